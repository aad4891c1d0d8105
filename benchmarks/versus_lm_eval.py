"""MMLU 5-shot, ours and lm-eval's hf model in one run: the same answers, question by question, and how much sooner?

Both get the same weights in float32, the same prompts and the same threads. lm-eval reads them as a local task (a YAML
file over a JSON file) and scores the options it is given; so do we. Questions of a subject share their five examples,
as in the whole benchmark: the first `--questions` of each of `--subjects` subjects are asked, without those that are
longer than the published window. lm-eval runs at each batch size of `--batch-sizes` on the first subject, and then
everything at the quickest.

    python benchmarks/versus_lm_eval.py DATA --model demo --threads 2

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qwenlet
from qwenlet import hub
from qwenlet.evals.choices import LETTERS
from qwenlet.evals.data import DataFolder
from qwenlet.evals.runner import answers
from qwenlet.evals.task import Bench, Choices, Sample
from qwenlet.evals.tasks.mmlu import Mmlu

SUBJECTS = (
    "astronomy computer_security high_school_us_history marketing moral_disputes high_school_statistics "
    "international_law econometrics"
).split()

TASK = """
task: same_questions
dataset_path: json
dataset_kwargs:
  data_files: {{"test": "{file}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


def hf_model(path: Path) -> tuple[Any, Any]:
    """transformers' own model and tokenizer over the same GGUF file or folder, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**where)


class LmEval:
    """lm-eval's hf model over prompts that are ready."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer = hf_model(path)

    def chosen(self, samples: list[Sample], batch_size: int) -> tuple[dict[str, str], float]:
        """(letter by sample, seconds of the model's own work)."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        lm = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size, device="cpu")
        seconds = 0.0
        loglikelihood = lm.loglikelihood

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal seconds
            began = time.perf_counter()
            result = loglikelihood(*args, **kwargs)
            seconds += time.perf_counter() - began
            return result

        lm.loglikelihood = timed
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "questions.json"
            rows = [
                {"id": s.id, "prompt": s.question.prompt, "answer": LETTERS.index(s.target)}  # type: ignore[union-attr]
                for s in samples
            ]
            file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            (Path(folder) / "same_questions.yaml").write_text(TASK.format(file=file), encoding="utf-8")
            manager = TaskManager(include_path=folder, include_defaults=False)
            result = simple_evaluate(
                lm, tasks=["same_questions"], task_manager=manager, log_samples=True, bootstrap_iters=0
            )
        found = {}
        for sample in result["samples"]["same_questions"]:
            scores = [float(r[0][0]) for r in sample["resps"]]
            found[sample["doc"]["id"]] = LETTERS[scores.index(max(scores))]
        return found, seconds


def ours(llm: qwenlet.LLM, samples: list[Sample]) -> tuple[dict[str, str], float]:
    began = time.perf_counter()
    found = {sample.id: LETTERS[answer.likeliest] for sample, answer in answers(llm, samples)}
    return found, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    if args.threads:
        torch.set_num_threads(args.threads)

    path = hub.resolve(args.model)
    llm = qwenlet.load(str(path), dtype="fp32", device="cpu", max_context=2048)
    bench = Bench(DataFolder(args.data), llm.tokenizer, llm.context_length, llm.config)
    subjects = SUBJECTS[: args.subjects]
    samples = [
        sample
        for sample in Mmlu().samples(bench)
        if sample.group in subjects and int(sample.id.split("/")[1]) < args.questions
    ]
    tokens = []
    for sample in samples:
        assert isinstance(sample.question, Choices)
        assert isinstance(sample.question.prompt, str)
        tokens.append(len(llm.tokenizer.encode(sample.question.prompt, allowed_special=set())))
    fitting = [sample for sample, count in zip(samples, tokens, strict=True) if count < 2048]
    print(f"{len(fitting)} questions of {len(subjects)} subjects, {sum(tokens) / len(tokens):.0f} tokens each")

    mine, my_seconds = ours(llm, fitting)
    print(f"qwenlet            {len(fitting) / my_seconds:6.2f} questions/s")
    llm.close()

    peer = LmEval(path)
    first = [sample for sample in fitting if sample.group == fitting[0].group]
    speeds = {size: len(first) / peer.chosen(first, size)[1] for size in args.batch_sizes}
    best = max(speeds, key=lambda size: speeds[size])
    print("lm-eval hf, first subject: " + ", ".join(f"batch {s}: {v:.2f}/s" for s, v in speeds.items()))
    theirs, their_seconds = peer.chosen(fitting, best)
    print(f"lm-eval hf         {len(fitting) / their_seconds:6.2f} questions/s at batch {best}")
    same = sum(mine[id] == theirs[id] for id in mine)
    right = sum(mine[sample.id] == sample.target for sample in fitting)
    print(f"same choice: {same} of {len(fitting)}; {right} right; {their_seconds / my_seconds:.1f} times as quick")
    print(
        json.dumps(
            {
                "model": args.model, "questions": len(fitting), "subjects": subjects,
                "tokens_per_question": sum(tokens) / len(tokens), "same": same, "right": right,
                "qwenlet_seconds": my_seconds, "lm_eval_seconds": their_seconds, "batch_size": best,
                "batch_speeds": speeds, "speedup": their_seconds / my_seconds,
                "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
