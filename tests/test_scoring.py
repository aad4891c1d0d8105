"""Measures on logits, against the definitions written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenlet import scoring
from qwenlet.errors import CheckpointError, RequestError
from qwenlet.scoring import Divergence, Perplexity, compare, perplexity, windows


class Table:
    """A model whose logits are random numbers that depend on the window; `calls` counts how often it ran."""

    def __init__(self, vocabulary: int, seed: int = 0, scale: float = 3.0) -> None:
        self.vocabulary, self.seed, self.scale, self.calls = vocabulary, seed, scale, 0

    def __call__(self, ids: object) -> torch.Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.seed + hash(tuple(ids)) % 10_000)
        return self.scale * torch.randn(len(ids), self.vocabulary, generator=generator)


def direct(reference, other, pieces):
    """Per-token losses, divergences and agreements, one position after the other, in float64."""
    losses, other_losses, divergences, same, errors = [], [], [], [], []
    for ids in pieces:
        p, q = reference(ids).double(), other(ids).double()
        for position in range(len(ids) // 2, len(ids) - 1):
            log_p, log_q = p[position].log_softmax(0), q[position].log_softmax(0)
            target = ids[position + 1]
            losses.append(-log_p[target])
            other_losses.append(-log_q[target])
            divergences.append((log_p.exp() * (log_p - log_q)).sum())
            same.append(p[position].argmax() == q[position].argmax())
            errors.append((p[position] - q[position]).abs().max())
    return (torch.stack([torch.as_tensor(x).double() for x in row]) for row in
            (losses, other_losses, divergences, same, errors))  # fmt: skip


@given(
    size=st.integers(4, 40), count=st.integers(1, 4), vocabulary=st.integers(2, 50), block=st.integers(1, 2000),
    seed=st.integers(0, 99), scale=st.floats(0.01, 30),
)  # fmt: skip
def test_every_measure_is_its_definition(size, count, vocabulary, block, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (size * count,), generator=generator).tolist()
    reference, other = Table(vocabulary, seed, scale), Table(vocabulary, seed + 1, scale)
    pieces = windows(ids, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_BLOCK_ELEMENTS", block)
        found = compare(reference, other, pieces)
        alone = perplexity(other, pieces)

    losses, other_losses, divergences, same, errors = direct(reference, other, pieces)
    assert found.reference.tokens == len(losses) == count * (size - size // 2 - 1)
    assert found.reference.value == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert found.other.value == pytest.approx(float(other_losses.mean().exp()), rel=1e-4)
    assert found.divergence.mean == pytest.approx(float(divergences.mean()), rel=1e-4, abs=1e-6)
    assert found.divergence.maximum == pytest.approx(float(divergences.max()), rel=1e-4, abs=1e-6)
    assert found.divergence.median == pytest.approx(float(divergences.quantile(0.5)), rel=1e-4, abs=1e-6)
    assert found.top1_agreement == pytest.approx(float(same.mean()))
    assert found.max_logit_error == pytest.approx(float(errors.max()), rel=1e-5)
    assert alone == found.other


def test_standard_error_is_that_of_the_mean_loss_carried_to_the_perplexity():
    # a vocabulary of two, and logits that give the next token 3/4 or 1/4
    def model(ids):
        rows = [[math.log(3.0), 0.0]] * len(ids)
        return torch.tensor(rows)

    found = perplexity(model, [[0, 0, 0, 0, 0, 0, 1, 0, 1]])  # scored: positions 4 to 7, targets 0 1 0 1
    losses = torch.tensor([-math.log(3 / 4), -math.log(1 / 4)] * 2, dtype=torch.float64)
    assert found.tokens == 4
    assert found.value == pytest.approx(float(losses.mean().exp()))
    assert found.error == pytest.approx(found.value * float(losses.std()) / 2)


def test_a_model_does_not_diverge_from_itself():
    found = compare(Table(1000), Table(1000), windows(list(range(400)), 100))
    assert found.divergence == Divergence(0.0, 0.0, 0.0, 0.0)
    assert (found.top1_agreement, found.max_logit_error) == (1.0, 0.0)
    assert found.reference == found.other


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    assert perplexity(lambda ids: torch.zeros(len(ids), 64), windows([0] * 32, 16)) == Perplexity(
        pytest.approx(64), 0.0, 14
    )


def test_the_last_rows_are_enough():
    whole = Table(30)
    pieces = windows(list(range(30)), 15)
    assert perplexity(lambda ids: whole(ids)[7:], pieces) == perplexity(whole, pieces)
    with pytest.raises(CheckpointError, match="shape"):
        perplexity(lambda ids: whole(ids)[8:], pieces)


def test_half_precision_is_measured_in_float32():
    whole = Table(30)
    pieces = windows(list(range(30)), 15)
    rounded = perplexity(lambda ids: whole(ids).bfloat16(), pieces)
    assert rounded == perplexity(lambda ids: whole(ids).bfloat16().float(), pieces)


def test_windows_are_consecutive_and_full():
    assert windows(list(range(11)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(list(range(11)), 4, limit=1) == [[0, 1, 2, 3]]
    with pytest.raises(RequestError, match="11 tokens, but one window needs 12"):
        windows(list(range(11)), 12)
    for size, limit in ((3, None), (4, 0)):
        with pytest.raises(RequestError, match="can't be scored"):
            windows(list(range(11)), size, limit)


def test_each_model_runs_once_a_window_and_progress_is_told():
    reference, other, seen = Table(8), Table(8, seed=1), []
    compare(reference, other, windows([1] * 12, 4), progress=lambda *told: seen.append(told))
    assert (reference.calls, other.calls) == (3, 3)
    assert seen == [(1, 3, "scoring"), (2, 3, "scoring"), (3, 3, "scoring")]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_error_and_no_number(bad):
    def broken(ids):
        logits = torch.zeros(len(ids), 8)
        logits[-2, 5] = bad
        return logits

    with pytest.raises(CheckpointError, match="not finite"):
        perplexity(broken, [[1] * 8])
    with pytest.raises(CheckpointError, match="not finite"):
        compare(Table(8), broken, [[1] * 8])


def test_models_of_different_vocabularies_and_empty_work_are_refused():
    with pytest.raises(CheckpointError, match="know 8 and 9 tokens"):
        compare(Table(8), Table(9), [[1] * 8])
    for measure in (lambda pieces: perplexity(Table(8), pieces), lambda pieces: compare(Table(8), Table(8), pieces)):
        with pytest.raises(RequestError, match="nothing to score"):
            measure([])
        with pytest.raises(RequestError, match="3 tokens"):
            measure([[1, 2, 3]])
