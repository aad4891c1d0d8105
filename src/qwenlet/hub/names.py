"""What a model's name means. Nothing here touches the network or imports a hub's library."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from qwenlet.errors import HubError

DEMO = "demo"

# what people mean when they mistype: first-generation Qwen on the hub
QWEN_REPOS = tuple(
    f"Qwen/Qwen-{size}{kind}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8")
)

_SEGMENT = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9][\w./+-]*"
_HUB_ID = re.compile(
    rf"(?P<repo>{_SEGMENT}/{_SEGMENT})(?:@(?P<revision>{_REVISION}))?(?::(?P<file>[\w.+-][^:@\s\\]*\.gguf))?",
    re.ASCII,
)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".json", ".pt", ".zip", ".whl")


@dataclass(frozen=True)
class HubId:
    """`owner/name[@revision][:file.gguf]`. A revision is a branch, a tag or a commit; None is the main branch."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}:{self.file}" if self.file else f"{self.repo}{revision}"


def parse_hub_id(name: str) -> HubId | None:
    """None if `name` is not of the form `owner/name[@revision][:file.gguf]`."""
    match = _HUB_ID.fullmatch(name)
    if match is None or "--" in match["repo"] or ".." in name:
        return None
    return HubId(match["repo"], match["revision"], match["file"])


def pinned(hub_id: HubId, revision: str) -> HubId:
    """The same repository at `revision`."""
    if not re.fullmatch(_REVISION, revision, re.ASCII) or ".." in revision:
        raise HubError(f"{revision!r} is not a revision: expected a branch, a tag or a commit")
    if hub_id.revision not in (None, revision):
        raise HubError(
            f"{hub_id} names revision {hub_id.revision!r}, but {revision!r} was asked for too", hint="give one"
        )
    return replace(hub_id, revision=revision)


def looks_like_path(name: str) -> bool:
    repo = re.split("[@:]", name, maxsplit=1)[0]
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or _DRIVE.match(name) is not None
        or repo.count("/") > 1
        or repo.lower().endswith(_FILE_SUFFIXES)
    )


def local_path(name: str) -> Path | None:
    """The existing file or folder that `name` is, `~` expanded."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None  # too long, a NUL in it, a user without a home: no such file


def suggestion(name: str) -> str | None:
    """The known name that `name` is closest to, owner or not."""
    known = {DEMO: DEMO} | {repo.lower(): repo for repo in QWEN_REPOS}
    known |= {repo.partition("/")[2].lower(): repo for repo in QWEN_REPOS}
    near = difflib.get_close_matches(name.strip().lower(), known, 1, cutoff=0.75)
    return known[near[0]] if near and known[near[0]] != name else None


def missing_path(name: str) -> HubError:
    return HubError(
        f"{name!r} looks like a path, but there is no such file or folder (looked from {Path.cwd()})",
        hint="check the spelling, or give a hub id such as Qwen/Qwen-1_8B-Chat",
    )


def unknown_name(name: str) -> HubError:
    near = suggestion(name)
    return HubError(
        f"{name!r} is not a model we can find: it is no local file or folder, not 'demo', and not a hub id "
        "of the form owner/name[@revision][:file.gguf]",
        hint=f"did you mean {near!r}?" if near else "try 'demo' (a small English model) or Qwen/Qwen-1_8B-Chat",
    )
