"""Where a browser says that a call comes from: a script of another site can reach whatever this machine can."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qwenlet.server.errors import ApiError


def check(headers: Mapping[bytes, bytes], what: str, allowed: Collection[str] = ()) -> None:
    """Programs that are no browser say nothing of the kind, and pass.

    Args:
        what: what was asked for belongs to whom, for the message.
        allowed: origins that may ask, too; "*" is any.
    Raises:
        ApiError 403: a page of another origin asks.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        own = site in (b"same-origin", b"none")
    else:  # an old browser, or an address that is not safe: those send an Origin alone
        own = origin is None or origin.partition(b"://")[2] == headers.get(b"host")
    shown = (origin or b"another site").decode("latin-1")
    if not own and "*" not in allowed and shown not in allowed:
        raise ApiError(403, f"{what}, and {shown!r:.100} asked", "permission_error", code="origin_not_allowed")
