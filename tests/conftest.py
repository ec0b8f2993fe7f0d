"""Real servers for the tests: each is started when it is first asked for, once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rksc_sgl.cli.serve import server_arguments
from rksc_sgl.model_fetch import DEFAULT_MODEL, fetch
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.testing import write_tiny_model

TINY = ("--max-total-tokens", "20000", "--chunked-prefill-size", "64", "--max-running-requests", "32")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path) -> Iterator[ServerProcess]:
    """A random two-layer Llama whose prompts are prefilled in chunks of 64."""
    with ServerProcess(server_arguments(["--model-path", str(tiny_model), *TINY])) as server:
        yield server


@pytest.fixture(scope="module")
def bare_tiny_server(tiny_model: Path) -> Iterator[ServerProcess]:
    """The same model on SGLang's default tree and without our hooks."""
    from benchmarks.overhead import BareServer

    with BareServer(["--model-path", str(tiny_model), *TINY]) as server:
        assert not any(server.get_json("/rksc/info")["schedulers"]), "the baseline has our hooks"
        yield server


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    return fetch(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm_server(embedded_model: Path) -> Iterator[ServerProcess]:
    """The embedded model, for what needs meaning."""
    arguments = server_arguments(["--model-path", DEFAULT_MODEL, "--max-total-tokens", "40000"])
    with ServerProcess(arguments) as server:
        yield server


@pytest.fixture(scope="session")
def smollm(smollm_server: ServerProcess):
    from rksc_sgl import Endpoint

    return Endpoint(smollm_server.url)


@pytest.fixture(scope="session")
def tiny(tiny_server: ServerProcess):
    from rksc_sgl import Endpoint

    return Endpoint(tiny_server.url)
