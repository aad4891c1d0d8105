"""What users download holds all that runs, the web page included; nothing of the page is built at run time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from scikit_build_core import build

import qwenlet

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "qwenlet"


def shipped() -> set[str]:
    """Every file of the package but its kernels' sources, as a wheel names them."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = {f"qwenlet/{path.relative_to(PACKAGE).as_posix()}" for path in files}
    return {name for name in names if "/csrc/" not in name and not name.endswith((".so", ".pyd", ".dylib"))}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_wheel(here: None, tmp_path: Path) -> None:
    """Built without kernels, as where there is no compiler: the Python is the same."""
    name = build.build_wheel(str(tmp_path), {"wheel.cmake": "false", "wheel.py-api": "py3"})
    with zipfile.ZipFile(tmp_path / name) as wheel:
        held = {one for one in wheel.namelist() if one.startswith("qwenlet/")}
    assert held == shipped()
    assert "qwenlet/server/static/index.html" in held
    assert any(one.endswith(".woff2") for one in held)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "c++"))), reason="needs cmake and a C++ compiler")
def test_the_wheel_with_kernels_runs_by_them_where_nothing_else_is(
    here: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Where the build fails a wheel without kernels comes out, and nothing else would tell."""
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("compiles all kernels: scripts/test -m slow")
    name = build.build_wheel(str(tmp_path), {"build-dir": str(tmp_path / "build")})
    assert "-cp311-abi3-" in name, "one file for every Python from 3.11 on"
    with zipfile.ZipFile(tmp_path / name) as wheel:
        held = {one for one in wheel.namelist() if one.startswith("qwenlet/")}
        wheel.extractall(tmp_path / "site")
    assert held - shipped() == {"qwenlet/ops/cpu/_kernels.abi3.so"}
    assert shipped() <= held
    found, isa = in_empty_environment(tmp_path / "site")
    assert Path(found).is_relative_to(tmp_path)
    assert isa in ("amx", "avx512_bf16", "avx512", "avx2", "portable")


def in_empty_environment(site: Path) -> list[str]:
    """Where a process finds the package, and by which instruction set it runs, with `site` first, the dependencies
    behind it, and no editable install (-S)."""
    code = "import qwenlet; from qwenlet.ops import cpu; print(qwenlet.__file__, cpu.status().isa, sep='\\n')"
    path = os.pathsep.join([str(site), sysconfig.get_paths()["platlib"], sysconfig.get_paths()["purelib"]])
    env = {name: value for name, value in os.environ.items() if not name.startswith("QWENLET_")} | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-S", "-c", code], env=env, cwd=site, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_the_source(here: None, tmp_path: Path) -> None:
    name = build.build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / name) as source:
        held = {one.partition("/")[2] for one in source.getnames()}
    wanted = {f"src/{one}" for one in shipped()}
    assert wanted <= held, wanted - held
    assert any(one.startswith("src/qwenlet/ops/cpu/csrc/") for one in held)  # the kernels' own
    assert not any(one.startswith(("docs/", "benchmarks/", "web/node_modules/")) for one in held)


def test_the_public_names_are_those_that_are_found() -> None:
    """The list is written out for type checkers."""
    assert set(qwenlet.__all__) == {*qwenlet._LAZY, "__version__"}
    assert all(getattr(qwenlet, name) is not None for name in qwenlet.__all__)
