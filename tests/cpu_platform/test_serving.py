"""SGLang's own features on the CPU platform, on real servers with a random two-layer model."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.testing import write_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.slow]

LONG = [3 + (7 * i) % 300 for i in range(200)]  # more than three chunks of 64


def generate(server: ServerProcess, ids: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        **more,
    }
    response = httpx.post(f"{server.url}/generate", json=body, timeout=120.0)
    response.raise_for_status()
    return response.json()


def transformers_greedy(path: Path, ids: list[int], tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sequence = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(tokens):
            following = model(sequence).logits[0, -1].argmax()
            sequence = torch.cat([sequence, following.view(1, 1)], dim=1)
    return sequence[0, len(ids) :].tolist()


def test_a_prompt_of_several_chunks_gives_the_tokens_of_transformers(
    tiny_server: ServerProcess, tiny_model: Path
) -> None:
    answer = generate(tiny_server, LONG, 12)
    assert answer["meta_info"]["prompt_tokens"] == len(LONG) > 3 * 64
    assert answer["output_ids"] == transformers_greedy(tiny_model, LONG, 12)


def test_the_tokens_after_a_weight_update_are_those_of_the_new_weights(
    tiny_server: ServerProcess, tiny_model: Path, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", seed=7)
    before = transformers_greedy(tiny_model, LONG, 12)
    after = transformers_greedy(other, LONG, 12)
    assert before != after
    try:
        update_weights(tiny_server, other)
        assert generate(tiny_server, LONG, 12)["output_ids"] == after
    finally:
        update_weights(tiny_server, tiny_model)
    assert generate(tiny_server, LONG, 12)["output_ids"] == before


def update_weights(server: ServerProcess, path: Path) -> None:
    body = {"model_path": str(path), "flush_cache": True}
    answer = httpx.post(f"{server.url}/update_weights_from_disk", json=body, timeout=120.0)
    assert answer.json()["success"], answer.text


def test_logprobs_are_those_of_transformers(tiny_server: ServerProcess, tiny_model: Path) -> None:
    answer = generate(tiny_server, LONG[:40], 1, return_logprob=True, top_logprobs_num=3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([LONG[:40]])).logits[0, -1].log_softmax(-1)
    top = answer["meta_info"]["output_top_logprobs"][0]
    assert [token for _, token, _ in top] == expected.topk(3).indices.tolist()
    assert [value for value, _, _ in top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def test_a_stream_grows_to_the_same_text(tiny_server: ServerProcess) -> None:
    whole = generate(tiny_server, LONG[:30], 20)["text"]
    body = {
        "input_ids": LONG[:30],
        "sampling_params": {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    texts = []
    with httpx.stream("POST", f"{tiny_server.url}/generate", json=body, timeout=60.0) as response:
        for line in response.iter_lines():
            if line.startswith("data:") and line != "data: [DONE]":
                texts.append(json.loads(line[5:])["text"])
    assert len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == whole


def test_an_aborted_request_frees_the_server(tiny_server: ServerProcess) -> None:
    body = {"input_ids": LONG[:30], "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{tiny_server.url}/generate", json=body, timeout=1.0)
    deadline = time.monotonic() + 30
    while httpx.post(f"{tiny_server.url}/flush_cache", timeout=30.0).status_code != 200:  # refused while one runs
        assert time.monotonic() < deadline, "the aborted request still runs"
        time.sleep(0.2)
    assert generate(tiny_server, LONG[:30], 4)["meta_info"]["completion_tokens"] == 4


def test_overlap_scheduling_is_on_and_our_platform_serves(tiny_server: ServerProcess) -> None:
    info = tiny_server.get_json("/server_info")
    assert info["disable_overlap_schedule"] is False
    ours = tiny_server.get_json("/rksc/info")
    assert ours["platform"].startswith("RkscCpuPlatform")
    assert ours["schedulers"][0]["attention_backend"] == "RkscCpuAttnBackend"
    assert ours["schedulers"][0]["decoder_layers"] == "lean, compiled"


@pytest.mark.parametrize(
    "flags",
    [("--tp", "2"), ("--page-size", "16"), ("--disable-overlap-schedule", "--attention-backend", "torch_native")],
    ids=["two ranks over gloo", "pages of 16", "no overlap and stock attention"],
)
def test_other_ways_to_serve_give_the_same_tokens(tiny_model: Path, flags: tuple[str, ...]) -> None:
    arguments = server_arguments(["--model-path", str(tiny_model), "--max-total-tokens", "20000", *flags])
    with ServerProcess(arguments) as server:
        assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(tiny_model, LONG, 12)
        again = generate(server, LONG, 12)
        assert again["meta_info"]["cached_tokens"] >= len(LONG) - 16
        assert again["output_ids"] == transformers_greedy(tiny_model, LONG, 12)


def test_without_the_compiled_operations_the_tokens_are_the_same(tiny_model: Path) -> None:
    arguments = server_arguments(["--model-path", str(tiny_model), "--max-total-tokens", "20000"])
    with ServerProcess(arguments, variables={"RKSC_NATIVE": "0"}) as server:
        assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(tiny_model, LONG, 12)
        assert server.get_json("/rksc/info")["schedulers"][0]["decoder_layers"] == "lean"


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2"])
def test_other_architectures_give_the_tokens_of_transformers(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / f"tiny-{architecture}", architecture)
    with ServerProcess(server_arguments(["--model-path", str(path), "--max-total-tokens", "20000"])) as server:
        assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(path, LONG, 12)
        layers = server.get_json("/rksc/info")["schedulers"][0]["decoder_layers"]
    unknown = "SGLang's own: Gemma2Model is not one of the known stacks"
    assert layers == (unknown if architecture == "gemma2" else "lean, compiled")


def in_16_bits(path: Path, dtype: torch.dtype) -> Path:
    """The same model with its weights rounded to a 16-bit type."""
    AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(path)
    return path


def test_a_bfloat16_checkpoint_stays_in_16_bits_and_gives_the_tokens_of_float32_arithmetic(tmp_path: Path) -> None:
    first, second, third = (
        in_16_bits(write_tiny_model(tmp_path / str(seed), "qwen2", seed=seed), dtype)
        for seed, dtype in ((0, torch.bfloat16), (1, torch.bfloat16), (2, torch.float32))
    )
    arguments = server_arguments(["--model-path", str(first), "--max-total-tokens", "20000"])
    with ServerProcess(arguments) as server:
        assert "9 of bfloat16 panels, multiplied in float32; 1 of bfloat16 rows" in server.log_tail(200)
        assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(first, LONG, 12)
        assert generate(server, LONG * 3, 4)["output_ids"] == transformers_greedy(first, LONG * 3, 4)
        for other in (second, third, first):
            update_weights(server, other)
            assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(other, LONG, 12)
        other_weights = AutoModelForCausalLM.from_pretrained(second, dtype=torch.bfloat16).state_dict()
        update_weights_from_tensors(server, list(other_weights.items()))
        assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(second, LONG, 12)


@pytest.mark.parametrize(("architecture", "dtype"), [("qwen2", torch.bfloat16), ("llama", torch.float16)])
def test_a_16_bit_checkpoint_that_is_split_over_two_ranks_gives_the_tokens_of_one(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tied = architecture == "llama"
    first, second = (
        in_16_bits(write_tiny_model(tmp_path / str(seed), architecture, seed=seed, tie_word_embeddings=tied), dtype)
        for seed in (0, 1)
    )
    assert transformers_greedy(first, LONG, 12) != transformers_greedy(second, LONG, 12)
    arguments = server_arguments(["--model-path", str(first), "--max-total-tokens", "20000", "--tp", "2"])
    with ServerProcess(arguments) as server:
        assert f"{str(dtype).removeprefix('torch.')} panels, multiplied in float32" in server.log_tail(200)
        assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(first, LONG, 12)
        update_weights(server, second)
        assert generate(server, LONG * 3, 4)["output_ids"] == transformers_greedy(second, LONG * 3, 4)


def update_weights_from_tensors(server: ServerProcess, named: list[tuple[str, torch.Tensor]]) -> None:
    from sglang.srt.utils import MultiprocessingSerializer

    torch.multiprocessing.set_sharing_strategy("file_system")
    body = {"serialized_named_tensors": [MultiprocessingSerializer.serialize(named, output_str=True)]}
    for route, content in (
        ("begin_weight_update", {}),
        ("update_weights_from_tensor", body),
        ("end_weight_update", {}),
    ):
        answer = httpx.post(f"{server.url}/{route}", json=content, timeout=120.0)
        assert answer.json()["success"], f"{route}: {answer.text}"


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_float16_head_that_is_the_embedding_is_held_once(architecture: str, tmp_path: Path) -> None:
    path = in_16_bits(write_tiny_model(tmp_path / "tied", architecture, tie_word_embeddings=True), torch.float16)
    arguments = server_arguments(["--model-path", str(path), "--max-total-tokens", "20000"])
    with ServerProcess(arguments) as server:
        assert "weights are float16 panels, multiplied in float32" in server.log_tail(200)
        assert generate(server, LONG, 12)["output_ids"] == transformers_greedy(path, LONG, 12)


def test_made_up_weights_have_the_checkpoints_type(tmp_path: Path) -> None:
    path = in_16_bits(write_tiny_model(tmp_path / "model"), torch.bfloat16)
    (path / "model.safetensors").unlink()
    arguments = server_arguments(["--model-path", str(path), "--max-total-tokens", "20000", "--load-format", "dummy"])
    with ServerProcess(arguments) as server:
        assert "9 of bfloat16 panels" in server.log_tail(200)
        assert len(generate(server, LONG, 12)["output_ids"]) == 12
        body = {"name": "model.layers.0.self_attn.o_proj.weight", "truncate_size": 4}
        rows = torch.tensor(httpx.post(f"{server.url}/get_weights_by_name", json=body, timeout=60.0).json()[0])
    assert torch.equal(rows, rows.bfloat16().float()), "they are stored in the checkpoint's type"
    assert bool((rows != 0).any()) and rows.unique().numel() > 4, "and they are made up, not left empty"


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "Once upon a time, there was a",
    "The three primary colours are",
    "In 1969, astronauts",
    "To make an omelette, first",
    "Newton's second law says that",
    "Q: What is 7 times 8?\nA:",
    "Dear Sir or Madam,",
    "The opposite of hot is",
    "A haiku about autumn:\n",
    "import numpy as np\n",
    "The largest planet in the solar system",
    "Shakespeare wrote",
    "Photosynthesis is the process",
    "She opened the door and",
    "1, 2, 4, 8, 16,",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "Les langues parlées en Suisse sont",
]


def test_the_embedded_model_continues_twenty_prompts_as_transformers_does(
    smollm_server: ServerProcess, embedded_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32).eval()
    differing = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        got = generate(smollm_server, ids, 20)["output_ids"]
        if got != expected[0, len(ids) :].tolist():
            differing.append(prompt)
    assert differing == []
