"""Is our perplexity transformers'? The same windows of the same text through both, same weights, float32.

    python benchmarks/eval_perplexity.py DATA --model demo --windows 16

Both score the second half of consecutive windows of 512 tokens of WikiText-2's test set. The last line is one JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from versus_lm_eval import hf_model

import qwenlet
from qwenlet import hub
from qwenlet.evals import tasks
from qwenlet.evals.data import DataFolder
from qwenlet.evals.run import choose
from qwenlet.evals.runner import answers
from qwenlet.evals.task import Bench, Passage, Result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()

    path = hub.resolve(args.model)
    task = tasks.get("wikitext2")
    with qwenlet.load(str(path), dtype="fp32", device="cpu", max_context=2048) as llm:
        bench = Bench(DataFolder(args.data), llm.tokenizer, llm.context_length, llm.config)
        samples = choose(task.samples(bench), args.windows, 1234)
        results = [Result(s, a, task.score(s, a, bench)) for s, a in answers(llm, samples)]
        ours = task.summary(results, bench).figures[0]

    model, tokenizer = hf_model(path)
    text = DataFolder(args.data).text("wikitext2/wiki.test.raw")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = []
    for sample in samples:
        assert isinstance(sample.question, Passage)
        at = int(sample.id) * 512
        window, first = torch.tensor(ids[at : at + 512]), sample.question.first
        assert tuple(window.tolist()) == sample.question.ids, "both cut the text into the same tokens"
        with torch.inference_mode():
            logits = model(window[None]).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits[first - 1 : -1], window[first:], reduction="none"))
    theirs = math.exp(float(torch.cat(losses).double().mean()))
    difference = 100 * (ours.value / theirs - 1)
    print(f"qwenlet {ours.value:.5f}, transformers {theirs:.5f}, difference {difference:+.5f} %, {ours.count} tokens")
    print(
        json.dumps(
            {"model": args.model, "windows": args.windows, "tokens": ours.count, "qwenlet": ours.value,
             "transformers": theirs, "difference_percent": difference}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
