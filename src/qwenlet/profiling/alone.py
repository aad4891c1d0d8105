"""A job in a process of its own: loading, the job, and nothing else, so that the peak of its memory is the job's.

The child gets one line of JSON on stdin and answers with one on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qwenlet.errors import EngineError
from qwenlet.profiling.measure import Figure, run_job
from qwenlet.profiling.subject import Subject
from qwenlet.profiling.workload import Job


def run_alone(subject: Subject, job: Job, threads: int) -> list[Figure]:
    """`run_job` by a fresh process on as many threads.

    Raises:
        EngineError: the process failed; the message ends with the last line that it wrote.
    """
    asked = {"subject": asdict(subject), "job": asdict(job), "threads": threads}
    with subprocess.Popen(
        [sys.executable, "-m", "qwenlet.profiling.alone"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        try:
            out, messages = child.communicate(json.dumps(asked))
        except BaseException:
            child.kill()
            raise
    lines = out.splitlines()
    if child.returncode or not lines:
        said = messages.strip().splitlines()
        why = said[-1] if said else "it said nothing"
        if child.returncode < 0:
            why = f"killed by signal {-child.returncode}, as for want of memory"
        raise EngineError(f"the process that measured {job} ended with {child.returncode}: {why}")
    return [_figure(one) for one in json.loads(lines[-1])]


def _figure(raw: dict[str, Any]) -> Figure:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return Figure(**fields)


def _answer(asked: dict[str, Any]) -> Sequence[dict[str, Any]]:
    import torch

    torch.set_num_threads(asked["threads"])
    subject = Subject(**asked["subject"])
    job = Job(**asked["job"] | {"tokens": tuple(asked["job"]["tokens"])})
    with subject.load(job.precision) as llm:
        return [asdict(figure) for figure in run_job(llm, job)]


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.stdin.readline()))))
