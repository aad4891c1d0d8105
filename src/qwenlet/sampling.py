"""From logits to a token: small functions, composed in one place.

    penalize -> bias -> greedy, or temperature -> top-k -> top-p -> min-p -> draw

Everything looks at one row [V] of float32 logits, so a request's tokens can't depend on its neighbours. On a CPU
all of it is one native call for many rows (`choose_all`); the functions are its definition, and what runs elsewhere.
Randomness is counter-based: a draw is a function of (seed, choice, position) alone, so pausing, batching or resuming
can't shift it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwenlet.config import SamplingParams
from qwenlet.errors import RequestError
from qwenlet.ops import cpu

# Dividing by less than this leaves one token anyway, and float32 runs out of range.
_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token under the model's own distribution, before penalties and temperature.

    `top` holds the most likely alternatives (id, log-probability), best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenCounts:
    """Which tokens a request has seen, for the penalties, on the CPU. Built only when a penalty is on.

    Attributes:
        seen: how many different tokens.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        ids = list(dict.fromkeys(prompt))
        self._places = {token: place for place, token in enumerate(ids)}
        self._ids = torch.tensor(ids, dtype=torch.long)
        self._replied = torch.zeros(len(ids))
        self.seen = len(ids)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self.seen)
        if place == self.seen:
            if place == len(self._ids):  # room for as many again
                self._ids = torch.cat([self._ids, self._ids.new_zeros(place + 16)])
                self._replied = torch.cat([self._replied, self._replied.new_zeros(place + 16)])
            self._ids[place] = token_id
            self.seen += 1
        self._replied[place] += 1

    @property
    def ids(self) -> Tensor:
        """[seen] int64, each once."""
        return self._ids[: self.seen]

    @property
    def replied(self) -> Tensor:
        """[seen] float32: how often each stands in the reply."""
        return self._replied[: self.seen]

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where `ids` and `replied` lie, and how many they are; until the next `add`."""
        return self._ids.data_ptr(), self._replied.data_ptr(), self.seen


def is_greedy(params: SamplingParams) -> bool:
    return (params.temperature or 0.0) < _GREEDY_BELOW


def needs_counts(params: SamplingParams) -> bool:
    return params.repetition_penalty not in (None, 1.0) or bool(params.presence_penalty or params.frequency_penalty)


def penalize(logits: Tensor, counts: TokenCounts, params: SamplingParams) -> Tensor:
    """Repetition penalty over prompt and reply: divides positive logits, multiplies others (CTRL, arXiv:1909.05858).
    Presence and frequency penalties over the reply alone: subtracted once, or per occurrence."""
    penalty = params.repetition_penalty or 1.0
    ids, replied = counts.ids.to(logits.device), counts.replied.to(logits.device)
    values = logits[ids]
    if penalty != 1.0:
        values = torch.where(values > 0, values / penalty, values * penalty)
    values = values - (params.presence_penalty * (replied > 0) + params.frequency_penalty * replied)
    return logits.index_copy(0, ids, values)


class Bias:
    """What is added to the logits of some tokens. Made once for all tokens of a request, as it may hold many.

    Args:
        amounts: by token id; ids beyond the vocabulary are left out.
    """

    def __init__(self, amounts: Mapping[int, float], vocab_size: int) -> None:
        known = {id: amount for id, amount in amounts.items() if id < vocab_size}
        self._ids = torch.tensor(list(known), dtype=torch.long)
        self._amounts = torch.tensor(list(known.values()), dtype=torch.float32)

    def added_to(self, logits: Tensor) -> Tensor:
        """New logits [V] float32."""
        if self._ids.device != logits.device:
            self._ids, self._amounts = self._ids.to(logits.device), self._amounts.to(logits.device)
        return logits.index_add(0, self._ids, self._amounts)


def bias_of(params: SamplingParams, vocab_size: int, banned: Collection[int] = ()) -> Bias | None:
    """`params.logit_bias`, and `banned` token ids ruled out; None where there is neither."""
    assert not isinstance(params.logit_bias, str), "SamplingParams keeps a mapping"
    amounts = {**(params.logit_bias or {}), **dict.fromkeys(banned, -math.inf)}
    return Bias(amounts, vocab_size) if amounts else None


def top_k(logits: Tensor, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor | None]:
    """The k most likely of the tokens kept so far, and what is as likely as the k-th: (their logits, their ids); ids
    None stands for all, in order."""
    if not 0 < k < logits.shape[0]:
        return logits, ids
    places = (logits >= logits.topk(k).values[-1]).nonzero()[:, 0]
    return logits[places], places if ids is None else ids[places]


def top_p(logits: Tensor, ids: Tensor | None, p: float) -> tuple[Tensor, Tensor | None]:
    """The smallest set of most likely tokens whose probabilities reach p (arXiv:1904.09751). Exact, and without sorting
    the whole vocabulary: by widening the head of the order until it carries p."""
    if p >= 1.0:
        return logits, ids
    total = logits.logsumexp(0)
    size, width = logits.shape[0], 128
    while True:
        width = min(width, size)
        values, places = logits.topk(width)
        mass = (values - total).exp().cumsum(0, dtype=torch.float64)
        if width == size or mass[-1] >= p:
            break
        width *= 16
    kept = min(int((mass < p).sum()) + 1, width)
    places = places[:kept]
    return values[:kept], places if ids is None else ids[places]


def min_p(logits: Tensor, ids: Tensor | None, p: float) -> tuple[Tensor, Tensor | None]:
    """Tokens at least p times as likely as the most likely one (arXiv:2407.01082)."""
    if p <= 0.0:
        return logits, ids
    keep = (logits >= logits.max() + float(np.log(p))).nonzero()[:, 0]
    return logits[keep], keep if ids is None else ids[keep]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone: Philox 4x64 (Salmon et al., SC 2011)."""
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([position, choice, 0, 0], np.uint64))
    return float((int(bits.random_raw()) >> 11) * 2.0**-53)


def draw(logits: Tensor, ids: Tensor | None, u: float) -> int:
    """Inverse of the cumulative distribution at u, over kept tokens in the order of their ids."""
    if ids is not None:
        ids, order = ids.sort()
        logits = logits[order]
    mass = (logits - logits.max()).double().exp().cumsum(0)
    place = int(torch.searchsorted(mass, mass[-1] * u, right=True))
    place = min(place, logits.shape[0] - 1)
    return place if ids is None else int(ids[place])


def choose(
    logits: Tensor,
    params: SamplingParams,
    counts: TokenCounts | None,
    choice: int,
    position: int,
    bias: Bias | None = None,
) -> int:
    """One token for one row.

    Args:
        logits: [V] float32.
        params: resolved (no None among the sampling fields), with a seed if it draws.
        counts: needed if `needs_counts(params)`.
        position: place of the new token in its row.
        bias: what `bias_of` gives; None: that of `params` alone.
    Raises:
        RequestError: the logits hold NaN or infinity, so no token can be chosen.
    """
    if bias is None and params.logit_bias:
        bias = bias_of(params, len(logits))
    native = draws_natively(logits)
    if counts is not None and (bias is not None or not native):  # the native draw knows no bias
        logits, counts = penalize(logits, counts, params), None
    if bias is not None:
        logits = bias.added_to(logits)
    if native:
        return checked(choose_all([Row(logits, params, counts, choice, position)])[0], logits)
    peak = logits.max()
    if not math.isfinite(peak):  # max passes NaN on
        checked(-1, logits)
    if is_greedy(params):
        return int(logits.argmax())
    # shifted first, so that a temperature near zero can't overflow
    kept: tuple[Tensor, Tensor | None] = ((logits - peak) / (params.temperature or 1.0), None)
    kept = top_k(*kept, params.top_k or 0)
    kept = top_p(*kept, 1.0 if params.top_p is None else params.top_p)
    kept = min_p(*kept, params.min_p or 0.0)
    return draw(*kept, uniform(params.seed or 0, choice, position))


@dataclass(frozen=True)
class Row:
    """What `choose` needs to know of a row."""

    logits: Tensor
    params: SamplingParams
    counts: TokenCounts | None
    choice: int
    position: int


def draws_natively(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and cpu.status().isa is not None


def choose_all(rows: Sequence[Row]) -> list[int]:
    """A token for each row by the kernels, all rows at once; for `checked`.

    No two rows share their logits: these hold the penalties while they are drawn from, and are as they were afterwards.
    """
    held = [row.logits.contiguous() for row in rows]
    numbers: list[int] = []
    settings: list[float] = []
    for row, logits in zip(rows, held, strict=True):
        params, counts = row.params, row.counts
        seen = (0, 0, 0) if counts is None else counts.addresses
        seed = params.seed or 0
        chance = (seed - (seed >> 63 << 64), row.choice, row.position)  # the seed's 64 bits, as an int64
        size = logits.shape[0]
        top = min(params.top_k or 0, size)  # a k beyond the vocabulary cuts nothing, and may exceed 64 bits
        numbers += (logits.data_ptr(), size, *seen, top, *chance)
        settings += (
            params.repetition_penalty or 1.0,
            params.presence_penalty,
            params.frequency_penalty,
            0.0 if is_greedy(params) else params.temperature or 0.0,
            1.0 if params.top_p is None else params.top_p,
            params.min_p or 0.0,
        )
    return cpu.draw(numbers, settings)


def checked(token: int, logits: Tensor) -> int:
    """The token; raises RequestError if it is the -1 of a row without a finite largest logit."""
    if token >= 0:
        return token
    raise RequestError(
        f"the model's largest logit is {float(logits.max())}, so no token can be chosen",
        hint="float16 overflows in places where bfloat16 and float32 don't; load with dtype='bf16' or 'fp32'",
    )


def token_logprob(logits: Tensor, token_id: int, alternatives: int) -> TokenLogprob:
    """Log-probability of `token_id` under logits [V] float32, and of so many most likely tokens."""
    total = logits.logsumexp(0)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, ids = logits.topk(min(alternatives, logits.shape[0]))
        top = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
    return TokenLogprob(token_id, float(logits[token_id] - total), top)
