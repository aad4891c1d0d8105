"""A request's fields, each with what becomes of it: honoured, accepted without effect, or refused by name.

A request is a msgspec struct that forbids unknown fields. What a field does stands in its annotation, from which the
docs, the OpenAPI document and the header `x-qwenlet-ignored` are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from qwenlet.config import SamplingParams
from qwenlet.server.errors import ApiError, refused

Effect = Literal["honoured", "ignored", "refused"]


def ignored(why: str) -> Meta:
    return Meta(description=f"Accepted without effect: {why}.", extra={"effect": "ignored", "why": why})


def unsupported(why: str) -> Meta:
    return Meta(description=f"Refused: {why}.", extra={"effect": "refused", "why": why})


def effects(request: type[Struct]) -> Iterator[tuple[str, Effect, str]]:
    """(name, effect, words) of each field."""
    hints = get_type_hints(request, include_extras=True)
    for field in msgspec.structs.fields(request):
        meta = _meta(hints[field.name])
        extra = (meta.extra if meta is not None else None) or {}
        words = extra.get("why") or (meta.description if meta is not None else None) or ""
        yield field.encode_name, extra.get("effect", "honoured"), words


def _meta(hint: Any) -> Meta | None:
    found = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Meta)), None)
    return found or next((meta for part in get_args(hint) if (meta := _meta(part)) is not None), None)


def check_effects(body: Struct) -> list[str]:
    """Names of the given fields that have no effect. Raises ApiError for one that is refused; null is not given."""
    without = []
    for name, effect, why in effects(type(body)):
        if effect == "honoured" or getattr(body, name) in (UNSET, None):
            continue
        if effect == "refused":
            raise refused(name, f"is not supported: {why}")
        without.append(name)
    return without


Anything = Any | UnsetType
Count = Annotated[int, Meta(ge=1)]


class SamplingFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions share."""

    model: Annotated[str | None, Meta(description="Left out: the model that is loaded.")] = None
    temperature: Annotated[float, Meta(ge=0, le=100, description="0 is greedy.")] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, description="0 and -1 keep all.")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="The same seed gives the same reply.")] | None = (
        None
    )
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Meta(ge=0)]] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-100, le=100, description="Lower goes first.")] | None = None
    return_progress: Annotated[bool | None, Meta(description="Chunks that say how much of the prompt is done.")] = None
    user: Annotated[Anything, ignored("clients are told apart by their keys")] = UNSET
    logit_bias: Annotated[Anything, unsupported("biases of single tokens are not built yet")] = UNSET
    echo: Annotated[Anything, unsupported("the prompt is not given back yet")] = UNSET
    min_tokens: Annotated[Anything, unsupported("a least length is not built yet")] = UNSET
    prompt_logprobs: Annotated[Anything, unsupported("log-probabilities are of the reply alone")] = UNSET


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Anything, ignored("chunks are as long as their text")] = UNSET


def stop_texts(body: SamplingFields) -> tuple[str, ...]:
    stop = body.stop
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in texts:
        raise ApiError(400, "stop holds an empty text, which would end every reply", param="stop")
    return texts


def sampling(body: SamplingFields, **more: Any) -> SamplingParams:
    """The body's sampling parameters. `more` are fields that families name differently."""
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=None if body.seed is None else body.seed % 2**64,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        n=body.n or 1,
        **({"stop": stop_texts(body)} | more),
    )
