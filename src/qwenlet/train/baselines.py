"""What a trained model is held against: counts, and the training text itself. No torch in here.

ngram_loss        how well counts of the last n - 1 tokens foretell a text
longest_overlap   how much of a sample was learned by heart
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from qwenlet.train.samples import Samples

COUNTED = 10_000_000
"""Tokens that counts are taken of at most, the first ones: some 100 bytes each while they are counted."""

Ids = npt.NDArray[np.int64]


def ngram_loss(learned: Samples, held_out: Samples, order: int, vocabulary: int) -> float:
    """Mean negative log-likelihood in nats of the held-out tokens that a run counts.

    Counts of contexts up to `order - 1` tokens, mixed as Witten and Bell do: a context gives way to the shorter one by
    the number of different tokens that followed it. Below the single token all are equally likely.
    """
    ids, at = _placed(learned)
    asked, asked_at = _placed(held_out)
    base = int(max(vocabulary, ids.max(initial=0) + 1, asked.max(initial=0) + 1))
    probability = np.full(len(asked), 1.0 / vocabulary)
    # contexts of one more token at each turn, by number: of each token that has one, and of those asked that was seen
    here, there = np.arange(len(ids)), np.flatnonzero(asked_at > 0)
    context, asked_context = np.zeros(len(here), np.int64), np.zeros(len(there), np.int64)
    for length in range(order):
        if length:
            here, context = _kept(here, context, at[here] >= length)
            there, asked_context = _kept(there, asked_context, asked_at[there] >= length)
            if not len(here):
                break
            known, context = np.unique(context * base + ids[here - length], return_inverse=True)
            asked_context, seen = _found(known, asked_context * base + asked[there - length])
            there, asked_context = _kept(there, asked_context, seen)
        followed, counts = np.unique(context * base + ids[here], return_counts=True)
        total = np.bincount(context)[asked_context]
        kinds = np.bincount(followed // base)[asked_context]
        place, seen = _found(followed, asked_context * base + asked[there])
        count = np.where(seen, counts[place], 0)
        probability[there] = (count + kinds * probability[there]) / (total + kinds)
    foretold = probability[asked_at > 0]
    return float(-np.log(foretold).sum() / max(len(foretold), 1))


def _placed(samples: Samples) -> tuple[Ids, Ids]:
    """Ids, and how far into its sample each stands."""
    ids = samples.ids[:COUNTED].astype(np.int64)
    starts = samples.starts[samples.starts < len(ids)]
    lengths = np.diff(np.append(starts, len(ids)))
    return ids, np.arange(len(ids)) - np.repeat(starts, lengths)


def _kept(places: Ids, contexts: Ids, keep: npt.NDArray[np.bool_]) -> tuple[Ids, Ids]:
    return places[keep], contexts[keep]


def _found(known: Ids, asked: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Where each stands among the known ones, which are sorted, and whether it does."""
    place = np.searchsorted(known, asked).clip(max=len(known) - 1)
    return place, known[place] == asked


def longest_overlap(sample: str, texts: Iterable[str]) -> str:
    """The longest piece of `sample` that stands in one of the texts, word for word; they are looked at one by one."""
    best = ""
    for text in texts:
        start = 0
        while start + len(best) < len(sample):
            length = len(best) + 1
            while start + length <= len(sample) and sample[start : start + length] in text:
                best = sample[start : start + length]
                length += 1
            start += 1
    return best
