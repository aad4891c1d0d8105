"""Training files: five forms that say themselves what they are, and errors that name the file and the line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.tiny import byte_tokenizer

from qwenlet.chat import Message, render
from qwenlet.config import DataConfig
from qwenlet.errors import DataError, RequestError
from qwenlet.tools import Toolbox, ToolMessage, react_messages
from qwenlet.train.batches import in_order
from qwenlet.train.preview import pieces
from qwenlet.train.records import Dialogue, Text, read_record, read_records
from qwenlet.train.samples import encode, load_samples

PUBLISHED_REPLY = {"from": "assistant", "value": "Ho"}
ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


def written(folder: Path, value: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1), encoding="utf-8")
    return path


def roles(record: Any) -> list[tuple[str, str]]:
    assert isinstance(record, Dialogue)
    return [(message.role, message.content) for message in record.messages]


# ------------------------------------------------------------------------------------------------------------ the forms


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("conversations", {"id": "1", "conversations": [{"from": "user", "value": "Hi"}, PUBLISHED_REPLY]}),
        ("conversations", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}),
        ("messages", {"messages": [ASKED, SAID]}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Ho"}),
        ("prompt", {"prompt": [ASKED], "completion": [SAID]}),
    ],
)  # fmt: skip
def test_forms_say_themselves_what_they_are(form: str, record: dict[str, Any]):
    read = read_record(record, "here")
    assert read.form == form
    assert roles(read) == [("user", "Hi"), ("assistant", "Ho")]


def test_the_rest_of_each_form():
    alpaca = {"instruction": "Add", "input": "2 and 3", "output": "5", "system": "S", "history": [["a", "b"]]}
    assert roles(read_record(alpaca, "")) == [
        ("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "Add\n2 and 3"), ("assistant", "5"),
    ]  # fmt: skip
    assert read_record({"prompt": "2 + 2 =", "completion": " 4"}, "w") == Text("w", " 4", "2 + 2 =", "prompt")
    assert read_record({"text": "abc"}, "w") == Text("w", "abc")
    opened = {
        "conversations": [{"from": "gpt", "value": "Welcome"}, *({"from": r, "value": "x"} for r in ("human", "gpt"))]
    }
    read = read_record(opened, "")
    assert isinstance(read, Dialogue)
    assert (len(read.messages), read.dropped) == (2, 1)


def test_tools_are_written_out_as_the_model_was_taught():
    record = {
        "conversations": [
            {"from": "human", "value": "6 * 7?"},
            {"from": "function_call", "value": '{"name": "calc", "arguments": {"a": 6, "b": 7}}'},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "It is 42."},
        ],
        "tools": json.dumps([{"name": "calc", "description": "Multiplies.", "parameters": {"type": "object"}}]),
    }
    (_, asked), (_, called), tool, (_, answer) = roles(read_record(record, ""))
    assert "calc: Call this tool" in asked
    assert asked.endswith("Question: 6 * 7?")
    assert 'Action: calc\nAction Input: {"a": 6, "b": 7}' in called
    assert tool == ("tool", "42")
    assert answer.endswith("Final Answer: It is 42.")


CLOCK = [{"type": "function", "function": {"name": "clock"}}]
CALL = SAID | {"content": None, "tool_calls": [{"id": "1", "function": {"name": "clock", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "noon"}


def test_every_reply_is_learned_behind_the_prompt_that_a_chat_gives_it():
    talk = [ASKED, CALL, RESULT, SAID, ASKED, CALL, RESULT, SAID, ASKED, SAID, ASKED, SAID]
    tokenizer, toolbox = byte_tokenizer(), Toolbox.of(CLOCK)
    prompts = []
    for index, message in enumerate(talk):
        if message["role"] == "assistant":
            asked = react_messages([ToolMessage.of(one) for one in talk[:index]], toolbox)
            prompts.append(render(tokenizer, asked))

    def learned(**options: Any) -> list[list[int]]:
        """What stands before each stretch that is learned."""
        config = DataConfig(max_length=5000, **options)
        samples = encode([read_record({"messages": talk, "tools": CLOCK}, "")], tokenizer, config, system=None)
        found = []
        for index in range(len(samples)):
            ids, marks = samples[index]
            text = "".join(piece if mark else "\0" for piece, mark in pieces(samples, index, tokenizer))
            assert "noon" not in text
            begins = np.flatnonzero(marks & ~np.concatenate([[False], marks[:-1]]))
            found += [ids[:at].tolist() for at in begins]
        return found

    assert learned() == prompts
    assert learned(labels="last") == prompts[-1:]
    assert len(encode([read_record({"messages": talk, "tools": CLOCK}, "")], tokenizer,
                      DataConfig(max_length=5000, labels="all"), system=None)) == 1  # fmt: skip


def test_the_last_reply_is_whole_where_it_called_tools():
    talk = [ASKED, SAID, ASKED, CALL, RESULT, SAID]
    tokenizer = byte_tokenizer()
    record = read_record({"messages": talk, "tools": CLOCK}, "")
    samples = encode([record], tokenizer, DataConfig(max_length=5000, labels="last"), system=None)
    texts = [
        "".join(piece for piece, mark in pieces(samples, index, tokenizer) if mark) for index in range(len(samples))
    ]
    assert texts == [
        "Thought: \nAction: clock\nAction Input: {}\nObservation:",
        " I now know the final answer.\nFinal Answer: Ho<|im_end|>",
    ]


def test_a_weight_of_nothing_leaves_a_message_unlearned():
    record = {"messages": [ASKED, SAID | {"weight": 0}, ASKED, SAID | {"weight": 1}]}
    samples = encode([read_record(record, "")], byte_tokenizer(), DataConfig(), system=None)
    assert samples.report.learned == len("Ho") + 1


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is from 'narrator'; known are user"),
        ({"conversations": []}, "expected a list of turns"),
        ({"messages": [ASKED]}, "the last message is the user's"),
        ({"messages": [ASKED, {"role": "assistant", "content": "  "}]}, "message 2, the assistant's, is empty"),
        ({"messages": [ASKED, SAID, {"role": "system", "content": "x"}, SAID]}, "message 3 is a system message"),
        ({"messages": [ASKED, {"role": "wizard", "content": "x"}]}, "'wizard'"),
        ({"messages": [ASKED, SAID | {"weight": 2}]}, "weight 2, expected 0 or 1"),
        ({"messages": [ASKED, SAID | {"tool_calls": 5}]}, "tool_calls is 5, expected a list"),
        ({"instruction": "x"}, "an instruction and no output"),
        ({"instruction": "x", "output": "y", "reward": 1}, "'reward' is not understood beside 'alpaca'"),
        ({"prompt": "x"}, "expected a completion"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "--method dpo"),
        ({"question": "x"}, "'question', expected conversations, messages"),
        ({"text": ""}, "the text is empty"),
        (3, "expected an object or a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_record_is_said(record: Any, why: str):
    with pytest.raises(RequestError, match=why.replace("*", r"\*")):
        read_record(record, "here")


def test_bad_records_come_in_one_error_with_their_lines_or_are_left_out(tmp_path: Path):
    good = {"messages": [ASKED, SAID]}
    path = written(tmp_path, [good, {"messages": [ASKED]}, good, {"text": 1}])
    with pytest.raises(
        DataError, match=r"2 records can't be used:\n.*data\.json:14: the last.*\n.*data\.json:34: text"
    ):
        read_records([path])
    records, bad = read_records([path], skip_bad=True)
    assert (len(records), len(bad.found)) == (2, 2)


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.json", '[\n{"text": "x"},\n{"text": "y",}\n]', r"a\.json:3 is not JSON"),
        ("a.json", '[\n{"text": "x"}\n{"text": "y"}]', r"a\.json:3 is not JSON: expected a comma"),
        ("a.json", '[\n{"text": "x"}', r"a\.json:2 is not JSON"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', r"a\.json:2 has something after"),
        ("a.json", "[" * 100_000, r"nested too deeply|not JSON"),
        ("a.txt", " \n", "there is no record"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, text: str, where: str):
    with pytest.raises(DataError, match=where):
        read_records([written(tmp_path, text, name)])


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Path):
    with pytest.raises(DataError, match="can't read"):
        read_records([tmp_path / "none.json"])
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_records([tmp_path / "x.txt"])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(
    st.sampled_from(["messages", "role", "content", "conversations", "from", "value", "text", "prompt", "completion",
                     "instruction", "output", "history", "tools", "system", "weight", "tool_calls"]), v)))  # fmt: skip
def test_any_record_is_read_or_refused(value: Any):
    with suppress(RequestError):
        assert read_record(value, "here").where == "here"


# ---------------------------------------------------------------------------------------------------------- samples


def dialogue(*words: str) -> Dialogue:
    messages = [Message("user" if i % 2 == 0 else "assistant", word) for i, word in enumerate(words)]
    return Dialogue("f:1", tuple(messages), (True,) * len(words), "messages")


def test_long_dialogues_are_left_out_cut_or_refused_and_counted():
    records = [dialogue("a", "b"), dialogue("a", "b" * 100)]
    tokenizer = byte_tokenizer()
    dropped = encode(records, tokenizer, DataConfig(max_length=60), system=None)
    assert (len(dropped), dropped.report.long) == (1, 1)
    assert "1 record longer than 60 tokens left out" in "\n".join(dropped.report.lines(60))
    cut = encode(records, tokenizer, DataConfig(max_length=60, long="cut"), system=None)
    assert (len(cut), cut.report.cut, int(cut.lengths.max())) == (2, 1, 60)
    with pytest.raises(DataError, match="f:1 has 1"):
        encode(records, tokenizer, DataConfig(max_length=60, long="error"), system=None)
    with pytest.raises(DataError, match=r"no sample is left.*of which nothing would be learned"):
        encode(records[1:], tokenizer, DataConfig(max_length=10, long="cut"), system=None)


def test_which_labels_are_asked_for():
    tokenizer = byte_tokenizer()
    record = dialogue("q", "one", "q", "two")

    def learned(**options: Any) -> str:
        samples = encode([record], tokenizer, DataConfig(**options), system="S")
        return "".join(text for text, mark in pieces(samples, 0, tokenizer) if mark)

    assert learned() == "one<|im_end|>two<|im_end|>"
    assert learned(labels="last") == "two<|im_end|>"
    assert learned(labels="all").startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user")
    assert learned(labels="published").startswith(
        "<|im_start|><|im_end|>\n<|im_start|><|im_end|>\n<|im_start|>one<|im_end|>\n"
    )


def test_text_is_cut_into_pieces_and_ends():
    tokenizer = byte_tokenizer()
    samples = encode([Text("f:1", "x" * 25)], tokenizer, DataConfig(max_length=10), system=None)
    assert samples.lengths.tolist() == [10, 10, 6]
    assert samples[2][0][-1] == tokenizer.eod_id


def test_the_cache_gives_what_was_made_and_knows_another_file(tmp_path: Path):
    tokenizer, config = byte_tokenizer(), DataConfig()
    path = written(tmp_path, [{"messages": [ASKED, SAID]}])

    def load(**options: Any):
        return load_samples([path], tokenizer, config, system=None, cache=tmp_path / "cache")

    first, again = load(), load()
    assert (first.report.cached, again.report.cached) == (False, True)
    assert again.fingerprint == first.fingerprint
    assert tuple(again.where) == tuple(first.where)
    written(tmp_path, [{"messages": [ASKED, {"role": "assistant", "content": "He"}]}])
    assert load().fingerprint != first.fingerprint
    for damage in (lambda whole: b"PK damaged", lambda whole: whole[: len(whole) // 2]):
        for file in (tmp_path / "cache").iterdir():
            file.write_bytes(damage(file.read_bytes()))
        assert not load().report.cached
        assert load().report.cached


def test_held_out_samples_are_others():
    samples = encode([dialogue(str(i), str(i) * 3) for i in range(20)], byte_tokenizer(), DataConfig(), system=None)
    learned, held_out = samples.split(0.25, seed=0)
    assert (len(learned), len(held_out)) == (15, 5)
    both = [tuple(part[i][0].tolist()) for part in (learned, held_out) for i in range(len(part))]
    assert len(set(both)) == 20
    with pytest.raises(DataError, match="none is left"):
        samples.split(20, seed=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200))
def test_packing_keeps_every_sample_and_the_budget(lengths: list[int], budget: int):
    import numpy as np

    batches = in_order(np.array(lengths), range(len(lengths)), batch_size=1, budget=budget)
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in batch) <= budget for batch in batches)
