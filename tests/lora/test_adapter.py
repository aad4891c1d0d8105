"""An adapter's folder: peft reads ours, we read peft's, and what doesn't fit is named."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora.tiny import plain_model, stir
from qwenlet.config import LoraConfig, ModelConfig
from qwenlet.errors import CheckpointError, ConfigError
from qwenlet.hf import QWenConfig, QWenLMHeadModel
from qwenlet.lora import Adapter, add_lora, load_adapter, save_adapter
from qwenlet.model import Qwen

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
IDS = torch.arange(24)[None]


def logits(model: Qwen) -> torch.Tensor:
    from qwenlet.cache import Rows

    with torch.no_grad():
        return model(IDS[0], Rows.fresh([IDS.shape[1]], [1.0]))


def as_hf(model: Qwen) -> QWenLMHeadModel:
    """The same weights behind transformers' API."""
    published = model.config.to_published()
    other = QWenLMHeadModel(
        QWenConfig(**{k: v for k, v in published.items() if k not in ("architectures", "auto_map")})
    )
    other.load_state_dict(model.state_dict())
    return other.float().eval()


def adapted(config: LoraConfig) -> tuple[Qwen, QWenLMHeadModel]:
    """A model with an adapter that does something, and what it was before, for peft."""
    model = plain_model()
    before = as_hf(model)
    add_lora(model, config)
    stir(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter += 0.05
            if "magnitude" in name:
                parameter *= 1.5
    return model, before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ("c_attn",), "rslora": True},
        {"modules_to_save": ("wte", "lm_head")},
        {"modules_to_save": ("ln_f",)},
        {"dora": True},
    ],
    ids=["published", "rslora", "wte and lm_head", "ln_f", "dora"],
)
def test_peft_loads_what_we_save(options: dict[str, object], tmp_path: Path) -> None:
    model, before = adapted(LoraConfig(rank=4, **options))  # type: ignore[arg-type]
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits[0], logits(model), atol=1e-4)

    ours = plain_model()
    load_adapter(ours, tmp_path / "adapter")
    assert torch.allclose(logits(ours), logits(model), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"w1": 2}}]
)
def test_we_load_what_peft_saves(options: dict[str, object], tmp_path: Path) -> None:
    before = plain_model()
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "w1"], task_type="CAUSAL_LM", alpha_pattern={"h.1.mlp.w1": 3.0}, **options
    )
    theirs = peft.get_peft_model(as_hf(before), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(before, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits[0], logits(before), atol=1e-4)


def test_an_adapter_of_the_qwen2_form_is_the_fused_projections(tmp_path: Path) -> None:
    """q and v adapted apart, k not at all."""
    model = plain_model()
    torch.manual_seed(5)
    prefix = "base_model.model.model.layers.0."
    parts = {leaf: (torch.randn(2, 64), torch.randn(64, 2)) for leaf in ("self_attn.q_proj", "self_attn.v_proj")}
    parts["mlp.gate_proj"] = (torch.randn(2, 64), torch.randn(96, 2))
    state = {}
    for leaf, (a, b) in parts.items():
        state |= {f"{prefix}{leaf}.lora_A.weight": a, f"{prefix}{leaf}.lora_B.weight": b}
    write(tmp_path / "adapter", state, r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "gate_proj"])
    adapter = Adapter.read(tmp_path / "adapter", model.config)
    assert set(adapter.factors) == {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.w2"}
    fused = adapter.factors["transformer.h.0.attn.c_attn"].added_to(torch.zeros(192, 64))
    q, v = (b @ a for a, b in (parts["self_attn.q_proj"], parts["self_attn.v_proj"]))
    assert torch.allclose(fused, torch.cat([q, torch.zeros(64, 64), v]), atol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        ({"q_proj": 2, "v_proj": 2}, {}),
        ({"q_proj": 2, "k_proj": 2, "v_proj": 2}, {}),
        ({"q_proj": 2, "k_proj": 2, "v_proj": 2}, {"use_rslora": True}),
        ({"q_proj": 2, "v_proj": 4}, {"rank_pattern": {"v_proj": 4}}),
        ({"q_proj": 2, "v_proj": 4}, {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 3}}),
    ],
    ids=["q and v", "q, k and v", "rslora", "ranks", "ranks and alphas"],
)
def test_what_was_fused_is_written_with_its_scale(
    ranks: dict[str, int], options: dict[str, object], tmp_path: Path
) -> None:
    """Loaded to be trained further, and written: the same change of the weights, to us and to peft."""
    prefix = "base_model.model.model.layers.0.self_attn."
    torch.manual_seed(5)
    state = {}
    for leaf, rank in ranks.items():
        state |= {f"{prefix}{leaf}.lora_A.weight": torch.randn(rank, 64) / 8}
        state |= {f"{prefix}{leaf}.lora_B.weight": torch.randn(64, rank) / 8}
    write(tmp_path / "apart", state, r=2, lora_alpha=8, target_modules=list(ranks), **options)
    model = plain_model()
    before = as_hf(model)
    first = load_adapter(model, tmp_path / "apart")
    save_adapter(model, tmp_path / "fused")
    name = "transformer.h.0.attn.c_attn"
    change = first.factors[name].added_to(torch.zeros(192, 64))
    again = Adapter.read(tmp_path / "fused", model.config)
    assert again.factors.keys() == {name}
    assert torch.allclose(again.factors[name].added_to(torch.zeros(192, 64)), change, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers without an adapter are missing in the file
        theirs = peft.PeftModel.from_pretrained(before, tmp_path / "fused").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits[0], logits(model), atol=1e-4)


def test_ranks_and_alphas_of_single_modules_stay(tmp_path: Path) -> None:
    before = plain_model()
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "w1"], task_type="CAUSAL_LM", rank_pattern={"w1": 2},
        alpha_pattern={"h.1.mlp.w1": 3.0},
    )  # fmt: skip
    theirs = peft.get_peft_model(as_hf(before), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = plain_model()
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    other = plain_model()
    load_adapter(other, tmp_path / "ours")
    assert torch.allclose(logits(other), logits(model), atol=1e-6)
    again = peft.PeftModel.from_pretrained(as_hf(plain_model()), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits[0], theirs(IDS).logits[0], atol=1e-5)


def test_a_vocabulary_that_grew_grows_the_model(tmp_path: Path) -> None:
    model = plain_model()
    model.resize_vocabulary(300)
    add_lora(model, LoraConfig(rank=4, modules_to_save=("wte", "lm_head")))
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    other = plain_model()
    load_adapter(other, tmp_path / "adapter")
    assert other.config.vocab_size == 300
    assert torch.equal(logits(other), logits(model))


def test_new_rows_begin_as_the_mean_of_the_old() -> None:
    model = plain_model()
    old = model.lm_head.weight.clone()
    model.resize_vocabulary(280)
    assert torch.equal(model.lm_head.weight[:271], old)
    assert torch.allclose(model.lm_head.weight[271:], old.mean(0).expand(9, -1))
    assert model.transformer.wte.weight.shape == (280, 64)


# ------------------------------------------------------------------------------------------------------ refusals


def write(folder: Path, state: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, _ = adapted(LoraConfig(rank=4))
    return save_adapter(model, tmp_path / "adapter")


def other_config(**changes: int) -> ModelConfig:
    return replace(plain_model().config, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, r"it adapts transformer\.h\.1\.attn\.c_attn\.lora_A\.weight, .* and \d+ more"),
        (
            {"intermediate_size": 64},
            r"transformer\.h\.0\.mlp\.w1 is \[4, 64\] and \[96, 4\], expected \[rank, 64\] and \[64",
        ),
    ],
)
def test_another_models_adapter_is_refused(saved: Path, changes: dict[str, int], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as problem:
        Adapter.read(saved, other_config(**changes))
    assert "model it was trained on" in str(problem.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "describes a 'IA3' adapter"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"new_field": 3}, "new_field"),
        ({"use_dora": True}, "contradict"),
        ({"r": "four"}, "r is 'four'"),
    ],
)
def test_kinds_that_are_not_read_are_named(config: dict[str, object], said: str, saved: Path) -> None:
    raw = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(raw | config))
    with pytest.raises((ConfigError, CheckpointError), match=said):
        Adapter.read(saved, plain_model().config)


def test_missing_and_damaged_files_are_named(saved: Path, tmp_path: Path) -> None:
    config = plain_model().config
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        Adapter.read(tmp_path, config)
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="can't be read"):
        Adapter.read(saved, config)
    file.rename(saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle"):
        Adapter.read(saved, config)


def test_half_an_adapter_is_refused(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    state = load_file(file)
    del state["base_model.model.transformer.h.0.mlp.w1.lora_B.weight"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.w1 has one of lora_A and lora_B only"):
        Adapter.read(saved, plain_model().config)


def test_a_vocabulary_that_grew_on_one_side_only_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "adapter", {"base_model.model.lm_head.weight": torch.zeros(300, 64)}, target_modules=[])
    with pytest.raises(CheckpointError, match="have to grow together"):
        Adapter.read(tmp_path / "adapter", plain_model().config)


def test_a_model_without_an_adapter_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_adapter(plain_model(), tmp_path / "adapter")


def test_nothing_is_overwritten(saved: Path) -> None:
    model, _ = adapted(LoraConfig(rank=4))
    with pytest.raises(CheckpointError, match="exists already"):
        save_adapter(model, saved)
