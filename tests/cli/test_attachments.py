"""`@file` in a question: its text below it; a mistake is refused, and other uses of the sign are left alone."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.cli import attachments
from qwenlet.cli.attachments import attach, begun, expand
from qwenlet.errors import RequestError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("alpha\n")
    (tmp_path / "my notes.md").write_text("意味\n")
    (tmp_path / "folder").mkdir()
    return tmp_path


A = "a.txt:\n```\nalpha\n```"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Explain @a.txt", f"Explain @a.txt\n\n{A}"),
        ("Explain @a.txt, please.", f"Explain @a.txt, please.\n\n{A}"),
        ("(@a.txt)", "(@a.txt)"),
        ("@a.txt and @a.txt", f"@a.txt and @a.txt\n\n{A}"),
        ('@"my notes.md"?', '@"my notes.md"?\n\nmy notes.md:\n```\n意味\n```'),
        ("@./a.txt", f"@./a.txt\n\n{A}"),
        ("two\nlines @a.txt", f"two\nlines @a.txt\n\n{A}"),
        ("Ask @everyone", "Ask @everyone"),
        ("me@a.txt", "me@a.txt"),
        ("@@a.txt", "@a.txt"),
        ("x @ y", "x @ y"),
        ("import x\n@pytest.mark\n@app.get('/')\ndef f(): ...", "import x\n@pytest.mark\n@app.get('/')\ndef f(): ..."),
        ("a\n@folder", "a\n@folder"),
    ],
)
def test_what_is_attached(question, expected):
    assert expand(question) == expected


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("Explain @b.txt", "there is no file b.txt"),
        ("Explain @~/nothing here", "there is no file ~/nothing"),
        ('Explain @"b"', "there is no file b"),
        ("Explain @folder", "folder is no plain file"),
        ("Explain @pipe", "pipe is no plain file"),
        ("Explain @zero", "zero is binary"),
        ("Explain @latin", "latin is not valid UTF-8: .*byte 0xe9 at offset 3"),
        ("Explain @big", r"big has 1\.0 MB, and a question takes files of 1\.0 MB in all"),
        ("Both @half @other", r"other has 600\.0 kB"),
    ],
)
def test_what_is_refused(here, question, said):
    os.mkfifo(here / "pipe")
    (here / "zero").write_bytes(b"abc\0")
    (here / "latin").write_bytes(b"caf\xe9")
    (here / "big").write_bytes(b"x" * (attachments.MAX_BYTES + 1))
    (here / "half").write_bytes(b"x" * 600_000)
    (here / "other").write_bytes(b"x" * 600_000)
    with pytest.raises(RequestError, match=said):
        expand(question)


def test_a_fence_is_longer_than_any_in_the_file(here):
    (here / "f").write_text("````\ncode\n````")
    assert attach("", [here / "f"]).endswith(":\n`````\n````\ncode\n````\n`````")


@given(st.text(alphabet='@"./~ab\n\0 é', max_size=30))
def test_wild_questions_are_expanded_or_refused(question):
    try:
        expand(question)
    except RequestError:
        return


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("see @a", "a"), ("@", ""), ('@"my n', "my n"), ("me@a", None), ("@a.txt ", None), ("plain", None)],
)
def test_the_name_that_is_being_typed(typed, expected):
    assert begun(typed) == expected
