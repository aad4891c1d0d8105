"""/v1/completions: echoes with log-probabilities as lm-eval reads them, the best of several, lengths of zero."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenlet.api import load
from qwenlet.checkpoint.save import write_tokenizer_json
from qwenlet.gguf_header import read_header
from qwenlet.llm import LLM
from qwenlet.tokenizer_bytelevel import read_gguf
from server.conftest import Server

PAIRS = [
    ("The capital of France is", " Paris."),
    ("Two plus two makes", " a large blue elephant"),
    ("Der Fluß heißt", " Straße 🙂"),
]


@pytest.fixture(scope="module")
def llm(demo_gguf: Path) -> Iterator[LLM]:
    with load(str(demo_gguf)) as model:
        yield model


def complete(server: Server, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    answer = server.call("POST", "/v1/completions", {"prompt": prompt, "temperature": 0} | fields)
    assert answer.status == 200, answer.raw
    return answer.json["choices"]


def as_lm_eval_reads(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """(log-probability, whether greedy): what its local-completions model makes of a reply."""
    lists = choice["logprobs"]
    own = lists["token_logprobs"][context:-1]
    top = lists["top_logprobs"][context:-1]
    return sum(own), all(each == max(best.values()) for each, best in zip(own, top, strict=True))


def test_lm_eval_sees_what_score_says(server: Server, llm: LLM) -> None:
    encode = llm.tokenizer.encode
    prompts = [encode(before) + encode(after) for before, after in PAIRS]
    choices = complete(server, prompts, echo=True, logprobs=1, max_tokens=1, seed=1234)
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    greedy = []
    for (before, after), choice in zip(PAIRS, choices, strict=True):
        score = llm.score(before, after)
        logprob, is_greedy = as_lm_eval_reads(choice, len(encode(before)))
        # other rows beside them may round differently
        assert logprob == pytest.approx(score.logprob, abs=2e-3)
        assert is_greedy == score.is_greedy
        greedy.append(is_greedy)
    assert len(set(greedy)) == 2, "one of each, else the comparison shows little"


def test_a_run_of_lm_eval_agrees_with_score(server: Server, llm: LLM, tmp_path: Path) -> None:
    """Its own local-completions model, from a task on disk to the accuracy, over HTTP."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    header = read_header(llm.path)
    write_tokenizer_json(tmp_path, read_gguf(header.metadata, str(llm.path)), "")
    rows = [
        {"q": "The capital of France is", "options": ["Paris", "a banana"], "gold": 0},
        {"q": "Two and two make", "options": ["purple", "four"], "gold": 1},
        {"q": "The opposite of hot is", "options": ["cold", "window"], "gold": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "facts.yaml").write_text(
        "task: facts\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{options}}'\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    done = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "demo",
            "base_url": url,
            "tokenizer": str(tmp_path),
            "num_concurrent": 1,
            "max_retries": 1,
        },
        tasks=["facts"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    right = 0
    for row, sample in zip(rows, done["samples"]["facts"], strict=True):
        scores = [llm.score(str(row["q"]), f" {option}") for option in row["options"]]
        for score, (logprob, is_greedy) in zip(scores, sample["filtered_resps"], strict=True):
            assert float(logprob) == pytest.approx(score.logprob, abs=2e-3)
            assert is_greedy == score.is_greedy
        right += max(range(2), key=lambda at: scores[at].logprob) == row["gold"]
    assert done["results"]["facts"]["acc,none"] == pytest.approx(right / len(rows))
    assert 0 < right < len(rows), "one is wrong on purpose"


def test_an_echo_is_the_prompt_and_its_tokens(server: Server, llm: LLM) -> None:
    text = "Straße 🙂 once"
    ids = llm.tokenizer.encode(text)
    (choice,) = complete(server, text, echo=True, logprobs=2, max_tokens=0)
    lists = choice["logprobs"]
    assert choice["text"] == text
    assert choice["finish_reason"] == "length"
    assert {len(each) for each in lists.values()} == {len(ids)}
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert all(each <= 0 for each in lists["token_logprobs"][1:])
    assert all(2 <= len(top) <= 3 for top in lists["top_logprobs"][1:])
    assert lists["text_offset"][-1] == text.index(" once")
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_an_echo_leads_what_is_written(server: Server) -> None:
    (plain,) = complete(server, PAIRS[0][0], max_tokens=3, logprobs=0)
    (led,) = complete(server, PAIRS[0][0], max_tokens=3, logprobs=0, echo=True)
    assert led["text"] == PAIRS[0][0] + plain["text"]
    assert led["logprobs"]["tokens"][-3:] == plain["logprobs"]["tokens"]
    assert led["logprobs"]["text_offset"][-3] == len(PAIRS[0][0])
    (bare,) = complete(server, PAIRS[0][0], max_tokens=3, echo=True)
    assert bare["text"] == led["text"]
    assert bare["logprobs"] is None


def test_a_streamed_echo_adds_up(server: Server) -> None:
    fields = {"max_tokens": 4, "echo": True, "logprobs": 1, "n": 2}
    whole = complete(server, PAIRS[0][0], **fields)
    body = {"prompt": PAIRS[0][0], "temperature": 0, "stream": True} | fields
    events = server.call("POST", "/v1/completions", body).events
    for choice in whole:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            told = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            assert told == pytest.approx(values) if name == "token_logprobs" else len(told) == len(values)


def test_the_best_of_several(server: Server) -> None:
    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 6, "logprobs": 0}
    every = complete(server, "Once", n=4, **fields)

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = max(every, key=mean)
    (told,) = complete(server, "Once", best_of=4, **fields)
    assert told["text"] == best["text"]
    (quiet,) = complete(server, "Once", best_of=4, **(fields | {"logprobs": None}))
    assert quiet["text"] == best["text"]
    assert quiet["logprobs"] is None


def test_more_prompts_than_have_room_run_in_slices(server: Server) -> None:
    """320 requests have room, and one call may have half of it."""
    words = ["One", "Two", "Three", "Four"]
    alone = complete(server, words, max_tokens=1)
    many = complete(server, words * 100, max_tokens=1)
    assert [choice["index"] for choice in many] == list(range(400))
    assert [choice["text"] for choice in many] == [choice["text"] for choice in alone] * 100
    pairs = complete(server, words * 50, max_tokens=1, n=2)
    assert [choice["text"] for choice in pairs[:8]] == [choice["text"] for choice in alone for _ in range(2)]


BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "zero without echo": ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    "best_of below n": ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
    "best_of streamed": ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix"),
    "mixed": ({"prompt": ["a", 1]}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "an empty prompt": ({"prompt": "", "echo": True}, None),
    "an id outside": ({"prompt": [10**9], "echo": True, "max_tokens": 0}, None),
    "too long": ({"prompt": [5] * 9000}, "prompt"),
    "too long to echo": ({"prompt": [5] * 9000, "echo": True, "logprobs": 1}, "prompt"),
    "too many": ({"prompt": ["a"] * 5000}, "prompt"),
    "too many for a stream": ({"prompt": ["a"] * 500, "stream": True}, "prompt"),
    "one too long of many": ({"prompt": [[5], [5] * 9000]}, "prompt"),
    "before others": ({"prompt": "a", "priority": -1}, "priority"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(server: Server, name: str) -> None:
    body, param = BAD[name]
    answer = server.call("POST", "/v1/completions", body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.raw
