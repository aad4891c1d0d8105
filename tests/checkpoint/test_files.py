"""Folders of weights: whole, sharded, pickled; and each way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.variants import State, load, logits, published, sharded, write_json
from qwenlet.checkpoint.files import PickledFiles, SafetensorsFiles, open_folder
from qwenlet.errors import CheckpointError, FormatError

INDEX = "model.safetensors.index.json"


def test_the_published_layout_whole_and_sharded_pickled_or_not(
    tmp_path: Path, state: State, raw_config: dict[str, Any], expected: torch.Tensor
) -> None:
    whole = tmp_path / "whole.bin"
    whole.mkdir()
    torch.save(state, whole / "pytorch_model.bin")
    write_json(whole / "config.json", raw_config)
    folders = [
        published(tmp_path / "whole", state, raw_config),
        sharded(tmp_path / "sharded", state, raw_config),
        whole,
        sharded(tmp_path / "sharded.bin", state, raw_config, pickled=True),
    ]
    for folder in folders:
        assert torch.equal(logits(folder), expected), folder.name
    assert isinstance(open_folder(folders[1]), SafetensorsFiles)
    assert isinstance(open_folder(folders[3]), PickledFiles)


def test_safetensors_win_where_both_are_there(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    folder = sharded(tmp_path / "both", state, raw_config, pickled=True)
    published(folder, state, raw_config)
    assert isinstance(open_folder(folder), SafetensorsFiles)


def test_shape_and_dtype_are_known_before_reading(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 5, dtype=torch.bfloat16), "b": torch.ones(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for files in (
        SafetensorsFiles([tmp_path / "model.safetensors"]),
        PickledFiles([tmp_path / "pytorch_model.bin"]),
    ):
        assert sorted(files.names()) == ["a", "b"]
        assert files.shape("a") == (3, 5)
        assert files.stored_dtype("a") == torch.bfloat16
        assert files.read("a", torch.float16).dtype == torch.float16
        assert torch.equal(files.read("b", torch.float32), tensors["b"])


def test_tensors_of_a_bin_may_share_memory_and_lie_transposed(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "b": base.T, "c": base[1:]}, tmp_path / "pytorch_model.bin")
    files = open_folder(tmp_path)
    assert torch.equal(files.read("b", torch.float16), base.T.half())
    assert torch.equal(files.read("c", torch.float32), base[1:])


# -------------------------------------------------------------------------------------------------------- bad folders


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors, .*; found nothing") as caught:
        open_folder(tmp_path)
    assert "qwenlet pull" in str(caught.value)
    (tmp_path / "README.md").touch()
    with pytest.raises(CheckpointError, match=r"found README\.md"):
        open_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    folder = sharded(tmp_path / "m", state, raw_config)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files, of which 1 are missing: model-00002-of-0") as caught:
        open_folder(folder)
    assert "resumes" in str(caught.value)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_a_truncated_shard_is_named(
    tmp_path: Path, state: State, raw_config: dict[str, Any], pickled: bool, keep: int
) -> None:
    folder = sharded(tmp_path / "m", state, raw_config, pickled=pickled)
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(FormatError, match=f"{shard.name} .* bytes") as caught:
        load(folder)
    assert "truncated" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{not json", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1, 2]", "holds a JSON list, expected an object"),
        ("[" * 100_000, "is not JSON that we read"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON that we read"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"lm_head.weight": 3}}', "has no weight_map"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError, match=complaint) as caught:
        open_folder(tmp_path)
    assert str(tmp_path / INDEX) in str(caught.value)
    assert caught.value.hint == "fetch the index again"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "", "sub/model.safetensors"])
def test_an_index_cant_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    write_json(folder / INDEX, {"weight_map": {"a": name}})
    with pytest.raises(FormatError, match="names files outside its folder"):
        open_folder(folder)


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", INDEX):
        folder = tmp_path / f"with-{name}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(FormatError, match=name):
            open_folder(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    folder = sharded(tmp_path / "m", state, raw_config)
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    with pytest.raises(FormatError, match=r"is both in .*00001-of-00003\.safetensors and in .*00002-of-00003"):
        open_folder(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("pickled", [False, True])
def test_numbers_that_need_a_scale_are_not_read_as_weights(tmp_path: Path, dtype: torch.dtype, pickled: bool) -> None:
    tensors = {"a.weight": torch.ones(4, 4).to(dtype)}
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    files = open_folder(tmp_path)
    with pytest.raises(FormatError, match=rf"a\.weight in .* is stored as {str(dtype)[6:]}, expected float16"):
        files.read("a.weight", torch.float32)


# ---------------------------------------------------------------------------------------------------- hostile pickles


class Mischief:
    """What an attacker would put into a .bin: unpickling it touches a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_never_runs_code(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "executed"
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1), "b": Mischief(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"pytorch_model\.bin .* can't be read as a file of tensors"):
        open_folder(tmp_path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the bait itself should work"


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(1)],
        {"a": 3},
        {"a": {"b": torch.ones(1)}},
        {3: torch.ones(1)},
        {"a": torch.ones(3, 3).to_sparse()},
        {"a": torch.ones(3, device="meta")},
    ],
    ids=["list", "number", "nested", "number as name", "sparse", "meta"],
)
def test_a_bin_of_something_else_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        open_folder(tmp_path)


def test_the_index_decides_which_files_are_read(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    folder = sharded(tmp_path / "m", state, raw_config)
    save_file({"stray": torch.ones(1)}, folder / "model-00009-of-00009.safetensors")
    assert "stray" not in set(open_folder(folder).names())
    assert set(json.loads((folder / INDEX).read_text())["weight_map"]) == set(open_folder(folder).names())
