"""The tables of names, both ways: every tensor of every layout is wanted once, with its rows in our order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.variants import LLAMA, State, cut, gguf_names, random_llama, to_pairs, untied_state
from qwenlet.checkpoint.names import Layout, Part, join, parts_of, unpermute
from qwenlet.config import ModelConfig


@pytest.mark.parametrize(
    ("layout", "model_type"), [("qwen", "qwen"), ("qwen2", "qwen2"), ("gguf", "qwen"), ("gguf", "qwen2")]
)
def test_parts_name_each_tensor_once_and_fit_its_rows(
    tiny: Path, state: State, layout: Layout, model_type: str
) -> None:
    config = replace(ModelConfig.from_file(tiny), model_type=model_type)  # type: ignore[arg-type]
    foreign = {"qwen": lambda *_: state, "qwen2": cut, "gguf": gguf_names}[layout](state, config)
    wanted = [part for name, value in state.items() for part in parts_of(name, len(value), layout, config)]
    assert sorted(part.name for part in wanted) == sorted(foreign)
    for part in wanted:
        assert part.rows == len(foreign[part.name]), part.name
        assert part.permuted_heads == 0
    for name, value in state.items():
        parts = parts_of(name, len(value), layout, config)
        assert torch.equal(join([foreign[part.name] for part in parts]), value), name


def test_llama_files_have_grouped_heads_and_turned_rows() -> None:
    rows = LLAMA.qkv_size
    assert parts_of("transformer.h.1.attn.c_attn.weight", rows, "gguf", LLAMA) == (
        Part("blk.1.attn_q.weight", 64, permuted_heads=4),
        Part("blk.1.attn_k.weight", 32, permuted_heads=2),
        Part("blk.1.attn_v.weight", 32),
    )
    # a Llama folder keeps the order
    assert all(not p.permuted_heads for p in parts_of("transformer.h.1.attn.c_attn.weight", rows, "qwen2", LLAMA))
    state = untied_state(random_llama())
    foreign = gguf_names(state, LLAMA)
    for name, value in state.items():
        tensors = [
            unpermute(foreign[part.name], part.permuted_heads) if part.permuted_heads else foreign[part.name]
            for part in parts_of(name, len(value), "gguf", LLAMA)
        ]
        assert torch.equal(join(tensors), value), name


@given(heads=st.integers(1, 8), half=st.integers(1, 16), columns=st.sampled_from([(), (3,)]))
def test_unpermute_undoes_the_pairs(heads: int, half: int, columns: tuple[int, ...]) -> None:
    weight = torch.arange(heads * 2 * half * (3 if columns else 1)).reshape(heads * 2 * half, *columns)
    assert torch.equal(unpermute(to_pairs(weight, 2 * half), heads), weight)
