"""No file of a checkpoint is executed, whatever `trust_remote_code` says: what names one is ignored, and said once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import tokenization_auto

logger = logging.getLogger(__name__)

OWN_TOKENIZER = "QWenTokenizer"
# where a config names code: classes, pipelines
CODE_FIELDS = ("auto_map", "custom_pipelines")


@cache
def say_ignored(name: str) -> None:
    """Once per checkpoint."""
    logger.warning("%s names code of its own, which is not executed: the classes of qwenlet.hf do its work", name)


def has_own_generate(name: str | os.PathLike[str] | None) -> bool:
    """Whether a folder holds a `generate` of its own, which transformers would load."""
    return name is not None and (Path(name) / "custom_generate" / "generate.py").exists()


def only_hub(options: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of a from_pretrained, those that say where files come from."""
    names = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
    return {name: options[name] for name in names if name in options}


def guard_tokenizers() -> None:
    """Makes AutoTokenizer take our class for every checkpoint of `model_type: qwen`.

    A tokenizer registered for a config class is not taken as local code, so the checkpoint's own would run; and one
    registered by name only counts where tokenizer_config.json has that name.
    """
    read = tokenization_auto.get_tokenizer_config
    if not hasattr(read, "guarded"):
        tokenization_auto.get_tokenizer_config = _guarded(read)


def _guarded(read: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @wraps(read)
    def get_tokenizer_config(name: str | os.PathLike[str], *args: Any, **options: Any) -> dict[str, Any]:
        found = read(name, *args, **options)
        named = found.get("tokenizer_class")
        if (named and "auto_map" not in found) or not (named == OWN_TOKENIZER or _is_qwen(name, options)):
            return found
        if "auto_map" in found:
            say_ignored(str(name))
        return {key: value for key, value in found.items() if key != "auto_map"} | {"tokenizer_class": OWN_TOKENIZER}

    get_tokenizer_config.guarded = True  # type: ignore[attr-defined]
    return get_tokenizer_config


def _is_qwen(name: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **only_hub(options))
    except OSError:
        return False  # a tokenizer alone
    return config.get("model_type") == "qwen"
