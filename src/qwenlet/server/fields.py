"""A request's fields, each with what becomes of it: honoured, accepted without effect, or refused by name.

A request is a msgspec struct that forbids unknown fields. What a field does stands in its annotation, from which the
docs, the OpenAPI document and the header `x-qwenlet-ignored` are made.
"""

from __future__ import annotations

import re
from functools import lru_cache
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


def only(value: object, why: str) -> Meta:
    """A field that has one value here: that one is honoured, others are refused."""
    return Meta(description=f"Only {value!r}: {why}.", extra={"effect": "honoured", "why": why, "only": value})


@lru_cache(maxsize=64)
def effects(request: type[Struct]) -> tuple[tuple[str, Effect, str, Meta | None], ...]:
    """(name, effect, words, annotation) of each field."""
    found: list[tuple[str, Effect, str, Meta | None]] = []
    hints = get_type_hints(request, include_extras=True)
    for field in msgspec.structs.fields(request):
        meta = _meta(hints[field.name])
        extra = (meta.extra if meta is not None else None) or {}
        words = extra.get("why") or (meta.description if meta is not None else None) or ""
        found.append((field.encode_name, extra.get("effect", "honoured"), words, meta))
    return tuple(found)


def _meta(hint: Any) -> Meta | None:
    found = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Meta)), None)
    return found or next((meta for part in get_args(hint) if (meta := _meta(part)) is not None), None)


def check_effects(body: Struct) -> list[str]:
    """Names of the given fields that have no effect, those of nested objects as `messages[].name`.

    Raises ApiError for one that is refused; null is not given.
    """
    without: dict[str, None] = {}
    _check(body, "", "", without)
    return list(without)


def _check(value: Any, place: str, kind: str, without: dict[str, None]) -> None:
    """`place` says where `value` stands, `kind` the same without numbers."""
    if isinstance(value, list):
        if value and isinstance(value[0], (Struct, list)):
            for number, item in enumerate(value):
                _check(item, f"{place}[{number}]", f"{kind}[]", without)
        return
    if not isinstance(value, Struct):
        return
    dot = "." if place else ""
    for name, effect, why, meta in effects(type(value)):
        given = getattr(value, name)
        if given is UNSET or given is None:
            continue
        here = f"{place}{dot}{name}"
        if effect == "refused":
            raise refused(here, f"is not supported: {why}")
        if effect == "ignored":
            without[f"{kind}{dot}{name}"] = None
        elif meta is not None and "only" in (meta.extra or {}) and given != (meta.extra or {})["only"]:
            raise refused(here, f"is {given!r:.80}, which is not supported: {why}")
        else:
            _check(given, here, f"{kind}{dot}{name}", without)


Anything = Any | UnsetType
Count = Annotated[int, Meta(ge=1)]
# each token of a reply is held against all of them
StopText = Annotated[str, Meta(max_length=1000)]
Stops = Annotated[list[StopText], Meta(max_length=256, description="At most 256 texts, of at most 1,000 characters.")]
# what several families are sent, and have no use for
Account = Annotated[Anything, ignored("clients are told apart by their keys")]
Tier = Annotated[Anything, ignored("there is one")]
CacheKey = Annotated[Anything, ignored("prompts that begin alike are found without")]
CacheRules = Annotated[Anything, ignored("the cache keeps what has room")]
Thinking = Annotated[Anything, ignored("the model does not think first")]
Verbosity = Annotated[Anything, ignored("the model was not taught it")]


class SchemaNotes(Struct, kw_only=True, forbid_unknown_fields=True):
    """What stands beside a JSON schema."""

    name: Annotated[str | None, ignored("the model is held to the schema, not told of it")] = None
    description: Annotated[str | None, ignored("the model is held to the schema, not told of it")] = None
    strict: Annotated[bool | None, ignored("a schema always holds")] = None


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
    stop: Stops | StopText | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1024, description="At most 1,024.")] | None
    ) = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: (
        Annotated[
            int, Meta(ge=0, le=100, description="Lower goes first; 0, as if left out: nobody goes before others.")
        ]
        | None
    ) = None
    return_progress: Annotated[bool | None, Meta(description="Chunks that say how much of the prompt is done.")] = None
    user: Account = UNSET
    logit_bias: (
        Annotated[dict[str, float], Meta(max_length=1024, description="By token id, -100 to 100; at most 1,024.")]
        | None
    ) = None
    min_tokens: Annotated[int, Meta(ge=0, description="No end token before.")] | None = None
    guided_json: Annotated[dict[str, Any] | str | None, Meta(description="vLLM's: a JSON schema.")] = None
    guided_regex: Annotated[str | None, Meta(description="vLLM's: a regular expression.")] = None
    guided_choice: Annotated[list[str] | None, Meta(description="vLLM's: the reply is one of these.")] = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: Annotated[bool | None, only(True, "control tokens are no text")] = None
    include_stop_str_in_output: Annotated[bool | None, only(False, "a reply ends before its stop text")] = None
    length_penalty: Annotated[Anything, ignored("it belongs to beam search")] = UNSET
    request_id: Annotated[Anything, ignored("the header x-request-id is the one")] = UNSET
    guided_grammar: Annotated[Anything, unsupported("grammars are JSON schemas and regular expressions")] = UNSET
    grammar: Annotated[Anything, unsupported("grammars are JSON schemas and regular expressions")] = UNSET
    prompt_logprobs: Annotated[Anything, unsupported("/v1/completions has echo with logprobs")] = UNSET
    return_token_ids: Annotated[bool | None, only(False, "replies are text; /tokenize has ids")] = None
    return_tokens_as_token_ids: Annotated[bool | None, only(False, "tokens are named by their text")] = None
    truncate_prompt_tokens: Annotated[Anything, unsupported("a prompt is never cut in silence")] = UNSET
    logprob_token_ids: Annotated[Anything, unsupported("the most likely alternatives are told")] = UNSET
    cache_salt: Annotated[Anything, unsupported("all clients share one prefix cache")] = UNSET


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's: what the reply is held to."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None
    grammar: Annotated[Anything, unsupported("grammars are JSON schemas and regular expressions")] = UNSET
    structural_tag: Annotated[Anything, unsupported("grammars are JSON schemas and regular expressions")] = UNSET


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


def _token(id: str) -> int:
    try:
        return int(id)
    except ValueError:
        raise ApiError(400, f"logit_bias has {id!r:.80}, expected token ids", param="logit_bias") from None


def held_to(body: SamplingFields, grammar: str | None = None) -> dict[str, Any]:
    """The grammar that vLLM's fields ask for, as SamplingParams names it.

    Args:
        grammar: another field that asks for one. Raises ApiError 400 where that makes two.
    """
    wanted = body.structured_outputs or StructuredOutputs()
    every: dict[str, tuple[str, Any]] = {
        "guided_json": ("json_schema", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_choice": ("choice", body.guided_choice),
        "structured_outputs.json": ("json_schema", wanted.json),
        "structured_outputs.regex": ("regex", wanted.regex),
        "structured_outputs.choice": ("choice", wanted.choice),
        "structured_outputs.json_object": ("json_object", wanted.json_object or None),
    }
    given = [(field, kind, value) for field, (kind, value) in every.items() if value is not None]
    if not given:
        return {}
    field, kind, value = given[0]
    other = given[1][0] if len(given) > 1 else grammar
    if other is not None:
        words = f"{field} and {other} both say what the reply is held to; give one of them"
        raise ApiError(400, words, param=field)
    if kind == "choice":
        if not value or "" in value:
            raise ApiError(400, f"{field} needs one or more texts that are not empty", param=field)
        kind, value = "regex", "|".join(map(re.escape, value))
    return {kind: value}


def name_unstreamed(body: SamplingFields, ignored: list[str], *more: str) -> None:
    """Puts fields among `ignored` that say how to stream a reply which is not streamed."""
    if not body.stream:
        ignored += [name for name in ("return_progress", *more) if getattr(body, name)]
        options = ("include_usage", "continuous_usage_stats")
        ignored += [f"stream_options.{name}" for name in options if getattr(body.stream_options, name, None)]


def sampling(body: SamplingFields, grammar: str | None = None, **more: Any) -> SamplingParams:
    """The body's sampling parameters. `more` are fields that families name differently; `grammar` is the field that put
    a grammar among them."""
    rest: dict[str, Any] = {"stop": stop_texts(body), "n": body.n or 1} | held_to(body, grammar) | more
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
        logit_bias=None if body.logit_bias is None else {_token(id): each for id, each in body.logit_bias.items()},
        min_new_tokens=body.min_tokens or 0,
        **rest,
    )
