"""What every download shares: where files go, whether the network may be used, room on the disk, checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qwenlet.errors import DiskSpaceError, HubError

# called with (bytes so far, bytes in all, what is being fetched)
Progress = Callable[[int, int, str], None]

_TRUE = ("1", "true", "yes", "on")


def cache_dir() -> Path:
    """Where qwenlet keeps what it fetched: $QWENLET_CACHE, else the user's cache folder."""
    if folder := os.environ.get("QWENLET_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("qwenlet", appauthor=False)


def is_offline(flag: bool | None = None) -> bool:
    """True if going online is forbidden: by `flag`, or where it is None by QWENLET_OFFLINE or HF_HUB_OFFLINE."""
    if flag is not None:
        return flag
    return any(os.environ.get(name, "").strip().lower() in _TRUE for name in ("QWENLET_OFFLINE", "HF_HUB_OFFLINE"))


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises DiskSpaceError unless the filesystem of `folder` (which need not exist yet) has `needed` bytes free."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskSpaceError(
            f"{what} needs {needed:,} more bytes, but {folder} has {free:,} free",
            hint="free some space there, or set QWENLET_CACHE to a folder on a larger disk",
        )


def storage_error(error: OSError, folder: Path, what: str) -> HubError:
    """What to tell the user when writing `what` to `folder` failed."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return DiskSpaceError(
            f"the disk is full while writing {what} to {folder}: {error}",
            hint="free some space there, or set QWENLET_CACHE to a folder on a larger disk; then run it again",
        )
    return HubError(
        f"{what} can't be stored in {folder}: {error}", hint="set QWENLET_CACHE to a folder you may write to"
    )


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_sha1_of(path: Path) -> str:
    """The name git gives the file's content, which is how a hub identifies its small files."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
