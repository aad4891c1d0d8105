"""The one loop: full, LoRA and Q-LoRA differ by what requires a gradient, the objective by what it makes smaller.

A step adds up its batches, each divided by what the whole step counts, so that a loss is the mean over the step's
tokens however they are spread over batches and processes. Random numbers of a batch follow from (seed, step, batch). So
a run that goes on after a checkpoint is the run that was never interrupted, to the bit, and two processes follow the
curve of one.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qwenlet.checkpoint import Progress
from qwenlet.config import TrainingConfig
from qwenlet.errors import TrainingError
from qwenlet.model import Qwen
from qwenlet.train.batches import Course, Step, count_steps
from qwenlet.train.checkpoints import Checkpoints, Standing
from qwenlet.train.journal import Journal
from qwenlet.train.objective import Objective
from qwenlet.train.optimizer import learning_names
from qwenlet.train.processes import Processes
from qwenlet.train.schedule import factor
from qwenlet.train.sharing import share


@dataclass(frozen=True)
class Outcome:
    """How a run went.

    Attributes:
        steps: done, of those planned; resumed: the step at which it went on, 0: it began.
        losses: of each step of this process's life, and `held_out` of each evaluation as (step, loss).
        best: loss of the best evaluation, and best_step; None without evaluations.
        tokens, seconds: in all, interruptions included and their pauses not.
        why: why it ended: "done", "patience", "interrupted".
    """

    steps: int
    planned: int
    resumed: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    best: float | None
    best_step: int | None
    tokens: int
    seconds: float
    why: str

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Trainer:
    """One run.

    Args:
        model: its parameters that learn require gradients, and are float32.
        objective: what is made smaller; held_out: what is measured, or None.
        lr: the learning rate at its height; dtype: of the arithmetic.
        out: the folder of the run; run: what the run depends on, plain values.
        export: writes what users load into a folder, the parameters being whole; also into every checkpoint where
            `export_always`.
    """

    def __init__(
        self,
        model: Qwen,
        objective: Objective,
        config: TrainingConfig,
        *,
        lr: float,
        dtype: torch.dtype,
        device: torch.device,
        out: Path,
        run: dict[str, Any],
        held_out: Objective | None = None,
        group: Processes | None = None,
        export: Callable[[Path], None] | None = None,
        export_always: bool = False,
        budget: int | None = None,
        progress: Progress | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.objective, self.held_out, self.config = model, objective, held_out, config
        self.lr, self.dtype, self.device, self.budget = lr, dtype, device, budget
        self.group = group or Processes()
        self.export, self.export_always, self.progress, self.note = export, export_always, progress, note or _silent
        self.checkpoints = Checkpoints(out, run, config.keep)
        self.course: Course = objective.course(
            seed=config.seed,
            batch_size=config.batch_size,
            budget=budget,
            group=config.accumulation * self.group.count,
        )
        self.learning = learning_names(model).keys()
        assert all(p.dtype == torch.float32 for p in learning_names(model).values()), "what learns is float32"
        self.sharing = share(
            model, objective, config, lr=lr, dtype=dtype, device=device, group=self.group,
            sample=self.course.epoch(0)[0].batches[0],
        )  # fmt: skip
        self.steps = count_steps(self.course, config)

    # ------------------------------------------------------------------------------------------------------ the course

    def _remaining(self, done: int) -> Iterator[tuple[Step, bool]]:
        """Steps from number `done` on, and whether each is the last of its epoch."""
        number = epoch = 0
        while number < self.steps:
            steps = self.course.epoch(epoch)
            if number + len(steps) > done:
                for step in steps[max(done - number, 0) : self.steps - number]:
                    yield replace(step, number=number + step.number), step is steps[-1]
            number += len(steps)
            epoch += 1

    # --------------------------------------------------------------------------------------------------------- the run

    def run(self) -> Outcome:
        """Trains to the end, or until a signal, patience or a loss that is no number ends it.

        Raises:
            TrainingError: a loss or gradient that is not finite: where, and what is kept. The folder holds another run.
            CheckpointError: a checkpoint could not be written; the earlier ones are whole.
        """
        if self.group.first:
            self.checkpoints.begin()
        self.group.wait()
        standing = self._resume()
        resumed = standing.step
        losses: list[float] = []
        measured: list[tuple[int, float]] = []
        journal = Journal(self.checkpoints.folder, resumed) if self.group.first else None
        if resumed:
            self.note(f"goes on after step {resumed:,}")
        why = "done"
        done = self.steps if self._tired(standing) else resumed
        begun, spent = time.perf_counter(), standing.seconds
        self.model.train()
        try:
            if self.held_out is not None and not resumed:
                before = self.measure(self.held_out)
                self.note(f"held-out loss before: {before:.4f}")
                if journal is not None:
                    journal.write(0, eval_loss=before)
            with _signals() as asked:
                for step, ends_epoch in self._remaining(done):
                    at = time.perf_counter()
                    loss, norm, tokens = self._step(step)
                    seconds = time.perf_counter() - at
                    losses.append(loss)
                    standing = replace(
                        standing, step=step.number + 1, tokens=standing.tokens + tokens,
                        seconds=spent + time.perf_counter() - begun,
                    )  # fmt: skip
                    self._report(journal, standing, step, loss, norm, tokens, seconds)
                    last = standing.step == self.steps
                    if self.held_out is not None and (last or self._due(self.config.eval_every, standing, ends_epoch)):
                        standing = self._measured(standing, journal, measured)
                    stop = self.group.agreed(bool(asked))
                    tired = self._tired(standing)
                    every = self.config.save_every or self.config.eval_every
                    if last or stop or tired or self._due(every, standing, ends_epoch):
                        self._save(standing)
                    if stop or tired:
                        why = "interrupted" if stop else "patience"
                        break
        finally:
            if journal is not None:
                journal.close()
                for package in dict.fromkeys(journal.missing):
                    what = "TensorBoard's events" if package == "tensorboard" else "loss.png"
                    self.note(f"{what} not written: pip install 'qwenlet[train]' brings {package}")
        return Outcome(
            standing.step, self.steps, resumed, tuple(losses), tuple(measured), standing.best, standing.best_step,
            standing.tokens, standing.seconds, why,
        )  # fmt: skip

    def _tired(self, standing: Standing) -> bool:
        return self.config.patience is not None and standing.worse >= self.config.patience

    def _due(self, every: int | None, standing: Standing, ends_epoch: bool) -> bool:
        return ends_epoch if every is None else standing.step % every == 0

    def _step(self, step: Step) -> tuple[float, float, int]:
        """(mean loss, norm of the gradient, tokens) of one step, the weights moved."""
        weight = sum(self.objective.weight(batch) for batch in step.batches)
        count = self.group.count
        rounds = -(-len(step.batches) // count)
        total = torch.zeros((), device=self.device)
        for turn in range(rounds):
            number = turn * count + self.group.rank
            # where batches don't go round, some processes compute one that counts nothing: all must take part
            batch = step.batches[min(number, len(step.batches) - 1)]
            share = count / weight if number < len(step.batches) else 0.0
            torch.manual_seed(_mixed(self.config.seed, step.number, number))
            loss = self.sharing.learn(batch, share, last=turn == rounds - 1)
            total += loss * (share / count)
        mean = float(self.group.add_up(total))
        self._check(mean, "loss", step)
        scale = self.sharing.scale
        norm = self.sharing.move(self.lr * factor(self.config, step.number, self.steps))
        # float16 overflows now and then: such a step is left out, and the next one scaled by less, while there is less
        if scale is None or scale[0] <= 1.0:
            self._check(norm, "gradient", step)
        return mean, norm, sum(self.objective.tokens(batch) for batch in step.batches)

    def _check(self, value: float, what: str, step: Step) -> None:
        if math.isfinite(value):
            return
        kept = self.checkpoints.all()
        places = [place for batch in step.batches for place in self.objective.where(batch)]
        shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
        good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"
        raise TrainingError(
            f"the {what} is {value} at step {step.number + 1} (epoch {step.epoch + 1}), over {shown}; nothing of this "
            f"step was kept, and {good}",
            hint="look at these samples; a lower --lr, a longer --warmup or --dtype bf16 instead of fp16 may help",
        )

    # ------------------------------------------------------------------------------------------------------ evaluation

    def measure(self, objective: Objective) -> float:
        """Mean loss over all samples of an objective."""
        course = objective.course(seed=0, batch_size=self.config.batch_size, budget=self.budget, group=1)
        batches = [batch for step in course.epoch(0) for batch in step.batches]
        count = self.group.count
        total = torch.zeros((), dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for turn in range(-(-len(batches) // count)):
                number = turn * count + self.group.rank
                loss = self.sharing.loss(batches[min(number, len(batches) - 1)], objective)
                total += float(loss) if number < len(batches) else 0.0
        self.model.train()
        return float(self.group.add_up(total)) / sum(objective.weight(batch) for batch in batches)

    def _measured(self, standing: Standing, journal: Journal | None, measured: list[tuple[int, float]]) -> Standing:
        assert self.held_out is not None
        loss = self.measure(self.held_out)
        measured.append((standing.step, loss))
        if journal is not None:
            journal.write(standing.step, eval_loss=loss)
        self.note(f"step {standing.step:,}: held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 700.0)):.2f}")
        if standing.best is not None and not loss < standing.best:
            return replace(standing, worse=standing.worse + 1)
        weights = self.sharing.weights()
        if self.group.first:
            self.checkpoints.save_best(weights)
        return replace(standing, best=loss, best_step=standing.step, worse=0)

    # ------------------------------------------------------------------------------------------------------ on disk

    def take_best(self) -> None:
        """Puts the weights of the best evaluation into the model."""
        self.sharing.assign(self.checkpoints.best())

    def write(self, folder: Path) -> None:
        """`export` into a folder, by the first process, the parameters being whole."""
        with self.sharing.whole():
            if self.group.first and self.export is not None:
                self.export(folder)
        self.group.wait()

    def _save(self, standing: Standing) -> None:
        scale, steady = self.sharing.scale or (None, 0)
        standing = replace(standing, scale=scale, steady=steady)
        weights, optimizer = self.sharing.weights(), self.sharing.moments()
        with self.sharing.whole() if self.export_always else nullcontext():
            if self.group.first:
                self.checkpoints.save(standing, weights, optimizer, self.export if self.export_always else None)
        self.group.wait()

    def _resume(self) -> Standing:
        found = self.checkpoints.load()
        if found is None:
            return Standing()
        standing, weights, optimizer = found
        if weights.keys() != self.learning:
            raise TrainingError(
                f"the checkpoint in {self.checkpoints.folder} holds other parameters than this run trains",
                hint="choose another --out",
            )
        scale = None if standing.scale is None else (standing.scale, standing.steady)
        self.sharing.restore(weights, optimizer, scale)
        return standing

    def _report(
        self,
        journal: Journal | None,
        standing: Standing,
        step: Step,
        loss: float,
        norm: float,
        tokens: int,
        seconds: float,
    ) -> None:
        rate = self.lr * factor(self.config, step.number, self.steps)
        if journal is not None:
            journal.write(
                standing.step, loss=loss, lr=rate, grad_norm=norm, epoch=step.epoch, tokens=standing.tokens,
                seconds=round(seconds, 4), tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            )  # fmt: skip
        if self.progress is not None and self.group.first:
            speed = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
            self.progress(standing.step, self.steps, f"loss {loss:.3f}, {speed}")


def _silent(text: str) -> None: ...


def _mixed(*numbers: int) -> int:
    """One seed out of several."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % (1 << 63)
    return seed


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask to end, as they come: the step that runs is finished first. A second Ctrl-C ends at once."""
    asked: list[int] = []

    def heard(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
