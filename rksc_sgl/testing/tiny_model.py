"""A random model of a few layers in Hugging Face's format, with a tokenizer of its own; no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rksc_sgl.errors import OptionError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "granite")  # SGLang has no split prefill of the last
VOCABULARY = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL)  # every byte has a token
SMALLEST_HEAD = 16  # attention kernels take no smaller heads
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "A farmer has 12 cows and sells 5 of them on Monday. How many cows are left? The answer is 7.",
    "Is the answer above correct? Reply with YES or NO.",
    "You are a careful assistant. Think step by step, then give the final answer as a number.",
    "The quick brown fox jumps over the lazy dog while 3 hens and 4 geese watch from the fence.",
)


def write_tiny_model(path: Path, architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a model directory; the same arguments give the same files.

    The random state of the caller is left as it was.

    Args:
        path: made if it is not there.
        architecture: one of :data:`ARCHITECTURES`.
        seed: of the weights.
        overrides: hyperparameters in the words of the architecture's Hugging Face configuration.

    Returns:
        ``path``.

    Raises:
        OptionError: an architecture that we do not make, a vocabulary without every byte, or heads too small.
    """
    if architecture not in ARCHITECTURES:
        raise OptionError(f"architecture: must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    import torch
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "granite": "Granite"}
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if architecture == "gemma2":
        shape |= {"query_pre_attn_scalar": 16, "sliding_window": 64, "hidden_act": "gelu_pytorch_tanh"}
    shape |= overrides
    _at_least("vocab_size", shape["vocab_size"], SMALLEST_VOCABULARY)
    _at_least("head_dim", shape["head_dim"], SMALLEST_HEAD)
    config = getattr(transformers, f"{names[architecture]}Config")(**shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{names[architecture]}ForCausalLM")(config).float().eval()
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    _write_tokenizer(path, shape["vocab_size"], shape["max_position_embeddings"])
    return path


def _at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise OptionError(f"{name}: must be at least {smallest}, got {value}")


def _write_tokenizer(path: Path, vocabulary: int, positions: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": _CHATML,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
