"""Reports: ours beside the card's, what was cut or not measured said so, a picture where it can be drawn."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from qwenlet.errors import MissingExtraError
from qwenlet.profiling.plot import write_png
from qwenlet.profiling.records import Row
from qwenlet.profiling.report import markdown

from .small import profile_of

GENERATED = Row(
    "generate", "bf16", "own", 1, 2048, done=2048, seconds=(200.0, 204.8, 210.0), first_token=(0.1,), bytes=10**12,
    operations=10**12, bound="memory", share=0.9, peak=4_000_000_000, card_speed=54.09, card_peak=None,
)  # fmt: skip
ENCODED = Row(
    "encode", "bf16", "own", 2048, 1, done=2048, seconds=(4.0,), first_token=(4.0,), peak=3_900_000_000,
    card_peak=4_230_000_000,
)  # fmt: skip
CUT = Row("generate", "int4", "own", 1, 8192, done=700, seconds=(20.0,), first_token=(0.1,), card_speed=76.45)
READ = Row("prefill", "bf16", "own", 512, 1, done=512, seconds=(2.0,), first_token=(2.0,), operations=10**12)
BATCH = Row("batch", "bf16", "own", 32, 8, batch=4, done=8, seconds=(2.0,), bytes=10**9, operations=10**9)
OURS = Row("peer generate", "bf16", "own", 1, 64, done=64, seconds=(1.0, 2.0, 4.0))
THEIRS = Row("peer generate", "bf16", "own", 1, 64, side="transformers", done=64, seconds=(4.0, 6.0, 20.0))
FAILED = Row("batch", "fp16", "own", 32, 8, batch=64, problem="out of memory")


def test_ours_stands_beside_the_card_s():
    text = markdown(profile_of(GENERATED, ENCODED, READ, BATCH))
    assert "| bf16 | own | 2,048 | 10.0 | 4.9 | 90% of memory | 54.09 |" in text
    assert "| bf16 | own | reading 2,048, generating 1 | 3.90 | 4.23 |" in text
    assert "card, A100-SXM4-80G" in text
    assert "| bf16 | own | 512 | 256.0 | 2.000 | 500 |  |" in text
    assert "| bf16 | own | 4 | 16.0 | 4.0 | 0.5 | 0 |  |" in text
    assert "a processor, 2 cores, 2 threads, 8 GB; kernels: avx2; torch 2" in text
    assert "bf16 3.05 GB" in text
    assert "* A note." in text


def test_a_model_that_is_not_the_card_s_stands_alone():
    text = markdown(profile_of(replace(GENERATED, card_speed=None), replace(ENCODED, card_peak=None)))
    assert "A100" not in text
    assert "| bf16 | own | 2,048 | 10.0 | 4.9 | 90% of memory |\n" in text


def test_what_was_cut_says_so():
    text = markdown(profile_of(CUT))
    assert "first 700 of 8,192" in text
    assert "35.0" in text


def test_peers_are_compared_round_by_round():
    assert "| bf16 | 64 tokens from one | 32.0 | 10.7 | 4.00 |" in markdown(profile_of(OURS, THEIRS))


def test_what_failed_is_listed_and_an_unfinished_run_says_so():
    text = markdown(profile_of(FAILED, finished=False))
    assert "(not finished)" in text
    assert "* fp16, attention own, 64 replies: out of memory" in text
    assert "## Several" not in text


def test_the_picture(tmp_path):
    write_png(profile_of(GENERATED, ENCODED, CUT, READ, BATCH, FAILED), tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.png"]


def test_no_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qwenlet\[profile\]'"):
        write_png(profile_of(GENERATED), tmp_path / "profile.png")
