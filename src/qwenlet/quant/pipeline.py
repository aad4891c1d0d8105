"""A checkpoint -> a quantized checkpoint, one layer in memory at a time.

With method "rtn" every weight is rounded by itself. With "gptq" the calibration's hidden states walk through the model:

    embed -> for each layer: attention half: c_attn, then c_proj          each calibrated on what the codes found so far
                             feed-forward half: w1 and w2, then c_proj    make of the samples (true-sequential)
          -> final norm -> head -> write the folder

A finished layer is kept in a work folder (workfolder.py). A run that goes on there sends the hidden states through the
finished layers again and then has the same numbers as an unbroken one.

Memory: one layer and the hidden states (tokens * hidden size) in float32, and the largest Hessian five times over.
Left out: the algorithm (gptq.py), the files' layout (checkpoint/quantized.py), quality (report.py).

Dimension letters: T calibration tokens, C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwenlet.cache import NoPast, Rows
from qwenlet.checkpoint import Checkpoint, Progress, Rounding, fit_layout, rounding_of, write_quantized
from qwenlet.checkpoint.files import read_parts
from qwenlet.checkpoint.load import plan_reading
from qwenlet.checkpoint.save import refuse_existing
from qwenlet.config import ModelConfig, QuantConfig
from qwenlet.config.quant import HEAD
from qwenlet.errors import CheckpointError, RequestError
from qwenlet.model import Block, Rotation
from qwenlet.ops.packing import QuantTensor
from qwenlet.quant.calibration import Calibration
from qwenlet.quant.gptq import Hessian, gptq
from qwenlet.quant.outcome import Outcome, recorded, run_of
from qwenlet.quant.workfolder import WeightError, WorkFolder

# Tokens of one forward call: enough to fill the matrix products, few enough for the feed-forward's wide rows.
_BATCH_TOKENS = 4096
_SLICE_ROWS = 4096  # of a weight that is rounded at a time

Half = Callable[[Tensor, Rotation, NoPast], Tensor]
Inputs = tuple[str, ...]
"""Linears that read the same inputs, and so share a Hessian."""


def quantize(
    source: str | Path,
    out: str | Path,
    quant: QuantConfig,
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
) -> Outcome:
    """Writes the checkpoint at `source`, quantized, into the new folder `out`, with a record of the run.

    Args:
        calibration: what GPTQ needs; round to nearest looks at none.
        progress: called with (steps done, steps in all, what).
    Raises:
        ConfigError: a group size that does not divide a layer.
        CheckpointError: `out` exists; the source is damaged, quantized already, or holds NaN; a layer doesn't fit the
            layout; an earlier run with other settings left its work beside `out`; a file could not be written (finished
            layers stay).
        RequestError: no calibration for GPTQ, or samples that the model can't take.
    """
    out = Path(out).resolve()
    refuse_existing(out)
    checkpoint = Checkpoint.open(source)
    if checkpoint.quant is not None:
        raise CheckpointError(f"{source} is quantized already", hint="quantize the original model")
    quant = fit_layout(quant, checkpoint.config)
    if quant.method == "rtn":
        outcome, run = Outcome(out, quant, None), run_of(checkpoint, quant, None)
        nearest = _nearest(rounding_of(checkpoint, quant, progress), outcome.errors)
        write_quantized(checkpoint, out, quant, nearest, beside=lambda at: outcome.record(at, run), progress=progress)
        return outcome
    if calibration is None:
        raise RequestError("GPTQ needs a calibration text", hint="make one with load_calibration, or use method='rtn'")
    _check_samples(calibration, checkpoint.config)
    outcome, run = Outcome(out, quant, calibration), run_of(checkpoint, quant, calibration)
    with WorkFolder(out, _of_layers(run)) as work:
        with torch.inference_mode():
            _Walk(checkpoint, outcome, calibration, work, progress or _silent).run()
        saved = _saved(work, quant)
        write_quantized(checkpoint, out, quant, saved, beside=lambda at: outcome.record(at, run), progress=progress)
        work.remove()
    return outcome


def _silent(done: int, total: int, what: str) -> None: ...


def _check_samples(calibration: Calibration, config: ModelConfig) -> None:
    largest, longest = (max(int(of(sample)) for sample in calibration.samples) for of in (torch.max, len))
    if largest >= config.vocab_size:
        raise RequestError(f"the calibration holds the id {largest}, the model knows {config.vocab_size} ids")
    if longest > config.seq_length:
        raise RequestError(
            f"a calibration sample has {longest} tokens, but the model was trained on {config.seq_length}",
            hint="use a smaller --max-length",
        )


def unmeasured(
    source: str | Path, out: str | Path, quant: QuantConfig, calibration: Calibration | None = None
) -> Outcome | None:
    """What `quantize` with the same arguments has written into `out` before, if its quality is still to be measured."""
    out, checkpoint = Path(out).resolve(), Checkpoint.open(source)
    quant = fit_layout(quant, checkpoint.config)
    errors = recorded(out, run_of(checkpoint, quant, calibration))
    return None if errors is None else Outcome(out, quant, calibration, errors)


_OUTSIDE = ("head_bits", "head_group_size", "embedding_bits")  # the layers: another run may choose anew


def _of_layers(run: dict[str, Any]) -> dict[str, Any]:
    """What the codes of the layers depend on; how the head was quantized is in its part's name."""
    return {name: value for name, value in run.items() if name not in _OUTSIDE}


def _nearest(rounding: Rounding, errors: list[WeightError]) -> Callable[[str, Tensor], QuantTensor]:
    def weight_of(name: str, weight: Tensor) -> QuantTensor:
        with _naming(name):
            rounded = rounding.linear(name, weight)
        lost, total = 0.0, 0.0
        for rows, floats in zip(_pieces(rounded), weight.split(_SLICE_ROWS), strict=True):
            lost += float((rows.dequantize() - floats).square().sum())
            total += float(floats.float().square().sum())
        errors.append(WeightError(name, math.sqrt(lost / total) if total else 0.0))
        return rounded

    return weight_of


def _pieces(weight: QuantTensor) -> Iterator[QuantTensor]:
    """Some rows at a time, so that the floats they stand for need no copy of the whole."""
    for at in range(0, len(weight.codes), _SLICE_ROWS):
        rows = slice(at, at + _SLICE_ROWS)
        zeros = None if weight.zeros is None else weight.zeros[rows]
        yield replace(weight, codes=weight.codes[rows], scales=weight.scales[rows], zeros=zeros)


def _saved(work: WorkFolder, quant: QuantConfig) -> Callable[[str, Tensor], QuantTensor]:
    """Hands out what the walk found, a layer's file read once."""
    held: dict[str, QuantTensor] = {}

    def weight_of(name: str, weight: Tensor) -> QuantTensor:
        nonlocal held
        if name not in held:
            held = work.load(_head_part(quant) if name == HEAD else _part(name))[0]
        return held[name]

    return weight_of


def _grid(quant: QuantConfig, name: str) -> tuple[int, int]:
    kind = quant.of_linear(name)
    assert kind is not None, f"{name} stays float"
    bits, group_size = kind
    assert group_size is not None, "the group size is fitted to the model"
    return bits, group_size


def _part(name: str) -> str:
    """The work folder's file for a layer's linear: transformer.h.3.mlp.w1 -> layer-003."""
    return f"layer-{int(name.split('.')[2]):03d}"


def _head_part(quant: QuantConfig) -> str:
    """... and for the head: lm_head-4-32."""
    return "-".join(map(str, (HEAD, *_grid(quant, HEAD))))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the linear's name in front of what went wrong."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.message}", hint=error.hint) from None


class _Reached(Exception):
    """The last input that was wanted has been seen; what comes behind it need not be computed."""


@dataclass(frozen=True)
class _Batch:
    """Some samples of the calibration: which hidden states are theirs, and their rows."""

    states: slice
    rows: Rows


class _Walk:
    """The calibration's hidden states on their way through the model."""

    def __init__(
        self, checkpoint: Checkpoint, outcome: Outcome, calibration: Calibration, work: WorkFolder, progress: Progress
    ) -> None:
        self.config, self.quant, self.outcome, self.work = checkpoint.config, outcome.quant, outcome, work
        self.weights = checkpoint.weights()
        self.model, self.plan = plan_reading(checkpoint, self.weights, [])
        self.batches = _batches(calibration.samples)
        self.states = self._read("transformer.wte.weight")[torch.cat(calibration.samples)].float()  # (T, C)
        self.progress = progress
        self.passes, self.passes_in_all = 0, self.config.num_hidden_layers * _PASSES[self.quant.true_sequential] + 1

    def run(self) -> None:
        layers = [f"transformer.h.{layer}." for layer in range(self.config.num_hidden_layers)]
        finished = [self.work.has(_part(prefix)) for prefix in layers]
        self.outcome.resumed = sum(finished)
        head = [] if self.quant.head_bits is None else [_head_part(self.quant)]
        head_left = [part for part in head if not self.work.has(part)]
        if not all(finished) or head_left:
            for prefix, known in zip(layers, finished, strict=True):
                self._layer(prefix, known)
        for part in head_left:
            self._head(part)
        for part in [_part(prefix) for prefix in layers] + head:
            self.outcome.errors += self.work.load(part)[1]

    def _read(self, name: str) -> Tensor:
        """A weight as it is stored, mapped where it can be; float32 where it is stored in codes."""
        parts = self.plan[name]
        return read_parts(self.weights, parts, self.weights.stored_dtype(parts[0].name) or torch.float32)

    # ---------------------------------------------------------------------------------------------- a layer

    def _layer(self, prefix: str, known: bool) -> None:
        """The hidden states through one layer, which is quantized on the way unless an earlier run has done it."""
        layer = int(prefix.split(".")[2])
        block = self.model.transformer.h[layer]
        assert isinstance(block, Block)
        what = f"layer {layer + 1} of {self.config.num_hidden_layers}"
        for name, _ in list(block.named_parameters()):
            _assign(block, name, self._read(prefix + name).float())
        found: dict[str, QuantTensor] = {}
        errors: list[WeightError] = []
        if known:
            for name, weight in self.work.load(_part(prefix))[0].items():
                _assign(block, f"{name.removeprefix(prefix)}.weight", weight.dequantize())
        for half, rounds in _halves(block, self.quant.true_sequential):
            for inputs in [] if known else rounds:
                for names, hessian in zip(inputs, self._hessians(block, half, inputs, what), strict=True):
                    for name in names:
                        linear = _linear(block, name)
                        found[prefix + name] = self._solve(prefix + name, linear.weight, hessian, errors)
                        linear.weight.data = found[prefix + name].dequantize()
            for batch in self._passing(what):
                self.states[batch.states] = self._run(half, batch)
        if not known:
            self.work.save(_part(prefix), found, errors)
        block.to("meta")
        self.passes = (layer + 1) * _PASSES[self.quant.true_sequential]  # a known layer needed fewer

    def _hessians(self, block: Block, half: Half, inputs: Sequence[Inputs], what: str) -> list[Hessian]:
        """One for each of `inputs`, over all samples; nothing behind the last of them is computed."""
        linears = [_linear(block, names[0]) for names in inputs]
        hessians = [Hessian(linear.in_features) for linear in linears]

        def seen(which: int, arguments: tuple[Tensor, ...]) -> None:
            hessians[which].add(arguments[0])
            if which == len(hessians) - 1:
                raise _Reached

        hooks = [
            linear.register_forward_pre_hook(lambda _, arguments, which=which: seen(which, arguments))
            for which, linear in enumerate(linears)
        ]
        try:
            for batch in self._passing(what):
                with suppress(_Reached):
                    self._run(half, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return hessians

    def _run(self, half: Half, batch: _Batch) -> Tensor:
        return half(self.states[batch.states], Rotation(self.config, batch.rows, extend=True), NoPast(batch.rows))

    def _head(self, part: str) -> None:
        norm = self.model.transformer.ln_f
        _assign(norm, "weight", self._read("transformer.ln_f.weight").float())
        hessian = Hessian(self.config.hidden_size)
        for batch in self._passing(HEAD):
            hessian.add(norm(self.states[batch.states]))
        errors: list[WeightError] = []
        weight = self._read("transformer.wte.weight" if self.config.tie_word_embeddings else f"{HEAD}.weight")
        self.work.save(part, {HEAD: self._solve(HEAD, weight, hessian, errors)}, errors)

    # ---------------------------------------------------------------------------------------------- pieces

    def _solve(self, name: str, weight: Tensor, hessian: Hessian, errors: list[WeightError]) -> QuantTensor:
        bits, group_size = _grid(self.quant, name)
        with _naming(name):
            solution = gptq(
                weight,
                hessian,
                bits,
                group_size,
                sym=self.quant.sym,
                mse=self.quant.mse,
                desc_act=self.quant.desc_act,
                static_groups=self.quant.static_groups,
                damp_percent=self.quant.damp_percent,
            )
        errors.append(WeightError(name, solution.error, solution.damp_percent, solution.dead_columns))
        return solution.weight

    def _passing(self, what: str) -> Iterator[_Batch]:
        """All batches, with the progress of the whole run. A pass over a layer's inputs is the unit of time."""
        count = len(self.batches)
        for i, batch in enumerate(self.batches):
            yield batch
            self.progress(self.passes * count + i + 1, self.passes_in_all * count, what)
        self.passes += 1


def _halves(block: Block, sequential: bool) -> list[tuple[Half, list[list[Inputs]]]]:
    """What the hidden states go through one after the other, and for each the rounds in which linears are quantized.

    Linears of one round are calibrated together, the next round sees their codes at work.
    """

    def attention(x: Tensor, rotation: Rotation, past: NoPast) -> Tensor:
        return x + block.attn(block.ln_1(x), rotation, past)

    def feed_forward(x: Tensor, rotation: Rotation, past: NoPast) -> Tensor:
        return x + block.mlp(block.ln_2(x))

    first: list[Inputs] = [("attn.c_attn",), ("attn.c_proj",)]
    second: list[Inputs] = [("mlp.w1", "mlp.w2"), ("mlp.c_proj",)]
    if not sequential:
        return [(block, [first + second])]
    return [(attention, [[inputs] for inputs in first]), (feed_forward, [[inputs] for inputs in second])]


_PASSES = {True: 6, False: 2}  # over the samples, for each layer of `_halves`


def _linear(block: Block, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


def _batches(samples: Sequence[Tensor]) -> list[_Batch]:
    batches, at, lengths = [], 0, list(map(len, samples))
    while lengths:
        take = 1
        while take < len(lengths) and sum(lengths[: take + 1]) <= _BATCH_TOKENS:
            take += 1
        now, lengths = lengths[:take], lengths[take:]
        batches.append(_Batch(slice(at, at + sum(now)), Rows.fresh(now, [1.0] * take)))
        at += sum(now)
    return batches
