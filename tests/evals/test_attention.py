"""The entropy of attention, against weights that are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.evals.attention import attention_entropy, entropy
from qwenlet.model import Qwen


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Qwen:
    return load_model(Checkpoint.open(golden / "tiny-qwen"), torch.float32, torch.device("cpu"))[0]


def test_keys_that_are_alike_share_the_attention() -> None:
    queries, keys = torch.randn(600, 4, 8), torch.ones(600, 2, 8)
    expected = torch.arange(1, 601).float().log().expand(4, -1)
    torch.testing.assert_close(entropy(queries, keys), expected, atol=1e-4, rtol=0)


def test_a_query_that_finds_its_key_has_none() -> None:
    keys = 40.0 * torch.eye(8)[:, None]
    torch.testing.assert_close(entropy(keys, keys), torch.zeros(1, 8), atol=1e-4, rtol=0)


def test_two_heads_may_read_one_key_head() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(5, 4, 8, generator=generator), torch.randn(5, 2, 8, generator=generator)
    weights = torch.softmax(torch.stack([q[4, head] @ k[:, head // 2].T for head in range(4)]) / math.sqrt(8), -1)
    torch.testing.assert_close(entropy(q, k)[:, 4], -(weights * weights.log()).sum(-1))


def test_log_n_keeps_attention_together_beyond_the_training_length(tiny: Qwen) -> None:
    """The golden model's training length is 32; its first layer's queries and keys are the same with and without."""
    ids = torch.randint(0, tiny.config.vocab_size, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    without, with_it = (attention_entropy(tiny, ids, logn=logn) for logn in (False, True))
    assert without.shape == (tiny.config.num_hidden_layers, tiny.config.num_attention_heads, 100)
    assert torch.equal(without[:, :, :32], with_it[:, :, :32])
    # a larger factor on all scores sharpens every softmax
    assert bool((with_it[0, :, 32:] < without[0, :, 32:]).all())
    assert not torch.equal(attention_entropy(tiny, ids, ntk=False), with_it)
    short = attention_entropy(tiny, ids[:32])
    assert torch.equal(attention_entropy(tiny, ids[:32], ntk=False, logn=False), short)
