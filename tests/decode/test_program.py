"""The decode step against the modules, which are its definition, and against the published code's logits: by torch's
operations, and by the kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decode.tiny import CPU, WAYS, Writer, by_modules, check_kernels, random_model, tokens, twins
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.decode.inputs import BUCKETS, bucket_of

pytestmark = pytest.mark.parametrize("way", WAYS)


def steps(way: str, count: int, interpreted: int) -> int:
    """How many tokens to write: a step of the kernels takes seconds in the interpreter."""
    return interpreted if way == "kernels" else count


def written(writer: Writer, first: int, last: int, at: int = 0) -> torch.Tensor:
    """Logits of positions first to last of a row, its beginning stored before."""
    writer.begin([first if row == at else 0 for row in range(len(writer.rows))])
    found = [writer.decoder.launch([writer.row(at, position)]).logits.float() for position in range(first, last)]
    return torch.cat([logits.clone() for logits in found])


def test_it_computes_what_the_published_code_computes(way: str, golden: Path) -> None:
    """Across twice to four times the training length, where NTK and log-n attention act."""
    check_kernels(way)
    reference = load_file(golden / "tiny-qwen" / "golden.safetensors")
    model, _ = load_model(Checkpoint.open(golden / "tiny-qwen"), torch.float32, CPU)
    ids = reference["prefill.128.input_ids"][0].tolist()
    writer = Writer(model, way, torch.float32, [ids])
    first = 128 - steps(way, 8, 3)
    found = written(writer, first, 128)
    assert (found - reference["prefill.128.logits"][0][first:]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("dtype", "cache", "share"),
    [
        (torch.float32, torch.float32, 2e-5),
        (torch.float32, torch.int8, 0.05),  # a number at the edge between two codes falls to the other
        (torch.bfloat16, torch.bfloat16, 0.08),
        (torch.float16, torch.float16, 0.01),
        (torch.bfloat16, torch.int8, 0.1),
    ],
)
def test_in_every_precision_it_computes_what_the_modules_compute(
    way: str, dtype: torch.dtype, cache: torch.dtype, share: float
) -> None:
    """Errors as shares of the logits' spread: those of numbers rounded to the precision some ten times in a row."""
    check_kernels(way)
    model, ids = random_model(dtype), tokens(72)
    first = 72 - steps(way, 10, 1)
    expected = by_modules(model, cache, ids, first=first)
    found = written(Writer(model, way, cache, [ids]), first, 72)
    assert (found - expected).abs().max() <= share * expected.std()


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True)])
def test_weights_in_codes_are_what_they_are_worth(way: str, bits: int, sym: bool) -> None:
    """On a GPU activations are not rounded, so that float weights of the same values give the same logits."""
    check_kernels(way)
    coded, plain = twins(bits, sym=sym)
    ids = tokens(10)
    model = coded if way == "kernels" else plain  # torch's operations on a CPU would round activations
    first = 10 - steps(way, 5, 2)
    found = written(Writer(model, way, torch.float32, [ids], plain), first, 10)
    expected = by_modules(plain, torch.float32, ids, first=first)
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


def test_grouped_heads_and_a_tied_head(way: str) -> None:
    check_kernels(way)
    model = random_model(num_key_value_heads=2, qkv_bias=False, tie_word_embeddings=True)
    ids = tokens(8)
    first = 8 - steps(way, 8, 2)
    found = written(Writer(model, way, torch.float32, [ids]), first, 8)
    expected = by_modules(model, torch.float32, ids, first=first)
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_rows_side_by_side_are_as_alone(way: str) -> None:
    """Three rows in a bucket of four, at places of their own; the empty one writes nothing."""
    check_kernels(way)
    model, rows = random_model(), [tokens(70, 1), tokens(3, 2), tokens(20, 3)]
    writer = Writer(model, way, torch.float32, rows)
    writer.begin([69, 2, 19])
    logits = writer.decoder.launch([writer.row(at, len(ids) - 1) for at, ids in enumerate(rows)]).logits
    assert len(logits) == 3
    for ids, found in zip(rows, logits, strict=True):
        expected = by_modules(model, torch.float32, ids, first=len(ids) - 1)[0]
        assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_a_step_goes_on_from_the_one_before_without_the_host(way: str) -> None:
    """Rows change places, and both launches are on their way before a token is asked for."""
    check_kernels(way)
    model, rows = random_model(), [tokens(6, 1), tokens(4, 2)]
    writer = Writer(model, way, torch.float32, rows)
    writer.begin([5, 3])
    first = writer.decoder.launch([writer.row(0, 5), writer.row(1, 3)])
    second = writer.decoder.launch(
        [writer.row(1, 3, token=None, source=1, position=4), writer.row(0, 5, token=None, source=0, position=6)]
    )
    a, b = first.tokens()
    for ids, token, after in ((rows[0], a, second.tokens()[1]), (rows[1], b, second.tokens()[0])):
        assert token == int(by_modules(model, torch.float32, ids, first=len(ids) - 1).argmax())
        assert after == int(by_modules_at(model, [*ids, token], len(ids)))


def by_modules_at(model, ids: list[int], asked: int) -> torch.Tensor:
    """The most likely token, with the NTK factor of the first `asked` ids."""
    assert model.config.ntk_alpha(asked) == model.config.ntk_alpha(len(ids))
    return by_modules(model, torch.float32, ids, first=len(ids) - 1).argmax()


def test_buckets(way: str) -> None:
    assert [bucket_of(rows) for rows in (1, 2, 3, 5, 9, 33, 64)] == [1, 2, 4, 8, 16, 64, 64]
    assert BUCKETS[-1] == 64
