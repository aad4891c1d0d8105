"""Samples -> the batches of a run: which samples stand together, and in which order. No torch in here.

A batch is rows of any length one after another: the model gives each row its own positions and attends within it, so
nothing is padded and no sample sees another. Packed, a batch has up to `batch_size * max_length` tokens; otherwise
`batch_size` samples.

The order depends on (seed, epoch) alone, and a step takes the next `accumulation * processes` batches: where a run
stands is its step's number, and two processes see in a step what one sees with twice the accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwenlet.config import TrainingConfig
from qwenlet.train.samples import Samples

Batch = tuple[int, ...]
"""Indices of samples."""


def epoch_batches(samples: Samples, epoch: int, *, seed: int, batch_size: int, budget: int | None) -> list[Batch]:
    """All batches of an epoch, each sample in one of them; but one of a single token, which foretells nothing.

    Args:
        budget: packed: tokens of a batch at most; None: `batch_size` samples each.
    """
    order = np.random.Generator(np.random.Philox(key=(seed, epoch))).permutation(len(samples))
    order = order[samples.lengths[order] > 1]
    return in_order(samples.lengths, order, batch_size=batch_size, budget=budget)


def in_order(
    lengths: npt.NDArray[np.int64], order: Sequence[int] | npt.NDArray[np.int64], *, batch_size: int, budget: int | None
) -> list[Batch]:
    """Samples in batches, in the order given."""
    if budget is None:
        return [tuple(map(int, order[at : at + batch_size])) for at in range(0, len(order), batch_size)]
    batches: list[Batch] = []
    batch: list[int] = []
    room = budget
    for index in order:
        length = int(lengths[index])
        if batch and length > room:
            batches.append(tuple(batch))
            batch, room = [], budget
        batch.append(int(index))
        room -= length
    return [*batches, tuple(batch)] if batch else batches


@dataclass(frozen=True)
class Step:
    """What one optimizer step takes.

    Attributes:
        number: from 0 on; epoch: from 0 on.
        batches: of all processes; batch i is process i % processes'.
    """

    number: int
    epoch: int
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Course:
    """The steps of a run, each found by its number.

    Attributes:
        group: batches of a step: accumulation * processes.
    """

    samples: Samples
    seed: int
    batch_size: int
    budget: int | None
    group: int

    def epoch(self, number: int) -> list[Step]:
        """Steps of an epoch, numbered within it; the last may have fewer batches."""
        batches = epoch_batches(self.samples, number, seed=self.seed, batch_size=self.batch_size, budget=self.budget)
        groups = [tuple(batches[at : at + self.group]) for at in range(0, len(batches), self.group)]
        return [Step(index, number, group) for index, group in enumerate(groups)]


def count_steps(course: Course, config: TrainingConfig) -> int:
    """Steps of a whole run."""
    if config.max_steps is not None:
        return config.max_steps
    whole, part = int(config.epochs), config.epochs % 1
    steps = sum(len(course.epoch(epoch)) for epoch in range(whole))
    return steps + math.ceil(part * len(course.epoch(whole))) if part else steps
