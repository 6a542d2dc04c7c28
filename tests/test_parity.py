"""This project against reference outputs of the authors' PyTorch code (see golden.py)."""

import re
import sys

import numpy as np
import pytest

from tests import golden
from tests.scripts import TRAIN, losses, module, run, train_words
from utils import checkpoint


@pytest.mark.slow
def test_evaluation_gives_the_golden_predictions(tmp_path):
    assert not golden.report(golden.compare_evaluation(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "released"])
def test_first_step(recipe):
    assert not golden.report(golden.compare_first_step(recipe))


@pytest.mark.slow
def test_eight_steps_of_the_training_script(tmp_path):
    """Repeated updates, with a weight decay large enough to show in each.

    The default recipe is in test_a_device_gets_a_verdict; python -m tests.golden compares all four traces.
    """
    assert not golden.report(golden.compare_train("released_decay", tmp_path))


@pytest.mark.slow
def test_a_device_gets_a_verdict(tmp_path):
    """The command that checks a device, here with small images for the steps that are timed."""
    argv = ["--device", "cpu", "--steps", 3, "--sizes", "96,64", "64,48"]
    lines = module("tests.golden", *argv, cwd=tmp_path).stdout.splitlines()
    assert [line for line in lines if "verdict" in line] == ["verdict: as expected of float32"]
    speed = (r"[\d.]+ s per step at 96,64 \+ 64,48 \(median of 2\), [\d.]+ TFLOP/s, "
             r"\d+% of the time waiting for data")  # fmt: skip
    assert re.fullmatch(speed, lines[-1])


@pytest.mark.parametrize("float32, verdict", [
    ([7.1765356, 6.6336361e-4, 0.019986896], "NOT as expected: --conv-precision float32 had no effect"),
    ([7.1765359, 6.6336363e-4, 0.019986896], "NOT as expected: --conv-precision float32 had no effect"),
    ([7.1765356, 6.6339361e-4, 0.019986896], "as expected: --conv-precision float32 changes losses")])
def test_a_precision_without_effect_is_told(float32, verdict):
    """As on a 910B whose convolutions stay in HF32: losses to the bit, or to what chance changes."""
    assert golden.float32_verdict([7.1765356, 6.6336361e-4, 0.019986896], float32).startswith(verdict)


@pytest.mark.parametrize("argv, named", [
    (["golden", "--device", "ascend", "--steps", 3], "--device ascend cannot be used"),
    (["golden", "--device", "gpu"], "invalid choice: 'gpu'"),
    (["golden", "--jit-level", "O1"], "--jit-level need --device"),
    (["golden", "--sizes", "96,64", "64"], "'64' is not WIDTH,HEIGHT"),
    (["benchmark", "--torch", "/nowhere/python"], "--torch /nowhere/python: No such file or directory"),
    (["benchmark", "--torch", sys.executable], "No module named 'torch'"),
    (["benchmark", "--size", "320x180"], "'320x180' is not SOURCE+TARGET"),
    (["benchmark", "--markdown", "nowhere/table.md"], "--markdown nowhere/table.md: no such folder")])
def test_mistakes_are_named_in_one_line(argv, named, tmp_path):
    assert named in module(f"tests.{argv[0]}", *argv[1:], cwd=tmp_path, code=2).stderr


@pytest.mark.slow
def test_a_resumed_run_of_the_full_network_ends_with_the_same_bits(data, tmp_path):
    """In graph mode: the small network's sums are too short to differ between executions."""
    argv = train_words(data, tmp_path / "run", "--model", "resnet101", "--input-size", "168,96", "--not-val")
    argv += ["--input-size-target", "136,72", "--num-steps", "24", "--num-steps-stop", "8"]
    argv += ["--preheat-steps", "4", "--save-pred-every", "4", "--restore-from", "none"]
    run(TRAIN, *argv)
    run(TRAIN, "--resume", tmp_path / "run" / "GTA5_4.ckpt", "--snapshot-dir", tmp_path / "resumed")
    once, resumed = (checkpoint.read(str(tmp_path / name / "GTA5_8.ckpt")) for name in ("run", "resumed"))
    assert once.keys() == resumed.keys() and len(once) > 600
    assert not [name for name in once if not np.array_equal(once[name], resumed[name])]
    assert np.array_equal(losses(tmp_path / "run"), losses(tmp_path / "resumed"))
