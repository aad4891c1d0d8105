"""Needle in a haystack: a fact is hidden in a long text at some depth, and asked for (G. Kamradt, 2023).

English: the well-known sentence about San Francisco in Paul Graham's essays. Chinese: a sentence of ours in a novel.
The beginnings of longctx/paul_graham_essays/addiction.txt and of longctx/zh_novels/水浒传.txt:

    July 2010What hard liquor, cigarettes, heroin, and crack have in common is that they're all more concentrated forms

    引首

    词曰：试看书林隐处，几多俊逸儒流。

Eight lengths up to the context, eleven depths each. The published figure was judged by a model; here an answer is worth
the share of the fact's parts that it names, which can be checked by reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwenlet.errors import EvalError
from qwenlet.evals.figures import Figure, HeatMap
from qwenlet.evals.statistics import grouped, mean
from qwenlet.evals.task import GREEDY, Answer, Bench, Dialogue, Result, Sample, Scored, Summary, Task
from qwenlet.tokenizer import Tokenizer

LENGTHS = 8
DEPTHS = tuple(range(0, 101, 10))  # percent
_REPLY = 64  # tokens
_FRAME = 64  # tokens of the dialogue's own words, at most
_SHORTEST = 256  # tokens of a question below which nothing is hidden


class Needle(Task):
    """Hidden in English essays."""

    name = "needle"
    title = "Needle in a haystack (English)"
    kind = "generation"
    chat = True
    measures = ("found",)

    folder = "longctx/paul_graham_essays/"
    needle = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
    parts: tuple[tuple[str, ...], ...] = (("sandwich",), ("dolores park",), ("sunny",))
    ends = ".!?\n"
    gap = " "
    prompt = (
        "{text}\n\nAnswer from the text above, without any knowledge of your own: "
        "what is the best thing to do in San Francisco?"
    )

    def samples(self, bench: Bench) -> list[Sample]:
        overhead = len(_ids(bench.tokenizer, self.prompt + self.gap + self.needle)) + _REPLY + _FRAME
        sizes = [bench.context_length * step // LENGTHS for step in range(1, LENGTHS + 1)]
        sizes = [size for size in sizes if size >= max(_SHORTEST, 2 * overhead)]
        if not sizes:
            raise EvalError(
                f"{self.name} needs a context of {max(_SHORTEST, 2 * overhead)} tokens or more, the model's has "
                f"{bench.context_length}"
            )
        hay = self._hay(bench, sizes[-1])
        ids = _ids(bench.tokenizer, hay)
        params = replace(GREEDY, max_new_tokens=_REPLY)
        found = []
        for size in sizes:
            room = size - overhead
            if len(ids) < room:
                raise EvalError(f"{self.folder} has {len(ids)} tokens, but {self.name} needs {room}")
            for depth in DEPTHS:
                question = Dialogue.ask(self.prompt.format(text=self._hidden(bench, ids[:room], depth)), params)
                fields = {"length": size, "depth": depth}
                found.append(Sample(f"{size}/{depth}", question, self.needle, fields=fields))
        return found

    def _hay(self, bench: Bench, tokens: int) -> str:
        """Enough text, file after file in the order of their names."""
        text = ""
        for name in bench.data.names(self.folder) or self._own(bench):
            text += bench.data.text(name).replace("\r\n", "\n").strip() + "\n\n"
            if len(text) > 8 * tokens:  # characters of a token, at most
                break
        return text

    def _own(self, bench: Bench) -> list[str]:
        """The folder's files where none is written down."""
        return sorted(
            path.relative_to(bench.data.root).as_posix() for path in (bench.data.root / self.folder).glob("*.txt")
        )

    def _hidden(self, bench: Bench, ids: Sequence[int], depth: int) -> str:
        """The text with the needle in it, behind the last sentence that ends before that depth."""
        # cut as text: a character may lie across tokens
        text = bench.tokenizer.decode(ids).rstrip("\ufffd")
        place = len(bench.tokenizer.decode(ids[: len(ids) * depth // 100]))
        if depth < 100:
            place = max(text.rfind(mark, 0, place) for mark in self.ends) + 1
        before, after = text[:place], text[place:]
        return f"{before}{self.gap if before else ''}{self.needle}{self.gap}{after}"

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        text = answer.text.casefold()
        named = [any(word in text for word in part) for part in self.parts]
        return Scored({"found": sum(named) / len(named)}, {"named": answer.text if any(named) else None})

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        cells = {(r.sample.fields["length"], r.sample.fields["depth"]): r.scored.values["found"] for r in results}
        sizes = sorted({size for size, _ in cells})
        plot = HeatMap(
            self.title,
            "tokens",
            "depth in percent",
            [str(size) for size in sizes],
            [str(depth) for depth in DEPTHS],
            [[cells.get((size, depth)) for size in sizes] for depth in DEPTHS],
        )
        figures = [Figure("found", *mean(list(cells.values())))]
        for size, values in sorted(grouped((size, value) for (size, _), value in cells.items()).items()):
            figures.append(Figure(f"{size} tokens", *mean(values), part=True))
        return Summary(tuple(figures), (plot,))


class NeedleZh(Needle):
    """Hidden in a Chinese novel."""

    name = "needle-zh"
    title = "Needle in a haystack (Chinese)"
    folder = "longctx/zh_novels/"
    needle = "小林最喜欢的早餐是豆浆配油条，而且一定要坐在院子里的槐树下吃。"
    parts = (("豆浆",), ("油条",), ("槐树",))
    ends = "。！？\n"
    gap = ""
    prompt = "{text}\n\n请只根据上面的文字回答：小林最喜欢的早餐是什么，要在哪里吃？"


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, allowed_special=set())
