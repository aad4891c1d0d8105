"""The loss in pieces is the loss: value and gradients against torch's own, over every kind of head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwenlet.model import Linear
from qwenlet.train.loss import IGNORED, head_loss

ROWS, HIDDEN, VOCABULARY = 13, 16, 50


def made(seed: int = 0) -> tuple[torch.Tensor, Linear, torch.Tensor]:
    torch.manual_seed(seed)
    head = Linear(HIDDEN, VOCABULARY, bias=False)
    nn.init.normal_(head.weight)
    targets = torch.randint(VOCABULARY, (ROWS,))
    targets[::4] = IGNORED
    return torch.randn(ROWS, HIDDEN, requires_grad=True), head, targets


class Wrapped(nn.Module):
    """A head that is no plain linear."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.out_features = head, head.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + 0.0


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_torchs_cross_entropy(chunk: int, wrapped: bool, frozen: bool):
    x, head, targets = made()
    head.weight.requires_grad_(not frozen)
    loss = head_loss(Wrapped(head) if wrapped else head, x, targets, chunk_elements=chunk)
    (loss * 0.25).backward()
    ours = [x.grad, head.weight.grad]
    x.grad = head.weight.grad = None
    expected = F.cross_entropy(head(x), targets, ignore_index=IGNORED, reduction="sum")
    (expected * 0.25).backward()
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(ours, [x.grad, head.weight.grad], strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)


def test_bfloat16_arithmetic_over_a_float32_weight_is_near():
    x, head, targets = made()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(head, x, targets)
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    expected = F.cross_entropy(head(x), targets, ignore_index=IGNORED, reduction="sum")
    assert abs(float((loss - expected).detach())) < 0.02 * float(expected.detach())


def test_the_logits_of_a_batch_are_never_whole():
    """400 rows of 20,000 logits are 32 MB in float32; the largest tensor that is made has 50 rows."""
    head = Linear(8, 20_000, bias=False)
    nn.init.normal_(head.weight)
    head.requires_grad_(False)
    x = torch.randn(400, 8, requires_grad=True)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype.is_floating_point:
                largest = max(largest, result.numel())
            return result

    with Sizes():
        head_loss(head, x, torch.zeros(400, dtype=torch.long), chunk_elements=1_000_000).backward()
    assert largest <= 1_000_000


def test_nothing_to_count_is_a_loss_of_nothing_with_a_gradient():
    x, head, _ = made()
    loss = head_loss(head, x, torch.full((ROWS,), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert x.grad is not None
    assert not x.grad.any()
    assert head.weight.grad is not None, "or processes that average it would wait for each other"
    assert not head.weight.grad.any()
