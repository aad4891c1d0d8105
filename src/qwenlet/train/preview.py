"""Samples as people can check them: what is learned set apart from what is not. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from qwenlet.tokenizer import Tokenizer
from qwenlet.train.samples import Samples


def pieces(samples: Samples, index: int, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """(text, learned) of one sample, control tokens written out."""
    ids, learned = samples[index]
    for mark, run in groupby(zip(ids.tolist(), learned.tolist(), strict=True), key=lambda pair: pair[1]):
        yield tokenizer.decode([id for id, _ in run]), mark
