"""The quality report: what quantizing a model cost, measured through the kernels that users get.

    measure_quality   two models and a text -> QualityReport
    QualityReport     the numbers; JSON beside the weights, a table on the screen

Left out: the measures themselves (scoring.py), and the errors of single layers, which the pipeline hands in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from qwenlet.config import QuantConfig, read_json
from qwenlet.errors import ConfigError, FormatError
from qwenlet.ops import cpu
from qwenlet.scoring import WINDOW, Comparison, Progress, compare, windows
from qwenlet.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.table import Table

REPORT_FILE = "quality_report.json"
BUILT_IN_TEXT = "built-in"
_WORST = 5  # layers that the table names


class Size(Protocol):
    """What loading a model reports about its size."""

    @property
    def parameters(self) -> int: ...

    @property
    def weight_bytes(self) -> int: ...


class Model(Protocol):
    """What a report needs of a model; LLM has it."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def load_report(self) -> Size: ...

    def logits(self, ids: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """What a quantized model is worth beside the one it was made from.

    Attributes:
        reference, quantized: names of the models.
        quant: how the weights were quantized.
        measured: perplexities, KL divergence, top-1 agreement, largest logit error.
        layer_errors: linear -> relative error of its outputs (or weights), as the quantizer found it.
        parameters: weights of the model; reference_bytes, quantized_bytes: what they take.
        text: name of the evaluation text; text_sha256: of its UTF-8 bytes, or of its ids as little-endian int32.
        windows, window: how many, and tokens in each.
        calibration: name of the text that the codes depend on; None: they were found without any.
        calibration_sha256: of its token ids, or of the file for the built-in samples that weigh rounding errors.
        kernels: which kernels ran the quantized model, and why.
    """

    reference: str
    quantized: str
    quant: QuantConfig
    measured: Comparison
    parameters: int
    reference_bytes: int
    quantized_bytes: int
    text: str
    text_sha256: str
    windows: int
    window: int
    kernels: str
    calibration: str | None = None
    calibration_sha256: str | None = None
    layer_errors: dict[str, float] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Scales, zero points and what stayed in half precision included."""
        return 8 * self.quantized_bytes / self.parameters

    @property
    def worst_layers(self) -> list[tuple[str, float]]:
        """(linear, relative error), the largest first."""
        return sorted(self.layer_errors.items(), key=lambda item: item[1], reverse=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with bits_per_weight for readers that don't know us."""
        return dataclasses.asdict(self) | {"bits_per_weight": self.bits_per_weight}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "quality report") -> QualityReport:
        """Raises FormatError naming a field that is missing, unknown or of another kind."""
        known = {name: value for name, value in raw.items() if name != "bits_per_weight"}
        report: QualityReport = _build(cls, known, source)
        return report

    def save(self, folder: str | Path) -> Path:
        """Writes the report beside the weights and returns its path."""
        path = Path(folder) / REPORT_FILE
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> QualityReport:
        """Raises ConfigError where there is none, FormatError where it is damaged."""
        path = Path(folder) / REPORT_FILE
        return cls.from_dict(read_json(path), str(path))

    def table(self) -> Table:
        """For a rich console that doesn't read markup."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Quality", title_justify="left", title_style="bold", box=None)
        for title in ("", self.reference, self.quantized):
            table.add_column(Text(title), overflow="fold")
        for row in self._rows():
            table.add_row(*map(Text, row))
        return table

    def _rows(self) -> list[tuple[str, str, str]]:
        """(what, of the reference, of the quantized model)."""
        base, other, kl = self.measured.reference, self.measured.other, self.measured.divergence
        plain_bits = 8 * self.reference_bytes / self.parameters
        change = 100 * (other.value / base.value - 1)
        worst = [("worst layers", "", f"{100 * error:.2f} %  {name}") for name, error in self.worst_layers[:_WORST]]
        return [
            ("perplexity", f"{base.value:.3f} ± {base.error:.3f}",
             f"{other.value:.3f} ± {other.error:.3f} ({change:+.2f} %)"),
            ("KL divergence, nats", "",
             f"mean {kl.mean:.5f}, median {kl.median:.5f}, 99 % {kl.p99:.4f}, max {kl.maximum:.3f}"),
            ("same likeliest token", "", f"{100 * self.measured.top1_agreement:.2f} %"),
            ("largest logit error", "", f"{self.measured.max_logit_error:.3f}"),
            ("weights", f"{self.reference_bytes / 1e6:,.1f} MB, {plain_bits:.2f} bits each",
             f"{self.quantized_bytes / 1e6:,.1f} MB, {self.bits_per_weight:.2f} bits each"),
            *(worst[:1] + [("", blank, text) for _, blank, text in worst[1:]]),
            ("text", f"{other.tokens:,} tokens scored", f"{self.text}, sha256 {self.text_sha256[:12]}"),
            ("calibration", "", "none" if self.calibration_sha256 is None else
             f"{self.calibration}, sha256 {self.calibration_sha256[:12]}"),
            ("kernels", "", self.kernels),
        ]  # fmt: skip


def built_in_text() -> str:
    """A short text in English and Chinese, with some code and arithmetic, so that a report needs no download."""
    return resources.files("qwenlet.quant").joinpath("evaluation.txt").read_text(encoding="utf-8")


def measure_quality(
    reference: Model,
    quantized: Model,
    quant: QuantConfig,
    text: str | Sequence[Sequence[int]] | None = None,
    *,
    text_name: str | None = None,
    window: int = WINDOW,
    limit: int | None = None,
    layer_errors: Mapping[str, float] | None = None,
    calibration: tuple[str, str] | None = None,
    progress: Progress | None = None,
) -> QualityReport:
    """Runs both models over the text and compares what they predict.

    Args:
        text: plain text, or windows of token ids; None: the built-in text.
        text_name: how the report calls it; None: "built-in" or "given".
        window, limit: tokens of each window, and how many windows at most, where `text` is not cut yet.
        layer_errors: as in QualityReport; calibration: name and SHA-256.
        progress: called with (windows done, in all, what).
    Raises:
        RequestError: the text is shorter than one window.
        CheckpointError: a model gives logits that are not finite, or the models don't fit each other.
        MissingTokenizerError: the reference has no vocabulary; windows of ids need none.
    """
    name = text_name or (BUILT_IN_TEXT if text is None else "given")
    text = built_in_text() if text is None else text
    if isinstance(text, str):
        digest = hashlib.sha256(text.encode()).hexdigest()
        pieces = windows(reference.tokenizer.encode(text, allowed_special=set()), window, limit)
    else:
        pieces = list(text)
        digest = hashlib.sha256(b"".join(struct.pack(f"<{len(ids)}i", *ids) for ids in pieces)).hexdigest()
    measured = compare(reference.logits, quantized.logits, pieces, progress=progress)
    status = cpu.status()
    return QualityReport(
        reference=reference.name,
        quantized=quantized.name,
        quant=quant,
        measured=measured,
        parameters=reference.load_report.parameters,
        reference_bytes=reference.load_report.weight_bytes,
        quantized_bytes=quantized.load_report.weight_bytes,
        text=name,
        text_sha256=digest,
        windows=len(pieces),
        window=max(map(len, pieces)),
        kernels=f"{status.isa or 'torch'}: {status.reason}",
        calibration=None if calibration is None else calibration[0],
        calibration_sha256=None if calibration is None else calibration[1],
        layer_errors=dict(layer_errors or {}),
    )


# ----------------------------------------------------------------------------------------------------------- JSON in


def _build(cls: type, raw: Any, source: str) -> Any:
    """A dataclass out of plain values, strictly: nested ones are built the same way."""
    hints = typing.get_type_hints(cls)
    if not isinstance(raw, Mapping):
        raise FormatError(f"{source} is {raw!r:.60}, expected an object")
    if set(raw) != set(hints):
        missing, unknown = sorted(set(hints) - set(raw)), sorted(set(raw) - set(hints))
        raise FormatError(
            f"{source} is no quality report of this version: missing {', '.join(missing) or 'nothing'}; "
            f"unknown {', '.join(unknown) or 'nothing'}",
            hint="measure again",
        )
    values = {name: _value(hint, raw[name], f"{source}: {name}") for name, hint in hints.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise FormatError(f"{source}: {error.message}") from None


def _value(hint: Any, value: Any, source: str) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, source)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise FormatError(f"{source} is {value!r:.60}, expected an object")
        kind = typing.get_args(hint)[1]
        return {name: _value(kind, item, f"{source}: {name}") for name, item in value.items()}
    if typing.get_origin(hint) is typing.Literal:
        return value  # the dataclass checks it
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise FormatError(f"{source} is {value!r:.60}, expected {expected}")
    return value
