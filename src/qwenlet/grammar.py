"""Replies held to a grammar: a JSON schema, a regular expression or a Lark grammar becomes a mask on logits.

    Grammars   one per model: tells llguidance the vocabulary, compiles specs
    Grammar    a compiled spec
    Matcher    where one reply stands in its grammar

llguidance (the extra `grammar`) knows the grammars; this module keeps hostile ones within limits and makes errors of
its error states. A reply is bytes there, so a character may lie across tokens. Control tokens are never part of
constrained text, and end tokens come exactly where the text may end. Left out: other kinds of grammar, and sharing
parsers between replies: a shared one grows with all that was written, so its limits would strike whoever comes last.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwenlet.config import JSON_GUIDANCE, GrammarSpec
from qwenlet.errors import MissingExtraError, RequestError, TokenizerError
from qwenlet.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

KEPT_GRAMMARS = 16  # of those compiled last

# What llguidance may spend: on a grammar at first, on one token, and on all of a reply (2 kB a state).
_LIMITS = {"initial_lexer_fuel": 500_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}
# Where its work grows faster than the schema and it counts nothing, ours come first.
MAX_SOURCE = 65_536  # characters
MAX_MULTIPLE = 10_000  # least common multiple of all multipleOf, each without the zeros at its ends
MAX_PATTERN_PROPERTIES = 64

# What %json may stand in without being the word: comments, strings and regular expressions, as Lark reads them.
_LARK = re.compile(
    r"""(?://|\#)[^\n]* | "(?:\\.|[^"\\\n])*" | /(?:\\.|[^/\\])*/ | (?P<json>%json\s*)""", re.VERBOSE | re.DOTALL
)

# A text that the grammar forces may be long, and is cut into tokens again at each of them: its beginning is enough.
_FORCED_CHARACTERS = 1024


class Grammars:
    """Compiles specs for one model, and keeps the latest. Any thread may call it.

    Args:
        vocab_size: width of the model's logits; ids without a token are never allowed.
        stop_ids: the model's own end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(id for id in stop_ids if 0 <= id < vocab_size)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._latest: OrderedDict[GrammarSpec, Grammar] = OrderedDict()

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar of `spec`: known to compile and to allow some text. The first one takes half a second longer.

        Raises:
            MissingExtraError: llguidance is not installed.
            RequestError: the spec does not compile, in llguidance's own words; it allows no text, or is too large; or
                the model has no end token, so that no such reply could end.
        """
        with self._lock:
            if spec not in self._latest:
                self._latest[spec] = self._compile(spec)
                if len(self._latest) > KEPT_GRAMMARS:
                    self._latest.popitem(last=False)
            self._latest.move_to_end(spec)
            return self._latest[spec]

    def _compile(self, spec: GrammarSpec) -> Grammar:
        if not self._stop_ids:
            raise RequestError("this model names no end token, so a reply that is held to a grammar could not end")
        llguidance = _library()
        if self._vocabulary is None:
            described = _Vocabulary(self._tokenizer, self._vocab_size, self._stop_ids)
            self._vocabulary = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(described), eos_token=sorted(self._stop_ids)
            )
        limits = llguidance.LLParserLimits(verbose_errors=False, **_LIMITS)
        source = _grammar_source(llguidance, spec)

        def parser() -> LLMatcher:
            return llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=limits)

        first = parser()
        if first.is_error():
            raise RequestError(f"the {spec.kind} does not compile: {_reason(first)}")
        for warning in first.get_grammar_warnings():
            logger.warning("the %s: %s", spec.kind, warning)
        grammar = Grammar(parser, self._vocab_size, self._stop_ids)
        grammar.matcher().allowed()  # one that allows nothing is found here, and not after the prompt was run
        return grammar


class Grammar:
    """A compiled spec.

    Args:
        parser: makes a parser at its start.
    """

    def __init__(self, parser: Callable[[], LLMatcher], vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._parser = parser
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids

    def matcher(self) -> Matcher:
        """A matcher at the beginning of a reply: about 1 ms, for a thousand properties 30 ms."""
        return Matcher(self._parser(), self._vocab_size, self._stop_ids)


class Matcher:
    """Where one reply stands in its grammar. For one thread at a time."""

    def __init__(self, state: LLMatcher, vocab_size: int, stop_ids: frozenset[int], *, ended: bool = False) -> None:
        self._state = state
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids
        self._ended = ended  # an end token was taken; `state` never sees those
        self._words = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    def mask(self, logits: Tensor) -> Tensor:
        """A copy of `logits` [V] float32 with -inf in the place of every token that may not come next.

        Raises:
            RequestError: the grammar is too costly to go on with, or no token of the vocabulary goes on with it.
        """
        allowed = self.allowed()
        if logits.device.type != "cpu":
            return torch.where(torch.from_numpy(allowed).to(logits.device), logits, -math.inf)
        # numpy stays in this thread, where torch may wait for others that are busy; without branches it takes 50 us
        ceiling = allowed.astype(np.float32)
        ceiling -= 0.5
        ceiling *= math.inf
        return torch.from_numpy(np.minimum(logits.detach().numpy(), ceiling, out=ceiling))

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens may come next: [V] bool. Raises as `mask` does."""
        if self._ended:
            allowed = np.zeros(self._vocab_size, dtype=np.bool_)
            allowed[list(self._stop_ids)] = True
            return allowed
        self._state.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._state.is_error():  # the words say that an end may come, which would pass for a good one
            raise RequestError(f"the reply can't go on in its grammar: {_reason(self._state)}")
        bits = np.unpackbits(self._words.view(np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Takes a token into the reply.

        Raises:
            RequestError: it may not come next, and the matcher stays where it is; or the grammar is too costly.
        """
        if token_id in self._stop_ids and not self._ended and self._state.is_accepting():
            self._ended = True
        elif self.takes([token_id]) == 0:
            raise RequestError(f"token {token_id} may not come next in the reply's grammar")
        elif not self._state.consume_token(token_id):
            raise RequestError(f"the reply can't go on in its grammar: {_reason(self._state)}")

    def takes(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, one after another, could come next; an end token is not counted.

        `mask` may be narrower: it wants forced text in the tokens that the tokenizer makes of it.
        """
        known = itertools.takewhile(lambda id: 0 <= id < self._vocab_size and id not in self._stop_ids, token_ids)
        return 0 if self._ended else self._state.validate_tokens(list(known))

    def forced(self) -> list[int]:
        """Tokens that have to come next, one after another: a draft that the masks will agree with."""
        return [] if self._ended else self._state.compute_ff_tokens()

    def rollback(self, count: int) -> None:
        """Takes the last `count` accepted tokens back."""
        if count and self._ended:
            self._ended = False
            count -= 1
        taken_back = self._state.rollback(count)
        assert taken_back, f"rollback of {count} tokens: {self._state.get_error()}"

    def fork(self) -> Matcher:
        """A matcher at the same place that goes its own way: another choice of the same request, or a way back."""
        return Matcher(self._state.deep_copy(), self._vocab_size, self._stop_ids, ended=self._ended)

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow, or one was taken."""
        return self._ended or self._state.is_stopped()


class _Vocabulary:
    """What llguidance asks of a tokenizer; its names."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [self._bytes(id) for id in range(vocab_size)]
        # special tokens are never part of text; to end tokens that were plain ones, this happens too
        self.special_token_ids = sorted(stop_ids.union(tokenizer.special_tokens.values()))
        self.eos_token_id = min(stop_ids)

    def _bytes(self, id: int) -> bytes:
        try:
            return self._tokenizer.token_bytes(id)
        except TokenizerError:
            return b""

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text[:_FORCED_CHARACTERS])


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError("llguidance", "grammar", "a reply held to a schema or a regex") from error
    return llguidance


def _grammar_source(llguidance: ModuleType, spec: GrammarSpec) -> str:
    """`spec` in the form that llguidance compiles. Raises RequestError for what would keep it busy too long."""
    if len(spec.source) > MAX_SOURCE:
        raise RequestError(f"the {spec.kind} has {len(spec.source)} characters, and at most {MAX_SOURCE} are compiled")
    if spec.kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(spec.source))
    try:
        if spec.kind == "lark":
            _check_costs(_embedded_schemas(spec.source))
            return str(llguidance.LLMatcher.grammar_from_lark(spec.source))
        _check_costs(json.loads(spec.source))
        return str(llguidance.LLMatcher.grammar_from_json_schema(spec.source, defaults=JSON_GUIDANCE))
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the {spec.kind} does not compile: {error}") from None


def _embedded_schemas(lark: str) -> list[Any]:
    """The JSON schemas in a Lark grammar, each behind %json; the same word in a literal or in a schema is none of them.

    Raises ValueError for one that is not JSON.
    """
    schemas, decoder, end = [], json.JSONDecoder(), 0
    while found := _LARK.search(lark, end):
        end = found.end()
        if found["json"]:
            schema, end = decoder.raw_decode(lark, end)
            schemas.append(schema)
    return schemas


def _check_costs(schema: Any) -> None:
    """Refuses what takes llguidance time or memory without bound. Looks at data in the schema as if it were schema."""
    multiple, patterns, nodes = 1, 0, [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += node.values()
            multiple = math.lcm(multiple, _digits(node.get("multipleOf")))
            if isinstance(properties := node.get("patternProperties"), dict):
                patterns += len(properties)
        if multiple > MAX_MULTIPLE:
            raise RequestError(
                f"the least common multiple of the multipleOf in the json_schema has the digits {multiple}, and at "
                f"most {MAX_MULTIPLE} is compiled"
            )
    if patterns > MAX_PATTERN_PROPERTIES:
        raise RequestError(
            f"the json_schema has {patterns} patternProperties, and at most {MAX_PATTERN_PROPERTIES} are compiled"
        )


def _digits(number: Any) -> int:
    """A number without sign, point and zeros at its ends, which cost nothing; 1 for what is no number above 0."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return 1
    return int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits))) or 1


def _reason(state: LLMatcher) -> str:
    """llguidance's own words without the inner state it adds, and with the beginning only of a long line."""
    words = state.get_error().partition("\n<")[0].rstrip()
    return "\n".join(line if len(line) <= 160 else line[:160] + " ..." for line in words.splitlines()[:20])
