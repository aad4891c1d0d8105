"""What a run keeps to go on from: weights that learn, the optimizer's state, and where it stood.

    OUT/training/run.json                 settings: another run does not go on here
    OUT/training/log.jsonl                a line for each step and evaluation
    OUT/training/step-000120/             a checkpoint: weights, optimizer (safetensors), state.json
    OUT/training/best.safetensors         the weights of the best evaluation

Random numbers need no keeping: each batch's follow from (seed, step, batch). A checkpoint appears under its name when
it is complete, so a full disk or a kill costs the last one and no more; nothing in here is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwenlet.checkpoint.save import new_folder, write_json
from qwenlet.config import read_json
from qwenlet.errors import CheckpointError, TrainingError

FOLDER = "training"
EXPORT = "export"  # in a checkpoint: what users load
_WEIGHTS, _OPTIMIZER, _STATE, _BEST, _RUN = (
    "weights.safetensors", "optimizer.safetensors", "state.json", "best.safetensors", "run.json"
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    Attributes:
        step: steps done.
        tokens: seen so far; seconds: spent so far.
        best: loss of the best evaluation and best_step, its step; None: none yet.
        worse: evaluations since.
        scale: of the loss, in float16; steady: steps since it last changed.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    worse: int = 0
    scale: float | None = None
    steady: int = 0


class Checkpoints:
    """The folder of one run.

    Args:
        run: what the run depends on, plain values.
    Raises:
        TrainingError: the folder holds another run, or a finished one.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], keep: int) -> None:
        self.folder, self.keep = out / FOLDER, keep
        self.run = json.loads(json.dumps(run))

    def begin(self) -> None:
        """Makes the folder, or takes it up again where it holds the same run."""
        found = self.folder / _RUN
        if found.exists():
            before = read_json(found)
            differing = sorted(k for k in before.keys() | self.run.keys() if before.get(k) != self.run.get(k))
            if differing:
                changes = ", ".join(f"{k} {before.get(k)!r} then, {self.run.get(k)!r} now" for k in differing)
                raise TrainingError(
                    f"{self.folder} holds a run with other settings: {changes}",
                    hint="go on with the same settings, or choose another --out",
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = found.with_suffix(".partial")
            write_json(partial, self.run)
            os.replace(partial, found)
        except OSError as error:
            raise TrainingError(f"{self.folder} could not be written: {error}") from None

    def all(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        found = self.folder.glob("step-*") if self.folder.exists() else ()
        steps = (path for path in found if re.fullmatch(r"step-\d+", path.name))
        return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))

    def save(
        self,
        standing: Standing,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        export: Callable[[Path], None] | None = None,
    ) -> Path:
        """Raises CheckpointError if it can't be written; the earlier checkpoints stay whole then.

        export: writes what users load into a folder beside.
        """
        path = self.folder / f"step-{standing.step:06d}"
        if path.exists():
            return path
        with new_folder(path) as work:
            save_file(dict(weights), work / _WEIGHTS)
            save_file(dict(optimizer), work / _OPTIMIZER)
            write_json(work / _STATE, asdict(standing))
            if export is not None:
                export(work / EXPORT)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def load(self) -> tuple[Standing, dict[str, Tensor], dict[str, Tensor]] | None:
        """The newest checkpoint; None: there is none. Raises CheckpointError if it is damaged."""
        if not (paths := self.all()):
            return None
        path = paths[-1]
        try:
            return Standing(**read_json(path / _STATE)), read_tensors(path / _WEIGHTS), read_tensors(path / _OPTIMIZER)
        except (TypeError, CheckpointError) as error:
            raise CheckpointError(
                f"the checkpoint {path} can't be read: {error}", hint="remove it, and the one before it is used"
            ) from None

    def save_best(self, weights: Mapping[str, Tensor]) -> None:
        path = self.folder / _BEST
        partial = path.with_suffix(".partial")
        try:
            save_file(dict(weights), partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path} could not be written: {error}", hint="look at the free space there"
            ) from None

    def best(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / _BEST)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError for a file that is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
