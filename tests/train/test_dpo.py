"""Preferences: pairs in all their forms, the loss against the formula, and a model that learns to prefer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.tiny import byte_tokenizer
from qwenlet.config import DataConfig, LoraConfig, TrainingConfig
from qwenlet.errors import ConfigError, DataError
from qwenlet.lora import add_lora
from qwenlet.lora.layers import LoraLinear, adapter_off
from qwenlet.model import Qwen
from qwenlet.train.dpo import Preference
from qwenlet.train.preferences import Pairs, load_pairs, read_pair
from qwenlet.train.records import Dialogue, Text
from qwenlet.train.trainer import Trainer
from train.tiny import CPU, TINY, tiny_model

TURNS = [{"from": "human", "value": "Hi"}]
ASKED = [{"role": "user", "content": "Hi"}]
SAID = {"role": "assistant"}


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": TURNS, "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}},
        {"conversations": TURNS, "chosen": "yes", "rejected": "no"},
        {"messages": ASKED, "chosen": {**SAID, "content": "yes"}, "rejected": {**SAID, "content": "no"}},
        {"prompt": ASKED, "chosen": [{**SAID, "content": "yes"}], "rejected": [{**SAID, "content": "no"}]},
        {"prompt": "Hi", "chosen": [{**SAID, "content": "yes"}], "rejected": [{**SAID, "content": "no"}]},
        {"prompt": "Hi", "chosen": [*ASKED, {**SAID, "content": "yes"}], "rejected": [{**SAID, "content": "no"}]},
        {"prompt": ASKED, "chosen": [*ASKED, {**SAID, "content": "yes"}], "rejected": "no"},
        {"chosen": [*ASKED, {**SAID, "content": "yes"}], "rejected": [*ASKED, {**SAID, "content": "no"}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        {"instruction": "Hi", "input": "", "output": ["yes", "perhaps", "no"]},
        {"instruction": "Hi", "chosen": "yes", "rejected": "no"},
    ],
)
def test_every_form_is_a_question_and_two_replies(record: dict[str, Any]) -> None:
    chosen, rejected = read_pair(record, "a:1")
    assert isinstance(chosen, Dialogue)
    assert isinstance(rejected, Dialogue)
    assert [(m.role, m.content) for m in chosen.messages] == [("user", "Hi"), ("assistant", "yes")]
    assert [(m.role, m.content) for m in rejected.messages] == [("user", "Hi"), ("assistant", "no")]


def test_texts_stay_texts() -> None:
    assert read_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, "a:1") == (
        Text("a:1", "b", "a", "prompt"), Text("a:1", "c", "a", "prompt"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("text", "a pair is 'text'"),
        ({"conversations": TURNS, "chosen": "yes"}, "it has no 'rejected'"),
        ({"instruction": "Hi", "output": ["one"]}, "output is a list of one"),
        ({"conversations": TURNS, "chosen": "yes", "rejected": "yes"}, "are the same"),
        ({"conversations": TURNS, "chosen": 1, "rejected": "no"}, "chosen is 1, expected a turn or a text"),
        ({"messages": "Hi", "chosen": "yes", "rejected": "no"}, "messages is 'Hi', expected a list"),
        ({"chosen": "yes", "rejected": "no"}, "a text without a prompt"),
        ({"prompt": ASKED, "chosen": [], "rejected": "no"}, "chosen is \\[\\]"),
        ({"conversations": TURNS, "chosen": "yes", "rejected": "no", "odd": 1}, "'odd' is not understood"),
        (
            {"prompt": "Ho", "chosen": [*ASKED, {**SAID, "content": "yes"}], "rejected": "no"},
            "chosen begins with other",
        ),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Ho\n\nAssistant: no"},
            "answer different prompts",
        ),
        ({"prompt": "Hi", "chosen": [{**SAID, "content": "yes"}], "rejected": "no"}, "answer different prompts"),
    ],
)
def test_a_record_that_is_no_pair_is_named_by_file_and_line(record: Any, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", [{"conversations": TURNS, "chosen": "a", "rejected": "b"}, record])
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{said}"):
        load_pairs([path], byte_tokenizer(), DataConfig(), system=None)
    kept = load_pairs([path], byte_tokenizer(), DataConfig(bad="skip"), system=None)
    assert (len(kept), len(kept.each.report.bad)) == (1, 1)


def test_a_pair_with_a_reply_that_is_too_long_goes_as_a_whole(tmp_path: Path) -> None:
    records = [{"conversations": TURNS, "chosen": "a" * size, "rejected": "b"} for size in (5, 500, 10)]
    path = written(tmp_path / "pairs.jsonl", records)
    pairs = load_pairs([path], byte_tokenizer(), DataConfig(max_length=100), system=None)
    assert (len(pairs), pairs.each.report.long) == (2, 1)
    assert [place.rpartition(":")[2] for place in pairs.each.where] == ["1", "1", "3", "3"]
    with pytest.raises(DataError, match="more than the 100 allowed"):
        load_pairs([path], byte_tokenizer(), DataConfig(max_length=100, long="error"), system=None)
    cut = load_pairs([path], byte_tokenizer(), DataConfig(max_length=36, long="cut"), system=None).each.report
    assert (cut.samples, cut.nothing, cut.long, cut.cut > 0) == (3, 0, 0, True)
    with pytest.raises(DataError, match="no pair is left"):
        load_pairs([path], byte_tokenizer(), DataConfig(max_length=5), system=None)


def test_what_was_left_out_of_pairs_is_told(tmp_path: Path) -> None:
    opened = [{"from": "gpt", "value": "Welcome"}, *TURNS]
    path = written(tmp_path / "pairs.jsonl", [{"conversations": opened, "chosen": "yes", "rejected": "no"}])
    report = load_pairs([path], byte_tokenizer(), DataConfig(), system=None).each.report
    assert report.openings == 1
    assert "1 messages before a first question left out" in report.lines(100)


def test_only_the_last_reply_is_compared(tmp_path: Path) -> None:
    turns = [*TURNS, {"from": "gpt", "value": "shared"}, {"from": "human", "value": "More"}]
    path = written(tmp_path / "pairs.jsonl", [{"conversations": turns, "chosen": "yes", "rejected": "no"}])
    pairs = load_pairs([path], byte_tokenizer(), DataConfig(), system=None)
    for index, reply in enumerate((b"yes", b"no")):
        ids, learned = pairs.each[index]
        assert bytes(int(id) for id in ids[learned] if id < 256).strip() == reply


def test_a_whole_conversation_may_bring_its_system_message() -> None:
    told = [{"role": "system", "content": "S"}, *ASKED]
    pair = {"prompt": "Hi", **{name: [*told, {**SAID, "content": name}] for name in ("chosen", "rejected")}}
    chosen, _ = read_pair(pair, "a:1")
    assert isinstance(chosen, Dialogue)
    assert [message.role for message in chosen.messages] == ["system", "user", "assistant"]


def test_replies_that_called_tools_are_compared_behind_one_prompt(tmp_path: Path) -> None:
    """The tools stand elsewhere once a result has come; the prompt is that of the reply's beginning."""
    asked = [*ASKED, {**SAID, "content": "Ho"}, {"role": "user", "content": "Time?"}]
    call = {**SAID, "content": None, "tool_calls": [{"id": "1", "function": {"name": "clock", "arguments": "{}"}}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "noon"}
    answer = {**SAID, "content": "It is noon."}
    record = {
        "messages": asked, "tools": [{"type": "function", "function": {"name": "clock"}}],
        "chosen": [call, result, answer], "rejected": [answer],
    }  # fmt: skip
    chosen, rejected = read_pair(record, "a:1")
    assert isinstance(chosen, Dialogue)
    assert isinstance(rejected, Dialogue)
    assert chosen.messages[:3] == rejected.messages[:3]
    assert "clock: Call this tool" in chosen.messages[0].content
    pairs = load_pairs([written(tmp_path / "p.jsonl", [record])], byte_tokenizer(), DataConfig(max_length=2000),
                       system=None)  # fmt: skip
    assert len(pairs) == 1


# --------------------------------------------------------------------------------------------------------- the loss


def made_pairs(tmp_path: Path, count: int = 12) -> Pairs:
    """Replies in capitals are chosen."""
    records = [
        {"conversations": [{"from": "human", "value": f"q{index}"}], "chosen": "ABC", "rejected": "xyzw"}
        for index in range(count)
    ]
    return load_pairs([written(tmp_path / "pairs.jsonl", records)], byte_tokenizer(), DataConfig(), system=None)


def adapted(seed: int = 0, **config: Any) -> Qwen:
    model = tiny_model(seed)
    add_lora(model, LoraConfig(**({"rank": 4, "dropout": 0.0} | config)))
    return model


def log_likelihood(model: Qwen, ids: Any, learned: Any) -> torch.Tensor:
    from qwenlet.cache import Rows

    tokens = torch.tensor(ids, dtype=torch.long)
    logp = model(tokens, Rows.fresh([len(tokens)], [1.0])).double().log_softmax(-1)
    each = logp[:-1].gather(1, tokens[1:, None])[:, 0]
    return each[torch.tensor(learned[1:])].sum()


def test_the_loss_is_the_formula(tmp_path: Path) -> None:
    pairs, model = made_pairs(tmp_path), adapted()
    objective = Preference(pairs, beta=0.3)
    # at first nothing is preferred to what was: log 2 a pair
    assert objective.loss(model, (0, 1, 2), CPU).item() == pytest.approx(3 * math.log(2), rel=1e-5)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.lora_B, std=0.3)
    expected = torch.zeros(())
    for pair in (3, 1):

        def margin(pair: int = pair) -> torch.Tensor:
            return log_likelihood(model, *pairs.each[2 * pair]) - log_likelihood(model, *pairs.each[2 * pair + 1])

        now = margin()
        with adapter_off(model):
            before = margin()
        expected -= torch.nn.functional.logsigmoid(0.3 * (now - before))
    found = objective.loss(model, (3, 1), CPU)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.item() != pytest.approx(2 * math.log(2), rel=1e-2)


def test_what_was_before_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, model = made_pairs(tmp_path), adapted()
    objective = Preference(pairs)
    calls = []
    own = objective.margins
    monkeypatch.setattr(objective, "margins", lambda *given: calls.append(given[1]) or own(*given))
    objective.loss(model, (0, 1), CPU)
    objective.loss(model, (0, 1), CPU)
    assert len(calls) == 3


def test_without_an_adapter_to_switch_off_the_model_is_asked_before(tmp_path: Path) -> None:
    pairs, model = made_pairs(tmp_path), tiny_model()
    objective = Preference(pairs)
    objective.prepare(model, CPU, batch_size=5)
    assert objective.loss(model, (4,), CPU).item() == pytest.approx(math.log(2), rel=1e-5)
    whole = adapted(modules_to_save=("lm_head",))
    with pytest.raises(ConfigError, match="can't be switched off"):
        Preference(pairs).loss(whole, (0,), CPU)


def test_what_was_before_is_measured_without_dropout(tmp_path: Path) -> None:
    """An adapter that is trained further drops inputs in training, and none of them in the model it began as."""
    pairs, model = made_pairs(tmp_path), adapted(dropout=0.5)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.lora_B, std=0.3)
    objective = Preference(pairs)
    objective.prepare(model.train(), CPU)
    assert model.training
    assert objective.gains(model.eval(), tuple(range(len(pairs))), CPU).abs().max() < 1e-5


@pytest.mark.parametrize("make", [adapted, tiny_model], ids=["lora", "full"])
def test_a_model_learns_to_prefer(make: Callable[[], Qwen], tmp_path: Path) -> None:
    """Held-out pairs: all preferred by the end, and the loss well below log 2."""
    train, held_out = made_pairs(tmp_path).split(4, seed=0)
    model = make()
    objective, measured = Preference(train, beta=0.2), Preference(held_out, beta=0.2)
    for one in (objective, measured):
        one.prepare(model, CPU)
    config = TrainingConfig(epochs=8, batch_size=2, accumulation=1, warmup=2, packed=False, seed=0)
    trainer = Trainer(
        model, objective, config, lr=0.01, dtype=torch.float32, device=CPU, out=tmp_path / "out", run={},
        held_out=measured,
    )  # fmt: skip
    outcome = trainer.run()
    assert outcome.losses[0] == pytest.approx(math.log(2), rel=1e-4)
    assert outcome.best is not None
    assert outcome.best < 0.2
    assert bool((measured.gains(model, tuple(range(4)), CPU) > 0).all())


def test_a_resumed_run_compares_with_the_same_model(tmp_path: Path) -> None:
    pairs = made_pairs(tmp_path)

    def run(out: str, steps: int) -> list[float]:
        config = TrainingConfig(max_steps=steps, batch_size=2, accumulation=1, warmup=2, packed=False, save_every=3,
                                schedule="constant")  # fmt: skip
        trainer = Trainer(
            adapted(), Preference(pairs), config, lr=0.01, dtype=torch.float32, device=CPU, out=tmp_path / out, run={}
        )
        return list(trainer.run().losses)

    whole = run("whole", 6)
    assert run("parts", 3) + run("parts", 6) == whole


# ------------------------------------------------------------------------------------------------------- the verb


@pytest.mark.parametrize("method", ["dpo", "dpo-full"])
def test_the_verb_learns_preferences(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], qwen_vocab: Path
) -> None:
    from dataclasses import replace

    from qwenlet.checkpoint import write_random
    from qwenlet.cli import main

    config = replace(TINY, vocab_size=151_936, max_position_embeddings=256, seq_length=256)
    base = write_random(tmp_path / "base", config, dtype="fp32", tokenizer_file=qwen_vocab)
    records = [{"conversations": TURNS, "chosen": "yes", "rejected": f"no {index}"} for index in range(8)]
    pairs = written(tmp_path / "pairs.jsonl", records)
    words = ["finetune", str(base), str(pairs), "--out", str(tmp_path / "out"), "--method", method, "--dtype", "fp32"]
    words += ["--lr", "0.003", "--epochs", "4", "--accumulation", "1", "--batch-size", "1", "--held-out", "2"]
    assert main([*words, "--max-length", "64", "--rank", "4"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    wanted = "adapter_config.json" if method == "dpo" else "config.json"
    assert (tmp_path / "out" / wanted).exists()
    lines = (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3)
    assert losses[-1] < losses[0]
