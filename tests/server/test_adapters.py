"""Adapters beside the served model: clients choose one by the model's name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.tiny import stir
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.cli import main
from qwenlet.config import LoraConfig
from qwenlet.lora import LoraLinear, add_lora, save_adapter
from server.conftest import Answer, Server, running


@pytest.fixture(scope="module")
def folders(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the demo model, far from trained: replies become others."""
    made = {}
    for name, config in (("alpha", LoraConfig(rank=4, targets=("c_attn", "w1"))), ("beta", LoraConfig(rank=24))):
        model, _ = load_model(Checkpoint.open(demo_gguf), torch.float32, torch.device("cpu"))
        add_lora(model, config)
        stir(model)
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.lora_B.data *= 2.0
        made[name] = save_adapter(model, tmp_path_factory.mktemp("adapters") / name)
    return made


@pytest.fixture(scope="module")
def adapted(demo_gguf: Path, folders: dict[str, Path]) -> Iterator[Server]:
    options = [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]
    with running(demo_gguf, "--quiet", *options) as one:
        yield one


def text(answer: Answer) -> str:
    assert answer.status == 200, answer.raw
    return str(answer.json["choices"][0]["message"]["content"])


def test_the_model_field_chooses(adapted: Server, server: Server) -> None:
    plain = text(server.chat())
    replies = {name: adapted.chat(model=name) for name in ("demo", "alpha", "beta")}
    assert text(replies["demo"]) == text(adapted.chat()) == plain
    assert len({text(reply) for reply in replies.values()}) == 3
    assert [reply.json["model"] for reply in replies.values()] == ["demo", "alpha", "beta"]


def test_requests_of_all_kinds_at_once_answer_as_alone(adapted: Server) -> None:
    names = ["alpha", "demo", "beta"] * 3
    alone = {name: text(adapted.chat("Tell me of the sea.", model=name, max_tokens=30)) for name in set(names)}
    with ThreadPoolExecutor(9) as pool:
        replies = pool.map(lambda name: text(adapted.chat("Tell me of the sea.", model=name, max_tokens=30)), names)
    assert list(replies) == [alone[name] for name in names]


def test_they_are_listed_as_models(adapted: Server) -> None:
    cards = {card["id"]: card for card in adapted.call("GET", "/v1/models").json["data"]}
    assert list(cards) == ["demo", "alpha", "beta"]
    assert [card["parent"] for card in cards.values()] == [None, "demo", "demo"]
    assert adapted.call("GET", "/v1/models/beta").json["id"] == "beta"
    assert {card["name"] for card in adapted.call("GET", "/api/tags").json["models"]} == set(cards)


def test_a_model_that_is_not_there_is_still_refused(adapted: Server) -> None:
    answer = adapted.chat(model="gamma")
    assert answer.status == 404
    assert "'demo', 'alpha', 'beta'" in answer.error["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {"prompt": "The sea", "max_tokens": 6, "temperature": 0},
         lambda a: a["choices"][0]["text"]),
        ("/v1/completions", {"prompt": "The sea", "max_tokens": 0, "echo": True, "logprobs": 0},
         lambda a: a["choices"][0]["logprobs"]["token_logprobs"][1:]),
        ("/v1/embeddings", {"input": "The sea"}, lambda a: a["data"][0]["embedding"]),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0},
         lambda a: a["content"]),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 16, "temperature": 0, "store": False},
         lambda a: a["output"][0]["content"]),
        ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}], "stream": False,
                       "options": {"num_predict": 6, "temperature": 0}}, lambda a: a["message"]["content"]),
    ],
)  # fmt: skip
def test_every_family_of_calls_has_them(adapted: Server, path: str, body: dict[str, Any], said: Any) -> None:
    answers = [adapted.call("POST", path, body | {"model": name}) for name in ("demo", "alpha", "beta", "alpha")]
    assert [answer.status for answer in answers] == [200] * 4, answers[1].raw
    assert [answer.json["model"] for answer in answers] == ["demo", "alpha", "beta", "alpha"]
    plain, alpha, beta, again = (said(answer.json) for answer in answers)
    assert alpha == again
    assert plain != alpha != beta != plain


def test_ollamas_tag_is_understood(adapted: Server) -> None:
    body = {"model": "alpha:latest", "prompt": "The sea", "stream": False, "options": {"num_predict": 3}}
    assert adapted.call("POST", "/api/generate", body).json["model"] == "alpha"


# ------------------------------------------------------------------------------------------------ command line


def test_generate_goes_with_the_first_adapter(
    demo_gguf: Path, folders: dict[str, Path], adapted: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(demo_gguf), "-p", "The sea", "--max-new-tokens", "6", "--temperature", "0"]
    assert main([*words, "--adapter", str(folders["beta"]), "--adapter", f"other={folders['alpha']}"]) == 0
    body = {"model": "beta", "prompt": "The sea", "max_tokens": 6, "temperature": 0}
    expected = adapted.call("POST", "/v1/completions", body).json["choices"][0]["text"]
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")


def test_what_does_not_fit_is_said_before_anything_runs(
    demo_gguf: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(demo_gguf), "-p", "Hi", "--adapter"]
    assert main([*words, f"x={tmp_path}"]) == 1
    assert "is no adapter: it has no adapter_config.json" in capsys.readouterr().err
    assert main([*words, f"x={folders['alpha']}", "--adapter", f"x={folders['beta']}"]) == 2
    assert "the name 'x' is taken" in capsys.readouterr().err


def test_a_name_that_is_the_models_own_is_refused(demo_gguf: Path, folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "qwenlet", "serve", str(demo_gguf), "--port", "0", "--served-name", "alpha"]
    done = subprocess.run(
        [*command, "--adapter", str(folders["alpha"])], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "'alpha' names the model and an adapter" in done.stderr
