"""What a run makes smaller: the cross-entropy of the next token, over some samples."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from qwenlet.cache import Rows
from qwenlet.model import Qwen
from qwenlet.train.batches import Batch, Course
from qwenlet.train.loss import IGNORED, head_loss
from qwenlet.train.samples import Samples


class Objective(Protocol):
    """Samples and a loss over them, which a run learns from or measures."""

    def course(self, *, seed: int, batch_size: int, budget: int | None, group: int) -> Course:
        """The batches, in the order of a run."""
        ...

    def weight(self, batch: Batch) -> int:
        """What a batch counts for: its tokens that are foretold, or its pairs."""
        ...

    def tokens(self, batch: Batch) -> int:
        """What a batch is to compute."""
        ...

    def loss(self, model: Qwen, batch: Batch, device: torch.device) -> Tensor:
        """The sum over what the batch counts for; a step divides by the weight of all its batches."""
        ...

    def where(self, batch: Batch) -> list[str]:
        """Files and lines it came from."""
        ...


class NextToken:
    """Every learned token is foretold from all of its sample that stands before it."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def course(self, *, seed: int, batch_size: int, budget: int | None, group: int) -> Course:
        return Course(self.samples, seed, batch_size, budget, group)

    def weight(self, batch: Batch) -> int:
        return sum(self.samples.targets(index) for index in batch)

    def tokens(self, batch: Batch) -> int:
        return int(sum(self.samples.lengths[index] for index in batch))

    def where(self, batch: Batch) -> list[str]:
        return [self.samples.where[index] for index in batch]

    def loss(self, model: Qwen, batch: Batch, device: torch.device) -> Tensor:
        ids, targets, rows = rows_of(self.samples, batch, model, device)
        return head_loss(model.lm_head, model.hidden(ids, rows), targets)


def rows_of(samples: Samples, batch: Batch, model: Qwen, device: torch.device) -> tuple[Tensor, Tensor, Rows]:
    """ids [N] and targets [N] int64, row after row: a target is the id behind, where that is learned."""
    ids, targets, lengths = [], [], []
    for index in batch:
        mapped = samples[index]  # of a file that can't be written, in 16 bits
        tokens, learned = torch.from_numpy(mapped[0].astype("int64")), torch.from_numpy(mapped[1].copy())
        wanted = torch.full((len(tokens),), IGNORED, dtype=torch.long)
        wanted[:-1] = torch.where(learned[1:], tokens[1:], IGNORED)
        ids.append(tokens)
        targets.append(wanted)
        lengths.append(len(tokens))
    rows = Rows.fresh(lengths, [model.config.ntk_alpha(length) for length in lengths], device)
    return torch.cat(ids).to(device), torch.cat(targets).to(device), rows


class Learner(nn.Module):
    """A model and its objective as one module, so that what wraps modules sees the whole way to the loss.

    Args:
        dtype: of the arithmetic; what is kept in float32 is rounded on the way.
    """

    def __init__(
        self, model: Qwen, objective: Objective, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model, self.objective, self.device, self.dtype = model, objective, device, dtype

    def forward(self, batch: Batch, objective: Objective | None = None) -> Tensor:
        with nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype):
            return (objective or self.objective).loss(self.model, batch, self.device)
