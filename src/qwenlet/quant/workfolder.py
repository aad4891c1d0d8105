"""What a GPTQ run has finished: one file a layer, so that a run that was interrupted goes on where it stopped.

    .OUT.quantizing/lock                  held by the run that works there
    .OUT.quantizing/run.json              settings, source and calibration of the run: another run is refused
    .OUT.quantizing/PART.safetensors      linears of a layer, or the head, in GPTQ's form; their errors in its header

A file appears under its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwenlet.config import read_json
from qwenlet.errors import CheckpointError
from qwenlet.ops.packing import GPTQTensors, QuantTensor, from_gptq, to_gptq

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not kept apart there
    fcntl = None  # type: ignore[assignment]

_LEAVES = ("qweight", "qzeros", "scales", "g_idx")
_RUN = "run.json"


def _locked(file: TextIO) -> bool:
    """Takes the lock, which goes with the process however it ends; False where another has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@dataclass(frozen=True)
class WeightError:
    """What quantizing did to one linear.

    Attributes:
        name: such as transformer.h.3.mlp.w1.
        error: of its outputs on the calibration text with GPTQ, of the weight itself with round to nearest; relative.
        damp_percent, dead_columns: of GPTQ's Hessian.
    """

    name: str
    error: float
    damp_percent: float | None = None
    dead_columns: int = 0


class WorkFolder:
    """The folder beside `out`, made or taken up again; a context manager that keeps other processes out.

    Args:
        run: what the results depend on, plain values.
    Raises:
        CheckpointError: it holds the work of another run, another process is at work there, or it can't be written.
    """

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        self.path = out.with_name(f".{out.name}.quantizing")
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")  # noqa: SIM115 - held until the run ends
        try:
            self._take_up(run)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()

    def _take_up(self, run: Mapping[str, Any]) -> None:
        if not _locked(self._lock):
            raise CheckpointError(
                f"another process is quantizing into {self.path}", hint="wait for it, or choose another OUT"
            )
        found = self.path / _RUN
        if found.exists():
            self._check_same(read_json(found), run)
            return
        with self._writing():
            partial = self.path / f"{_RUN}.partial"
            partial.write_text(json.dumps(run, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(partial, found)

    def has(self, part: str) -> bool:
        return self._file(part).exists()

    def save(self, part: str, weights: Mapping[str, QuantTensor], errors: list[WeightError]) -> None:
        """Raises CheckpointError if it can't be written; what was saved before stays."""
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            packed = to_gptq(weight)
            tensors |= {f"{name}.{leaf}": getattr(packed, leaf).contiguous() for leaf in _LEAVES}
        grid = {name: [weight.bits, weight.group_size] for name, weight in weights.items()}
        header = {"grid": json.dumps(grid), "errors": json.dumps([asdict(error) for error in errors])}
        partial = self.path / f"{part}.partial"
        with self._writing():
            save_file(tensors, partial, metadata=header)
            os.replace(partial, self._file(part))

    def load(self, part: str) -> tuple[dict[str, QuantTensor], list[WeightError]]:
        """Raises CheckpointError if the file is damaged."""
        try:
            with safe_open(self._file(part), framework="pt") as file:
                header = file.metadata()
                grid = json.loads(header["grid"])
                errors = [WeightError(**error) for error in json.loads(header["errors"])]
                weights = {
                    name: from_gptq(
                        GPTQTensors(*(file.get_tensor(f"{name}.{leaf}") for leaf in _LEAVES)), bits, group_size
                    )
                    for name, (bits, group_size) in grid.items()
                }
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self._file(part)}, which an earlier run left, can't be read: {error}",
                hint="remove that file, and this part will be quantized again",
            ) from None
        return weights, errors

    def remove(self) -> None:
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.safetensors"

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        # as JSON gives it back: tuples are lists there
        wanted = json.loads(json.dumps(now))
        differing = sorted(key for key in before.keys() | wanted.keys() if before.get(key) != wanted.get(key))
        if differing:
            changes = ", ".join(f"{key} {before.get(key)!r} then, {wanted.get(key)!r} now" for key in differing)
            raise CheckpointError(
                f"{self.path} holds an unfinished run with other settings: {changes}",
                hint="go on with the same settings, choose another OUT, or remove that folder to start again",
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path} could not be written: {error}",
                hint="what is finished stays there; look at the free space, then run the same command to go on",
            ) from None
