"""Perplexity of a text: WikiText-2's test set, Chinese Wikipedia paragraphs, or a file of yours.

The beginning of wikitext2/wiki.test.raw, and a `context` of zh_text/cmrc2018/cmrc2018_trial.json:

     = Robert Boulter =

     Robert Boulter is an English film , television and theatre actor . ...

    {"paragraphs": [{"id": "TRIAL_800", "context": "基于《跑跑卡丁车》与《泡泡堂》上所开发的游戏，由韩国Nexon...

The protocol is that of `qwenlet.scoring`, which `qwenlet quantize` reports, too: consecutive windows of 512 tokens that
share no context, of which the second half is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qwenlet.errors import EvalError
from qwenlet.evals.figures import Figure
from qwenlet.evals.task import Answer, Bench, Passage, Result, Sample, Scored, Summary, Task
from qwenlet.scoring import WINDOW, windows


class Perplexity(Task):
    """Of a UTF-8 file: `perplexity:FILE`."""

    name = "perplexity"
    title = "Perplexity"
    kind = "likelihood"
    measures = ("nats per token",)

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def with_argument(self, argument: str) -> Task:
        path = Path(argument)
        task = type(self)(path)
        task.name, task.title = f"{self.name}:{path.name}", f"{self.title} of {path.name}"
        return task

    def text(self, bench: Bench) -> str:
        if self.path is None:
            raise EvalError("perplexity needs a text", hint="perplexity:FILE, or the tasks wikitext2 and zh-perplexity")
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError as problem:
            raise EvalError(f"can't read {self.path}: {problem.strerror or problem}") from None
        except UnicodeDecodeError as problem:
            raise EvalError(f"{self.path} is not valid UTF-8 at byte {problem.start}") from None

    def samples(self, bench: Bench) -> list[Sample]:
        ids = bench.tokenizer.encode(self.text(bench), allowed_special=set())
        size = min(WINDOW, bench.context_length)
        pieces = windows(ids, size)
        # the token in the middle is given, the ones behind it are scored
        return [Sample(str(n), Passage(tuple(piece), size // 2 + 1), None) for n, piece in enumerate(pieces)]

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        count = len(answer.logprobs)
        return Scored({"nats per token": -math.fsum(answer.logprobs) / count if count else math.nan})

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        losses = [-logprob for result in results for logprob in result.answer.logprobs]
        center = math.fsum(losses) / len(losses)
        spread = math.sqrt(math.fsum((loss - center) ** 2 for loss in losses) / max(len(losses) - 1, 1) / len(losses))
        value = math.exp(center)
        return Summary((Figure("perplexity", value, value * spread, len(losses), "number", higher_is_better=False),))


class WikiText2(Perplexity):
    """The raw test set, whole."""

    name = "wikitext2"
    title = "Perplexity of WikiText-2"

    def text(self, bench: Bench) -> str:
        return bench.data.text("wikitext2/wiki.test.raw")


class Chinese(Perplexity):
    """Paragraphs of Chinese Wikipedia (CMRC 2018), one behind the other."""

    name = "zh-perplexity"
    title = "Perplexity of Chinese Wikipedia"

    def text(self, bench: Bench) -> str:
        articles = [
            article
            for part in ("dev", "trial")
            for article in bench.data.json(f"zh_text/cmrc2018/cmrc2018_{part}.json")["data"]
        ]
        return "\n".join(paragraph["context"] for article in articles for paragraph in article["paragraphs"])
