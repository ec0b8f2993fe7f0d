"""GGUF to a Hugging Face model directory: SGLang cannot run GGUF on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rksc_sgl.errors import ModelFetchError

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_DIGITS_ALONE = {"smollm": True, "gpt-2": False}  # by the name that the GGUF gives its rule
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf_path: Path, target: Path, advance: Callable[[float], None] = lambda fraction: None) -> None:
    """Write ``config.json``, float32 safetensors and the tokenizer with its chat template into ``target``.

    float32, because the dequantized values are not exact in 16 bits.

    Args:
        gguf_path: a GGUF file of a ``llama`` model.
        target: an existing empty directory.
        advance: called with the fraction that is done.

    Raises:
        ModelFetchError: the file is of another architecture, has tensors or a tokenizer that we do not know,
            or the weights cannot be written.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_path)
    config = read_config(reader)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (target / "generation_config.json").write_text(json.dumps(special, indent=2))
    _write_weights(reader, config, target, advance)
    _write_tokenizer(reader, gguf_path, target)


def read_config(reader: Any) -> dict[str, Any]:
    """The model's hyperparameters in the words of Hugging Face's ``LlamaConfig``.

    Raises:
        ModelFetchError: not a ``llama`` model.
    """

    def value(key: str) -> Any:
        return _field(reader, key)

    architecture = value("general.architecture")
    if architecture != "llama":
        raise ModelFetchError(f"the GGUF file holds a {architecture!r} model; only 'llama' can be converted")
    heads = value("llama.attention.head_count")
    names = {tensor.name for tensor in reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.embedding_length") // heads,
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": round(float(value("llama.attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": float(value("llama.rope.freq_base")),
        "vocab_size": value("llama.vocab_size"),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
    }


def _field(reader: Any, key: str) -> Any:
    if key not in reader.fields:
        raise ModelFetchError(f"the GGUF file has no field {key!r}")
    return reader.fields[key].contents()


def hugging_face_name(gguf_name: str) -> str:
    """The name of a tensor in ``LlamaForCausalLM``.

    Raises:
        ModelFetchError: a tensor that a llama model does not have.
    """
    stem = gguf_name.removesuffix(".weight")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    raise ModelFetchError(f"the GGUF file has a tensor {gguf_name!r} that a llama model does not have")


def unpermute(weight: Any, heads: int) -> Any:
    """Undo the row order in which GGUF keeps the query and key projections of a llama model.

    GGUF interleaves the two halves of each head's rotary dimensions; Hugging Face keeps them apart.

    Args:
        weight: [heads * head_dim, hidden], rows as (head, pair, half).
        heads: number of query heads, or of key heads.

    Returns:
        The same rows as (head, half, pair).
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_weights(reader: Any, config: dict[str, Any], target: Path, advance: Callable[[float], None]) -> None:
    import gguf
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        name = hugging_face_name(tensor.name)
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        weights[name] = weight.contiguous()
        advance(done / len(reader.tensors))
    try:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise ModelFetchError(f"the converted weights could not be written: {error}") from error


def split_text(rule: str) -> Any:
    """How a tokenizer splits text before it merges bytes; transformers reads the rest of it from a GGUF, not this.

    With ``smollm`` every digit stands alone first. That also decides how the white space before a number is
    split: a blank line before ``1.`` is one token for the model, not two.

    Args:
        rule: the GGUF's ``tokenizer.ggml.pre``.

    Returns:
        A pre-tokenizer of the ``tokenizers`` package.

    Raises:
        ModelFetchError: a rule that we do not know.
    """
    from tokenizers import pre_tokenizers

    if rule not in _DIGITS_ALONE:
        raise ModelFetchError(f"the GGUF file splits text by {rule!r}; known are {', '.join(_DIGITS_ALONE)}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not _DIGITS_ALONE[rule]:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _write_tokenizer(reader: Any, gguf_path: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    if not tokenizer.chat_template:
        raise ModelFetchError(f"{gguf_path.name} has no chat template")
    tokenizer.backend_tokenizer.pre_tokenizer = split_text(_field(reader, "tokenizer.ggml.pre"))
    tokenizer.save_pretrained(target)
