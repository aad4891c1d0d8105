"""The Ray Serve recipe of docs/guides/scale-out.md, as it stands there: two replicas, and the loss of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "scale-out.md"

# a process of its own: Ray starts others and installs hooks that the other tests shall not see
DRIVER = """
import json, os, signal, sys, time, urllib.request
model, port = sys.argv[1], int(sys.argv[2])
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False,
         _node_ip_address="127.0.0.1")
start(model, port)

def ask():
    body = json.dumps({"prompt": [5, 300, 17], "max_new_tokens": 4}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)

def both():
    seen = {}
    deadline = time.time() + 60
    while len(seen) < 2 and time.time() < deadline:
        answer = ask()
        seen[answer["process"]] = answer["token_ids"]
    return seen

before = both()
victim = next(iter(before))
os.kill(victim, signal.SIGKILL)
answers = []
failures = 0
for _ in range(20):
    try:
        answers.append(ask())
    except OSError:
        failures += 1
    time.sleep(0.1)
deadline = time.time() + 60
after = {}
while time.time() < deadline and len(after) < 2:
    try:
        answer = ask()
    except OSError:
        continue
    if answer["process"] != victim:
        after[answer["process"]] = answer["token_ids"]
print("RESULT" + json.dumps({"before": list(before.values()), "answers": len(answers), "failures": failures,
      "victim_gone": victim not in after, "after": list(after.values())}))
serve.shutdown()
ray.shutdown()
"""


def test_two_replicas_answer_and_the_loss_of_one_is_survived(tmp_path: Path, golden: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(golden / "tiny-qwen", model, ignore=shutil.ignore_patterns("golden*"))
    (recipe,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    script = tmp_path / "recipe.py"
    script.write_text(recipe + DRIVER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(model), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the recipe did not end in time")
    found = re.search(r"RESULT(.*)", out)
    assert found, err[-3000:]
    result = json.loads(found[1])
    assert len(result["before"]) == 2
    assert len(result["after"]) == 2
    assert result["victim_gone"]
    assert result["answers"] >= 15, f"{result['failures']} of 20 requests failed while a replica was gone"
    assert len({tuple(ids) for ids in result["before"] + result["after"]}) == 1, "replicas should agree"
