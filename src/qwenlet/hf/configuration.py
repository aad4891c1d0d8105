"""config.json of a first-generation model, as transformers holds it. What it means, ModelConfig says."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig

from qwenlet.config import ModelConfig, qwen_1_8b
from qwenlet.errors import ConfigError
from qwenlet.hf.guard import CODE_FIELDS, say_ignored

_DEFAULTS = qwen_1_8b().to_published()
# what transformers' own machinery looks for under other names
_OTHER_NAMES = {"num_key_value_heads": "num_attention_heads", "head_dim": "kv_channels"}


class QWenConfig(PreTrainedConfig):
    """The published fields; those of Qwen-1.8B where a field is not given.

    A GPTQ checkpoint's `quantization_config` is kept as `gptq_section`: under its own name transformers would ask for
    its own quantizers before our class has a say. Fields that name code of the checkpoint are left out.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = _OTHER_NAMES

    def __init__(self, **fields: Any) -> None:
        fields = {name: value for name, value in fields.items() if name not in CODE_FIELDS}
        section = fields.pop("quantization_config", None) or fields.pop("gptq_section", None)
        published = {name: fields.pop(name, default) for name, default in _DEFAULTS.items() if name not in _THEIRS}
        for name, value in published.items():
            setattr(self, name, value)
        self.gptq_section = section
        fields.pop("model_type", None)
        super().__init__(tie_word_embeddings=False, **{k: v for k, v in fields.items() if k != "tie_word_embeddings"})

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        return super().from_pretrained(name_or_path, **{"name_or_path": str(name_or_path)} | options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Raises ConfigError for the configuration of another kind of model."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ConfigError(
                f"model_type is {kind!r}, expected 'qwen'",
                hint="transformers has its own classes for it: AutoModelForCausalLM finds them",
            )
        if any(config_dict.get(name) for name in CODE_FIELDS):
            say_ignored(str(options.get("name_or_path") or config_dict.get("_name_or_path") or "the checkpoint"))
        return super().from_dict(config_dict, **options)

    def to_dict(self) -> dict[str, Any]:
        raw = super().to_dict()
        section = raw.pop("gptq_section", None)
        return raw if section is None else raw | {"quantization_config": section}

    def to_model_config(self) -> ModelConfig:
        """Raises ConfigError for a field that changes the maths and is not understood."""
        return ModelConfig.from_dict(
            {name: getattr(self, name) for name in _DEFAULTS if hasattr(self, name)} | {"model_type": "qwen"}
        )


# fields that transformers' own class holds
_THEIRS = ("architectures", "auto_map", "model_type", "tie_word_embeddings", "transformers_version", "tokenizer_class")
