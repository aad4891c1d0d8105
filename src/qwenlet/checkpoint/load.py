"""Disk -> model: a skeleton on the meta device, one tensor at a time, assigned, with one report of all problems.

Peak memory is the weights plus the largest tensor: float files of the right dtype stay mapped and are not copied at
all; of the others one tensor at a time is mapped, converted and let go. Quantized linears are repacked for the
kernels; a quantized embedding is read in place.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.codes import CodeReader
from qwenlet.checkpoint.files import RUNNABLE_TYPES, GGUFFile, WeightFile, open_folder, read_parts, weight_paths
from qwenlet.checkpoint.gptq import GPTQFile
from qwenlet.checkpoint.names import Layout, Part, parts_of
from qwenlet.checkpoint.rounding import Rounding
from qwenlet.checkpoint.source import Source
from qwenlet.checkpoint.tilefile import TileFile, TileWriter
from qwenlet.config import OWN_PREFIX, GenerationDefaults, ModelConfig, QuantConfig, config_from_gguf, read_json
from qwenlet.errors import CheckpointError, ConfigError, FormatError, MissingTokenizerError
from qwenlet.gguf_header import GGUFHeader, read_header
from qwenlet.linear import BF16_COLUMNS, Kind, choose_linear, new_linear, replace_linear
from qwenlet.model import Qwen
from qwenlet.tokenizer import Tokenizer

# What the published chat code falls back to.
DEFAULT_SYSTEM = "You are a helpful assistant."

Progress = Callable[[int, int, str], None]

# Buffers that older code saved beside the weights; all are recomputed from the config.
_REDUNDANT = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
# What GPTQ, AWQ, bitsandbytes and 8-bit floats store beside their weights.
_QUANTIZED = re.compile(r"qweight|qzeros|absmax|weight_scale")
_MISFIT_HINT = "the config belongs to another checkpoint, or the download is incomplete"


@dataclass(frozen=True)
class Checkpoint:
    """A folder or a GGUF file, understood but not loaded.

    Attributes:
        path: the folder or the file.
        layout: how its tensors are named.
        header: GGUF metadata, or None for a folder.
        quant: how a folder's weights are quantized; None for floats, and for GGUF, where each tensor says it.
    """

    path: Path
    config: ModelConfig
    defaults: GenerationDefaults
    layout: Layout
    header: GGUFHeader | None = None
    quant: QuantConfig | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads the configuration. Raises CheckpointError or ConfigError naming what is missing or not understood."""
        path = Path(path)
        if path.is_dir():
            ggufs = sorted(path.glob("*.gguf"))
            if not (path / "config.json").exists() and len(ggufs) == 1:
                return cls.open(ggufs[0])
            if not (path / "config.json").exists():
                seen = ", ".join(p.name for p in ggufs) or "neither it nor a .gguf file"
                raise CheckpointError(
                    f"{path.resolve()} has no config.json; found {seen}",
                    hint="name one of the files" if ggufs else "a model folder holds config.json beside its weights",
                )
            config = ModelConfig.from_file(path)
            layout: Layout = "qwen" if config.model_type == "qwen" else "qwen2"
            defaults = GenerationDefaults()
            if (path / "generation_config.json").exists():
                file = path / "generation_config.json"
                defaults = GenerationDefaults.from_dict(read_json(file), str(file))
            if not defaults.eos_token_ids:
                defaults = replace(defaults, eos_token_ids=config.eos_token_ids)
            quant = _quant_config(path)
            if quant is not None and quant.head_bits is not None:
                config = replace(config, tie_word_embeddings=False)  # the head has codes of its own
            return cls(path, config, defaults, layout, quant=quant)
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist", hint="give a model folder, a .gguf file, a hub id or 'demo'"
            )
        header = read_header(path)
        config = config_from_gguf(header.metadata, list(header.tensors), str(path))
        return cls(path, config, _gguf_defaults(config, header), "gguf", header)

    @property
    def default_system(self) -> str:
        """The system message the model expects: what its chat template falls back to, or the published one."""
        fallback = re.search(r"<\|im_start\|>system\n([^{}'\"]+?)<\|im_end\|>", self.chat_template)
        return fallback[1] if fallback else DEFAULT_SYSTEM

    @property
    def chat_template(self) -> str:
        """The Jinja template beside the vocabulary, or ""."""
        return _folder_template(self.path) if self.header is None else _chat_template(self.header)

    @property
    def source(self) -> Source:
        """The weight files. Raises as `weights` does."""
        return Source([self.path] if self.header is not None else weight_paths(self.path))

    def weights(self) -> WeightFile:
        """Opens the weight files. Raises CheckpointError if there are none, or one is missing or damaged."""
        if self.header is not None:
            return GGUFFile(self.header)
        files = open_folder(self.path)
        if self.quant is None:
            return files
        try:
            return GPTQFile(files, self.quant)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error.message}", hint=error.hint) from None

    @property
    def is_quantized(self) -> bool:
        """Whether linears are stored in codes that can run as they are."""
        if self.header is None:
            return self.quant is not None
        return any(info.type_id in RUNNABLE_TYPES for info in self.header.tensors.values())


def _quant_config(folder: Path) -> QuantConfig | None:
    """What config.json's quantization_config says, else quantize_config.json, where older tools put it."""
    file = folder / "config.json"
    section = read_json(file).get("quantization_config")
    if section is None:
        file = folder / "quantize_config.json"
        return QuantConfig.from_published(read_json(file), str(file)) if file.exists() else None
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: quantization_config is {section!r}, expected an object")
    return QuantConfig.from_published(section, f"{file}: quantization_config")


def _folder_template(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return ""
    return str(read_json(file).get("chat_template") or "")


# What the published chat checkpoint's generation_config.json says.
QWEN_CHAT_DEFAULTS = GenerationDefaults(
    do_sample=True, top_p=0.8, top_k=0, repetition_penalty=1.1, max_new_tokens=512, eos_token_ids=(151643,),
    chat_format="chatml", max_window_size=6144,
)  # fmt: skip


def _chat_template(header: GGUFHeader) -> str:
    return str(header.metadata.get("tokenizer.chat_template", ""))


def _gguf_defaults(config: ModelConfig, header: GGUFHeader) -> GenerationDefaults:
    """Files of ours hold a generation config. Of the others the first generation's is known, and the rest gets what
    small models need."""
    if own := header.metadata.get(f"{OWN_PREFIX}generation_config"):
        return GenerationDefaults.from_json(str(own), str(header.path))
    if config.model_type == "qwen":
        return QWEN_CHAT_DEFAULTS
    chatml = "<|im_start|>" in _chat_template(header)
    # greedy with a mild penalty: small models wander when they draw, and repeat themselves when they don't
    return GenerationDefaults(
        eos_token_ids=config.eos_token_ids,
        max_new_tokens=512,
        repetition_penalty=1.1,
        chat_format="chatml" if chatml else None,
    )


@dataclass
class LoadReport:
    """What loading did. `str()` is one line for people.

    Attributes:
        linear: the classes that run `swapped` of the linears.
        kept: quantized modules came out of a file of tiles.
        warnings: what runs worse than it could, and why; the command line says it unasked.
    """

    parameters: int = 0
    weight_bytes: int = 0
    seconds: float = 0.0
    dtype: str = ""
    swapped: int = 0
    linear: str = "torch"
    kept: bool = False
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        packed = f", {self.swapped} linears by {self.linear}" if self.swapped else ""
        notes = "".join(f"; {note}" for note in (*self.notes, *self.warnings))
        return (
            f"{self.parameters / 1e6:,.1f} M parameters in {self.dtype}, loaded in {self.seconds:.1f} s{packed}{notes}"
        )


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | MissingTokenizerError:
    """The vocabulary, or the error that text calls will raise: without one the model still takes ids."""
    try:
        if checkpoint.header is not None:
            return Tokenizer.from_gguf(checkpoint.header.metadata, str(checkpoint.path))
        return Tokenizer.from_folder(checkpoint.path)
    except MissingTokenizerError as error:
        return error


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    linear: str = "torch",
    quantized: bool = False,
    rounding: Rounding | None = None,
    kept: TileFile | None = None,
    keep: TileWriter | None = None,
    progress: Progress | None = None,
) -> tuple[Qwen, LoadReport]:
    """The model in evaluation mode, with every weight assigned.

    Args:
        dtype: of the weights; with `quantized` of what isn't, and of the activations.
        linear: which kernels run the linears that are not quantized: "torch", or as `choose_linear` says (inference
            only).
        quantized: run quantized tensors as they are; otherwise they become `dtype`.
        rounding: with `quantized`, rounds weights that are stored as floats.
        kept: with `quantized`, holds what an earlier load made; passed over if it doesn't fit the model.
        keep: with `quantized`, gets the modules in codes; the model is left without them.
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        CheckpointError: missing, unexpected or wrongly shaped tensors, all of them in one message.
    """
    started = time.perf_counter()
    config = checkpoint.config
    weights = checkpoint.weights()
    report = LoadReport(dtype=str(dtype).removeprefix("torch."), parameters=config.parameter_count)
    model, plan = plan_reading(checkpoint, weights, report.notes)

    kind, _ = choose_linear(linear, device, dtype)
    swaps: dict[str, nn.Module] = {}
    codes = None
    if quantized:
        # what a GPTQ folder holds was asked for; what a GGUF file holds gives way to what is asked for
        modules = None if kept is None else kept.modules(model, dtype)
        report.kept = modules is not None
        codes = CodeReader(
            weights, dtype, rounding, kept=modules, keep=keep, requantize=checkpoint.quant is None, device=device
        )
    total = report.parameters * dtype.itemsize
    done = 0
    for module_name, module in list(model.named_modules()):
        names = {leaf: f"{module_name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
        parts = {leaf: plan[name] for leaf, name in names.items() if name in plan}
        swapped = codes.module(module_name, module, parts) if codes is not None and parts else None
        if swapped is not None:
            replace_linear(model, module_name, swapped)
        elif parts:
            tensors = {leaf: read_parts(weights, of, dtype) for leaf, of in parts.items()}
            report.weight_bytes += sum(tensor.nbytes for tensor in tensors.values())
            if kind is not None and isinstance(module, nn.Linear):
                swaps[module_name] = new_linear(kind, tensors["weight"], tensors.get("bias"))
                replace_linear(model, module_name, swaps[module_name])
            else:
                for leaf, tensor in tensors.items():
                    setattr(module, leaf, nn.Parameter(_placed(tensor, device), requires_grad=False))
        if parts and progress is not None:
            done += sum(p.numel() for p in module.parameters(recurse=False)) * dtype.itemsize
            progress(done, total, names.get("weight", module_name))
    if config.tie_word_embeddings:
        if codes is not None:
            replace_linear(model, "lm_head", codes.tied_head(plan["transformer.wte.weight"]).to(device))
        elif kind is not None:
            swaps["lm_head"] = new_linear(kind, model.transformer.wte.weight, None)
            replace_linear(model, "lm_head", swaps["lm_head"])
        else:
            model.tie_weights()
    _report_swaps(swaps, kind, report)
    if codes is not None:
        _report_codes(codes, report)
    report.seconds = time.perf_counter() - started
    return model, report


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU's kernels want rows side by side, a CPU's mapped tensors stay as they are."""
    return tensor if device.type == "cpu" else tensor.to(device).contiguous()


def _report_swaps(swaps: Mapping[str, nn.Module], kind: Kind, report: LoadReport) -> None:
    report.swapped = len(swaps)
    report.linear = " and ".join(dict.fromkeys(type(module).__name__ for module in swaps.values())) or "torch"
    others = [name for name, module in swaps.items() if type(module) is not kind]
    if others:
        report.warnings.append(
            f"{_shown(others)} by {type(swaps[others[0]]).__name__}, more slowly: their inputs are no multiple of "
            f"{BF16_COLUMNS}"
        )


def _report_codes(codes: CodeReader, report: LoadReport) -> None:
    report.weight_bytes += codes.bytes
    if codes.bits:
        report.notes.append(f"computing in {report.dtype}")
        for dtype in dict.fromkeys(dtype for _, dtype in codes.floats):
            names = [name for name, of in codes.floats if of == dtype]
            report.notes.append(f"{_shown(names)} in {str(dtype).removeprefix('torch.')}")
        report.dtype = " and ".join(f"int{bits}" for bits in sorted(codes.bits))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plan_reading(
    checkpoint: Checkpoint, weights: WeightFile, notes: list[str]
) -> tuple[Qwen, dict[str, tuple[Part, ...]]]:
    """The model on the meta device, and for each of its parameters the tensors on disk that make it up.

    Raises:
        CheckpointError: the files don't fit the configuration; every problem in one message.
    """
    config = checkpoint.config
    held = sum(1 for _ in weights.names())
    # a damaged config must not make us build a billion layers, or sizes that overflow
    if config.num_hidden_layers > held or config.parameter_count >= 1 << 60:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its configuration ({config.model_type}): {held} tensors can't fill "
            f"{config.num_hidden_layers} layers with {config.parameter_count:,} parameters",
            hint=_MISFIT_HINT,
        )
    with torch.device("meta"):
        model = Qwen(config)
    model.requires_grad_(False).eval()
    targets = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    plan = {name: parts_of(name, p.shape[0], checkpoint.layout, config) for name, p in targets.items()}
    _check_names(checkpoint, targets, plan, weights, notes)
    return model, plan


def _check_names(
    checkpoint: Checkpoint,
    targets: Mapping[str, Tensor],
    plan: Mapping[str, tuple[Part, ...]],
    weights: WeightFile,
    notes: list[str],
) -> None:
    """One report of everything that is missing, unexpected or of the wrong shape."""
    present = set(weights.names())
    wanted = {part.name for parts in plan.values() for part in parts}
    missing = sorted(wanted - present)
    unexpected = sorted(name for name in present - wanted if not _REDUNDANT.search(name))
    if checkpoint.config.tie_word_embeddings and "lm_head.weight" in unexpected:
        unexpected.remove("lm_head.weight")
        notes.append("lm_head.weight ignored: the config ties it to the embedding")
    wrong = []
    for name, parts in plan.items():
        for part in parts:
            expected = (part.rows, *targets[name].shape[1:])
            if part.name in present and weights.shape(part.name) != expected:
                wrong.append(f"{part.name} is {list(weights.shape(part.name))}, expected {list(expected)}")
    if not (missing or unexpected or wrong):
        return
    lines = [f"{checkpoint.path} does not fit its configuration ({checkpoint.config.model_type}):"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if names:
            shown = names[:6] + ([f"... and {len(names) - 6} more"] if len(names) > 6 else [])
            lines.append(f"  {title} ({len(names)}): {', '.join(shown)}")
    hint = _MISFIT_HINT
    if any(_QUANTIZED.search(name) for name in unexpected):
        hint = (
            "these are quantized weights, of which the configuration says nothing; quantize_config.json may be missing"
        )
    raise CheckpointError("\n".join(lines), hint=hint)
