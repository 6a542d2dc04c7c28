"""Choice of the device, and reports on its precision and software. Evidence of an NPU is simulated."""

import importlib.metadata
import json
import os
from collections import Counter
from types import SimpleNamespace

import mindspore
import numpy as np
import pytest

import CLAN_train_gta5_2_city as script
from model import CLAN_D
from options.train_options import get_arguments
from tests.scripts import EAGER, ROOT, TRAIN, fails, python, run, train_words
from utils.system import device
from utils.system.errors import UserError


@pytest.mark.parametrize("name", ["auto", "ascend"])
def test_an_npu_that_cannot_be_used_is_an_error_with_the_reason(tmp_path, name):
    """As on a server where CANN's set_env.sh was not sourced: it does not train on the CPU instead."""
    argv = [ROOT / TRAIN, "--device", name, "--restore-from", "none"]
    message = python(argv, tmp_path, 2, ASCEND_HOME_PATH=str(tmp_path), LD_LIBRARY_PATH="").stderr
    assert "libge_runner.so: cannot open shared object file" in message  # MindSpore's reason, its first line
    assert "libmindspore_ops_ascend.so failed" in message  # and its second
    assert "source /usr/local/Ascend/" in message and "set_env.sh" in message and "--device cpu" in message
    assert ("this machine has an NPU (ASCEND_HOME_PATH)" in message) == (name == "auto")


def test_a_gpu_that_cannot_be_used_is_one_line(tmp_path):
    """MindSpore's own check would log errors about libcuda.so and libcudnn.so before it."""
    message = fails(TRAIN, "--device", "gpu", "--restore-from", "none", cwd=tmp_path)
    assert "--device gpu cannot be used: MindSpore finds no CUDA 11" in message


@pytest.mark.skipif(device.npu_evidence() is not None, reason="there is an NPU")
def test_without_evidence_of_an_npu_auto_is_the_cpu(data, tmp_path):
    more = ["--num-steps", 1, "--not-val", "--conv-precision", "float32", "--method", "source", *EAGER]
    output = run(TRAIN, *train_words(data, tmp_path / "run", *more, "--device", "auto")).stdout
    assert "small on cpu" in output
    assert "precision: device CPU, convolutions of G float32, convolutions of D float32, matrix" in output
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert options["precision"]["convolutions of G"] == "float32" and options["conv_precision"] == "float32"


def test_warnings_are_shown_where_there_is_an_npu(monkeypatch):
    for evidence, level in ((None, "3"), ("/dev/davinci0", "2")):
        monkeypatch.setattr(device, "npu_evidence", lambda evidence=evidence: evidence)
        monkeypatch.delenv("GLOG_v", raising=False)
        device.prepare_environment()
        assert os.environ["GLOG_v"] == level


@pytest.mark.parametrize("version, newer", [("2.10.0", False), ("2.11.0rc1", True), ("3.0.0", True)])
def test_a_newer_mindspore_is_a_line_at_the_start(monkeypatch, version, newer):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(importlib.metadata, "version", {"mindspore": version}.get)
    note = device.prepare_environment()
    assert (note is not None) == newer and (not newer or f"MindSpore {version} is newer than" in note)


@pytest.fixture
def npu(monkeypatch):
    """Return a function that fakes an NPU of a chip and returns the list of what is set in MindSpore."""

    def make(chip: str) -> list:
        calls, supported = [], lambda _: True
        context = SimpleNamespace(get_ascend_soc_version=lambda: chip, is_pkg_support_device=supported)
        monkeypatch.setattr(device, "ascend", lambda: context)
        monkeypatch.setattr(device, "init_communication", lambda: None)
        monkeypatch.setattr(mindspore, "get_context", {"device_target": "Ascend"}.get)
        monkeypatch.setattr(mindspore, "set_context", lambda **settings: calls.append(settings))
        monkeypatch.setattr(mindspore, "set_device", lambda *chosen: calls.append(chosen))
        monkeypatch.setattr(mindspore, "set_deterministic", lambda value: calls.append(value))
        monkeypatch.setattr(mindspore.runtime, "synchronize", lambda: None)
        return calls

    return make


@pytest.mark.parametrize(
    "chip, amp_level, conv_precision, values",
    [
        ("ascend910b", "O0", "default", ("HF32", "HF32", "float32")),
        ("ascend910b", "O0", "float32", ("float32", "float32", "float32")),
        ("ascend910b", "O2", "default", ("float16", "HF32", "float32")),
        ("ascend910_93", "O3", "float32", ("float16", "float16", "float32")),
        ("ascend910", "O0", "default", ("float16", "float16", "float16")),
    ],
)
def test_precision_is_that_of_the_chip(npu, chip, amp_level, conv_precision, values):
    npu(chip)
    assert tuple(device.precision(amp_level, conv_precision).values()) == (chip, *values)


def test_versions_of_cann_and_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setattr(device, "DRIVER", tmp_path / "driver" / "version.info")
    assert not {"CANN", "NPU driver"} & device.versions().keys()
    for name, text, key, version in (
        ("driver/version.info", "Version=25.2.0\nascendhal_version=7.35.23\n", "NPU driver", "25.2.0"),
        ("compiler/version.info", "version_dir=8.2.RC1\nVersion=8.2.0.1.220\n", "CANN", "8.2.0.1.220"),
        ("aarch64-linux/ascend_toolkit_install.info", "name=cann\nversion=8.2.RC1\n", "CANN", "8.2.RC1"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
        assert device.versions()[key] == version


@pytest.mark.parametrize(
    "environment, count, several, number",
    [
        ({"RANK_SIZE": "1", "RANK_ID": "0"}, 1, False, 1),  # containers set it
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "1"}, 1, True, None),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_SIZE": "4", "DEVICE_ID": "3"}, 4, True, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "RANK_SIZE": "1"}, 2, True, None),
    ],
)
def test_each_process_of_a_job_has_an_npu(npu, monkeypatch, environment, count, several, number):
    """MindSpore numbers the processes of a machine itself if it is given no number; not all may get NPU 0."""
    calls, args = npu("ascend910"), get_arguments(["--device-id", "0" if several else "1"])
    monkeypatch.setattr(os, "environ", environment)
    device.setup(args)
    assert (device.process_count(), device.launched()) == (count, several)
    assert calls[0] == ("Ascend", number)
    assert {"jit_config": {"jit_level": "O0"}} in calls  # not O2, the default of MindSpore 2.7 on a 910A


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--jit-level", "O1", "--mode", "pynative"], "--jit-level has no effect with --mode pynative"),
        (["--jit-level", "O2", "--device", "cpu"], "--jit-level O2 needs an NPU"),
        (["--device", "cpu", "--device-id", "1"], "--device-id 1 names an NPU, but the device is the CPU"),
        (["--conv-precision", "float32"], "--conv-precision float32 is not for ascend910: leave it out"),
    ],
)
def test_options_that_contradict_the_device_are_refused(npu, argv, named):
    npu("ascend910")
    with pytest.raises(UserError, match=named):
        device.setup(get_arguments(argv))


def test_a_rank_table_is_refused_without_the_level_it_forces(npu, monkeypatch):
    """Started so, MindSpore compiles everything at O2, where D has to do without the NPU's leaky ReLU."""
    calls = npu("ascend910")
    monkeypatch.setattr(os, "environ", {"RANK_TABLE_FILE": "table.json", "RANK_SIZE": "8", "DEVICE_ID": "3"})
    with pytest.raises(UserError, match="RANK_TABLE_FILE .*unset it .*add --jit-level O2"):
        device.setup(get_arguments([]))
    device.setup(get_arguments(["--jit-level", "O2"]))
    assert calls[0] == ("Ascend", 3) and {"jit_config": {"jit_level": "O2"}} in calls
    for level, activation in (("O0", CLAN_D.leaky_relu_npu), ("O2", CLAN_D.leaky_relu)):
        monkeypatch.setattr(mindspore, "get_context", {"device_target": "Ascend", "jit_level": level}.get)
        assert CLAN_D.discriminator("small").leaky_relu is activation


def test_deterministic_is_set_once_per_process_and_first(npu):
    """MindSpore refuses a second call, and wants it before the communication starts."""
    calls = npu("ascend910b")
    for _ in range(2):
        device.setup(get_arguments(["--deterministic"]))
    assert calls[0] is True and calls.count(True) == 1
    device.compute_deterministically.cache_clear()


def test_the_profiler_records_the_steps_after_the_first_ten(data, tmp_path):
    argv = train_words(data, tmp_path / "run", "--num-steps", 13, "--not-val", "--method", "source", *EAGER)
    run(TRAIN, *argv, "--profile", 2)
    [trace] = (tmp_path / "run" / "profile").rglob("trace_view.json")
    operators = [event["name"] for event in json.loads(trace.read_text(encoding="utf-8"))]
    updates = Counter(name for name in operators if name.startswith("Default/SGD-op"))
    assert min(updates.values()) == 2  # of a weight, one in a step; an event may be recorded in several parts
    argv = ["--resume", tmp_path / "run", "--num-steps-stop", 13]
    assert get_arguments(list(map(str, argv))).profile == 0  # a resumed run does not record again
    assert "--profile skips 10 steps" in fails(TRAIN, *argv, "--profile", 2)


def test_processes_that_cannot_join_say_why(tmp_path):
    message = python([ROOT / TRAIN, "--device", "cpu"], tmp_path, 2, RANK_SIZE="2").stderr
    assert "2 processes cannot join: for a single one, unset RANK_SIZE" in message


def test_a_dryrun_trains_to_its_end_and_writes_no_checkpoint(data, tmp_path, monkeypatch):
    """With losses that are not finite, as a simulation may return, and made-up values of memory."""
    # MindSpore itself must not see the variable: it would simulate the tests that follow, too.
    monkeypatch.setattr(os, "environ", {**os.environ, "MS_SIMULATION_LEVEL": "1"})
    assert not device.simulated()  # on the CPU the variable means nothing
    monkeypatch.setattr(device, "on_npu", lambda: True)
    monkeypatch.setattr(script.CLANStep, "step", lambda *_: np.full(5, np.nan))
    monkeypatch.setattr(mindspore.runtime, "max_memory_allocated", lambda: 7665 << 20)
    monkeypatch.setattr(mindspore.runtime, "max_memory_reserved", lambda: 9 << 30)
    argv = train_words(data, tmp_path / "run", "--num-steps", 2, "--mode", "pynative", "--save-pred-every", 1)
    script.train(get_arguments(argv))
    assert not list(tmp_path.rglob("*.ckpt"))
    log = (tmp_path / "run" / "Train_log.log").read_text("utf-8")
    assert "first steps compile for the NPU" in log
    assert "all values are simulated" in log and "7,665 MiB, 9,216 MiB with fragments" in log
