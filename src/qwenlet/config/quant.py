"""How weights are quantized: what a user asks for, and what a checkpoint says it is.

On disk a checkpoint says it as AutoGPTQ does, in `quantize_config.json` and in config.json's `quantization_config`. A
quantized head is written as GPTQModel writes it ("lm_head" and "dynamic"); a quantized embedding has fields of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qwenlet.config.fields import Fields
from qwenlet.config.model import ModelConfig
from qwenlet.errors import ConfigError

GROUP_SIZES = (32, 64, 128)
EMBEDDING_GROUP_SIZE = 32  # of the embeddings we write
HEAD = "lm_head"


# Below this many parameters a GGUF model runs in floats unless asked otherwise.
_SMALL = 500_000_000


def keeps_codes(parameters: int, *, gguf: bool) -> bool:
    """Whether a quantized checkpoint runs as it is stored where nothing is asked for: a GPTQ folder always, a GGUF file
    unless it is so small that memory is no reason to round its activations."""
    return not gguf or parameters >= _SMALL


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a model is quantized. The defaults are what quant="int4" means; `QuantConfig.named("int8")` is the other.

    Attributes:
        bits: of the linears inside the layers, 4 or 8.
        group_size: input columns that share a scale: 32, 64 or 128; None: the largest of them that divides every layer.
        sym: symmetric around zero; else a zero point per group.
        desc_act: GPTQ takes columns in the order of their activations (act-order).
        static_groups: GPTQ fixes the groups' scales before it reorders, so that columns stay where they are.
        true_sequential: GPTQ calibrates each linear of a layer behind its already quantized predecessors.
        damp_percent: share of the Hessian's mean diagonal that is added to it.
        mse: search each group's scale for the least squared error instead of taking its largest weight.
        weighted: in that search an error counts as its inputs are large on a short built-in text, where weights of four
            bits are rounded to nearest (GPTQ always does so, on its calibration's text).
        method: "rtn" (round to nearest) or "gptq": how the codes were found; the format is the same.
        head_bits, head_group_size: of the output head; head_bits None leaves it in half precision, head_group_size None
            is the largest that divides its inputs.
        embedding_bits: 8 or None.
    """

    bits: int = 4
    group_size: int | None = None
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    damp_percent: float = 0.01
    mse: bool = True
    weighted: bool = True
    method: Literal["rtn", "gptq"] = field(default="rtn", metadata={"choices": ("rtn", "gptq")})
    head_bits: int | None = 4
    head_group_size: int | None = 32
    embedding_bits: int | None = 8

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bits", self.bits, (4, 8)),
            ("group_size", self.group_size, (None, *GROUP_SIZES)),
            ("head_bits", self.head_bits, (None, 4, 8)),
            ("head_group_size", self.head_group_size, (None, *GROUP_SIZES)),
            ("embedding_bits", self.embedding_bits, (None, 8)),
            ("method", self.method, ("rtn", "gptq")),
        ):
            if value not in allowed or isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}, expected {' or '.join(map(str, allowed))}")
        if not 0.0 < self.damp_percent < 1.0:
            raise ConfigError(f"damp_percent is {self.damp_percent!r}, expected a share between 0 and 1")

    @classmethod
    def named(cls, name: str) -> QuantConfig:
        """ "int4" or "int8". Raises ConfigError for any other name."""
        if name == "int4":
            return cls()
        if name == "int8":
            return cls(bits=8, head_bits=8, head_group_size=None)
        raise ConfigError(f"quant is {name!r}, expected 'int4', 'int8' or a QuantConfig")

    def of_linear(self, name: str) -> tuple[int, int | None] | None:
        """(bits, group size) of a linear by our name, such as "transformer.h.0.attn.c_attn"; None: it stays float."""
        if name == HEAD:
            return None if self.head_bits is None else (self.head_bits, self.head_group_size)
        return self.bits, self.group_size

    def fit(self, model: ModelConfig) -> QuantConfig:
        """The same with group sizes that are numbers. Raises ConfigError naming the layer whose inputs it cuts."""
        hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim
        layers = {"attn.c_attn": hidden, "attn.c_proj": query, "mlp.c_proj": model.intermediate_size}
        fitting = [size for size in GROUP_SIZES if not any(inputs % size for inputs in layers.values())]
        size = self.group_size or max(fitting, default=min(GROUP_SIZES))
        for name, inputs in layers.items():
            _check_divides(size, inputs, f"transformer.h.0.{name}", "group_size", fitting)
        fitting = [size for size in GROUP_SIZES if hidden % size == 0]
        head = self.head_group_size or max(fitting, default=min(GROUP_SIZES))
        if self.head_bits is not None:
            _check_divides(head, hidden, HEAD, "head_group_size", fitting)
        if self.embedding_bits is not None:
            _check_divides(EMBEDDING_GROUP_SIZE, hidden, "transformer.wte", "head_group_size", fitting)
        return replace(self, group_size=size, head_group_size=head)

    def completed(self, asked: QuantConfig) -> QuantConfig:
        """What a checkpoint quantized like this becomes when `asked` for: head and embedding, if it left them.

        Raises:
            ConfigError: the layers have other codes than were asked for.
        """
        wanted = {"bits": (self.bits, asked.bits), "group_size": (self.group_size, asked.group_size)}
        for name, (is_, should) in wanted.items():
            if should is not None and is_ != should:
                raise ConfigError(
                    f"the checkpoint is quantized already, with {name} {is_}; {name} {should} was asked for",
                    hint="leave quant out, or start from the unquantized checkpoint",
                )
        head = self if self.head_bits is not None else asked
        return replace(
            self,
            head_bits=head.head_bits,
            head_group_size=head.head_group_size,
            embedding_bits=self.embedding_bits or asked.embedding_bits,
        )

    # ---------------------------------------------------------------------------------------------- on disk

    @classmethod
    def from_published(cls, raw: Mapping[str, Any], source: str) -> QuantConfig:
        """Reads a `quantize_config.json` or `quantization_config` (already parsed).

        Raises:
            ConfigError: another method than GPTQ, or a field that changes the maths and is not understood; by name.
        """
        f = Fields(raw, source, "GPTQ")
        method = f.raw.pop("quant_method", "gptq")
        if method != "gptq":
            raise ConfigError(
                f"{source} describes a checkpoint quantized by {method!r}, but only 'gptq' is read",
                hint="load the unquantized checkpoint, with quant='int4' if it should be small",
            )
        for name, allowed, why in _REQUIRED:
            f.require(name, allowed, why)
        body = _bits_and_group(f, f"{source}:", f.take("bits", int), f.take("group_size", int))
        sym = f.take("sym", bool, True)
        head = _head(f, body, sym)
        embedding = f.take("embedding_bits", int, None)
        f.take("embedding_group_size", int, None)  # the shape of its scales says the same
        if f.take("quantize_embedding", bool, False) and embedding is None:
            raise ConfigError(f"{source} says quantize_embedding, but not in how many bits (embedding_bits)")
        meta = f.raw.pop("meta", None)
        meta = meta if isinstance(meta, Mapping) else {}
        nearest = meta.get("method") == "rtn"
        config = cls(
            bits=body[0],
            group_size=body[1],
            sym=sym,
            desc_act=f.take("desc_act", bool, False),
            static_groups=f.take("static_groups", bool, False),
            true_sequential=f.take("true_sequential", bool, True),
            damp_percent=f.take("damp_percent", float, 0.01),
            mse=bool(f.raw.pop("mse", False)),
            weighted=not nearest or bool(meta.get("weighted", False)),
            method="rtn" if nearest else "gptq",
            head_bits=None if head is None else head[0],
            head_group_size=32 if head is None else head[1],
            embedding_bits=embedding,
        )
        unknown = sorted(name for name in f.raw if name not in _INERT and not name.startswith("_"))
        if unknown:
            raise ConfigError(
                f"{source} has fields that are not understood: {', '.join(unknown)}",
                hint="a field that changes the maths can't be ignored; if this one doesn't, remove it from the file",
            )
        return config

    def to_published(self) -> dict[str, Any]:
        """The way back: AutoGPTQ's fields, and of the head and the embedding where they are quantized."""
        assert self.group_size is not None, "fit() the group size to the model first"
        assert self.head_group_size is not None, "fit() the head's group size to the model first"
        published: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": self.damp_percent,
            "desc_act": self.desc_act,
            "static_groups": self.static_groups,
            "sym": self.sym,
            "true_sequential": self.true_sequential,
            "mse": self.mse,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "meta": {"quantizer": ["qwenlet"], "method": self.method, "weighted": self.weighted},
        }
        if self.head_bits is not None:
            published["lm_head"] = True
            published["dynamic"] = {_HEAD_RULE: {"bits": self.head_bits, "group_size": self.head_group_size}}
        if self.embedding_bits is not None:
            published |= {"embedding_bits": self.embedding_bits, "embedding_group_size": EMBEDDING_GROUP_SIZE}
        return published


def _check_divides(size: int, inputs: int, layer: str, option: str, fitting: list[int]) -> None:
    if inputs % size:
        raise ConfigError(
            f"groups of {size} do not divide the {inputs} inputs of {layer}",
            hint=f"use {option}={max(fitting)}" if fitting else "this model's layers can't be cut into groups we run",
        )


_HEAD_RULE = "+:^lm_head$"
_HEAD_RULES = (_HEAD_RULE, "+:lm_head", "^lm_head$", HEAD)

# Fields that may be absent, and the values with which the maths is the one we implement.
_REQUIRED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("checkpoint_format", ("gptq", None), "zero points are stored less one"),
    ("format", ("gptq", None), "zero points are stored less one"),
    ("is_marlin_format", (False, None), "the words of the published files"),
    ("pack_dtype", ("int32", None), "codes lie in 32-bit words"),
    ("rotation", (None, ""), "weights are not rotated"),
    ("adapter", (None,), "no adapter is merged in"),
    ("modules_in_block_to_quantize", (None,), "every linear of a layer is quantized"),
)

# Written by quantizers about how they worked; the tensors say the rest.
_INERT = frozenset(
    """model_name_or_path model_file_base_name damp_auto_increment quantizer tokenizer dataset batch_size
    cache_block_outputs cache_examples_on_gpu use_cuda_fp16 use_exllama disable_exllama exllama_config max_input_length
    model_seqlen block_name_to_quantize module_name_preceding_first_block pad_token_id backend true_sequential_groups
    act_group_aware uri parallel_packing offload_to_disk offload_to_disk_path hyb_act""".split()
)


def _bits_and_group(f: Fields, where: str, bits: Any, group_size: Any) -> tuple[int, int]:
    if bits not in (4, 8) or isinstance(bits, bool):
        raise ConfigError(f"{where} bits is {bits!r}, but only 4 and 8 are implemented")
    if group_size not in GROUP_SIZES or isinstance(group_size, bool):
        raise ConfigError(
            f"{where} group_size is {group_size!r}, but only {', '.join(map(str, GROUP_SIZES))} are implemented",
            hint="quantize the original model again with one of these",
        )
    return bits, group_size


def _head(f: Fields, body: tuple[int, int], sym: bool) -> tuple[int, int] | None:
    """Bits and group size of the head. Rules for any other module are refused."""
    quantized, rules = f.take("lm_head", bool, False), f.raw.pop("dynamic", None) or {}
    foreign = sorted(name for name in rules if name not in _HEAD_RULES) if isinstance(rules, Mapping) else [rules]
    if foreign:
        raise ConfigError(
            f"{f.source}: dynamic has rules for {', '.join(map(repr, foreign))}, but only lm_head may differ",
            hint="quantize the original model again with one setting for all layers",
        )
    if not quantized:
        if rules:
            raise ConfigError(f"{f.source}: dynamic has a rule for lm_head, but lm_head is not true")
        return None
    rule = {"bits": body[0], "group_size": body[1], "sym": sym}
    for given in rules.values():
        if not isinstance(given, Mapping) or set(given) - {"bits", "group_size", "sym", "desc_act"}:
            raise ConfigError(f"{f.source}: dynamic says {given!r} of lm_head, expected bits and group_size")
        rule |= given
    return _bits_and_group(f, f"{f.source}: lm_head's", rule["bits"], rule["group_size"])
