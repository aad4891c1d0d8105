"""Stands in for the kernel while it is being written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sample(logits: Tensor, s: Any) -> Tensor:
    tokens = []
    for row, x in enumerate(logits.float()):
        slot = int(s.slots[row])
        if slot >= 0:
            counts = s.counts[slot]
            seen = counts >= 0
            r = s.repetition[row]
            x = torch.where(seen, torch.where(x > 0, x / r, x * r), x)
            x = torch.where(counts > 0, x - (s.presence[row] + s.frequency[row] * counts), x)
        peak = x.max()
        if not bool(torch.isfinite(peak)):
            tokens.append(-1)
            continue
        if s.temperature[row] == 0:
            token = int(x.argmax())
        else:
            w = ((x - peak) / s.temperature[row]).exp().double()
            k = int(s.top_k[row])
            if 0 < k < len(x):
                w = torch.where(x >= x.topk(k).values[-1], w, 0.0)
            order = w.sort(descending=True, stable=True).indices
            before = w[order].cumsum(0) - w[order]
            if s.top_p[row] < 1:
                w[order[before >= s.top_p[row] * w.sum()]] = 0.0
            w = torch.where(w >= s.min_p[row], w, 0.0)
            total = w.cumsum(0)
            token = int(torch.searchsorted(total, total[-1] * s.u[row], right=True))
        tokens.append(token)
        if slot >= 0:
            s.counts[slot, token] = max(int(s.counts[slot, token]), 0) + 1
    return torch.tensor(tokens, dtype=torch.int32, device=logits.device)
