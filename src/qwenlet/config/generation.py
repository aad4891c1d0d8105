"""How replies are drawn: what the checkpoint asks for by default, and what a caller asks for one request."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwenlet.config.fields import Fields
from qwenlet.errors import ConfigError, RequestError

# A checkpoint that names no reply length gets this one, cut to what the context has room for.
DEFAULT_NEW_TOKENS = 512

# What llguidance is told about every JSON schema: white space between the parts of JSON is bounded, or a model that
# loops on blanks never comes back.
JSON_GUIDANCE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's `generation_config.json` asks for. Defaults: greedy, no penalties."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stop_words_ids: tuple[tuple[int, ...], ...] = ()
    chat_format: Literal["chatml", "raw"] | None = None
    max_window_size: int = 6144

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "generation_config.json") -> GenerationDefaults:
        """Reads a parsed `generation_config.json`; fields of generation modes we don't have are left alone."""
        f = Fields(raw, source, "generation")
        words = f.raw.pop("stop_words_ids", None) or []
        if not isinstance(words, list) or any(not isinstance(w, list) for w in words):
            raise ConfigError(f"{source}: stop_words_ids is {words!r}, expected a list of lists of token ids")
        chat_format = f.take("chat_format", str, None)
        if chat_format not in (None, "chatml", "raw"):
            raise ConfigError(f"{source}: chat_format is {chat_format!r}, expected 'chatml' or 'raw'")
        sampling = {
            "temperature": f.take("temperature", float, 1.0),
            "top_p": f.take("top_p", float, 1.0),
            "top_k": f.take("top_k", int, 0),
            "min_p": f.take("min_p", float, 0.0),
            "repetition_penalty": f.take("repetition_penalty", float, 1.0),
            "max_new_tokens": f.take("max_new_tokens", int, None),
        }
        try:
            SamplingParams(**sampling)
        except RequestError as error:
            raise ConfigError(f"{source}: {error.message}") from None
        return cls(
            do_sample=f.take("do_sample", bool, False),
            eos_token_ids=f.take_ids("eos_token_id"),
            stop_words_ids=tuple(tuple(w) for w in words),
            chat_format=chat_format,
            max_window_size=f.take("max_window_size", int, 6144),
            **sampling,
        )

    @classmethod
    def from_json(cls, text: str, source: str) -> GenerationDefaults:
        """The same from JSON text. Raises ConfigError."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: its generation config is not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{source}: its generation config is {raw!r}, expected an object")
        return cls.from_dict(raw, source)

    def to_published(self) -> dict[str, Any]:
        """`generation_config.json` as the published checkpoints write it."""
        ends = list(self.eos_token_ids)
        return {
            "chat_format": self.chat_format or "raw",
            "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
            "pad_token_id": ends[0] if ends else None,
            "max_window_size": self.max_window_size,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop_words_ids": [list(words) for words in self.stop_words_ids],
        }


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False, whole: bool = False) -> None:
    kinds = numbers.Integral if whole else numbers.Real
    good = isinstance(value, kinds) and not isinstance(value, bool) and (whole or _fits_a_float(value))
    if not good or value > high or value < low or (open_low and value == low):
        kind = "a whole number" if whole else "a number"
        edge = f"above {low:g}" if open_low else f"at least {low:g}"
        top = "" if high == math.inf else f" and at most {high:g}"
        raise RequestError(f"{name} is {value!r}, expected {kind} {edge}{top}")


def _fits_a_float(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number may be larger than any float
        return False


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {value!r}, expected a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds half a surrogate pair at character {error.start}, which is no text") from None
    return value


def _schema_text(value: Any) -> str:
    """A JSON schema, given as a mapping or as JSON text, as JSON text in the order it was given."""
    try:
        schema = json.loads(_text("json_schema", value)) if isinstance(value, str) else value
        if not isinstance(schema, Mapping):
            raise RequestError(f"json_schema is {value!r:.200}, expected a JSON object")
        return _text("json_schema", json.dumps(dict(schema), ensure_ascii=False, allow_nan=False))
    except RequestError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema is not JSON: {error}") from None


def _bias(value: Any) -> dict[int, float] | None:
    """Token ids and what is added to their logits, given as a mapping or as JSON text."""
    if value is None:
        return None
    try:
        pairs = json.loads(_text("logit_bias", value)) if isinstance(value, str) else value
        bias = {int(token): amount for token, amount in pairs.items()}
    except (AttributeError, TypeError, ValueError):
        raise RequestError(f"logit_bias is {value!r:.200}, expected token ids with a number each") from None
    for token, amount in bias.items():
        _number("a token id of logit_bias", token, 0, whole=True, high=math.inf)
        _number(f"logit_bias of token {token}", amount, -100.0, 100.0)
    return bias or None


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence):
        raise RequestError(f"{name} is {value!r}, expected a list")
    return tuple(value)


@dataclass(frozen=True)
class GrammarSpec:
    """What a reply is held to; equal specs allow the same texts.

    Attributes:
        kind: what `source` is.
        source: a JSON schema as JSON text, a regular expression, or a grammar in llguidance's dialect of Lark.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks for. None means: as the checkpoint's generation config says.

    Attributes:
        max_new_tokens: at most so many tokens in the reply.
        temperature: 0 is greedy; above 0 the logits are divided by it.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one.
        repetition_penalty: above 1 makes every token of prompt and reply less likely (CTRL, arXiv:1909.05858).
        logit_bias: added to the logits of these token ids, from -100 (never) to 100 (always).
        presence_penalty, frequency_penalty: subtracted from the logit of a token of the reply, once or per occurrence.
        min_new_tokens: no end token, and no stop token, is drawn before so many tokens. Stop texts still end the reply.
        seed: the same seed gives the same tokens, whatever else the engine runs. None draws one.
        stop: texts that end the reply and are not part of it.
        stop_token_ids: ids that end the reply, beside the checkpoint's own.
        ignore_eos: don't stop at the checkpoint's own end tokens.
        json_schema: the reply is JSON that this JSON schema allows, with properties in the schema's order. The model is
            held to it, not told of it.
        json_object: the reply is a JSON object, whatever is in it.
        regex: the reply as a whole matches this regular expression, in the syntax of Rust's crate regex; there is no
            look-around, and \\d is any digit of Unicode.
        lark: the reply as a whole is a text of this grammar, in llguidance's dialect of Lark.
        logprobs: give the log-probability of each token, and of so many most likely alternatives.
        n: so many replies, each with its own randomness.
        adapter: name of the adapter to reply with, of those that are loaded; None: the model alone.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | str | None = None
    min_new_tokens: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    lark: str | None = None
    logprobs: int | None = None
    n: int = 1
    adapter: str | None = None

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float = math.inf, **kinds: bool) -> None:
            value = getattr(self, name)
            if value is not None:
                _number(name, value, low, high, **kinds)

        check("max_new_tokens", 1, whole=True)
        check("min_new_tokens", 0, whole=True)
        check("temperature", 0.0)
        check("top_p", 0.0, 1.0, open_low=True)
        check("top_k", 0, whole=True)
        check("min_p", 0.0, 1.0)
        check("repetition_penalty", 0.01, 100.0)
        check("presence_penalty", -100.0, 100.0)
        check("frequency_penalty", -100.0, 100.0)
        check("seed", 0, 2**64 - 1, whole=True)
        check("logprobs", 0, whole=True)
        check("n", 1, 128, whole=True)
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        if any(not isinstance(text, str) or not text for text in stop):
            raise RequestError(f"stop is {self.stop!r}, expected texts that are not empty")
        ids = None if self.stop_token_ids is None else _items("stop_token_ids", self.stop_token_ids)
        if ids is not None and any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}, expected token ids")
        for name in ("ignore_eos", "json_object"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected True or False")
        for name in ("regex", "lark", "adapter"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))
        schema = None if self.json_schema is None else _schema_text(self.json_schema)
        grammars = {"json_schema": schema, "json_object": self.json_object, "regex": self.regex, "lark": self.lark}
        if len(given := [name for name, value in grammars.items() if value]) > 1:
            raise RequestError(f"{' and '.join(given)} are given, and a reply can be held to one of them")
        if self.min_new_tokens and any(grammars.values()):
            raise RequestError(
                f"min_new_tokens is {self.min_new_tokens}, but a reply that is held to a grammar ends where that does"
            )
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)
        object.__setattr__(self, "json_schema", schema)

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the reply is held to, or None where it is free."""
        if self.regex is not None:
            return GrammarSpec("regex", self.regex)
        if self.lark is not None:
            return GrammarSpec("lark", self.lark)
        schema = '{"type": "object"}' if self.json_object else self.json_schema
        assert schema is None or isinstance(schema, str), "a schema is kept as text"
        return None if schema is None else GrammarSpec("json_schema", schema)

    def resolve(self, defaults: GenerationDefaults) -> SamplingParams:
        """The same with every None replaced by what the checkpoint says; max_new_tokens and seed may stay None."""
        cuts_set = any(value is not None for value in (self.top_p, self.top_k, self.min_p))
        temperature = self.temperature
        if temperature is None:
            # a caller who sets top_p wants sampling, also from a checkpoint whose default is greedy
            temperature = defaults.temperature if defaults.do_sample else 1.0 if cuts_set else 0.0

        def pick(value: Any, default: Any) -> Any:
            return default if value is None else value

        return replace(
            self,
            temperature=temperature,
            top_p=pick(self.top_p, defaults.top_p),
            top_k=pick(self.top_k, defaults.top_k),
            min_p=pick(self.min_p, defaults.min_p),
            repetition_penalty=pick(self.repetition_penalty, defaults.repetition_penalty),
            max_new_tokens=pick(self.max_new_tokens, defaults.max_new_tokens),
            stop_token_ids=self.stop_token_ids or (),
        )
