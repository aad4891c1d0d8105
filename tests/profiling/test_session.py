"""A whole profile of a tiny model, and what becomes of one that is ended."""

from __future__ import annotations

import json

import pytest

from qwenlet.errors import ConfigError, EngineError, RequestError
from qwenlet.profiling import session
from qwenlet.profiling.alone import run_alone
from qwenlet.profiling.session import Hooks, Session, spoken
from qwenlet.profiling.subject import Subject
from qwenlet.profiling.workload import changed

from .small import CEILINGS, SMALL, TINY, job


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch):
    monkeypatch.setattr(session, "measure_ceilings", lambda device: CEILINGS)


@pytest.fixture
def together(monkeypatch):
    """Jobs that would get a process of their own run in this one, which is quicker."""
    monkeypatch.setattr(session, "run_alone", lambda subject, job, threads: _here(subject, job))


def _here(subject, job):
    from qwenlet.profiling.measure import run_job

    with subject.load(job.precision) as llm:
        return run_job(llm, job)


@pytest.mark.usefixtures("together")
def test_everything_that_was_asked_for_is_there():
    said, kept = [], []
    workload = changed(SMALL, precisions=("fp32", "int4"), peer="transformers", peer_tokens=3)
    profile = Session(TINY, workload, Hooks(said.append, kept.append)).run()
    assert profile.finished
    assert kept[-1] is profile
    assert not kept[0].finished
    for precision in ("fp32", "int4"):
        rows = [row for row in profile.rows if row.precision == precision and row.problem is None]
        assert [row.tokens for row in rows if row.kind == "generate"] == [3, 6]
        assert [row.batch for row in rows if row.kind == "batch"] == [1, 3]
        assert [row.prompt for row in rows if row.kind == "prefill"] == [8]
        assert [row.peak is not None for row in rows if row.kind == "encode"] == [True]
        assert all(row.share is not None and row.speed is not None for row in rows)
        assert {row.bound for row in rows} <= {"memory", "arithmetic"}
    peers = [row for row in profile.rows if row.kind.startswith("peer ")]
    assert {(row.kind, row.side) for row in peers} == {
        (f"peer {kind}", side) for kind in ("generate", "prefill") for side in ("qwenlet", "transformers")
    }
    (refused,) = [row for row in profile.rows if row.problem is not None]
    assert "transformers has no int4" in refused.problem
    assert json.loads(json.dumps(profile.to_dict()))["rows"][0]["tokens_per_second"] > 0
    assert any("left" in line for line in said), "the time that is left"
    assert "measurements" in said[1], "and how long it will take, before the start"


@pytest.mark.usefixtures("together")
def test_what_is_finished_is_kept_when_a_run_is_ended():
    kept = []

    def keep(profile):
        kept.append(profile)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Session(TINY, SMALL, Hooks(kept=keep)).run()
    assert len(kept[-1].rows) == 2
    assert not kept[-1].finished


@pytest.mark.usefixtures("together")
def test_a_job_that_fails_is_a_row_that_says_so(monkeypatch):
    def fails(llm, job):
        raise EngineError("no more pages")

    monkeypatch.setattr(session, "run_job", fails)
    profile = Session(TINY, SMALL, Hooks()).run()
    problems = [row for row in profile.rows if row.problem]
    assert {row.kind for row in problems} == {"prefill", "batch"}
    assert all(row.problem == "no more pages" for row in problems)
    assert [row.tokens for row in profile.rows if row.kind == "generate"] == [3, 6], "the others go on"


def test_where_nothing_can_be_measured_it_is_an_error(monkeypatch):
    def refuses(self, precision, context=1, progress=None):
        raise ConfigError("not on this machine")

    monkeypatch.setattr(Subject, "load", refuses)
    with pytest.raises(ConfigError, match="nothing could be measured: not on this machine"):
        Session(TINY, SMALL, Hooks()).run()


def test_more_than_the_model_has_positions_for():
    with pytest.raises(ConfigError, match=r"needs 40,001 positions.*32,767"):
        Session(TINY, changed(SMALL, generate=(40_000,)), Hooks()).run()


def test_an_unknown_shape_is_named():
    with pytest.raises(RequestError, match=r"'7b'; known are 1\.8b, tiny"):
        Session(Subject("random:7b", "cpu"), SMALL, Hooks()).run()


def test_a_process_of_its_own():
    three, six = run_alone(TINY, job("generate", 1, 3, 6, rounds=2), threads=1)
    assert (three.done, six.done, len(six.seconds)) == (3, 6, 2)
    assert 50_000_000 < six.peak < 1_000_000_000


def test_a_process_that_fails_says_by_what():
    with pytest.raises(EngineError, match=r"there is no random model 'none'|known are"):
        run_alone(Subject("random:none", "cpu"), job("generate", 1, 3), threads=1)


def test_time_in_words():
    assert spoken(0.2) == "about 1 s"
    assert spoken(300) == "about 5 min"
    assert spoken(7200) == "about 2.0 h"
