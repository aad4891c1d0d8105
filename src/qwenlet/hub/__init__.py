"""A name -> files on this machine.

    a path              an existing folder or file is taken as it is
    demo                a small real chat model that comes out of a Python package (demo.py)
    owner/name          a model of the Hugging Face hub (huggingface.py), or of ModelScope (modelscope.py);
                        owner/name@revision pins a branch, tag or commit, owner/name:file.gguf names one file

`resolve` goes online only for what is not here: a complete local snapshot of the asked revision is used as it is, so
that starting is quick and works on a plane. `pull` asks the hub for the newest commit and compares every checksum.
Offline (a flag, QWENLET_OFFLINE or HF_HUB_OFFLINE) no socket is opened and no other program started.

Code of a repository (*.py) is never downloaded; where a local folder has some, it is never run.
`demo` always means the demo model: a folder of that name is reached as ./demo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwenlet.config import MODEL_TYPES
from qwenlet.errors import HubError, OfflineError
from qwenlet.hub import demo
from qwenlet.hub.downloads import Progress, cache_dir, is_offline
from qwenlet.hub.names import DEMO, HubId, local_path, looks_like_path, missing_path, parse_hub_id, pinned, unknown_name

__all__ = [
    "LocalModel",
    "Progress",
    "Pulled",
    "cache_dir",
    "is_offline",
    "local_models",
    "published_config",
    "pull",
    "resolve",
]

Source = Literal["huggingface", "modelscope"]


@dataclass(frozen=True)
class Pulled:
    """What `pull` did.

    Attributes:
        path: the model: a folder or a .gguf file.
        revision: commit on the hub, or release of the package; None where the source has no such thing.
        files: how many files make the model.
        bytes_total: bytes of those files.
        bytes_downloaded: bytes that travelled, less than the total where files were here or partly here.
    """

    path: Path
    revision: str | None
    files: int
    bytes_total: int
    bytes_downloaded: int


@dataclass(frozen=True)
class LocalModel:
    """A model found on this machine. `missing` names the files that an interrupted download has left out."""

    name: str
    path: Path
    size: int
    missing: tuple[str, ...] = ()


def resolve(
    name: str,
    *,
    offline: bool | None = None,
    revision: str | None = None,
    source: Source = "huggingface",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder or .gguf file that `name` stands for, fetched first if it is not here.

    Args:
        offline: True forbids the network, False allows it, None leaves it to QWENLET_OFFLINE and HF_HUB_OFFLINE.
        revision: branch, tag or commit of a hub id; the same as writing owner/name@revision.
        source: where hub ids are looked up.
        cache_dir: keeps everything under this folder; None: $QWENLET_CACHE, else qwenlet's and the hub's usual caches.
        progress: called with (bytes so far, bytes in all, what) while downloading.

    Raises:
        OfflineError: not here, and going online is forbidden.
        DiskSpaceError: it would not fit.
        MissingExtraError: ModelScope was asked for and is not installed.
        HubError: anything else that keeps the name from becoming files.
    """
    offline = is_offline(offline)
    target = _target(name, revision)
    if isinstance(target, Path):
        return target
    if target is None:
        return demo.resolve(_root(cache_dir), offline, progress)
    if _known(source) == "modelscope":
        from qwenlet.hub import modelscope

        return modelscope.resolve(target, cache_dir, offline)
    from qwenlet.hub import huggingface

    cache = huggingface.cache_folder(cache_dir)
    found, missing = huggingface.find(target, cache)
    if found is not None:
        return found
    if offline:
        raise OfflineError(
            f"{target} is not complete in {cache} and going online is forbidden; missing: {', '.join(missing)}",
            hint=f"while online, run: qwenlet pull {target}",
        )
    return huggingface.fetch(target, cache, progress).path


def pull(
    name: str,
    *,
    offline: bool | None = None,
    revision: str | None = None,
    source: Source = "huggingface",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Brings the newest commit of `name` here and compares the checksum of every file. Arguments as for `resolve`."""
    target = _target(name, revision)
    if isinstance(target, Path):
        size, files = _size_of(target)
        return Pulled(target, None, files, size, 0)
    if is_offline(offline):
        raise OfflineError(
            f"pulling {target or DEMO} needs the network, and going online is forbidden",
            hint="drop --offline, unset QWENLET_OFFLINE and HF_HUB_OFFLINE; a model that is here runs without a pull",
        )
    if target is None:
        path, downloaded = demo.refresh(_root(cache_dir), progress)
        return Pulled(path, demo.FILE.requirement, 1, demo.FILE.size, downloaded)
    if _known(source) == "modelscope":
        from qwenlet.hub import modelscope

        before = modelscope.find(target, cache_dir)
        path = modelscope.resolve(target, cache_dir, offline=False, refresh=True)
        size, files = _size_of(path)
        return Pulled(path, target.revision, files, size, size if before is None else 0)
    from qwenlet.hub import huggingface

    done = huggingface.fetch(target, huggingface.cache_folder(cache_dir), progress, verify=True)
    return Pulled(done.path, done.commit, done.files, done.bytes_total, done.bytes_downloaded)


def published_config(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """config.json of a model that is not here, fetched from the Hugging Face hub and kept nowhere.

    Raises:
        HubError: `name` is no hub id, or the hub doesn't give it.
    """
    target = _target(name, revision)
    if not isinstance(target, HubId) or target.file is not None:
        raise HubError(f"{name} is not on this machine", hint=f"fetch it first: qwenlet pull {name}")
    from qwenlet.hub import huggingface

    return huggingface.fetch_config(target)


def local_models(cache_dir: Path | None = None) -> list[LocalModel]:
    """The models on this machine that qwenlet could run: the demo, and the hub cache's snapshots. Opens no socket."""
    from qwenlet.hub import huggingface

    found = demo.find(_root(cache_dir))
    models = [LocalModel(DEMO, found, found.stat().st_size)] if found else []
    return models + list(_hub_models(huggingface.cache_folder(cache_dir)))


def _hub_models(cache: Path) -> Iterator[LocalModel]:
    from qwenlet.hub import huggingface
    from qwenlet.hub.layout import find_model

    for name, folder in huggingface.snapshots(cache):
        ggufs = [path for path in folder.glob("**/*.gguf") if path.is_file()]
        for path in ggufs:
            yield LocalModel(f"{name}:{path.relative_to(folder).as_posix()}", path, path.stat().st_size)
        if _model_type(folder) in MODEL_TYPES:
            yield LocalModel(name, folder, _size_of(folder)[0], tuple(find_model(folder)[1]))


def _model_type(folder: Path) -> object:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # other tools keep all sorts of repositories in this cache
    return config.get("model_type") if isinstance(config, dict) else None


def _target(name: str, revision: str | None) -> Path | HubId | None:
    """A local path, a hub id, or None for the demo model."""
    if name == DEMO or (path := local_path(name)) is not None:
        if revision is not None:
            raise HubError(f"revision {revision!r} was given, but {name!r} is not a hub id", hint="drop the revision")
        return None if name == DEMO else path
    if looks_like_path(name):
        raise missing_path(name)
    hub_id = parse_hub_id(name)
    if hub_id is None:
        raise unknown_name(name)
    return hub_id if revision is None else pinned(hub_id, revision)


def _known(source: str) -> str:
    if source not in ("huggingface", "modelscope"):
        raise HubError(f"source is {source!r}, expected 'huggingface' or 'modelscope'")
    return source


def _root(folder: Path | None) -> Path:
    return cache_dir() if folder is None else folder


def _size_of(path: Path) -> tuple[int, int]:
    """Bytes and number of files."""
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return sum(file.stat().st_size for file in files), len(files)
