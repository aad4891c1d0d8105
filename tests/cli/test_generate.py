"""Raw continuations: where the text comes from, and one JSON object for each."""

from __future__ import annotations

import json

import pytest

from qwenlet.config import SamplingParams


def prompts(api):
    return ["".join(map(chr, ids)) for ids, _ in api.llm.requests]


def test_text_goes_to_stdout(run, api):
    result = run("generate", "demo", "-p", "Once")
    assert (result.code, result.out, result.err) == (0, "You said Once (101)\n", "")
    assert api.llm.closed


def test_what_runs_worse_than_it_could_is_said_once_beside_the_text(run, api):
    api.llm.load_report.warnings = ["runs by modules, more slowly: a test says so"]
    result = run("generate", "demo", "-p", "Once")
    assert (result.out, result.err) == ("You said Once (101)\n", "runs by modules, more slowly: a test says so\n")
    for command in (("generate", "demo", "--json", "-p", "Once"), ("chat", "--json", "-p", "Once")):
        result = run(*command)
        assert json.loads(result.out)
        assert result.err.count("more slowly") == 1


def test_the_prompt_comes_from_one_of_three_places(run, api, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n\n")
    run("generate", "demo", "--prompt-file", str(file))
    run("generate", "demo", stdin=b"from a pipe\n")
    run("generate", "demo", "-p", "from a flag", stdin=b"not read")
    assert prompts(api) == ["from a file\n", "from a pipe", "from a flag"]


@pytest.mark.parametrize(
    ("flags", "stdin", "code", "expected"),
    [
        (["-p", ""], None, 1, "error: the prompt is empty"),
        ([], b"", 1, "error: the prompt is empty"),
        ([], None, 1, "error: the prompt is empty"),
        ([], b"\x80", 1, "error: stdin is not valid UTF-8"),
        (["--prompt-file", "nowhere.txt"], None, 1, "error: can't read nowhere.txt: No such file"),
        (["-p", "a", "--prompt-file", "b"], None, 2, "error: Invalid value for --prompt-file"),
        (["-p", "a", "--logprobs", "2"], None, 2, "error: Invalid value for --logprobs"),
        (["-p", "a", "--n", "0"], None, 1, "error: n is 0"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(run, api, flags, stdin, code, expected):
    result = run("generate", "demo", *flags, stdin=stdin)
    assert result.code == code
    assert result.err.startswith(expected)
    assert api.loaded == []


def test_json_carries_counts_seed_and_timings(run, api):
    result = run("generate", "demo", "-p", "Once", "--json", "--n", "2", "--seed", "7", "--stop", "END")
    first, second = map(json.loads, result.out.splitlines())
    assert first["text"] == second["text"] == "You said Once (7)"
    assert first["finish_reason"] == "stop"
    assert (first["prompt_tokens"], first["completion_tokens"], first["seed"]) == (10, len(first["token_ids"]), 7)
    assert first["timings"]["time_to_first_token"] == 0.25
    assert first["timings"]["decode_tokens_per_second"] == 10.0
    assert api.llm.requests[0][1] == SamplingParams(n=2, seed=7, stop=("END",))


def test_several_texts_are_set_apart(run):
    assert run("generate", "demo", "-p", "a", "--n", "2").out == "You said a (101)\n---\nYou said a (102)\n"


def test_control_tokens_are_text_unless_asked_for(run, api):
    run("generate", "demo", "-p", "<|im_start|>")
    run("generate", "demo", "-p", "<|im_start|>", "--special")
    assert [ids[0] for ids, _ in api.llm.requests] == [ord("<"), 1]


def test_stats(run):
    assert "prefill 20.0 tokens/s" in run("generate", "demo", "-p", "a", "--stats").err
