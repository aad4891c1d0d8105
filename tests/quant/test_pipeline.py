"""Layer by layer through a tiny model: what is written, and what is left when a run is killed, full or fed nonsense."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenlet.cache import Rows
from qwenlet.checkpoint import Checkpoint, load_model, write_random, write_rounded
from qwenlet.config import ModelConfig, QuantConfig, qwen_1_8b
from qwenlet.errors import CheckpointError, ConfigError, RequestError
from qwenlet.quant import workfolder
from qwenlet.quant.calibration import Calibration
from qwenlet.quant.outcome import RUN_FILE
from qwenlet.quant.pipeline import quantize, unmeasured

VOCABULARY, LAYERS = 160, 3
GPTQ = QuantConfig(method="gptq", group_size=32)


def calibration(seed: int = 0, length: int = 96) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    lengths = (length, length, 17, length, 64)
    return Calibration(tuple(torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths), "random ids")


def tiny(vocabulary: int = VOCABULARY) -> ModelConfig:
    return replace(
        qwen_1_8b(), vocab_size=vocabulary, hidden_size=64, intermediate_size=160, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_hidden_layers=LAYERS, seq_length=128, max_position_embeddings=128,
        initializer_range=0.15,  # larger than a random start, so that layers do something to their inputs
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model") / "tiny", tiny())


def damaged(source: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((source / "config.json").read_text())
    return out


def logits(path: Path, ids: Tensor) -> Tensor:
    model, _ = load_model(Checkpoint.open(path), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        return model(ids, Rows.fresh([len(ids)], [1.0]))


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


OPTIONS = [
    {},
    {"bits": 8, "head_bits": 8},
    {"sym": False},
    {"desc_act": True},
    {"desc_act": True, "static_groups": True},
    {"true_sequential": False},
    {"head_bits": None, "embedding_bits": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_written_is_a_checkpoint_near_its_source(options: dict[str, object], source, tmp_path) -> None:
    quant = replace(GPTQ, **options)  # type: ignore[arg-type]
    outcome = quantize(source, tmp_path / "out", quant, calibration())
    assert outcome.path == tmp_path / "out"
    assert left_beside(outcome.path) == []
    checkpoint = Checkpoint.open(outcome.path)
    assert checkpoint.quant == quant
    names = [error.name for error in outcome.errors]
    assert len(names) == LAYERS * 5 + (quant.head_bits is not None)
    assert names[:5] == [
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    ]
    assert all(0 < error.error < (0.2 if quant.bits == 4 else 0.02) for error in outcome.errors)
    ids = calibration(1).samples[0]
    expected, found = logits(source, ids), logits(outcome.path, ids)
    assert (found - expected).norm() < (0.5 if quant.bits == 4 else 0.05) * expected.norm()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(("vocabulary", "bits", "kept"), [(202, 4, None), (203, 8, None), (204, 8, 8), (204, 4, None)])
def test_a_head_that_fills_no_words_stays_in_half_precision(
    vocabulary: int, bits: int, kept: int | None, method: str, tmp_path
) -> None:
    source = write_random(tmp_path / "tiny", tiny(vocabulary))
    quant = replace(GPTQ, bits=bits, head_bits=bits, method=method)
    outcome = quantize(source, tmp_path / "out", quant, calibration())
    found = Checkpoint.open(outcome.path).quant
    assert found is not None
    assert (found.bits, found.head_bits, outcome.quant.head_bits) == (bits, kept, kept)
    ids = calibration(1).samples[0]
    expected = logits(source, ids)
    assert (logits(outcome.path, ids) - expected).norm() < 0.5 * expected.norm()


def test_gptq_beats_rounding_on_other_text(source, tmp_path) -> None:
    """Random ids through random layers have little to correlate, so the gain is small."""
    ids = calibration(1).samples[0]
    expected = logits(source, ids)
    away = {}
    for method in ("gptq", "rtn"):
        quant = replace(GPTQ, method=method, head_bits=None, embedding_bits=None)
        outcome = quantize(source, tmp_path / method, quant, calibration() if method == "gptq" else None)
        away[method] = float((logits(outcome.path, ids) - expected).norm())
    assert away["gptq"] < 0.97 * away["rtn"]


def test_round_to_nearest_is_what_loading_with_quant_does(source, tmp_path) -> None:
    quant = replace(GPTQ, method="rtn")
    outcome = quantize(source, tmp_path / "out", quant)
    write_rounded(Checkpoint.open(source), tmp_path / "loaded", quant)
    outcome.measured()
    assert same_files(outcome.path, tmp_path / "loaded")
    assert len(outcome.errors) == LAYERS * 5 + 1
    assert all(0.02 < error.error < 0.15 for error in outcome.errors)


def test_progress_ends_where_it_said(source, tmp_path) -> None:
    seen: list[tuple[int, int, str]] = []
    quantize(source, tmp_path / "out", GPTQ, calibration(), progress=lambda *step: seen.append(step))
    steps = [step for step in seen if step[2].startswith("layer") or step[2] == "lm_head"]
    assert [done for done, _, _ in steps[: LAYERS * 6]] == list(range(1, LAYERS * 6 + 1))
    assert steps[0][1:] == (LAYERS * 6 + 1, "layer 1 of 3")
    assert (LAYERS * 6 + 1, LAYERS * 6 + 1, "lm_head") in steps


# ------------------------------------------------------------------------------------------------- interruptions

KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from quant.test_pipeline import GPTQ, calibration
from qwenlet.quant.pipeline import quantize

def progress(done, total, what):
    if what.startswith("layer 3"):
        print("in the third layer", flush=True)
        time.sleep(60)

quantize({source!r}, {out!r}, GPTQ, calibration(), progress=progress)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source, tmp_path) -> None:
    unbroken = quantize(source, tmp_path / "unbroken" / "out", GPTQ, calibration())
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    code = KILLED.format(path=[str(Path(__file__).parents[1])], source=str(source), out=str(out))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in the third layer\n"
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert left_beside(out) == [".out.quantizing"]

    resumed = quantize(source, out, GPTQ, calibration())
    assert resumed.resumed == 2
    assert resumed.errors == unbroken.errors
    assert same_files(out, unbroken.path)
    assert left_beside(out) == []


def interrupted(source: Path, out: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "layer 2 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, GPTQ, calibration(), progress=stop)


def test_other_settings_do_not_go_on_with_the_work(source, tmp_path) -> None:
    interrupted(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds an unfinished run with other settings: bits 4 then, 8 now"):
        quantize(source, tmp_path / "out", replace(GPTQ, bits=8), calibration())
    with pytest.raises(CheckpointError, match="other settings: calibration"):
        quantize(source, tmp_path / "out", GPTQ, calibration(2))
    assert quantize(source, tmp_path / "out", GPTQ, calibration()).resumed == 1


def test_finished_layers_serve_another_head(source, tmp_path) -> None:
    """How head and embedding are stored changes no layer; a head that was found for other bits is not taken for it."""

    def stop(done: int, total: int, what: str) -> None:
        if what == "transformer.wte":  # the layers and the head are done, the folder is being written
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, GPTQ, calibration(), progress=stop)
    eight = replace(GPTQ, head_bits=8, embedding_bits=None)
    outcome = quantize(source, out, eight, calibration())
    assert outcome.resumed == LAYERS
    assert Checkpoint.open(out).quant == eight
    unbroken = quantize(source, tmp_path / "unbroken", eight, calibration())
    assert outcome.errors == unbroken.errors
    assert same_files(out, unbroken.path)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_what_was_found_is_kept_until_its_quality_is_measured(method: str, source, tmp_path) -> None:
    quant, out = replace(GPTQ, method=method), tmp_path / "out"
    picked = calibration() if method == "gptq" else None
    assert unmeasured(source, out, quant, picked) is None
    outcome = quantize(source, out, quant, picked)
    assert unmeasured(source, out, quant, picked) == replace(outcome, quant=quant.fit(tiny()))
    assert unmeasured(source, out, replace(quant, head_bits=8), picked) is None, "another run's"
    assert unmeasured(source, out, GPTQ, calibration(2)) is None
    outcome.measured()
    assert not (out / RUN_FILE).exists()
    assert unmeasured(source, out, quant, picked) is None


def test_the_text_that_codes_depend_on_is_named(source, tmp_path) -> None:
    outcome = quantize(source, tmp_path / "out", GPTQ, calibration())
    assert outcome.seen == ("random ids", calibration().sha256)
    nearest = replace(outcome, quant=replace(GPTQ, method="rtn"), calibration=None)
    text = resources.files("qwenlet.checkpoint").joinpath("samples.json").read_bytes()
    assert nearest.seen == ("built-in samples", hashlib.sha256(text).hexdigest())
    assert replace(nearest, quant=replace(nearest.quant, weighted=False)).seen is None
    assert replace(nearest, quant=replace(nearest.quant, bits=8, head_bits=8)).seen is None


def test_two_runs_into_one_folder_are_kept_apart(source, tmp_path) -> None:
    def second(done: int, total: int, what: str) -> None:
        if not what.startswith("layer"):
            return
        with pytest.raises(CheckpointError, match="another process is quantizing"):
            quantize(source, tmp_path / "out", GPTQ, calibration())

    first = quantize(source, tmp_path / "out", GPTQ, calibration(), progress=second)
    assert Checkpoint.open(first.path).quant == GPTQ


def test_a_damaged_part_is_named(source, tmp_path) -> None:
    interrupted(source, tmp_path / "out")
    part = tmp_path / ".out.quantizing" / "layer-000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"layer-000\.safetensors, which an earlier run left, can't be read"):
        quantize(source, tmp_path / "out", GPTQ, calibration())
    part.unlink()
    assert quantize(source, tmp_path / "out", GPTQ, calibration()).resumed == 0


def test_a_full_disk_loses_nothing(source, tmp_path, monkeypatch) -> None:
    saved = []

    def save(tensors: object, path: Path, **options: object) -> None:
        if len(saved) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(path)
        save_file(tensors, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(workfolder, "save_file", save)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        quantize(source, tmp_path / "out", GPTQ, calibration())
    assert "run the same command" in str(caught.value.hint)
    monkeypatch.undo()
    assert quantize(source, tmp_path / "out", GPTQ, calibration()).resumed == 2


# ----------------------------------------------------------------------------------------------------- bad input


def test_an_existing_folder_is_refused_before_any_work(source, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(source, tmp_path / "out", GPTQ, calibration())
    assert left_beside(tmp_path / "out") == []


def test_a_group_that_does_not_divide_names_the_layer(source, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"groups of 128 do not divide the 64 inputs of transformer\.h\.0") as caught:
        quantize(source, tmp_path / "out", replace(GPTQ, group_size=128), calibration())
    assert caught.value.hint == "use group_size=32"


def test_gptq_without_a_text_is_refused(source, tmp_path) -> None:
    with pytest.raises(RequestError, match="needs a calibration text"):
        quantize(source, tmp_path / "out", GPTQ)


def test_samples_the_model_can_not_take_are_refused(source, tmp_path) -> None:
    with pytest.raises(RequestError, match="has 129 tokens, but the model was trained on 128"):
        quantize(source, tmp_path / "out", GPTQ, calibration(length=129))
    with pytest.raises(RequestError, match=f"holds the id 9999, the model knows {VOCABULARY} ids"):
        quantize(source, tmp_path / "out", GPTQ, Calibration((torch.tensor([9999]),), "x"))


def test_a_quantized_source_is_refused(source, tmp_path) -> None:
    quantize(source, tmp_path / "out", replace(GPTQ, method="rtn"))
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", GPTQ, calibration())


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_nan_in_a_weight_names_the_linear(method: str, source, tmp_path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.1.mlp.w2.weight"][3, 4] = float("nan")

    bad = damaged(source, tmp_path / "bad", change)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.(w2|c_proj): "):
        quantize(bad, tmp_path / "out", replace(GPTQ, method=method), calibration())
    assert not (tmp_path / "out").exists()


def test_nan_in_the_hidden_states_names_the_first_linear_that_sees_it(source, tmp_path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.2.ln_1.weight"][5] = float("nan")

    bad = damaged(source, tmp_path / "bad", change)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.2\.attn\.c_attn: its inputs hold NaN"):
        quantize(bad, tmp_path / "out", GPTQ, calibration())


def test_inputs_that_are_always_zero_are_counted(source, tmp_path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.ln_1.weight"][[7, 9]] = 0

    outcome = quantize(damaged(source, tmp_path / "bad", change), tmp_path / "out", GPTQ, calibration())
    assert outcome.errors[0].dead_columns == 2
    assert outcome.errors[1].dead_columns == 0
