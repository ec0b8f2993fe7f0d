"""Real servers for the tests: each is started when it is first asked for, once a run.

Tests that share a server flush its cache, look at what its counters grew by, and name their forks as no other module
does. A test that needs a fresh server, or may end it, starts its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rksc_sgl.model_fetch import DEFAULT_MODEL, fetch
from rksc_sgl.server_arguments import server_arguments
from rksc_sgl.server_process import ServerProcess
from rksc_sgl.testing import write_tiny_model
from tests.six_layers import AUDIT_RATE, VARIANTS, Served, SixLayers, server_of

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
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> SixLayers:
    return SixLayers.make(tmp_path_factory.mktemp("six"))


@pytest.fixture(scope="session")
def served(six_layers: SixLayers) -> Iterator[Served]:
    """The six-layer model with all that may be switched on beside each other."""
    variables = {"XDG_CACHE_HOME": str(six_layers.cache()), "RKSC_TRACE": "1", "RKSC_AUDIT_RATE": str(AUDIT_RATE)}
    with server_of(six_layers.path, "--enable-metrics", variables=variables) as process:
        yield Served.of(process, six_layers.path)


@pytest.fixture(scope="session", params=VARIANTS, ids="".join)
def variant(request: pytest.FixtureRequest, six_layers: SixLayers) -> Iterator[Served]:
    """The six-layer model served in other ways; pytest runs the tests of one way after each other."""
    cache = six_layers.cache(2 if "--tp" in request.param else 1)
    with server_of(six_layers.path, *request.param, variables={"XDG_CACHE_HOME": str(cache)}) as process:
        yield Served.of(process, six_layers.path)


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
