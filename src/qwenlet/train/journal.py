"""What a run writes down: a JSON line for each step and evaluation, TensorBoard's events, and a picture of the loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qwenlet.errors import TrainingError

LOG, PICTURE, EVENTS = "log.jsonl", "loss.png", "tensorboard"


class Journal:
    """The log of one run, taken up again at the step where the run goes on.

    Attributes:
        missing: packages without which something is not written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.missing: list[str] = []
        kept = [line for line in read_log(folder) if line["step"] <= step] if step else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        try:
            (folder / LOG).write_text(text, encoding="utf-8")
            self._file = open(folder / LOG, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise TrainingError(f"{folder / LOG} could not be written: {error}") from None
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / EVENTS), purge_step=step + 1 if step else None)
        except ImportError:
            self.missing.append("tensorboard")

    def write(self, step: int, **values: float) -> None:
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no inf
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Draws the loss, too."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        try:
            draw(read_log(self.folder), self.folder / PICTURE)
        except ImportError:
            self.missing.append("matplotlib")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last one that was not finished is left out."""
    if not (folder / LOG).exists():
        return []
    lines = []
    for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The loss of each step, smoothed, and of each evaluation, as PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    if steps:
        axes.plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.3)
        smooth, value = [], steps[0][1]
        for step, loss in steps:
            value += (loss - value) * 0.1
            smooth.append((step, value))
        axes.plot(*zip(*smooth, strict=True), color="tab:blue", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    if steps or held_out:
        axes.legend()
    axes.grid(alpha=0.3)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
