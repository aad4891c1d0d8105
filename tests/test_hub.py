"""A name becomes files. The hub is a small server on 127.0.0.1 (fake_hub.py); nothing here leaves the machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_hub import COMMIT, REPO, FakeHub
from qwenlet import hub as qhub
from qwenlet.errors import DiskSpaceError, HubError, MissingExtraError, OfflineError
from qwenlet.hub import layout, names

WEIGHTS = bytes(range(256)) * 200
FILES = {
    "config.json": b'{"model_type": "qwen"}',
    "generation_config.json": b"{}",
    "qwen.tiktoken": b"YQ== 0\n",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "modeling_qwen.py": b"raise SystemExit('this must never be fetched')",
    "README.md": b"# hello",
    "pytorch_model.bin": b"the same weights again",
    "pytorch_model.bin.index.json": b"{}",
}
WANTED = sorted(name for name in FILES if not name.endswith((".py", ".md", ".bin", ".bin.index.json")))
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QWENLET_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QWENLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants, file_download

    server = FakeHub()
    server.files = dict(FILES)
    # read from HF_ENDPOINT when huggingface_hub is imported, which other tests may have done already;
    # releases before 1.0 keep copies of these constants in file_download
    for module in (constants, file_download):
        monkeypatch.setattr(module, "ENDPOINT", server.url, raising=False)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(module, "DOWNLOAD_CHUNK_SIZE", 1000, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its retries
    yield server
    import huggingface_hub

    # a kept-alive connection would outlive this server; the name changed with release 1.0
    reset = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils._http.reset_sessions
    reset()
    server.stop()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a socket was opened, or a program started")

    monkeypatch.setattr(socket, "socket", fail)
    monkeypatch.setattr(subprocess, "Popen", fail)


# ------------------------------------------------------------------------------------------------------ names


def test_what_exists_here_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "Qwen").mkdir()
    assert qhub.resolve("model.gguf") == Path("model.gguf")
    assert qhub.resolve("~/model.gguf") == tmp_path / "model.gguf"
    assert qhub.resolve("Qwen") == Path("Qwen")
    pulled = qhub.pull(str(tmp_path / "model.gguf"))
    assert (pulled.files, pulled.bytes_total, pulled.bytes_downloaded) == (1, 4, 0)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/x", "~/nowhere", "a/b/c", "nowhere.gguf", "a\\b", "C:/x/y", "a/b.gguf"]
)
def test_a_path_that_does_not_exist_is_called_a_path(name: str) -> None:
    with pytest.raises(HubError, match="looks like a path"):
        qhub.resolve(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Demo", "'demo'"),
        ("dem", "'demo'"),
        ("Qwen-1_8B-Chat", "'Qwen/Qwen-1_8B-Chat'"),
        ("qwen-1.8b-chat", "'Qwen/Qwen-1_8B-Chat'"),
    ],
)
def test_a_near_miss_is_named(name: str, near: str) -> None:
    with pytest.raises(HubError, match="is not a model we can find") as error:
        qhub.resolve(name)
    assert error.value.hint == f"did you mean {near}?"


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "x" * 5000, "a\0b", "a//b", "a/b@", "a/b:", "a/b:c.txt", "a/b@../../c", "-a/b", "a--b/c"]
)
def test_what_is_no_name_at_all_is_refused(name: str) -> None:
    with pytest.raises(HubError):
        qhub.resolve(name, offline=True)


def test_a_hub_id_has_a_revision_and_a_file() -> None:
    assert names.parse_hub_id("a/b-1_8B.x") == names.HubId("a/b-1_8B.x")
    assert names.parse_hub_id("a/b@refs/pr/1:sub/c.gguf") == names.HubId("a/b", "refs/pr/1", "sub/c.gguf")


SEGMENTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.]{0,10}[A-Za-z0-9]", fullmatch=True).filter(lambda s: ".." not in s)


@given(SEGMENTS, SEGMENTS, st.none() | SEGMENTS, st.none() | SEGMENTS.map(lambda s: f"{s}.gguf"))
def test_a_hub_id_reads_what_it_writes(owner: str, name: str, revision: str | None, file: str | None) -> None:
    hub_id = names.HubId(f"{owner}/{name}", revision, file)
    assert names.parse_hub_id(str(hub_id)) == hub_id


@given(st.text(max_size=60) | st.text(alphabet="a/@:.~-_\\", max_size=20))
def test_any_text_is_a_name_or_a_clear_error(text: str) -> None:
    hub_id = names.parse_hub_id(text)
    if hub_id is not None:
        assert str(hub_id) == text
        assert ".." not in text
    elif names.local_path(text) is None:
        assert names.unknown_name(text).hint


def test_a_revision_must_agree_with_the_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(HubError, match=r"'v1'.*'v2'"):
        qhub.resolve("a/b@v1", revision="v2", offline=True)
    with pytest.raises(HubError, match="not a hub id"):
        qhub.resolve("folder", revision="v2")
    with pytest.raises(HubError, match="not a revision"):
        qhub.resolve("a/b", revision="../../etc", offline=True)
    with pytest.raises(HubError, match="source is 'gopher'"):
        qhub.resolve("a/b", source="gopher", offline=True)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ which files


def test_only_a_models_files_are_chosen() -> None:
    assert sorted(layout.choose_files(FILES, REPO)) == WANTED
    without = [name for name in FILES if "safetensors" not in name] + ["training_args.bin"]
    assert "pytorch_model.bin" in layout.choose_files(without, REPO)
    assert "training_args.bin" not in layout.choose_files(without, REPO)


def test_of_several_gguf_files_one_must_be_named() -> None:
    assert layout.choose_files(["README.md", "a.gguf"], REPO) == ["a.gguf"]
    assert layout.choose_files(["a.gguf", "q/b.gguf"], REPO, "q/b.gguf") == ["q/b.gguf"]
    with pytest.raises(HubError, match=r"a.gguf, b.gguf") as error:
        layout.choose_files(["a.gguf", "b.gguf"], REPO)
    assert error.value.hint == f"name one: {REPO}:a.gguf"
    with pytest.raises(HubError, match=r"no file c.gguf"):
        layout.choose_files(["a.gguf"], REPO, "c.gguf")
    with pytest.raises(HubError, match=r"seen: README\.md"):
        layout.choose_files(["README.md"], REPO)


@pytest.mark.parametrize("name", ["../x.gguf", "/x.gguf", "a\\b.gguf", "c:x.gguf", "a/../../x.gguf"])
def test_a_file_name_cannot_leave_the_cache(name: str) -> None:
    with pytest.raises(HubError, match="not a plain relative path"):
        layout.choose_files([name], REPO)


def test_a_folder_says_what_it_lacks(tmp_path: Path) -> None:
    assert layout.find_model(tmp_path) == (None, ["config.json"])
    (tmp_path / "config.json").write_text("{}")
    assert layout.find_model(tmp_path) == (None, ["weights (*.safetensors or *.bin)"])
    (tmp_path / SHARD).touch()
    assert layout.find_model(tmp_path) == (None, ["model-00002-of-00002.safetensors"])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    assert layout.find_model(tmp_path) == (None, ["a readable model.safetensors.index.json"])
    index.write_bytes(FILES[index.name])
    assert layout.find_model(tmp_path) == (None, ["model-00002-of-00002.safetensors"])
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert layout.find_model(tmp_path) == (tmp_path, [])


# ------------------------------------------------------------------------------------------------------ the hub


def test_a_model_is_fetched_once(hub: FakeHub) -> None:
    seen: list[tuple[int, int, str]] = []
    folder = qhub.resolve(REPO, progress=lambda *report: seen.append(report))
    assert sorted(path.name for path in folder.iterdir()) == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS), "model-00002-of-00002.safetensors")
    assert not any(path.endswith((".py", ".bin", ".md")) for _, path, _ in hub.requests)

    hub.requests.clear()
    assert qhub.resolve(REPO) == folder
    assert qhub.resolve(REPO, revision=COMMIT) == folder
    assert hub.requests == []


def test_pull_refreshes_and_mends(hub: FakeHub) -> None:
    first = qhub.pull(REPO)
    assert first.revision == COMMIT
    assert first.files == len(WANTED)
    assert first.bytes_downloaded == first.bytes_total == sum(len(FILES[name]) for name in WANTED)
    assert qhub.pull(REPO).bytes_downloaded == 0

    blob = (first.path / SHARD).resolve()
    blob.write_bytes(b"x" * len(WEIGHTS))
    assert qhub.pull(REPO).bytes_downloaded == len(WEIGHTS)
    assert (first.path / SHARD).read_bytes() == WEIGHTS

    newer = "beef" + 36 * "0"
    hub.revisions |= {"main": newer, newer: newer}
    hub.files["config.json"] = b'{"model_type": "qwen", "x": 1}'
    assert qhub.resolve(REPO) == first.path


def test_a_revision_is_pinned(hub: FakeHub) -> None:
    hub.revisions["v1"] = COMMIT
    folder = qhub.resolve(f"{REPO}@v1")
    assert folder.name == COMMIT
    assert ("GET", f"/api/models/{REPO}/revision/v1", None) in hub.requests
    assert qhub.resolve(REPO, revision="v1", offline=True) == folder
    with pytest.raises(OfflineError):
        qhub.resolve(REPO, offline=True)
    with pytest.raises(HubError, match="no revision 'v2'"):
        qhub.resolve(REPO, revision="v2")


def test_a_gguf_file_of_a_repository(hub: FakeHub) -> None:
    hub.files = {"README.md": b"", "a.gguf": b"GGUF one", "b.gguf": b"GGUF two"}
    path = qhub.resolve(f"{REPO}:b.gguf")
    assert path.read_bytes() == b"GGUF two"
    assert hub.fetched("a.gguf") == []
    assert qhub.resolve(f"{REPO}:b.gguf", offline=True) == path


def test_a_lost_connection_keeps_the_partial_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut[SHARD] = [20_500] + 6 * [0]
    with pytest.raises(HubError, match="no connection to the hub") as error:
        qhub.resolve(REPO)
    assert "the same command resumes" in str(error.value)
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    assert partial.read_bytes() == WEIGHTS[:20_000]  # in whole chunks
    with pytest.raises(OfflineError, match=f"missing: {SHARD}"):
        qhub.resolve(f"{REPO}@{COMMIT}", offline=True)

    hub.requests.clear()
    hub.cut.clear()
    pulled = qhub.pull(REPO)
    assert (pulled.path / SHARD).read_bytes() == WEIGHTS
    assert hub.fetched(SHARD) == ["bytes=20000-"]
    assert hub.fetched("config.json") == []
    assert pulled.bytes_downloaded == 2 * len(WEIGHTS) - 20_000
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_no_answer_at_all(hub: FakeHub, tmp_path: Path) -> None:
    hub.refuse = True
    with pytest.raises(HubError, match="no connection to the hub"):
        qhub.resolve(REPO)
    hub.refuse = False
    folder = qhub.resolve(REPO)
    hub.refuse = True
    assert qhub.resolve(REPO) == folder


@pytest.mark.parametrize("name", [SHARD, "qwen.tiktoken"])
def test_damage_on_the_way_is_noticed(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.served[name] = bytes(len(FILES[name]))
    with pytest.raises(HubError, match=rf"{name}.*arrived damaged: checksum [0-9a-f]+, expected {hub.digest(name)}"):
        qhub.resolve(REPO)
    assert not list((tmp_path / "cache").rglob(f"{hub.digest(name)}*[!k]"))  # only the .lock stays
    hub.served.clear()
    assert (qhub.resolve(REPO) / name).read_bytes() == FILES[name]


def test_a_partial_file_that_is_wrong_does_not_stay(hub: FakeHub, tmp_path: Path) -> None:
    blobs = tmp_path / "cache" / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hub.digest(SHARD)}.incomplete"
    partial.write_bytes(b"x" * 100)
    with pytest.raises(HubError, match="arrived damaged"):
        qhub.resolve(REPO)
    assert not partial.exists()
    partial.write_bytes(b"x" * (len(WEIGHTS) + 1))  # longer than the file: not even tried
    assert (qhub.resolve(REPO) / SHARD).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "RepoNotFound"), "no model Qwen/Qwen-1.8B-Chat, or it is private"),
        ((401, ""), "no model Qwen/Qwen-1.8B-Chat, or it is private"),
        ((403, "GatedRepo"), "is gated"),
        ((503, ""), "HTTP 503"),
    ],
)
def test_the_hub_says_no(hub: FakeHub, answer: tuple[int, str], message: str) -> None:
    hub.error = answer
    with pytest.raises(HubError, match=message) as error:
        qhub.resolve("Qwen/Qwen-1.8B-Chat")
    if "private" in message:
        assert error.value.hint == "did you mean 'Qwen/Qwen-1_8B-Chat'?"


def test_a_mirror_without_checksums_is_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "digest", lambda name: "unknown")
    with pytest.raises(HubError, match="no size and checksum"):
        qhub.resolve(REPO)


def test_the_disk_is_looked_at_before(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = sum(len(FILES[name]) for name in WANTED)
    usage = types.SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match=f"needs {needed:,} more bytes, but .* has {needed - 1:,} free") as error:
        qhub.resolve(REPO)
    assert "QWENLET_CACHE" in str(error.value)
    assert hub.fetched("config.json") == []
    usage.free = needed
    qhub.resolve(REPO)
    usage.free = 0
    qhub.pull(REPO)  # nothing is missing, so nothing is needed


def test_a_disk_that_fills_up_keeps_the_partial_file(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenlet.hub import huggingface

    def full(self: object, data: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface._Reporting, "write", full)
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            qhub.resolve(REPO)
    assert (qhub.resolve(REPO) / SHARD).read_bytes() == WEIGHTS


# ------------------------------------------------------------------------------------------------------ offline


@pytest.mark.parametrize("value", ["1", "true", "YES", " on "])
@pytest.mark.parametrize("variable", ["QWENLET_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_environment_forbids_the_network(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert qhub.is_offline()
    assert not qhub.is_offline(False)
    monkeypatch.setenv(variable, "0")
    assert not qhub.is_offline()
    assert qhub.is_offline(True)


@pytest.mark.usefixtures("no_network")
def test_offline_names_what_is_missing() -> None:
    for call in (qhub.resolve, qhub.pull):
        with pytest.raises(OfflineError, match=REPO):
            call(REPO, offline=True)
        with pytest.raises(OfflineError, match="demo"):
            call("demo", offline=True)
    with pytest.raises(OfflineError) as error:
        qhub.resolve(f"{REPO}@v1", offline=True)
    assert error.value.hint == f"while online, run: qwenlet pull {REPO}@v1"


def test_offline_opens_no_socket_in_a_fresh_process(hub: FakeHub, tmp_path: Path) -> None:
    folder = qhub.resolve(REPO)
    program = """
import socket, subprocess, sys
def fail(*args, **kwargs): raise SystemExit("a socket was opened, or a program started")
socket.socket = socket.create_connection = socket.getaddrinfo = subprocess.Popen = fail
from qwenlet import hub
from qwenlet.errors import OfflineError
print(hub.resolve(sys.argv[1]))
for name in ("demo", "acme/other"):
    try:
        hub.resolve(name)
    except OfflineError:
        print("offline")
print(len(hub.local_models()), "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, REPO],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split() == [str(folder), "offline", "offline", "1", "False"]


def test_the_library_may_be_offline_by_itself(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # TRANSFORMERS_OFFLINE does this
    with pytest.raises(OfflineError, match="offline mode"):
        qhub.resolve(REPO)


# ------------------------------------------------------------------------------------------------------ what is here


def test_a_configuration_alone_is_fetched_and_kept_nowhere(hub: FakeHub, tmp_path: Path) -> None:
    assert qhub.published_config(REPO) == {"model_type": "qwen"}
    assert qhub.published_config(f"{REPO}@{COMMIT}") == {"model_type": "qwen"}
    assert {path.rsplit("/", 1)[-1] for method, path, _ in hub.requests if method == "GET"} == {"config.json"}
    assert not (tmp_path / "cache").exists()
    del hub.files["config.json"]
    with pytest.raises(HubError, match=r"has no config\.json"):
        qhub.published_config(REPO)
    hub.error = (404, "RepoNotFound")
    with pytest.raises(HubError):
        qhub.published_config(REPO)
    for name in ("demo", f"{REPO}:model.gguf"):
        with pytest.raises(HubError, match="not on this machine"):
            qhub.published_config(name)


def test_local_models_are_listed_with_what_they_lack(hub: FakeHub, tmp_path: Path) -> None:
    assert qhub.local_models() == []
    folder = qhub.resolve(REPO)
    (other,) = qhub.local_models()
    size = sum(len(FILES[name]) for name in WANTED)
    assert other == qhub.LocalModel(f"{REPO}@{COMMIT[:12]}", folder, size)
    (folder / SHARD).unlink()
    assert qhub.local_models()[0].missing == (SHARD,)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert qhub.local_models() == []


def test_the_cache_is_the_shared_one_unless_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    from qwenlet.hub import huggingface

    assert huggingface.cache_folder(None) == tmp_path / "cache" / "hub"
    assert huggingface.cache_folder(tmp_path) == tmp_path / "hub"
    monkeypatch.delenv("QWENLET_CACHE")
    assert huggingface.cache_folder(None) == Path(constants.HF_HUB_CACHE)
    assert qhub.cache_dir().name == "qwenlet"


# ------------------------------------------------------------------------------------------------------ ModelScope


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A stand-in for the package modelscope, which keeps a copy of FILES under tmp_path/ms; its calls are recorded."""
    calls: list[dict[str, Any]] = []
    folder = tmp_path / "ms"

    class HubApi:
        def get_model_files(
            self, model_id: str, revision: str = "master", recursive: bool = False
        ) -> list[dict[str, Any]]:
            if model_id != REPO:
                raise ValueError("record not found")
            return [{"Path": name, "Type": "blob", "Size": len(data)} for name, data in FILES.items()]

    def snapshot_download(model_id: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only and not folder.exists():
            raise ValueError("not in the cache")
        if not local_files_only:
            calls.append(options)
            folder.mkdir(exist_ok=True)
            for name in options["allow_patterns"]:
                (folder / name).write_bytes(FILES[name])
        return str(folder)

    api, snapshot = types.ModuleType("modelscope.hub.api"), types.ModuleType("modelscope.hub.snapshot_download")
    api.HubApi, snapshot.snapshot_download = HubApi, snapshot_download  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, api.__name__, api)
    monkeypatch.setitem(sys.modules, snapshot.__name__, snapshot)
    return calls


def test_modelscope_fetches_the_same_files(modelscope: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="ModelScope"):
        qhub.resolve(REPO, source="modelscope", offline=True)
    folder = qhub.resolve(REPO, source="modelscope")
    assert sorted(path.name for path in folder.iterdir()) == WANTED
    assert qhub.resolve(REPO, source="modelscope") == qhub.resolve(REPO, source="modelscope", offline=True) == folder
    assert len(modelscope) == 1
    pulled = qhub.pull(f"{REPO}@v1", source="modelscope", cache_dir=tmp_path / "elsewhere")
    assert pulled.files == len(WANTED)
    assert modelscope[1]["revision"] == "v1"
    assert modelscope[1]["cache_dir"] == str(tmp_path / "elsewhere")
    with pytest.raises(HubError, match="record not found"):
        qhub.pull("acme/other", source="modelscope")


def test_modelscope_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingExtraError, match=r"qwenlet\[modelscope\]"):
        qhub.resolve(REPO, source="modelscope")
