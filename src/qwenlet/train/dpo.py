"""Direct preference optimization (arXiv:2305.18290): the reply that was chosen becomes likelier beside the one that was
rejected, measured against what the model said before training.

    loss of a pair = -log sigmoid(beta * (margin - margin before)),  margin = log p(chosen) - log p(rejected)

There is no second model: what was before is the model with its new adapter switched off, asked once for each pair.
Where that can't be (full training, modules that train as a whole, an adapter that is trained further), `prepare` asks
for all pairs before the first step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenlet.lora.layers import adapter_off
from qwenlet.model import Qwen
from qwenlet.train.batches import Batch, Course
from qwenlet.train.loss import IGNORED, token_losses
from qwenlet.train.objective import rows_of
from qwenlet.train.preferences import Pairs

Progress = Callable[[int, int, str], None]


class Preference:
    """The objective of DPO: batches are of pairs.

    Args:
        beta: how dear it is to leave the model as it was; 0.1 as published.
    """

    def __init__(self, pairs: Pairs, beta: float = 0.1) -> None:
        self.pairs, self.beta = pairs, beta
        self._before = torch.full((len(pairs),), torch.nan, dtype=torch.float64)

    def course(self, *, seed: int, batch_size: int, budget: int | None, group: int) -> Course:
        return Course(self.pairs.both, seed, batch_size, budget, group)

    def weight(self, batch: Batch) -> int:
        return len(batch)

    def tokens(self, batch: Batch) -> int:
        lengths = self.pairs.both.lengths
        return int(sum(lengths[index] for index in batch))

    def where(self, batch: Batch) -> list[str]:
        return [self.pairs.each.where[2 * index] for index in batch]

    def loss(self, model: Qwen, batch: Batch, device: torch.device) -> Tensor:
        before = self._margins_before(model, batch, device)
        return -F.logsigmoid(self.beta * (self.margins(model, batch, device) - before)).sum()

    def margins(self, model: Qwen, batch: Batch, device: torch.device) -> Tensor:
        """log p(chosen) - log p(rejected) of each pair, float32 [len(batch)]; of the last replies, prompts given."""
        each = tuple(at for index in batch for at in (2 * index, 2 * index + 1))
        ids, targets, rows = rows_of(self.pairs.each, each, model, device)
        counted = targets != IGNORED
        losses = token_losses(model.lm_head, model.hidden(ids, rows)[counted], targets[counted])
        row_of = torch.arange(len(each), device=device).repeat_interleave(torch.tensor(rows.lengths, device=device))
        likely = torch.zeros(len(each), device=device).index_add(0, row_of[counted], -losses)
        return likely[0::2] - likely[1::2]

    def gains(self, model: Qwen, batch: Batch, device: torch.device) -> Tensor:
        """What training changed of the margins, float32 [len(batch)]: above 0 where the chosen reply gained."""
        with torch.no_grad():
            return self.margins(model, batch, device) - self._margins_before(model, batch, device)

    @torch.no_grad()
    def prepare(self, model: Qwen, device: torch.device, batch_size: int = 1, progress: Progress | None = None) -> None:
        """Takes the model as it is now for what was before, nothing of it dropped out."""
        training = model.training
        model.eval()
        for pairs in torch.arange(len(self.pairs)).split(batch_size):
            batch = tuple(pairs.tolist())
            self._before[pairs] = self.margins(model, batch, device).double().cpu()
            if progress is not None:
                progress(batch[-1] + 1, len(self.pairs), "what the model prefers")
        model.train(training)

    def _margins_before(self, model: Qwen, batch: Batch, device: torch.device) -> Tensor:
        pairs = torch.tensor(batch)
        if bool(self._before[pairs].isnan().any()):
            with torch.no_grad(), adapter_off(model):
                self._before[pairs] = self.margins(model, batch, device).double().cpu()
        return self._before[pairs].to(device, torch.float32)
