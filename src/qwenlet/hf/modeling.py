"""The model behind transformers' API: the same modules as model.py, over transformers' cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from qwenlet import hub
from qwenlet.cache import Rows
from qwenlet.checkpoint import DTYPES, Checkpoint, auto_dtype, check_dtype, device_by_name, dtype_by_name
from qwenlet.checkpoint.files import read_parts
from qwenlet.checkpoint.load import plan_reading
from qwenlet.errors import ConfigError, RequestError
from qwenlet.hf.configuration import QWenConfig
from qwenlet.hf.conversation import Conversation
from qwenlet.hf.guard import has_own_generate, only_hub, say_ignored
from qwenlet.hf.past import CachePast, QWenCache, alphas_of
from qwenlet.model import Embedding, Linear, RMSNorm, Transformer


class QWenModel(Transformer):
    """The layers, called as transformers calls a model without its head."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config.to_model_config())
        self.config = config

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Last hidden states [B, T, C] of ids [B, T], and the cache.

        As published, a token's position is its place in the padded row, whatever `position_ids` say.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("expected either input_ids or inputs_embeds")
        if output_hidden_states:
            raise RequestError("output_hidden_states is not given by this model", hint="leave it out")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = QWenCache(config=self.config)
        start = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        alphas = alphas_of(past_key_values) if start or len(alphas_of(past_key_values)) == batch else ()
        if not alphas:
            alphas = self.alphas(batch, start + length, attention_mask)
            if past_key_values is not None:
                past_key_values.alphas = alphas
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        positions = torch.arange(start, start + length, device=x.device).repeat(batch)
        rows = Rows(positions, (length,) * batch, alphas)
        implementation = "eager" if output_attentions else self.config._attn_implementation
        past = CachePast(self.shape, implementation, past_key_values, mask, (batch, length), {})
        hidden = super().forward(x.flatten(0, 1), rows, past).unflatten(0, (batch, length))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            attentions=tuple(past.weights) if output_attentions else None,
        )

    def alphas(self, batch: int, length: int, mask: Tensor | None) -> tuple[float, ...]:
        """As published: of a row's length without its padding, once the padded row is beyond the training length."""
        if length <= self.shape.seq_length or mask is None or mask.dim() != 2:
            return (self.shape.ntk_alpha(length),) * batch
        return tuple(self.shape.ntk_alpha(int(own)) for own in mask.sum(-1).tolist())


class QWenLMHeadModel(Conversation, PreTrainedModel, GenerationMixin):
    """First-generation Qwen for transformers: generate, train, save, and `chat` as published."""

    config_class = QWenConfig
    config: QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    # saved beside the weights by older code, and computed from the config here
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$"]  # noqa: RUF012

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer: Any = QWenModel(config)
        self.lm_head: Any = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    # -------------------------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *args: Any, **options: Any) -> Any:
        """As transformers' own, with the published `bf16=True`, `fp16=True`, `fp32=True`, and GPTQ checkpoints, whose
        weights become floats.

        The precision, where none is named, is what is fast on the device the model will live on.

        Raises:
            ConfigError: more than one of the three, a foreign model_type, or a field that is not understood.
        """
        # with it transformers would load a folder's own `generate`
        if options.pop("trust_remote_code", None) and has_own_generate(name_or_path):
            say_ignored(str(name_or_path))
        config = options.get("config")
        flags = {name: options.pop(name) for name in DTYPES if name in options}
        if config is None:
            config = QWenConfig.from_pretrained(name_or_path, **only_hub(options))
            options["config"] = config
        config.to_model_config()
        asked = [name for name in DTYPES if flags.get(name, getattr(config, name, False))]
        if len(asked) > 1:
            raise ConfigError(f"{' and '.join(asked)} were asked for, expected one of them")
        options["dtype"] = _dtype(options.pop("torch_dtype", None) or options.get("dtype"), asked, config, options)
        if config.gptq_section is None or options.get("state_dict") is not None:
            return super().from_pretrained(name_or_path, *args, **options)
        return cls._from_gptq(name_or_path, config, options)

    @classmethod
    def _from_gptq(cls, name_or_path: Any, config: QWenConfig, options: dict[str, Any]) -> Any:
        folder = (
            Path(name_or_path)
            if Path(name_or_path).is_dir()
            else hub.resolve(
                str(name_or_path), offline=options.get("local_files_only") or None, revision=options.get("revision")
            )
        )
        checkpoint = Checkpoint.open(folder)
        weights = checkpoint.weights()
        _, plan = plan_reading(checkpoint, weights, [])
        state = {name: read_parts(weights, parts, options["dtype"]).clone() for name, parts in plan.items()}
        for name in ("revision", "cache_dir", "token", "local_files_only", "force_download"):
            options.pop(name, None)
        config.gptq_section = None  # from here on these are floats
        model = super().from_pretrained(None, state_dict=state, **options)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (Linear, Embedding)):
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    # -------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **extra: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V], the loss if there are labels [B, T], and the cache."""
        out = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept] if not isinstance(kept, slice) or logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **extra)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            attentions=out.attentions,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    # ------------------------------------------------------------------------------------------------- generate

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        out = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if type(cache) is QWenCache.__base__:
            cache.__class__ = QWenCache  # the same cache, which keeps its rows' factors too
        return out

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not cache.get_seq_length() and input_ids.shape[1]:
            # a prompt in pieces has the factor of the whole
            mask = model_kwargs.get("attention_mask")
            cache.alphas = self.transformer.alphas(input_ids.shape[0], input_ids.shape[1], mask)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> Any:
        """Writes the published layout."""
        self.config.auto_map = {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        }
        try:
            return super().save_pretrained(save_directory, **options)
        finally:
            del self.config.auto_map


def _dtype(named: Any, asked: list[str], config: QWenConfig, options: dict[str, Any]) -> torch.dtype:
    """The precision that was named, asked for by a flag, or is fast where the model will live."""
    device = _device_of(options.get("device_map"))
    if named not in (None, "auto"):
        dtype = named if isinstance(named, torch.dtype) else dtype_by_name(str(named))
    elif asked and not (config.gptq_section is not None and device.type == "cpu"):
        dtype = DTYPES[asked[0]]
    else:  # a GPTQ checkpoint says fp16 because its scales are; a CPU has something faster
        return auto_dtype(device)[0]
    check_dtype(dtype, device)
    return dtype


def _device_of(device_map: Any) -> torch.device:
    """Where most of the model will live."""
    if isinstance(device_map, dict):
        device_map = next((place for place in device_map.values() if place != "disk"), None)
    if device_map is None or device_map == "cpu":
        return torch.device("cpu")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device_by_name("auto")
    return device_by_name(f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map))
