"""The tools that expect a transformers model, one test each: peft, trl, accelerate, pipeline, lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwenlet.hf  # noqa: F401 (registers the classes)

pytestmark = pytest.mark.filterwarnings("default")  # warnings of other people's libraries


@pytest.fixture
def model(chat_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)


@pytest.fixture
def tokenizer(chat_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_folder, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def test_peft_lora_trains_and_reloads(tmp_path: Path, chat_folder: Path, model: Any) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    targets = ["c_attn", "c_proj", "w1", "w2"]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    ids = torch.randint(0, 1000, (2, 16))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wrapped.eval()
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)
        assert torch.allclose(again.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-4)


def test_trl_sft_trainer(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    settings = SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to="none", logging_steps=1, bf16=False, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = Dataset.from_list([{"messages": turns}] * 8)
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_accelerate_dispatches_and_prepares(chat_folder: Path) -> None:
    from accelerate import Accelerator

    model = AutoModelForCausalLM.from_pretrained(chat_folder, device_map={"": "cpu"}, dtype=torch.float32)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.randint(0, 1000, (2, 8))
    accelerator.backward(model(ids, labels=ids).loss)
    before = next(model.parameters()).detach().clone()
    optimizer.step()
    assert not torch.equal(before, next(model.parameters()))


def test_text_generation_pipeline(model: Any, tokenizer: Any) -> None:
    from transformers import pipeline

    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (plain,) = ask("Once upon", max_new_tokens=4, do_sample=False)
    assert plain["generated_text"].startswith("Once upon")
    (chatted,) = ask([{"role": "user", "content": "hi"}], max_new_tokens=4, do_sample=False)
    assert [turn["role"] for turn in chatted["generated_text"]] == ["user", "assistant"]


def test_lm_eval_scores_a_task_of_this_machine(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    import json

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"q": f"{n} + 1 =", "options": [str(n + 1), str(n + 7)], "gold": 0} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{options}}'\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    held = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    results = lm_eval.simple_evaluate(model=held, tasks=["sums"], task_manager=tasks, bootstrap_iters=0)
    assert 0 <= results["results"]["sums"]["acc,none"] <= 1
