"""Flags follow the dataclasses: every field has one, with its help, its default and its type."""

from __future__ import annotations

import dataclasses

import pytest

from qwenlet.cli.conversation import NOT_FOR_CHAT
from qwenlet.cli.options import LoadOptions, attribute_docs
from qwenlet.config import EngineConfig, SamplingParams


@pytest.mark.parametrize("cls", [SamplingParams, EngineConfig, LoadOptions])
def test_every_field_is_explained_and_nothing_else(cls):
    docs = attribute_docs(cls)
    assert set(docs) == {field.name for field in dataclasses.fields(cls)}
    assert all(docs.values())


def test_each_field_is_a_flag_of_chat_and_generate(run):
    chat, generate = run("chat", "--help").out, run("generate", "--help").out
    for cls in (SamplingParams, EngineConfig, LoadOptions):
        for field in dataclasses.fields(cls):
            flag = f"--{field.name.replace('_', '-')} "
            assert flag in generate
            assert (flag in chat) == (field.name not in NOT_FOR_CHAT)


def test_defaults_and_choices_are_shown(run):
    text = " ".join(run("chat", "--help").out.split())
    assert "One of: auto, flash, sdpa, math, efficient. [default: auto]" in text
    assert "One of: prompt, reserve. [default: prompt]" in text
    assert f"[default: {EngineConfig().max_requests}]" in text


def test_only_the_flags_that_were_used_are_passed_on(run, api):
    run("chat", "some/model", "-p", "hi")
    run("chat", "-p", "hi", "--device", "cpu", "--linear", "torch", "--max-context", "32", "--offline", "--seed", "3",
        "--stop", "a", "--stop", "b", "--stop-token-ids", "5", "--ignore-eos")  # fmt: skip
    assert api.loaded == [
        ("some/model", {}),
        ("demo", {"device": "cpu", "linear": "torch", "max_context": 32, "offline": True}),
    ]
    assert [params for _, params in api.llm.requests] == [
        SamplingParams(),
        SamplingParams(seed=3, stop=("a", "b"), stop_token_ids=(5,), ignore_eos=True),
    ]


def test_a_schema_is_a_file_or_the_text_itself(run, api, tmp_path):
    file, text = tmp_path / "schema.json", '{"type": "object"}'
    file.write_text(text + "\n")
    run("chat", "-p", "hi", "--json-schema", str(file))
    run("chat", "-p", "hi", "--json-schema", f" {text}")
    assert [params for _, params in api.llm.requests] == [SamplingParams(json_schema=text)] * 2
    missing = run("generate", "demo", "-p", "hi", "--json-schema", str(tmp_path / "none.json"))
    assert missing.code == 2
    assert "--json-schema" in missing.err
    assert "none.json: No such file" in missing.err
    both = run("generate", "demo", "-p", "hi", "--json-schema", text, "--regex", "a")
    assert both.code == 1
    assert "json_schema and regex are given" in both.err
    wrong = run("generate", "demo", "-p", "hi", "--json-schema", "[1]")
    assert wrong.code == 1
    assert "expected a JSON object" in wrong.err
