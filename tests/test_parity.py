"""This project against reference outputs of the authors' PyTorch code (see golden.py)."""

import re

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
    assert "verdict: as expected of float32" in lines
    speed = r"[\d.]+ s per step at 96,64 \+ 64,48 \(median of 2\), \d+% of it waiting for data"
    assert re.fullmatch(speed, lines[-1])


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
