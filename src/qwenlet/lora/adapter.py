"""An adapter's folder, in peft's format: adapter_config.json and adapter_model.safetensors.

peft names tensors by the modules of the model that was adapted. Ours and the published checkpoint's are the same;
adapters of the Qwen2 form, where q, k and v lie apart, are read as the fused projection they add up to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qwenlet.checkpoint.names import Layout, parts_of
from qwenlet.checkpoint.save import new_folder, write_json
from qwenlet.config import GenerationDefaults, LoraConfig, ModelConfig, read_json
from qwenlet.errors import CheckpointError, ConfigError
from qwenlet.lora.layers import LoraLinear, add_lora, grow_vocabulary, lora_config, saved_modules
from qwenlet.model import Qwen

CONFIG, WEIGHTS, GENERATION = "adapter_config.json", "adapter_model.safetensors", "generation_config.json"
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_SHOWN = 6


@dataclass(frozen=True)
class Factors:
    """A linear's low-rank part: adds scale * B A to its weight.

    Attributes:
        a: [rank, in]; b: [out, rank]; of any float dtype.
        magnitude: [out], of an adapter with DoRA: lengths of the adapted weight's rows; else None.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def added_to(self, weight: Tensor) -> Tensor:
        """The adapted weight [out, in] float32."""
        whole = torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitude is None:
            return whole
        return whole * (self.magnitude.float() / whole.norm(dim=1))[:, None]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model, by our names.

    Attributes:
        factors: of linears, such as "transformer.h.0.attn.c_attn".
        saved: whole parameters that take the place of the model's, such as "lm_head.weight".
        base: what was adapted, as the folder says it.
        chat_format: of the conversations it learned, where the folder says so.
    """

    path: Path
    config: LoraConfig
    factors: Mapping[str, Factors]
    saved: Mapping[str, Tensor]
    base: str | None
    chat_format: Literal["chatml"] | None = None

    @classmethod
    def read(cls, folder: str | Path, model: ModelConfig) -> Adapter:
        """Reads an adapter for a model.

        Raises:
            CheckpointError: missing or damaged files, or another model's adapter; all problems in one message.
            ConfigError: an adapter of a kind that we don't read.
        """
        folder = Path(folder)
        if not (folder / CONFIG).exists():
            raise CheckpointError(
                f"{folder} is no adapter: it has no {CONFIG}", hint="give the folder that training wrote"
            )
        raw = read_json(folder / CONFIG)
        config = LoraConfig.from_peft(raw, str(folder / CONFIG))
        factors, saved = _Reading(folder, model, config, _tensors(folder)).result()
        return cls(folder, config, factors, saved, raw.get("base_model_name_or_path"), _chat_format(folder))

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding and the head it brings; None if it brings none."""
        return next((len(t) for name, t in self.saved.items() if name in _VOCABULARY), None)


_VOCABULARY = ("transformer.wte.weight", "lm_head.weight")


def _chat_format(folder: Path) -> Literal["chatml"] | None:
    file = folder / GENERATION
    if not file.exists():
        return None
    return "chatml" if GenerationDefaults.from_dict(read_json(file), str(file)).chat_format == "chatml" else None


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{folder} holds adapter_model.bin, a pickle; adapters are read from {WEIGHTS}",
                hint="save it again with peft, which writes safetensors",
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS}", hint="the folder is incomplete; copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}", hint="the file is damaged; copy it again") from None


class _Reading:
    """Tensors as they are named in the file -> ours, checked against the model's shapes."""

    def __init__(self, folder: Path, model: ModelConfig, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
        self.folder, self.model, self.config, self.tensors = folder, model, config, tensors
        with torch.device("meta"):
            self.skeleton = Qwen(model)
        foreign = any(name.startswith("model.") for name in tensors)
        self.layout: Layout = "qwen2" if foreign else "qwen"
        self.problems: list[str] = []

    def result(self) -> tuple[dict[str, Factors], dict[str, Tensor]]:
        factors = {}
        for name, module in self.skeleton.named_modules():
            if isinstance(module, nn.Linear) and (found := self._factors(name, module)) is not None:
                factors[name] = found
        saved = {}
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            if (tensor := self._saved(name, parameter)) is not None:
                saved[name] = tensor
        if unknown := sorted(self.tensors):
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            self.problems.insert(0, f"it adapts {', '.join(unknown[:_SHOWN])}{more}, which this model does not have")
        if not factors and not saved and not self.problems:
            self.problems.append("it holds no tensors")
        sizes = {len(saved[name]) for name in _VOCABULARY if name in saved}
        if len(sizes) > 1 or (sizes and sizes != {self.model.vocab_size} and len(saved.keys() & _VOCABULARY) < 2):
            self.problems.append(
                f"it brings {' and '.join(f'{size:,}' for size in sorted(sizes))} rows for a vocabulary of "
                f"{self.model.vocab_size:,}; wte and lm_head have to grow together"
            )
        if self.problems:
            shown = self.problems[:_SHOWN] + ["..."] * (len(self.problems) > _SHOWN)
            raise CheckpointError(
                f"the adapter in {self.folder} does not fit the model ({self.model.model_type}, hidden size "
                f"{self.model.hidden_size}, {self.model.num_hidden_layers} layers):\n  " + "\n  ".join(shown),
                hint="use it with the model it was trained on",
            )
        return factors, saved

    def _factors(self, name: str, module: nn.Linear) -> Factors | None:
        """The low-rank part of a linear of ours: of the fused projection out of up to three parts that lie apart."""
        stems = [
            (part.name.removesuffix(".weight"), part.rows)
            for part in parts_of(f"{name}.weight", module.out_features, self.layout, self.model)
        ]
        found = []
        for stem, rows in stems:
            a, b = (self.tensors.pop(f"{stem}.{leaf}.weight", None) for leaf in ("lora_A", "lora_B"))
            magnitude = self.tensors.pop(f"{stem}.lora_magnitude_vector", None)
            if a is None and b is None:
                continue
            if a is None or b is None:
                self.problems.append(f"{stem} has one of lora_A and lora_B only")
                continue
            expected = f"[rank, {module.in_features}] and [{rows}, rank]"
            if (
                a.ndim != 2
                or b.ndim != 2
                or (b.shape[0], b.shape[1], a.shape[1]) != (rows, a.shape[0], module.in_features)
            ):
                self.problems.append(f"{stem} is {list(a.shape)} and {list(b.shape)}, expected {expected}")
                continue
            if (magnitude is not None) != self.config.dora or (magnitude is not None and magnitude.shape != (rows,)):
                self.problems.append(f"{stem}: use_dora and its lora_magnitude_vector contradict each other")
                continue
            found.append((stem, Factors(a, b, self.config.scale(stem, a.shape[0]), magnitude)))
        if len(found) == len(stems) == 1:
            return found[0][1]
        if not found:
            return None
        if self.config.dora and len(found) < len(stems):
            self.problems.append(f"{name}: DoRA of one of q, k and v alone can't be fused")
            return None
        return _fused(dict(found), stems)

    def _saved(self, name: str, parameter: Tensor) -> Tensor | None:
        parts = parts_of(name, parameter.shape[0], self.layout, self.model)
        # peft before 0.6 kept the name of its wrapper
        names = [(part.name, re.sub(r"\.(\w+)$", r".modules_to_save.\1", part.name)) for part in parts]
        tensors = [self.tensors.pop(a, None) if a in self.tensors else self.tensors.pop(b, None) for a, b in names]
        if all(tensor is None for tensor in tensors):
            return None
        whole = None if any(tensor is None for tensor in tensors) else torch.cat([t for t in tensors if t is not None])
        free = name in _VOCABULARY  # its rows may be more
        if whole is None or whole.shape[int(free) :] != parameter.shape[int(free) :]:
            seen = "incomplete" if whole is None else f"{list(whole.shape)}"
            self.problems.append(f"{name} is {seen}, expected {list(parameter.shape)}")
            return None
        return whole


def _fused(found: Mapping[str, Factors], stems: list[tuple[str, int]]) -> Factors:
    """Parts side by side: A's below each other, B's on the diagonal; scales that differ go into B."""
    scales = {f.scale for f in found.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    a = torch.cat([f.a for f in found.values()])
    b = torch.zeros(sum(rows for _, rows in stems), a.shape[0], dtype=a.dtype)
    row = column = 0
    for stem, rows in stems:
        if stem in found:
            f = found[stem]
            b[row : row + rows, column : column + f.rank] = f.b.to(b.dtype) * (f.scale / scale)
            column += f.rank
        row += rows
    magnitudes = [f.magnitude for f in found.values() if f.magnitude is not None]
    return Factors(a, b, scale, torch.cat(magnitudes) if magnitudes else None)


# ------------------------------------------------------------------------------------------------ to and from a model


def save_adapter(
    model: Qwen, folder: str | Path, *, base: str | None = None, chat_format: Literal["chatml"] | None = None
) -> Path:
    """Writes the model's adapter, and the modules that trained as a whole.

    Args:
        base: name or path of the model, kept for those who load the adapter.
        chat_format: of the conversations it learned, kept in a generation config, which peft passes over.
    Raises:
        ConfigError: the model has no adapter.
        CheckpointError: `folder` exists and is not empty, or could not be written.
    """
    config = lora_config(model)
    if config is None:
        raise ConfigError("the model has no adapter to save", hint="add_lora gives it one")
    with new_folder(folder) as work:
        path = work / WEIGHTS
        save_file(adapter_state(model), path, metadata={"format": "pt"})
        path.chmod(work.stat().st_mode & 0o666)  # safetensors makes it private; the folder follows the umask
        kept = [name.rpartition(".")[2] for name in saved_modules(model, config)]
        patterns = _patterns(model, config)
        write_json(work / CONFIG, replace(config, modules_to_save=kept).to_peft(base) | patterns)
        if chat_format is not None:
            write_json(work / GENERATION, {"chat_format": chat_format})
    return Path(folder)


def _patterns(model: Qwen, config: LoraConfig) -> dict[str, dict[str, float]]:
    """Ranks and alphas of the modules that have others than most, by full names: with them every scale comes back."""
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    plain = replace(config, alpha_pattern={})
    for name, module in model.named_modules():
        if not isinstance(module, LoraLinear):
            continue
        rank = module.lora_A.shape[0]
        if rank != config.rank:
            ranks[name] = rank
        if module.scale != plain.scale(name, rank):
            alphas[name] = module.scale * config.alpha / plain.scale(name, rank)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def adapter_state(model: Qwen) -> dict[str, Tensor]:
    """What an adapter's file holds, by peft's names."""
    state: dict[str, Tensor] = {}
    config = lora_config(model)
    assert config is not None, "the model has no adapter"
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.lora_A.weight"] = module.lora_A.detach()
            state[f"{name}.lora_B.weight"] = module.lora_B.detach()
            if module.lora_magnitude_vector is not None:
                state[f"{name}.lora_magnitude_vector"] = module.lora_magnitude_vector.detach()
    for name in saved_modules(model, config):
        for leaf, parameter in model.get_submodule(name).named_parameters(recurse=False):
            tensor = parameter.detach()
            shared = any(tensor.data_ptr() == other.data_ptr() for other in state.values())
            state[f"{name}.{leaf}"] = tensor.clone() if shared else tensor
    return {f"{_PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in state.items()}


def load_adapter(model: Qwen, folder: str | Path) -> Adapter:
    """Gives a model the adapter of a folder, ready to be trained further, in place.

    A vocabulary that grew with the adapter grows the model's.

    Raises:
        CheckpointError, ConfigError: as `Adapter.read`; the model is unchanged then.
    """
    adapter = Adapter.read(folder, model.config)
    if (size := adapter.vocab_size) is not None and size != model.config.vocab_size:
        grow_vocabulary(model, size)
    ends = tuple(dict.fromkeys(name.rpartition(".")[2] for name in adapter.factors))
    kept = tuple(dict.fromkeys(name.split(".")[-2] for name in adapter.saved))
    config = replace(adapter.config, targets=ends, modules_to_save=kept)
    add_lora(model, config, {name: f.rank for name, f in adapter.factors.items()})
    with torch.no_grad():
        for name, f in adapter.factors.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, LoraLinear)
            layer.lora_A.copy_(f.a)
            layer.lora_B.copy_(f.b)
            layer.scale = f.scale
            if layer.lora_magnitude_vector is not None and f.magnitude is not None:
                layer.lora_magnitude_vector.copy_(f.magnitude)
        for name, tensor in adapter.saved.items():
            model.get_parameter(name).copy_(tensor)
    return adapter
