"""A model from ModelScope, the second hub (extra `modelscope`).

The package modelscope does the work: its cache, its resume, its checksums. We choose the files, look at the disk first
and check that the result is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenlet.errors import HubError, MissingExtraError, OfflineError, QwenletError
from qwenlet.hub.downloads import require_space
from qwenlet.hub.layout import choose_files, find_model
from qwenlet.hub.names import HubId


def find(hub_id: HubId, cache: Path | None) -> Path | None:
    """The complete local copy, if there is one. ModelScope's cache does not tell revisions apart."""
    _, snapshot_download = _library()
    try:
        folder = snapshot_download(hub_id.repo, local_files_only=True, **_options(hub_id, cache))
    except Exception:  # the library raises ValueError or its own classes, by release, for "not in the cache"
        return None
    return find_model(Path(folder), hub_id.file)[0]


def resolve(hub_id: HubId, cache: Path | None, offline: bool, refresh: bool = False) -> Path:
    """Raises MissingExtraError, OfflineError, DiskSpaceError, HubError."""
    local = find(hub_id, cache)
    if offline and local is None:
        raise OfflineError(
            f"{hub_id} is not complete in ModelScope's cache and going online is forbidden",
            hint=f"while online, run: qwenlet pull {hub_id} --source modelscope",
        )
    # a copy of an unknown revision does not answer a request for a certain one
    if local is not None and (offline or not (refresh or hub_id.revision)):
        return local
    return _fetch(hub_id, cache)


def _fetch(hub_id: HubId, cache: Path | None) -> Path:
    hub_api, snapshot_download = _library()
    options = _options(hub_id, cache)
    revision = {"revision": hub_id.revision} if hub_id.revision else {}
    try:
        listing = hub_api().get_model_files(hub_id.repo, recursive=True, **revision)
        sizes = {entry["Path"]: int(entry.get("Size") or 0) for entry in listing if entry.get("Type") != "tree"}
        chosen = choose_files(sizes, hub_id.repo, hub_id.file)
        present = find(hub_id, cache) is not None
        require_space(cache or Path.home(), 0 if present else sum(sizes[name] for name in chosen), str(hub_id))
        folder = Path(snapshot_download(hub_id.repo, allow_patterns=chosen, **options))
    except QwenletError:
        raise
    except Exception as error:  # its classes differ between releases; the message is the library's own
        raise HubError(
            f"ModelScope could not give {hub_id}: {type(error).__name__}: {error}",
            hint="check the name and the network, then run the same command again",
        ) from error
    path, missing = find_model(folder, hub_id.file)
    if path is None:
        raise HubError(f"{hub_id} came from ModelScope without {', '.join(missing)}")
    return path


def _options(hub_id: HubId, cache: Path | None) -> dict[str, Any]:
    options: dict[str, Any] = {"cache_dir": str(cache)} if cache else {}
    return options | ({"revision": hub_id.revision} if hub_id.revision else {})


def _library() -> tuple[Callable[[], Any], Callable[..., str]]:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise MissingExtraError("modelscope", "modelscope", "fetching from ModelScope") from error
    return HubApi, snapshot_download
