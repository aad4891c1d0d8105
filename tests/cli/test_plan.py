"""`qwenlet plan`: what is printed, where the configuration comes from, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from qwenlet import hub
from qwenlet.cli import plan as verb
from qwenlet.cli.plan import parse_size
from qwenlet.config import QuantConfig, qwen_1_8b
from qwenlet.errors import RequestError

INT4 = QuantConfig(head_bits=None, embedding_bits=None, group_size=32, method="gptq")


@pytest.fixture
def model(golden) -> str:
    return str(golden / "tiny-qwen")


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    for name in ("QWENLET_CACHE", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("QWENLET_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def facts(run):
    def ask(*arguments: str) -> dict:
        result = run("plan", *arguments, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    return ask


# ------------------------------------------------------------------------------------------------------- the answer


def test_a_table_for_people(run):
    command = ("plan", "--like", "qwen-1.8b", "--quant", "int4", "--context", "2048")
    text = run(*command, "--memory", "2G").out
    for expected in ("qwen-1.8b: 1,836,828,672 parameters, int4 in groups of 128, head int4 in groups of 32",
                     "embedding int8", "4.12 bits a weight", "2,048 tokens, 101,376 bytes each in int8", "peak",
                     "fits in 2.0 GB", "What a token costs", "largest context"):  # fmt: skip
        assert expected in text, expected
    assert "would fit" not in text

    text = run(*command, "--memory", "1.4G", "--batch", "4").out
    assert "does not fit in 1.4 GB" in text
    assert "Each of these would fit" in text
    assert "--context" in text.partition("would fit")[2]
    assert "No setting makes this model fit" in run(*command, "--memory", "10M").out


def test_json_for_programs(facts):
    found = facts("--like", "qwen-1.8b", "--dtype", "bf16", "--context", "8192", "--memory", "2.5G")
    assert (found["parameters"], found["kv_cache"], found["context"], found["batch"]) == (
        1_836_828_672,
        "bf16",
        8192,
        1,
    )
    assert found["peak"] > found["memory"] == 25 * 10**8
    assert found["fits"] is False
    assert found["largest_context"] is None
    assert found["advice"][0]["options"] == "--quant int4"
    assert found["advice"][0]["without"] == ["--dtype"], "quantized weights compute in fp32"
    for change in found["advice"]:
        words = change["options"].split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        again = facts("--like", "qwen-1.8b", "--memory", "2.5G", *sum(({"--context": "8192"} | given).items(), ()))
        assert again["fits"] is True
        assert again["peak"] == change["peak"], "the options lead to what was promised"


def test_what_this_machine_has_is_the_limit_unless_one_is_given(facts, monkeypatch):
    monkeypatch.setattr(verb, "available_memory", lambda: 123_456_789)
    assert facts("--like", "qwen-1.8b")["memory"] == 123_456_789
    monkeypatch.setattr(verb, "available_memory", lambda: None)
    found = facts("--like", "qwen-1.8b")
    assert found["memory"] is None
    assert "fits" not in found


def test_the_dtype_follows_the_processor_and_quantized_weights_compute_in_float32(facts, monkeypatch):
    for flags, dtype in ((("avx512_bf16",), "bf16"), (("avx2",), "fp32")):
        monkeypatch.setattr(verb, "cpu_info", lambda flags=flags: ("a processor", frozenset(flags)))
        assert facts("--like", "qwen-1.8b")["quantization"] == dtype
    assert facts("--like", "qwen-1.8b", "--quant", "none")["kv_cache"] == "fp32"
    assert facts("--like", "qwen-1.8b", "--quant", "int8")["kv_cache"] == "int8"


# --------------------------------------------------------------------------------- where the configuration comes from


def test_weights_need_not_be_there(facts, model, tmp_path):
    shutil.copy(f"{model}/config.json", tmp_path)
    found = facts(str(tmp_path), "--dtype", "bf16")
    assert found["quantization"] == "bf16"
    assert found["parameters"] == facts(model)["parameters"]
    assert facts(str(tmp_path / "config.json"))["parameters"] == found["parameters"]


def test_a_quantized_checkpoint_says_so(facts, run, tmp_path):
    published = qwen_1_8b().to_published()
    (tmp_path / "config.json").write_text(json.dumps(published | {"quantization_config": INT4.to_published()}))
    found = facts(str(tmp_path), "--memory", "8G")
    assert found["quantization"] == "int4 in groups of 32, head bf16, embedding fp16"
    embedding = next(kind for kind in found["weights"] if kind["name"] == "embedding")
    assert (embedding["bits"], embedding["stored"]) == (16, 2 * 151936 * 2048)
    assert found["kv_cache"] == "int8"
    # what the file left in half precision can be rounded, its codes stay
    assert facts(str(tmp_path), "--quant", "int4")["quantization"] == (
        "int4 in groups of 32, head int4 in groups of 32, embedding int8"
    )
    assert "with bits 4; bits 8 was asked for" in run("plan", str(tmp_path), "--quant", "int8").err
    assert facts(str(tmp_path), "--quant", "none", "--dtype", "bf16")["quantization"] == "bf16"

    (tmp_path / "config.json").write_text(json.dumps(published))
    (tmp_path / "quantize_config.json").write_text(json.dumps(INT4.to_published()))
    assert facts(str(tmp_path), "--memory", "8G") == found


@pytest.mark.parametrize("bits", [4, 8])
def test_no_advice_that_the_checkpoint_or_another_option_rules_out(bits, facts, run, tmp_path):
    quant = QuantConfig(bits=bits, head_bits=None, embedding_bits=None, group_size=128, method="gptq")
    section = {"quantization_config": quant.to_published()} if bits == 8 else {}
    (tmp_path / "config.json").write_text(json.dumps(qwen_1_8b().to_published() | {"fp16": True} | section))
    given = ("--dtype", "bf16", "--context", "2048") if bits == 4 else ("--context", "8192")
    found = facts(str(tmp_path), *given, "--memory", "2.7G")
    assert found["fits"] is False
    assert found["advice"]
    for change in found["advice"]:
        words = [*given, *change["options"].split()]
        for option in change["without"]:
            at = words.index(option)
            del words[at : at + 2]
        again = facts(str(tmp_path), *words, "--memory", "2.7G")
        assert (again["fits"], again["peak"]) == (True, change["peak"])
    options = " ".join(change["options"] for change in found["advice"])
    assert ("int8" in options, "int4" in options) == ((True, True) if bits == 4 else (True, False))
    if bits == 4:
        assert "--quant int8, without --dtype" in run("plan", str(tmp_path), *given, "--memory", "2.7G").out


def test_a_gguf_file_is_planned_as_its_codes_run(facts, demo_gguf):
    found = facts(str(demo_gguf), "--quant", "stored")
    assert found["quantization"] == "as the file stores it"
    assert [kind["bits"] for kind in found["weights"]] == [5.0, 8.5, 8.5]
    assert facts(str(demo_gguf.parent / demo_gguf.name), "--dtype", "bf16")["quantization"] == "bf16"
    assert "int4" in facts(str(demo_gguf), "--quant", "int4")["quantization"]


def test_of_a_model_that_is_elsewhere_only_the_configuration_is_fetched(facts, run, nothing_here, monkeypatch):
    asked = []

    def published_config(name):
        asked.append(name)
        return qwen_1_8b().to_published() | {"bf16": True}

    monkeypatch.setattr(hub, "published_config", published_config)
    assert facts("Qwen/Qwen-1_8B-Chat")["parameters"] == 1_836_828_672
    assert asked == ["Qwen/Qwen-1_8B-Chat"]
    assert "going online is forbidden" in run("plan", "Qwen/Qwen-1_8B-Chat", "--offline").err
    assert len(asked) == 1


def test_a_name_that_has_no_configuration_to_fetch_is_an_error(run, nothing_here):
    assert "qwenlet pull demo" in run("plan", "demo").err
    assert "qwenlet pull acme/x:y.gguf" in run("plan", "acme/x:y.gguf").err
    assert "no such file" in run("plan", "./nowhere").err


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no model to plan for"),
        (("demo", "--like", "qwen-1.8b"), "not both"),
        (("--like", "gpt"), "'gpt' is not one of"),
        (("--like", "qwen-1.8b", "--quant", "int3"), "quant is 'int3'"),
        (("--like", "qwen-1.8b", "--dtype", "fp8"), "dtype is 'fp8'"),
        (("--like", "qwen-1.8b", "--quant", "int4", "--dtype", "bf16"), "quantized weights compute in fp32"),
        (("--like", "qwen-1.8b", "--kv-cache", "int2"), "kv_cache is 'int2'"),
        (("--like", "qwen-1.8b", "--context", "99999"), "published maths for 32767"),
        (("--like", "qwen-1.8b", "--context", "0"), "context"),
        (("--like", "qwen-1.8b", "--memory", "much"), "'much' is no amount of memory"),
    ],
)
def test_bad_input_is_named(run, arguments, message):
    result = run("plan", *arguments)
    assert result.code != 0
    assert result.out == ""
    assert message in result.err


def test_sizes_are_read_as_they_are_written():
    assert [parse_size(text) for text in ("4G", "900M", "1.5 GB", "2GiB", "64KiB", "12k", "4096", "1T")] == [
        4 * 10**9, 9 * 10**8, 15 * 10**8, 2**31, 2**16, 12_000, 4096, 10**12,
    ]  # fmt: skip
    for text in ("", "G", "-1G", "1X", "1,5G", "0", "4i", "nan", "1e9"):
        with pytest.raises(RequestError, match="no amount of memory"):
            parse_size(text)


def test_it_answers_at_once_and_without_torch():
    code = (
        "import sys; from qwenlet.cli import main; code = main(['plan', '--like', 'qwen-1.8b', '--memory', '1G']);"
        "heavy = {'torch', 'numpy', 'gguf'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    fastest = math.inf  # in processor time, as other tests may run beside this one
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = os.times()
        assert done.returncode == 0, done.stderr
        used = after.children_user - before.children_user + after.children_system - before.children_system
        fastest = min(fastest, used)
    assert fastest < 0.8, "less than half a second on a quiet machine"


# ------------------------------------------------------------------------------------------------------------ a GPU


def test_a_gpu_has_a_plan_of_its_own(facts):
    here = facts("--like", "qwen-1.8b", "--quant", "int4", "--context", "8192", "--memory", "3G")
    there = facts("--like", "qwen-1.8b", "--quant", "int4", "--context", "8192", "--memory", "3G", "--device", "cuda")
    assert there["fits"]
    assert there["cache"] == here["cache"]
    assert there["decode_bytes"] == here["decode_bytes"]
    # nothing stays in a mapped file, and steps are longer
    embedding = there["weights"][2]
    assert embedding["name"] == "embedding"
    assert embedding["resident"] == embedding["stored"]
    assert there["activations"] > here["activations"]


def test_floats_on_a_gpu_are_bfloat16_unless_asked_otherwise(facts):
    arguments = ("--like", "qwen-1.8b", "--memory", "80G", "--device", "cuda:1")
    assert facts(*arguments)["quantization"] == "bf16"
    assert facts(*arguments, "--dtype", "fp32")["quantization"] == "fp32"


def test_the_limit_is_what_the_driver_says_is_free(facts, monkeypatch):
    monkeypatch.setattr(verb, "gpu_memory", lambda index: {0: 4 * 10**9, 1: None}[index])
    assert facts("--like", "qwen-1.8b", "--device", "cuda")["fits"] is False
    assert facts("--like", "qwen-1.8b", "--quant", "int4", "--device", "cuda")["fits"] is True
    # a GPU that nobody can ask: the plan stands, without a limit
    unknown = facts("--like", "qwen-1.8b", "--device", "cuda:1")
    assert unknown["memory"] is None
    assert "fits" not in unknown


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_another_device_is_refused(run, device):
    result = run("plan", "--like", "qwen-1.8b", "--device", device)
    assert result.code != 0
    assert f"{device!r} is not cpu, cuda or cuda:N" in result.err
