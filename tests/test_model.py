"""The model against outputs of the published code (tests/golden/tiny-qwen: 3 layers, seq_length 32, float32), and what
the published code promises in words: one NTK factor per request, rows that don't see each other, few logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenlet.cache import PAGE_TOKENS, PagedPast, PagePool, Rows, pages_for
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.config import ModelConfig
from qwenlet.model import Qwen
from qwenlet.ops.attention import attention_backend

TOLERANCE = 1e-4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "tiny-qwen" / "golden.safetensors")


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Qwen:
    return load_model(Checkpoint.open(golden / "tiny-qwen"), torch.float32, CPU)[0]


def small(**changes: object) -> Qwen:
    """A random model of a few thousand weights, for what the goldens don't cover."""
    fields: dict[str, object] = {
        "model_type": "qwen2", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64,
        "seq_length": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen(ModelConfig(**(fields | changes)))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prefill(model: Qwen, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, Rows.fresh([len(ids)], [model.config.ntk_alpha(len(ids))]))


def paged(model: Qwen, ids: torch.Tensor, pieces: list[int], alpha: float) -> torch.Tensor:
    """Logits of every position, computed piece by piece over a paged past whose pages lie in disorder."""
    pool = PagePool(model.config, 8, torch.float32, CPU)
    spare = pool.take(3)
    table = pool.take(pages_for(len(ids)))
    pool.give_back(spare)
    start, out = 0, []
    with torch.no_grad():
        for length in pieces:
            rows = Rows.single(start, length, alpha)
            past = PagedPast(pool, rows, [table], [start])
            out.append(model(ids[start : start + length], rows, past))
            start += length
    return torch.cat(out)


@pytest.mark.parametrize("length", [1, 16, 32, 33, 64, 69, 128])
def test_prefill_equals_the_published_code_below_at_and_beyond_seq_length(
    tiny: Qwen, reference: dict[str, torch.Tensor], length: int
) -> None:
    logits = prefill(tiny, reference[f"prefill.{length}.input_ids"][0])
    assert (logits - reference[f"prefill.{length}.logits"][0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("prompt", "new"), [(16, 32), (35, 8)])
def test_cached_decode_keeps_the_prompts_ntk_factor_across_the_boundary(
    tiny: Qwen, reference: dict[str, torch.Tensor], prompt: int, new: int
) -> None:
    ids = reference[f"decode.{prompt}+{new}.input_ids"][0]
    assert len(ids) == prompt + new
    logits = paged(tiny, ids, [prompt, *[1] * new], tiny.config.ntk_alpha(prompt))[prompt - 1 : -1]
    assert (logits - reference[f"decode.{prompt}+{new}.logits"][0]).abs().max() <= TOLERANCE


def test_a_left_padded_batch_equals_the_same_rows_without_padding(
    tiny: Qwen, reference: dict[str, torch.Tensor]
) -> None:
    mask = reference["batch.attention_mask"].bool()
    rows = [ids[keep] for ids, keep in zip(reference["batch.input_ids"], mask, strict=True)]
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) == 3, f"rows of {lengths} tokens: the golden should be ragged"
    with torch.no_grad():
        logits = tiny(torch.cat(rows), Rows.fresh(lengths, [1.0] * 3))
    assert (logits - reference["batch.logits"][mask]).abs().max() <= TOLERANCE


def test_greedy_tokens(tiny: Qwen, reference: dict[str, torch.Tensor]) -> None:
    ids, expected = reference["greedy.input_ids"][0], reference["greedy.output_ids"][0]
    while len(ids) < len(expected):
        ids = torch.cat((ids, prefill(tiny, ids)[-1:].argmax(-1)))
    assert ids.tolist() == expected.tolist()


def test_loss(tiny: Qwen, reference: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        loss = tiny.loss(reference["loss.input_ids"], reference["loss.labels"])
    assert abs(float(loss) - float(reference["loss.value"])) <= TOLERANCE


@pytest.mark.parametrize("pieces", [[128], [64, 64], [1, 127], [63, 2, 63], [100, 28]])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(
    tiny: Qwen, reference: dict[str, torch.Tensor], pieces: list[int]
) -> None:
    ids = reference["prefill.128.input_ids"][0]
    logits = paged(tiny, ids, pieces, tiny.config.ntk_alpha(128))
    assert (logits - reference["prefill.128.logits"][0]).abs().max() <= TOLERANCE


def test_rows_of_one_call_have_their_own_ntk_factor_and_dont_see_each_other(
    tiny: Qwen, reference: dict[str, torch.Tensor]
) -> None:
    lengths = [16, 69, 128]
    ids = torch.cat([reference[f"prefill.{length}.input_ids"][0] for length in lengths])
    with torch.no_grad():
        together = tiny(ids, Rows.fresh(lengths, [tiny.config.ntk_alpha(length) for length in lengths]))
    for length, logits in zip(lengths, together.split(lengths), strict=True):
        assert (logits - reference[f"prefill.{length}.logits"][0]).abs().max() <= TOLERANCE


def test_rows_with_a_past_and_rows_without_run_in_one_call(tiny: Qwen, reference: dict[str, torch.Tensor]) -> None:
    ids = {length: reference[f"prefill.{length}.input_ids"][0] for length in (16, 33)}
    pool = PagePool(tiny.config, 4, torch.float32, CPU)
    old, new = pool.take(1), pool.take(1)
    alpha = tiny.config.ntk_alpha(33)
    with torch.no_grad():
        first = Rows.single(0, 30, alpha)
        tiny(ids[33][:30], first, PagedPast(pool, first, [old], [0]))
        rows = Rows(torch.cat((torch.arange(30, 33), torch.arange(16))), (3, 16), (alpha, 1.0))
        logits = tiny(torch.cat((ids[33][30:], ids[16])), rows, PagedPast(pool, rows, [old, new], [30, 0]))
    assert (logits[:3] - reference["prefill.33.logits"][0][30:]).abs().max() <= TOLERANCE
    assert (logits[3:] - reference["prefill.16.logits"][0]).abs().max() <= TOLERANCE


def test_logits_come_only_where_asked(tiny: Qwen, reference: dict[str, torch.Tensor]) -> None:
    ids = reference["prefill.33.input_ids"][0]
    rows = Rows.fresh([33], [tiny.config.ntk_alpha(33)])
    with torch.no_grad():
        some = tiny(ids, rows, logits_at=torch.tensor([32, 4]))
    assert some.shape == (2, tiny.config.vocab_size)
    assert (some - reference["prefill.33.logits"][0][[32, 4]]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_attention_backends_agree(tiny: Qwen, reference: dict[str, torch.Tensor], backend: str) -> None:
    with attention_backend(backend):
        logits = paged(tiny, reference["prefill.69.input_ids"][0], [40, 28, 1], tiny.config.ntk_alpha(69))
    assert (logits - reference["prefill.69.logits"][0]).abs().max() <= TOLERANCE


def test_the_switches_do_something(tiny: Qwen, reference: dict[str, torch.Tensor]) -> None:
    """Guards the goldens themselves: without NTK or without log-n the long ones must not match."""
    from dataclasses import replace

    ids = reference["prefill.64.input_ids"][0]
    for switch in ("use_dynamic_ntk", "use_logn_attn"):
        other = Qwen(replace(tiny.config, **{switch: False})).eval()
        other.load_state_dict(tiny.state_dict())
        assert (prefill(other, ids) - reference["prefill.64.logits"][0]).abs().max() > 10 * TOLERANCE, switch


def test_training_uses_neither_ntk_nor_logn_and_checkpointing_changes_no_gradient() -> None:
    model = small(
        model_type="qwen", num_key_value_heads=6, seq_length=8, use_dynamic_ntk=True, use_logn_attn=True
    ).train()
    ids = torch.randint(0, 97, (2, 24))
    plain = model.loss(ids, ids)
    plain.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.transformer.gradient_checkpointing = True
    again = model.loss(ids, ids)
    again.backward()
    assert torch.equal(plain, again)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True) if p.grad is not None)
    assert len(gradients) == len(list(model.parameters()))
    assert abs(plain.item() - model.eval().loss(ids, ids).item()) > 1e-4, (
        "evaluation mode should differ beyond seq_length"
    )


def test_grouped_heads_equal_the_same_model_with_repeated_heads() -> None:
    grouped = small()
    config = grouped.config
    whole = small(num_key_value_heads=config.num_attention_heads)
    repeat = config.num_attention_heads // config.num_key_value_heads
    state = grouped.state_dict()
    sizes = [config.num_attention_heads * 8, config.num_key_value_heads * 8, config.num_key_value_heads * 8]
    for name, value in list(state.items()):
        if "c_attn" in name:
            q, k, v = value.split(sizes)
            k, v = (x.unflatten(0, (-1, 8)).repeat_interleave(repeat, 0).flatten(0, 1) for x in (k, v))
            state[name] = torch.cat((q, k, v))
    whole.load_state_dict(state)
    ids = torch.randint(0, 97, (PAGE_TOKENS - 1,))
    assert torch.allclose(prefill(grouped, ids), prefill(whole, ids), atol=1e-4)
    assert torch.allclose(paged(grouped, ids, [40, 22, 1], 1.0), prefill(whole, ids), atol=1e-4)


def test_a_tied_head_is_the_embedding() -> None:
    model = small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count
