"""What a trained model is held against: counts, and the training text itself. No torch in here.

ngram_loss        how well counts of the last n - 1 tokens foretell a text
longest_overlap   how much of a sample was learned by heart
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from qwenlet.train.samples import Samples


def ngram_loss(learned: Samples, held_out: Samples, order: int, vocabulary: int) -> float:
    """Mean negative log-likelihood in nats of the held-out tokens that a run counts.

    Counts of contexts up to `order - 1` tokens, mixed as Witten and Bell do: a context gives way to the shorter one by
    the number of different tokens that followed it. Below the single token all are equally likely.
    """
    follows: list[dict[tuple[int, ...], dict[int, int]]] = [defaultdict(lambda: defaultdict(int)) for _ in range(order)]
    for index in range(len(learned)):
        ids = learned[index][0].tolist()
        for at in range(len(ids)):
            for length in range(min(order, at + 1)):
                follows[length][tuple(ids[at - length : at])][ids[at]] += 1
    totals = [{context: sum(counts.values()) for context, counts in level.items()} for level in follows]
    loss, count = 0.0, 0
    for index in range(len(held_out)):
        ids = held_out[index][0].tolist()
        for at in range(1, len(ids)):
            probability = 1.0 / vocabulary
            for length in range(min(order, at + 1)):
                context = tuple(ids[at - length : at])
                counts = follows[length].get(context)
                if counts is None:
                    break
                total, kinds = totals[length][context], len(counts)
                probability = (counts.get(ids[at], 0) + kinds * probability) / (total + kinds)
            loss -= math.log(probability)
            count += 1
    return loss / max(count, 1)


def longest_overlap(sample: str, texts: Sequence[str]) -> str:
    """The longest piece of `sample` that stands in one of the texts, word for word."""
    whole = "\0".join(texts)
    best, start = "", 0
    while start + len(best) < len(sample):
        length = len(best) + 1
        while start + length <= len(sample) and sample[start : start + length] in whole:
            best = sample[start : start + length]
            length += 1
        start += 1
    return best
