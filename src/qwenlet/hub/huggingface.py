"""A model from the Hugging Face hub, in the cache that transformers and others share.

Layout of that cache, as documented by huggingface_hub: models--OWNER--NAME/ holds refs/REVISION (a commit), snapshots/
COMMIT/FILE (links) and blobs/HASH (content, named by its SHA-256 or its git hash). Looking for a model that is already
there reads those folders and opens no socket; huggingface_hub itself is imported only to download.

We download the blobs ourselves, over huggingface_hub's sessions, because its current releases throw a partial file
away when the connection is lost: ours stays as blobs/HASH.incomplete and the next run continues it. A blob gets its
name only after its checksum was right. Not covered: Xet transfers (they don't resume), files above 50 GB.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlet import __version__
from qwenlet.config import read_json
from qwenlet.errors import HubError, OfflineError, QwenletError
from qwenlet.hub.downloads import Progress, git_blob_sha1_of, require_space, sha256_of, storage_error
from qwenlet.hub.layout import choose_files, find_model
from qwenlet.hub.names import HubId, suggestion

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAIN = "main"


@dataclass(frozen=True)
class Fetched:
    """What `fetch` did: where the model is, its commit, and bytes of all its files and of those that travelled."""

    path: Path
    commit: str
    files: int
    bytes_total: int
    bytes_downloaded: int


def cache_folder(root: Path | None) -> Path:
    """The hub cache: under `root` or $QWENLET_CACHE where one is given, else the one that all tools share."""
    if root is None and (override := os.environ.get("QWENLET_CACHE")):
        root = Path(override).expanduser()
    if root is not None:
        return root / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


# ------------------------------------------------------------------------------------------------ what is here


def find(hub_id: HubId, cache: Path) -> tuple[Path | None, list[str]]:
    """The complete local snapshot of the asked revision, and what is missing if there is none. Opens no socket."""
    commit = _local_commit(hub_id, cache)
    if commit is None:
        return None, ["everything: no file of this revision was ever fetched"]
    return find_model(_storage(hub_id.repo, cache) / "snapshots" / commit, hub_id.file)


def snapshots(cache: Path) -> Iterator[tuple[str, Path]]:
    """(owner/name@commit, snapshot folder) of every model repository in the cache."""
    for folder in sorted(cache.glob("models--*--*/snapshots/*")):
        owner, _, name = folder.parents[1].name.removeprefix("models--").partition("--")
        if folder.is_dir():
            yield f"{owner}/{name}@{folder.name[:12]}", folder


def _storage(repo: str, cache: Path) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _local_commit(hub_id: HubId, cache: Path) -> str | None:
    revision = hub_id.revision or _MAIN
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (_storage(hub_id.repo, cache) / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


# ------------------------------------------------------------------------------------------------ downloading


@dataclass(frozen=True)
class _RemoteFile:
    """A file of the repository. `digest` is its SHA-256 (64 digits) or git's SHA-1 (40 digits), and names its blob."""

    name: str
    size: int
    digest: str

    def digest_of(self, path: Path) -> str:
        return sha256_of(path) if len(self.digest) == 64 else git_blob_sha1_of(path)

    def is_at(self, path: Path, verify: bool) -> bool:
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        return not verify or self.digest_of(path) == self.digest


class _Reporting(io.BufferedWriter):
    """Appends to a file and reports its size after every write."""

    def __init__(self, path: Path, file: _RemoteFile, progress: Progress | None) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._file, self._progress = file, progress

    def write(self, data: ReadableBuffer, /) -> int:
        written = super().write(data)
        if self._progress:
            self._progress(self.tell(), self._file.size, self._file.name)
        return written


class _Repository:
    """One repository at one commit, and its place in the cache."""

    def __init__(self, hub_id: HubId, cache: Path, info: ModelInfo) -> None:
        if not info.sha or not _COMMIT.fullmatch(info.sha):
            raise HubError(f"the hub names commit {info.sha!r} for {hub_id}, expected 40 hexadecimal digits")
        self.hub_id, self.cache, self.commit = hub_id, cache, info.sha
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        chosen = choose_files(siblings, hub_id.repo, hub_id.file)
        self.files = [_remote_file(siblings[name], hub_id) for name in chosen]
        self.storage = _storage(hub_id.repo, cache)

    def blob(self, file: _RemoteFile) -> Path:
        return self.storage / "blobs" / file.digest

    def partial(self, file: _RemoteFile) -> Path:
        return self.storage / "blobs" / f"{file.digest}.incomplete"

    def pointer(self, file: _RemoteFile) -> Path:
        return self.storage / "snapshots" / self.commit / file.name

    def has(self, file: _RemoteFile, verify: bool) -> bool:
        # a cache without symbolic links has the file itself in the snapshot
        return file.is_at(self.blob(file), verify) or file.is_at(self.pointer(file), verify)

    def bytes_needed(self, file: _RemoteFile) -> int:
        partial = self.partial(file)
        return max(0, file.size - partial.stat().st_size) if partial.is_file() else file.size

    def download(self, file: _RemoteFile, progress: Progress | None, verify: bool) -> int:
        """Puts the verified blob in its place; returns the bytes that travelled."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

        partial = self.partial(file)
        # huggingface_hub's own lock for this blob, so that its downloads and ours exclude each other
        lock = self.cache / ".locks" / self.storage.name / f"{file.digest}.lock"
        for folder in (lock.parent, partial.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if self.has(file, verify):
                return 0  # another process was faster
            if partial.is_file() and partial.stat().st_size > file.size:
                partial.unlink()
            with _Reporting(partial, file, progress) as output:
                start = output.tell()
                http_get(
                    hf_hub_url(self.hub_id.repo, file.name, revision=self.commit),
                    output,
                    resume_size=start,
                    # compressed transfers can't be resumed
                    headers=build_hf_headers(library_name="qwenlet", library_version=__version__)
                    | {"Accept-Encoding": "identity"},
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            seen = file.digest_of(partial)
            if seen != file.digest:
                partial.unlink()
                raise HubError(
                    f"{file.name} of {self.hub_id} arrived damaged: checksum {seen}, expected {file.digest}",
                    hint="the file was deleted; run the same command again to fetch it anew",
                )
            partial.replace(self.blob(file))
        return file.size - start

    def link(self, file: _RemoteFile) -> None:
        """Lets huggingface_hub make the snapshot's link to the blob, which it does in its own way on each system."""
        from huggingface_hub import hf_hub_download

        blob, pointer = self.blob(file), self.pointer(file)
        if blob.is_file() and pointer.is_file() and not pointer.samefile(blob):
            pointer.unlink()  # an older copy, or a damaged one
        linked = Path(hf_hub_download(self.hub_id.repo, file.name, revision=self.commit, cache_dir=self.cache))
        if blob.is_file() and not linked.samefile(blob) and file.digest_of(linked) != file.digest:
            raise HubError(f"{linked} does not have the checksum {file.digest} that the hub lists for {file.name}")

    def write_ref(self) -> None:
        revision = self.hub_id.revision or _MAIN
        if revision == self.commit:
            return
        ref = self.storage / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        temporary.write_text(self.commit, encoding="utf-8")
        temporary.replace(ref)


def fetch(hub_id: HubId, cache: Path, progress: Progress | None = None, verify: bool = False) -> Fetched:
    """Brings the newest commit of the asked revision here, fetching only what is missing.

    Args:
        verify: compare the checksums of files that are already here too, and fetch damaged ones anew.

    Raises:
        DiskSpaceError, HubError
    """
    with _explained(hub_id, cache):
        from huggingface_hub import HfApi

        api = HfApi(library_name="qwenlet", library_version=__version__)
        info = api.model_info(hub_id.repo, revision=hub_id.revision or _MAIN, files_metadata=True)
        repository = _Repository(hub_id, cache, info)
        absent = [file for file in repository.files if not repository.has(file, verify)]
        require_space(cache, sum(repository.bytes_needed(file) for file in absent), str(hub_id))
        downloaded = 0
        with _quiet():
            for file in repository.files:
                if file in absent:
                    downloaded += repository.download(file, progress, verify)
                repository.link(file)
        repository.write_ref()
    path, missing = find_model(repository.storage / "snapshots" / repository.commit, hub_id.file)
    if path is None:
        raise HubError(f"{hub_id} is incomplete on the hub itself: missing {', '.join(missing)}")
    return Fetched(path, repository.commit, len(repository.files), sum(f.size for f in repository.files), downloaded)


def fetch_config(hub_id: HubId) -> dict[str, Any]:
    """config.json of the asked revision, kept nowhere: what planning needs before a model is downloaded."""
    folder = Path(tempfile.gettempdir())
    with _explained(hub_id, folder), _quiet(), tempfile.TemporaryDirectory() as temporary:
        from huggingface_hub import errors, hf_hub_download

        try:
            path = hf_hub_download(
                hub_id.repo, "config.json", revision=hub_id.revision or _MAIN, cache_dir=temporary,
                library_name="qwenlet", library_version=__version__,
            )  # fmt: skip
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            raise HubError(
                f"{hub_id.repo} has no config.json", hint=f"if it holds GGUF files, run: qwenlet pull {hub_id.repo}"
            ) from None
        return read_json(path)


def _remote_file(sibling: RepoSibling, hub_id: HubId) -> _RemoteFile:
    lfs = sibling.lfs
    size, digest = (lfs.size, lfs.sha256) if lfs else (sibling.size, sibling.blob_id)
    if size is None or digest is None or not _HASH.fullmatch(digest):
        raise HubError(
            f"the hub lists no size and checksum for {sibling.rfilename} of {hub_id} (size {size!r}, hash {digest!r})",
            hint="if HF_ENDPOINT names a mirror, try another one, or the hub itself",
        )
    return _RemoteFile(sibling.rfilename, size, digest)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of huggingface_hub beside our own, unless the user's environment decides about them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _explained(hub_id: HubId, cache: Path) -> Iterator[None]:
    """Turns the errors of huggingface_hub, of its HTTP library and of the disk into ours."""
    from huggingface_hub import errors

    # the HTTP library differs between releases of huggingface_hub; its errors' base class does not need its name
    transport: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, OSError)
    try:
        yield
    except QwenletError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise OfflineError(
            f"{hub_id} is not complete on this machine and huggingface_hub is in offline mode",
            hint=f"unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, then run: qwenlet pull {hub_id}",
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"the hub does not accept the name {hub_id}: {error}") from error
    except transport as error:
        raise _explain(error, hub_id, cache) from error


def _explain(error: Exception, hub_id: HubId, cache: Path) -> HubError:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return HubError(
            f"{hub_id.repo} is gated: the hub gives it only to accounts that accepted its terms (HTTP {status})",
            hint=f"accept them at https://huggingface.co/{hub_id.repo}, then run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{hub_id.repo} has no revision {hub_id.revision or _MAIN!r}", hint="give a branch, a tag or a commit"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        near = suggestion(hub_id.repo)
        return HubError(
            f"the hub has no model {hub_id.repo}, or it is private (HTTP {status})",
            hint=f"did you mean {near!r}?" if near else "check the spelling; for a private model run: hf auth login",
        )
    if status is not None:
        return HubError(
            f"the hub answered HTTP {status} for {hub_id}",
            hint="try again later; what was fetched so far is kept and the same command resumes",
        )
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError))
    ):
        return storage_error(error, cache, str(hub_id))
    return HubError(
        f"no connection to the hub, or it was lost while fetching {hub_id}: {type(error).__name__}: {error}",
        hint="check the network; partial files are kept, and the same command resumes",
    )
