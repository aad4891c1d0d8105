"""What a run of `quantize` did, and a record of it beside the weights until their quality has been measured.

OUT/quantize_run.json     settings, source and calibration of the run, and the errors of its linears
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwenlet import __version__
from qwenlet.checkpoint import Checkpoint
from qwenlet.checkpoint.importance import samples_sha256, weighs
from qwenlet.checkpoint.save import write_json
from qwenlet.config import QuantConfig, read_json
from qwenlet.quant.calibration import Calibration
from qwenlet.quant.workfolder import WeightError

RUN_FILE = "quantize_run.json"


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        path: the folder that was written.
        quant: as used, with a group size; a head that the layout can't hold in codes has no bits.
        errors: of every linear, in the order they were quantized.
        resumed: layers that an earlier run had finished.
    """

    path: Path
    quant: QuantConfig
    calibration: Calibration | None
    errors: list[WeightError] = field(default_factory=list)
    resumed: int = 0

    @property
    def seen(self) -> tuple[str, str] | None:
        """(name, SHA-256) of the text that the codes depend on: the calibration, or what weighs a quick rounding's
        errors; None: no text was looked at."""
        if self.calibration is not None:
            return self.calibration.source, self.calibration.sha256
        return ("built-in samples", samples_sha256()) if weighs(self.quant) else None

    def record(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Says in the folder that is being written what `recorded` gives back."""
        write_json(folder / RUN_FILE, {"run": run, "errors": [asdict(error) for error in self.errors]})

    def measured(self) -> None:
        """Takes the record back: the quality report says all of it."""
        (self.path / RUN_FILE).unlink(missing_ok=True)


def recorded(out: Path, run: Mapping[str, Any]) -> list[WeightError] | None:
    """The errors of the run that wrote `out`, if it was this one and its quality is still to be measured."""
    if not (out / RUN_FILE).exists():
        return None
    found = read_json(out / RUN_FILE)
    if found.get("run") != run:
        return None
    return [WeightError(**error) for error in found["errors"]]


def run_of(checkpoint: Checkpoint, quant: QuantConfig, calibration: Calibration | None) -> dict[str, Any]:
    """All that the result depends on, plain values. `quant` is fitted to the layout."""
    files = [checkpoint.path] if checkpoint.path.is_file() else sorted(checkpoint.path.iterdir())
    marks = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files if file.is_file()]
    source = f"{checkpoint.path.resolve()} {hashlib.sha256(''.join(marks).encode()).hexdigest()[:16]}"
    text = None if calibration is None else calibration.sha256
    return asdict(quant) | {"source": source, "calibration": text, "qwenlet": __version__}
