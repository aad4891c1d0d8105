"""transformers runs the same model: its logits are ours."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from qwenlet.cache import Rows
from qwenlet.checkpoint import RandomCheckpoint, load_model
from qwenlet.errors import MissingExtraError
from qwenlet.profiling.peer import peer_model, run_duel
from qwenlet.profiling.subject import Subject

from .small import TINY, job, tiny

CPU = torch.device("cpu")


def _logits(checkpoint, ids):
    model, _ = load_model(checkpoint, torch.float32, CPU)
    with torch.inference_mode():
        ours = model(torch.tensor(ids), Rows.single(0, len(ids), 1.0))
        theirs = peer_model(checkpoint, torch.float32, CPU)(torch.tensor([ids])).logits[0]
    return ours, theirs


def test_the_same_weights_give_the_same_logits():
    ours, theirs = _logits(TINY.checkpoint(precision="fp32"), [5, 900, 17, 3])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_a_tied_llama_with_shared_heads_and_no_biases_too():
    llama = replace(
        TINY.checkpoint().config, model_type="llama", qkv_bias=False, num_key_value_heads=1, tie_word_embeddings=True,
        use_dynamic_ntk=False, use_logn_attn=False,
    )  # fmt: skip
    ours, theirs = _logits(RandomCheckpoint.of(llama, dtype=torch.float32), [5, 900, 17, 3])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_both_sides_do_the_same_work_in_turn():
    duel = run_duel(
        tiny(), peer_model(TINY.checkpoint(precision="fp32"), torch.float32, CPU), job("peer", 1, 5, rounds=2)
    )
    assert all(len(seconds) == 2 for side in (duel.generate, duel.prefill) for seconds in side.values())
    assert all(took > 0 for side in (duel.generate, duel.prefill) for seconds in side.values() for took in seconds)


def test_no_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qwenlet\[peers\]'"):
        peer_model(Subject("random:tiny", "cpu").checkpoint(), torch.float32, CPU)
