"""Measures on logits: how well a model predicts a text, and how far a second one strays from it.

    windows      token ids cut into consecutive pieces of one length
    perplexity   of one model
    compare      both perplexities, KL divergence, top-1 agreement, largest logit error: one pass over both

The protocol is llama-perplexity's: consecutive windows that share no context, an incomplete last one left out, and only
the second half of each scored, so that every scored token was predicted from at least half a window. (It puts a
beginning-of-text token in front of windows where the vocabulary asks for one; the vocabularies we read don't.)

A model is a callable from token ids to logits, `LLM.logits` for example. One window's logits of a model stand in memory
at a time; everything made from them is made a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenlet.errors import CheckpointError, RequestError

Logits = Callable[[Sequence[int]], Tensor]
"""Token ids [T] -> float logits [T, V] of every position, or of at least the last T - T // 2."""

Progress = Callable[[int, int, str], None]

WINDOW = 512
_BLOCK_ELEMENTS = 1 << 22  # of logits that are worked on at once: 16 MB in float32


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted.

    Attributes:
        value: e^(mean negative log-likelihood of a token): so many equally likely tokens would be as hard to guess.
        error: standard error of `value`, from the spread over tokens.
        tokens: how many were scored.
    """

    value: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of the other model's next-token distribution from the reference's, in nats a token.

    Attributes:
        mean, median, p99, maximum: over the scored tokens; p99 is exceeded by one in a hundred.
    """

    mean: float
    median: float
    p99: float
    maximum: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same windows.

    Attributes:
        reference, other: their perplexities.
        divergence: of the other from the reference.
        top1_agreement: share of tokens where both find the same next token most likely.
        max_logit_error: largest difference of any two logits.
    """

    reference: Perplexity
    other: Perplexity
    divergence: Divergence
    top1_agreement: float
    max_logit_error: float


def windows(ids: Sequence[int], size: int = WINDOW, limit: int | None = None) -> list[Sequence[int]]:
    """Consecutive windows of `size` tokens, the first `limit` of them; what doesn't fill a window is left out.

    Raises:
        RequestError: fewer tokens than one window, or windows too short to score half of one.
    """
    if size < 4 or (limit is not None and limit < 1):
        raise RequestError(f"{limit} windows of {size} tokens can't be scored: expected 1 or more, of 4 tokens or more")
    if len(ids) < size:
        raise RequestError(
            f"the text has {len(ids)} tokens, but one window needs {size}",
            hint="give a longer text, or smaller windows",
        )
    count = len(ids) // size
    return [ids[i * size : (i + 1) * size] for i in range(count if limit is None else min(limit, count))]


@torch.inference_mode()
def perplexity(model: Logits, pieces: Sequence[Sequence[int]], *, progress: Progress | None = None) -> Perplexity:
    """Perplexity of `model` over the second half of each window. `progress` gets (windows done, in all, what).

    Raises:
        CheckpointError: logits that are not finite.
        RequestError: no window.
    """
    losses = []
    for ids in _counted(pieces, progress):
        logits, targets = _scored(model, ids)
        losses += [_loss(block.log_softmax(-1), targets[rows]) for rows, block in _blocks(logits)]
    return _perplexity(torch.cat(losses))


@torch.inference_mode()
def compare(
    reference: Logits, other: Logits, pieces: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> Comparison:
    """Measures `other` against `reference` over the second half of each window.

    Raises:
        CheckpointError: logits that are not finite, or of different vocabularies.
        RequestError: no window.
    """
    losses, other_losses, divergences, agreements = [], [], [], []
    largest = 0.0
    for ids in _counted(pieces, progress):
        logits, targets = _scored(reference, ids)
        other_logits, _ = _scored(other, ids)
        if logits.shape != other_logits.shape:
            raise CheckpointError(
                f"the models know {logits.shape[1]} and {other_logits.shape[1]} tokens, so they can't be compared",
                hint="compare a model with a quantized form of itself",
            )
        for (rows, block), (_, other_block) in zip(_blocks(logits), _blocks(other_logits), strict=True):
            largest = max(largest, float((block - other_block).abs().max()))
            agreements.append(block.argmax(-1) == other_block.argmax(-1))
            log_p, log_q = block.log_softmax(-1), other_block.log_softmax(-1)
            losses.append(_loss(log_p, targets[rows]))
            other_losses.append(_loss(log_q, targets[rows]))
            divergences.append(_divergence(log_p, log_q))
    return Comparison(
        reference=_perplexity(torch.cat(losses)),
        other=_perplexity(torch.cat(other_losses)),
        divergence=_statistics(torch.cat(divergences)),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        max_logit_error=largest,
    )


# --------------------------------------------------------------------------------------------------------- a window


def _counted(pieces: Sequence[Sequence[int]], progress: Progress | None) -> Iterator[Sequence[int]]:
    if not pieces:
        raise RequestError("there is nothing to score: no windows were given")
    for done, ids in enumerate(pieces):
        if len(ids) < 4:
            raise RequestError(f"a window has {len(ids)} tokens, expected 4 or more")
        yield ids
        if progress is not None:
            progress(done + 1, len(pieces), "scoring")


def _scored(model: Logits, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [R, V] that predict the tokens behind the window's middle, and those tokens [R]."""
    first = len(ids) // 2
    logits = model(ids)
    wanted = len(ids) - first
    if logits.ndim != 2 or len(logits) < wanted:
        raise CheckpointError(f"logits have the shape {list(logits.shape)}, expected [{len(ids)}, vocabulary]")
    # the last position predicts what comes after the window
    return logits[-wanted:-1], torch.tensor(ids[first + 1 :], device=logits.device)


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time, in float32."""
    step = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        block = logits[rows].float()
        if not bool(block.isfinite().all()):
            raise CheckpointError(
                "the model gives logits that are not finite numbers",
                hint="its weights are damaged, or overflow this dtype; load it in float32, or quantize it again",
            )
        yield rows, block


# ----------------------------------------------------------------------------------------------------------- a token


def _loss(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods [R] in float64."""
    return -log_probabilities.gather(1, targets[:, None])[:, 0].double()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [R] in float64; rounding may not make it negative."""
    return (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).clamp_min(0.0)


def _perplexity(losses: Tensor) -> Perplexity:
    value = float(losses.mean().exp())
    spread = float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return Perplexity(value, value * spread, len(losses))


def _statistics(divergences: Tensor) -> Divergence:
    median, p99 = divergences.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return Divergence(float(divergences.mean()), median, p99, float(divergences.max()))
