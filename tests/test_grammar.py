"""Replies held to a grammar: whatever is drawn under the masks is a text the grammar allows, on both vocabularies, and
what can't be compiled or would take forever is refused with a reason."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlet import grammar as grammar_module
from qwenlet.config import GrammarSpec, SamplingParams
from qwenlet.errors import MissingExtraError, RequestError
from qwenlet.gguf_header import read_header
from qwenlet.grammar import KEPT_GRAMMARS, MAX_SOURCE, Grammar, Grammars, Matcher
from qwenlet.tokenizer import Tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "姓名": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "绿", 'q"uote']}, "maxItems": 3},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["姓名", "age", "tags", "ok"],
    "additionalProperties": False,
}


class Model:
    """A vocabulary with the width and the end tokens of a model that has it."""

    def __init__(self, tokenizer: Tokenizer, width: int, ends: list[int]) -> None:
        self.tokenizer, self.width, self.ends = tokenizer, width, ends
        self.grammars = Grammars(tokenizer, width, ends)

    def matcher(self, **held_to: Any) -> Matcher:
        return self.compile(**held_to).matcher()

    def compile(self, **held_to: Any) -> Grammar:
        spec = SamplingParams(**held_to).grammar
        assert spec is not None
        return self.grammars.compile(spec)


@pytest.fixture(scope="module")
def qwen(qwen_vocab: Path) -> Model:
    return Model(Tokenizer.from_file(qwen_vocab), 151_936, [151_643, 151_645])


@pytest.fixture(scope="module")
def smol(demo_gguf: Path) -> Model:
    tokenizer = Tokenizer.from_gguf(read_header(demo_gguf).metadata, demo_gguf)
    return Model(tokenizer, tokenizer.vocab_size, [0, 2])


@pytest.fixture(params=["qwen", "smol"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def choices(matcher: Matcher) -> list[int]:
    return np.flatnonzero(matcher.allowed()).tolist()


def draw(model: Model, matcher: Matcher, seed: int, *, limit: int = 400) -> list[int]:
    """A random walk to an end token, which is not part of the ids. An end that may come does, sooner or later."""
    rng = random.Random(seed)
    ids: list[int] = []
    while True:
        assert len(ids) < limit, f"no end after {model.tokenizer.decode(ids)!r}"
        candidates = choices(matcher)
        ends = [id for id in candidates if id in model.ends]
        if ends and (len(ends) == len(candidates) or rng.random() < 0.1):
            assert ends == model.ends, "each of the end tokens may come"
            matcher.accept(rng.choice(ends))
            assert matcher.finished
            return ids
        # short tokens are rare among all, and long ones make dull texts
        few = rng.sample([id for id in candidates if id not in model.ends], min(8, len(candidates) - len(ends)))
        ids.append(min(few, key=lambda id: len(model.tokenizer.token_bytes(id))))
        matcher.accept(ids[-1])


def feed(model: Model, matcher: Matcher, text: str) -> None:
    for id in model.tokenizer.encode_plain(text):
        matcher.accept(id)


# ------------------------------------------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("seed", range(8))
def test_text_drawn_under_a_schema_is_what_the_schema_allows(model: Model, seed: int) -> None:
    ids = draw(model, model.matcher(json_schema=PERSON), seed)
    person = json.loads(model.tokenizer.decode(ids, errors="strict"))
    assert list(person) == ["姓名", "age", "tags", "ok"], "in the order of the schema"
    assert 1 <= len(person["姓名"]) <= 8
    assert type(person["age"]) is int
    assert 0 <= person["age"] <= 150
    assert len(person["tags"]) <= 3
    assert set(person["tags"]) <= {"red", "绿", 'q"uote'}
    assert person["ok"] in (True, False, None)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{4}-[0-9]{2}-[0-9]{2}",
        "(yes|no|maybe)( really){0,3}!",
        "[一-龥]{2,6}。",
        "(👍|é|ﬀ|a\u0301)+",
        "[^\n\x00-\x1f]{5,20}\n",
    ],
)
def test_text_drawn_under_a_regex_matches_all_of_it(model: Model, pattern: str, seed: int) -> None:
    text = model.tokenizer.decode(draw(model, model.matcher(regex=pattern), seed), errors="strict")
    assert re.fullmatch(pattern, text)


def test_any_json_object(model: Model) -> None:
    text = '{"a": [1, {"b": null}],\n  "中": "x\\n"}'
    matcher = model.matcher(json_object=True)
    feed(model, matcher, text)
    assert json.loads(text)
    assert matcher.finished
    assert choices(matcher) == model.ends
    for no_object in ("[1]", "null", " {", "{a", '{"a" 1', '{"a":1,}'):
        ids = model.tokenizer.encode_plain(no_object)
        assert model.matcher(json_object=True).takes(ids) < len(ids)


SCHEMAS = st.recursive(
    st.sampled_from([{"type": "boolean"}, {"type": "integer", "minimum": -20, "maximum": 300}, {"const": "naïve 中\n"},
                     {"type": "string", "maxLength": 5}, {"enum": [1, "x", None]}]),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}, inner),
        st.builds(
            lambda fields: {"type": "object", "properties": fields, "required": list(fields),
                            "additionalProperties": False},
            st.dictionaries(st.text("ab中\"\\", min_size=1, max_size=3), inner, max_size=3),
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=5,
)  # fmt: skip


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON schema that SCHEMAS draws from."""
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "array":
            return isinstance(value, list) and 1 <= len(value) <= 2 and all(valid(v, schema["items"]) for v in value)
        case _:
            fields = schema["properties"]
            same = isinstance(value, dict) and list(value) == list(fields)
            return same and all(valid(value[name], fields[name]) for name in fields)


@settings(max_examples=40)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_wild_schemas_hold(smol: Model, schema: dict[str, Any], seed: int) -> None:
    text = smol.tokenizer.decode(draw(smol, smol.matcher(json_schema=schema), seed), errors="strict")
    assert valid(json.loads(text), schema)


def test_a_character_may_lie_across_tokens(model: Model) -> None:
    """A cuneiform sign that no token holds is spelled byte by byte, and nothing else is possible on the way."""
    matcher = model.matcher(regex="𒀀")
    ids = model.tokenizer.encode_plain("𒀀")
    assert len(ids) > 1
    for id in ids:
        assert choices(matcher) == [id]
        matcher.accept(id)
    assert matcher.finished


def test_white_space_in_json_comes_to_an_end(model: Model) -> None:
    matcher = model.matcher(json_object=True)
    feed(model, matcher, "{")
    (space,) = model.tokenizer.encode_plain(" ")
    for _ in range(40):
        matcher.accept(space)
    assert matcher.takes([space]) == 0
    with pytest.raises(RequestError, match="may not come next"):
        matcher.accept(space)
    feed(model, matcher, "}")
    assert matcher.finished


# ------------------------------------------------------------------------------------------------------------ the mask


def test_a_mask_leaves_the_logits_of_what_may_come(model: Model) -> None:
    logits = torch.randn(model.width, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    matcher = model.matcher(regex="[0-9]")
    masked = matcher.mask(logits)
    kept = [id for id in range(model.tokenizer.vocab_size) if re.fullmatch("[0-9]", model.tokenizer.decode([id]))]
    assert torch.equal(logits, before)
    assert torch.equal(masked.isfinite().nonzero()[:, 0], torch.tensor(kept))
    assert torch.equal(masked[kept], logits[kept])
    assert torch.all(masked[~masked.isfinite()] == -math.inf)


def test_control_tokens_and_rows_without_a_token_are_never_text(qwen: Model) -> None:
    assert qwen.width > qwen.tokenizer.vocab_size
    matcher = qwen.matcher(regex=r"(.|\n)*")
    allowed = matcher.allowed()
    assert allowed[:151_643].sum() > 140_000
    assert np.flatnonzero(allowed[151_643:]).tolist() == [0, 2], "the end tokens, since the empty text matches"
    for id in (151_644, 151_700, 151_900, 151_935, 151_936, -1):
        assert matcher.takes([id]) == 0
        with pytest.raises(RequestError, match=f"token {id} may not"):
            matcher.accept(id)
    assert np.array_equal(matcher.allowed(), allowed), "a token that is refused changes nothing"


def test_an_end_token_ends_and_is_all_that_follows_an_end(model: Model) -> None:
    matcher = model.matcher(regex="a+")
    with pytest.raises(RequestError, match="may not come next"):
        matcher.accept(model.ends[1])
    feed(model, matcher, "a")
    assert not matcher.finished
    matcher.accept(model.ends[1])
    assert matcher.finished
    assert choices(matcher) == model.ends
    assert matcher.takes(model.tokenizer.encode_plain("a")) == 0
    with pytest.raises(RequestError, match="may not come next"):
        matcher.accept(model.ends[0])


def test_an_end_token_that_is_a_plain_one_is_no_text(smol: Model) -> None:
    (end,) = smol.tokenizer.encode_plain("\n")
    matcher = Grammars(smol.tokenizer, smol.width, [end]).compile(GrammarSpec("regex", r"a\nb|a")).matcher()
    feed(smol, matcher, "a")
    assert choices(matcher) == [end]
    assert matcher.takes([end]) == 0
    matcher.accept(end)
    assert matcher.finished


def test_end_tokens_may_be_rows_without_a_token(qwen: Model) -> None:
    ends = [151_900, 151_935]
    matcher = Grammars(qwen.tokenizer, qwen.width, ends).compile(GrammarSpec("regex", "a*")).matcher()
    assert set(ends) < set(choices(matcher))
    assert {151_643, 151_645}.isdisjoint(choices(matcher))
    matcher.accept(151_935)
    assert choices(matcher) == ends


# -------------------------------------------------------------------------------------------- rollback, forks, drafts


@pytest.mark.parametrize("seed", range(4))
def test_rollback_goes_back_exactly(model: Model, seed: int) -> None:
    rng = random.Random(seed)
    ids = draw(model, model.matcher(json_schema=PERSON), seed)
    whole = [*ids, model.ends[0]]
    fresh = model.matcher(json_schema=PERSON)
    masks = [fresh.allowed()]
    for id in whole:
        fresh.accept(id)
        masks.append(fresh.allowed())
    place = len(whole)
    for _ in range(20):
        back = rng.randint(0, place)
        fresh.rollback(back)
        place -= back
        assert np.array_equal(fresh.allowed(), masks[place])
        assert fresh.finished == (place >= len(ids))
        forward = rng.randint(0, len(whole) - place)
        for id in whole[place : place + forward]:
            fresh.accept(id)
        place += forward
        assert np.array_equal(fresh.allowed(), masks[place])


def test_forks_go_their_own_ways(model: Model) -> None:
    matcher = model.matcher(regex="ab(c|d)e")
    feed(model, matcher, "a")
    fork = matcher.fork()
    feed(model, matcher, "bce")
    assert matcher.finished
    assert not fork.finished
    feed(model, fork, "bde")
    assert fork.finished
    matcher.accept(model.ends[0])
    assert choices(matcher.fork()) == model.ends


def test_drafts_are_judged_without_moving(model: Model) -> None:
    matcher = model.matcher(
        json_schema={"type": "object", "properties": {"name": {"const": "qwen"}}, "required": ["name"]}
    )
    before = matcher.allowed()
    good, bad = model.tokenizer.encode_plain('{"name": "qwen"}'), model.tokenizer.encode_plain('{"name": 5')
    assert matcher.takes([*good, model.ends[0]]) == len(good)
    assert 0 < matcher.takes(bad) < len(bad)
    assert matcher.takes([]) == 0
    assert np.array_equal(matcher.allowed(), before)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_forced_is_what_the_masks_allow(model: Model, seed: int) -> None:
    """At every place of a random reply, following the forced tokens meets masks of that one token."""
    matcher = model.matcher(json_schema=PERSON)
    seen = 0
    for id in draw(model, model.matcher(json_schema=PERSON), seed):
        look = matcher.fork()
        for forced in look.forced():
            assert choices(look) == [forced]
            look.accept(forced)
            seen += 1
        matcher.accept(id)
    assert seen


def test_forced_text_is_not_normalised_and_its_control_surfaces_are_text(qwen: Model) -> None:
    """Qwen's encoder would make é of e + accent, and the chat template's markers are text inside a reply."""
    constant = "e\u0301<|im_end|>"
    ids = draw(qwen, qwen.matcher(json_schema={"const": constant}), 0)
    assert json.loads(qwen.tokenizer.decode(ids)) == constant
    assert not any(qwen.tokenizer.is_special(id) for id in ids)


def test_long_forced_text_is_followed_to_its_end(smol: Model) -> None:
    constant = "The quick brown fox. " * 500
    matcher = smol.matcher(json_schema={"const": constant})
    began = time.perf_counter()
    ids = draw(smol, matcher, 0, limit=10_000)
    assert time.perf_counter() - began < 20
    assert smol.tokenizer.decode(ids) == json.dumps(constant)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("held_to", "reason"),
    [
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "can't go on"),
        ({"regex": "(" * 3000 + ")" * 3000}, "nest"),
        ({"json_schema": {"type": "strin"}}, "Invalid type: strin"),
        ({"json_schema": {"type": "string", "format": "zzz"}}, "Unknown format: zzz"),
        ({"json_schema": {"not": {}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "#/$defs/q"}}, "'/\\$defs/q' does not exist"),
        ({"json_schema": {"$ref": "https://example.org/schema"}}, "not fetch"),
        ({"json_schema": {"$ref": "#"}}, "can't go on"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, r"minimum \(5\) is greater"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "regex parse error"),
        ({"json_schema": {"x-guidance": {"bogus": 1}}}, "unknown field `bogus`"),
        ({"json_schema": '{"a":' * 200 + "1" + "}" * 200}, "recursion limit"),
        ({"json_schema": {"enum": ["\ud800"]}}, "surrogate"),
        ({"json_schema": {"type": "integer", "multipleOf": 10**400}}, "does not compile"),
        ({"json_schema": {"type": "integer", "multipleOf": 0}}, "does not compile"),
    ],
)
def test_what_does_not_compile_says_why(smol: Model, held_to: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        smol.compile(**held_to)
    assert len(caught.value.message) < 1500
    assert "non-verbose" not in caught.value.message


HOSTILE: list[dict[str, Any]] = [
    {"json_schema": {"type": "integer", "multipleOf": 999_983}},
    {"json_schema": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (97, 89, 83, 79)]}},
    {"json_schema": {"type": "number", "multipleOf": 0.30000000000000004}},
    {"json_schema": {"type": "object", "patternProperties": {f"^x{i}_[a-z]*$": {} for i in range(1500)}}},
    {"json_schema": {"type": "object", "required": [f"k{i}" for i in range(20_000)]}},
    {"json_schema": {"enum": [f"value {i}" for i in range(100_000)]}},
    {"json_schema": {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(5, 17)]}},
    {"regex": "x" * (MAX_SOURCE + 1)},
    {"regex": "(a*)*" * 2000},
]


@pytest.mark.parametrize("held_to", HOSTILE)
def test_what_would_take_forever_is_refused_at_once(smol: Model, held_to: dict[str, Any]) -> None:
    smol.compile(regex="a")
    began = time.perf_counter()
    with pytest.raises(RequestError):
        smol.compile(**held_to)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "(.*[a-m].{30}[n-z].{30}){40}.*", r"(.*a.{1000}){1000}"])
def test_a_grammar_that_grows_too_large_fails_its_reply_and_no_other(smol: Model, pattern: str) -> None:
    grammar = smol.compile(regex=pattern)
    began = time.perf_counter()
    with pytest.raises(RequestError, match=r"can't go on in its grammar: .*lexer error"):
        draw(smol, grammar.matcher(), 0)
    assert time.perf_counter() - began < 20
    assert choices(grammar.matcher()), "another reply begins as if nothing had been"


def test_reasonable_multiples_and_patterns_compile(smol: Model) -> None:
    for step in (0.01, 5, 1_000_000, 1e-9):
        smol.compile(json_schema={"type": "number", "multipleOf": step})
    smol.compile(json_schema={"type": "number", "allOf": [{"multipleOf": step} for step in (4, 0.06, 25)]})
    smol.compile(json_schema={"type": "object", "properties": {"multipleOf": {}, "patternProperties": {}}})
    smol.compile(json_schema={"enum": [{"multipleOf": value} for value in (True, 0, -5, None)]})
    smol.compile(json_schema={"type": "object", "patternProperties": {"^a": {}, "^b": {}}})


def test_a_byte_that_the_vocabulary_lacks_is_an_error_and_no_silent_end(smol: Model) -> None:
    lacking = next(chr(byte) for byte in range(0x20) if not smol.tokenizer.encode_plain(chr(byte)))
    with pytest.raises(RequestError, match="grammar"):
        draw(smol, smol.matcher(regex=f"a{lacking}b"), 0)


def test_a_model_without_end_tokens_is_told(smol: Model) -> None:
    for ends in ([], [smol.width]):
        with pytest.raises(RequestError, match="no end token"):
            Grammars(smol.tokenizer, smol.width, ends).compile(GrammarSpec("regex", "a"))


def test_llguidance_is_an_extra(smol: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"qwenlet\[grammar\]"):
        Grammars(smol.tokenizer, smol.width, smol.ends).compile(GrammarSpec("regex", "a"))


# ------------------------------------------------------------------------------------------------------------- sharing


def test_equal_specs_are_compiled_once_and_old_ones_are_dropped(smol: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = smol.compile(json_schema=PERSON)
    assert smol.compile(json_schema=json.dumps(PERSON)) is first
    built: list[GrammarSpec] = []
    original = grammar_module._grammar_source

    def counted(library: Any, spec: GrammarSpec) -> str:
        built.append(spec)
        return original(library, spec)

    monkeypatch.setattr(grammar_module, "_grammar_source", counted)
    for n in range(KEPT_GRAMMARS - 1):
        smol.compile(regex=f"other {n}")
    assert smol.compile(json_schema=PERSON) is first
    smol.compile(regex="one more")
    assert smol.compile(json_schema=PERSON) is first, "the oldest is the one that was not asked for"
    before = len(built)
    smol.compile(regex="other 0")
    assert len(built) == before + 1


def test_threads_may_compile_and_draw_at_once(smol: Model) -> None:
    grammars = Grammars(smol.tokenizer, smol.width, smol.ends)
    texts: dict[int, str] = {}

    def work(seed: int) -> None:
        matcher = grammars.compile(GrammarSpec("regex", r"\d{4}-\d{2}( [a-z]{2,5}){1,3}")).matcher()
        texts[seed] = smol.tokenizer.decode(draw(smol, matcher, seed % 4))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert all(texts[seed] == texts[seed + 4] for seed in range(4)), "the same draws give the same text"


def test_warnings_of_the_library_are_logged(
    smol: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}
    smol.compile(json_schema=schema)
    assert "uniqueItems" in caplog.text


# ---------------------------------------------------------------------------------------------------------------- Lark


def test_a_lark_grammar_with_a_schema_in_it(smol: Model):
    source = 'start: "Answer: " answer\nanswer: %json {"type": "integer", "minimum": 0, "maximum": 99}\n'
    for seed in range(5):
        text = smol.tokenizer.decode(draw(smol, smol.matcher(lark=source), seed))
        assert re.fullmatch(r"Answer: \d{1,2}", text)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("start: (", "the lark does not compile"),
        ("begin: /a/", "the lark does not compile"),
        ("start: %json {", "the lark does not compile"),
        ('start: %json {"multipleOf": 9973} %json {"multipleOf": 9967}', "multipleOf"),
        ('start: "%json {" /"%json {/ %json {"multipleOf": 99991} // %json {', "multipleOf"),
        ('# a "quote\nstart: /"\\// %json {"multipleOf": 99991} "b"', "multipleOf"),
        ("start: /a/ // " + "x" * MAX_SOURCE, "characters"),
    ],
)
def test_a_lark_grammar_that_is_wrong_or_too_costly(smol: Model, source: str, said: str):
    with pytest.raises(RequestError, match=said):
        smol.compile(lark=source)
