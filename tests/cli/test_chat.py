"""One question, one answer: where the prompt comes from, what goes to stdout and what to stderr."""

from __future__ import annotations

import json

import pytest

from cli.fake import SYSTEM
from qwenlet.config import SamplingParams


def asked(api):
    """The messages of the only request."""
    [(messages, _)] = api.llm.requests
    return messages


def test_the_answer_alone_goes_to_stdout(run, api):
    result = run("chat", "-p", "hi")
    assert (result.code, result.out, result.err) == (0, "You said hi (101)\n", "")
    assert asked(api) == [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hi"}]
    assert api.llm.closed


def test_an_answer_that_ends_its_line_gets_no_second_end(run):
    assert run("chat", "-p", "code").out == "if x:\n    y\n"


@pytest.mark.parametrize(
    ("prompt", "stdin", "expected"),
    [
        (None, b"from a pipe\n", "from a pipe"),
        (None, b"\xef\xbb\xbfwith a mark\r\n", "with a mark"),
        ("Sum up:", b"a\nb\n", "Sum up:\n\na\nb"),
        ("hi", b"", "hi"),
        ("hi", b"\n", "hi"),
        (None, "你好".encode(), "你好"),
    ],
)
def test_prompt_and_pipe(run, api, prompt, stdin, expected):
    flags = [] if prompt is None else ["-p", prompt]
    assert run("chat", *flags, stdin=stdin).code == 0
    assert asked(api)[-1]["content"] == expected


@pytest.mark.parametrize(
    ("flags", "stdin", "expected"),
    [
        (["-p", " "], None, "the prompt is empty"),
        ([], b"", "the prompt is empty"),
        ([], b"good \xff bad", "stdin is not valid UTF-8: invalid start byte, byte 0xff at offset 5"),
        (["-p", "bad \udcff"], None, "--prompt is not valid UTF-8: byte 0xff after 4 characters"),
        (["-p", "hi", "--system", "\udcfe"], None, "--system is not valid UTF-8"),
        ([], None, "a conversation needs a terminal"),
        (["-p", "hi", "--top-p", "0"], None, "top_p is 0.0"),
        (["-p", "hi", "--temperature", "nan"], None, "temperature is nan"),
        (["-p", "hi", "--load", "nowhere.json"], None, "can't read nowhere.json: No such file"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(run, api, flags, stdin, expected):
    result = run("chat", *flags, stdin=stdin)
    assert result.code == 1
    assert result.err.startswith(f"error: {expected}")
    assert result.out == ""
    assert api.loaded == []


def test_an_error_of_the_model_leaves_its_message(run):
    result = run("chat", "-p", "too long")
    assert result.code == 1
    assert "the prompt has 100 tokens" in result.err
    assert "hint: shorten the prompt" in result.err


@pytest.mark.parametrize(("system", "expected"), [("Be brief.", ["system", "user"]), ("", ["user"])])
def test_system_prompt(run, api, system, expected):
    run("chat", "-p", "hi", "--system", system)
    assert [message["role"] for message in asked(api)] == expected


def test_stats_go_to_stderr(run):
    result = run("chat", "-p", "hi", "--stats")
    assert result.out == "You said hi (101)\n"
    assert result.err == (
        "10 prompt tokens; 5 new; first token after 0.25 s; prefill 20.0 tokens/s; decode 10.0 tokens/s; "
        "seed 101; finish reason stop\n"
    )


def test_dropped_turns_are_announced(run):
    assert "the model did not see the 2 oldest turns" in run("chat", "-p", "long").err


def test_going_on_with_a_saved_conversation(run, api, tmp_path):
    saved = {
        "version": 1,
        "model": "held/with",
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "params": {"temperature": 0.5, "seed": 9},
    }
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(saved))
    result = run("chat", "--load", str(file), "-p", "c", "--seed", "4")
    assert result.out == "You said c (4)\n"
    assert [name for name, _ in api.loaded] == ["held/with"]
    [(messages, params)] = api.llm.requests
    assert [message["content"] for message in messages] == ["Be brief.", "a", "b", "c"]
    assert params == SamplingParams(temperature=0.5, seed=4), "what the command line says outweighs the file"
    assert json.loads(file.read_text()) == saved


def test_control_characters_reach_files_but_no_terminal(run, monkeypatch):
    assert run("chat", "-p", "escape").out == "\x1b[31mred\x07\n\tend\n"
    monkeypatch.setattr("qwenlet.cli.console.is_terminal", lambda stream: True)
    assert run("chat", "-p", "escape").out == "[31mred\n\tend\n"
