"""The step: same maths as model.py for one token of each row, over buffers that never move."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from qwenlet.decode.inputs import Inputs
from qwenlet.decode.plain import Turn
from qwenlet.decode.slots import Slots
from qwenlet.model import Attention, Block, FeedForward, Qwen


class Steps(Protocol):
    """A layer's operations, as `plain.Plain` defines them."""

    def embed(self, ids: Tensor) -> Tensor: ...

    def qkv(self, block: Block, x: Tensor) -> Tensor: ...

    def attend(self, attention: Attention, qkv: Tensor, turn: Turn, at: Inputs) -> Tensor: ...

    def add(self, linear: nn.Module, y: Tensor, x: Tensor) -> Tensor: ...

    def gated(self, norm: nn.Module, mlp: FeedForward, x: Tensor) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...

    def draw(self, logits: Tensor, at: Inputs) -> Tensor: ...


def step(model: Qwen, steps: Steps, slots: Slots, at: Inputs, tokens: Tensor) -> Tensor:
    """Stores a token of each row, and puts the next one into tokens [most rows] int32; logits [B, V].

    tokens: of the step before, which `at.source` names rows of.
    """
    before = tokens.index_select(0, at.source.clamp_min(0))
    ids = torch.where(at.source >= 0, before, at.ids).clamp_min(0)
    turn = slots.rotation(at.slots, at.positions)
    x = steps.embed(ids)
    for block in model.transformer.h:
        assert isinstance(block, Block)
        answer = steps.attend(block.attn, steps.qkv(block, x), turn, at)
        x = steps.add(block.attn.c_proj, answer, x)
        x = steps.add(block.mlp.c_proj, steps.gated(block.ln_2, block.mlp, x), x)
    logits = steps.logits(x)
    tokens[: len(ids)] = steps.draw(logits, at)
    return logits
