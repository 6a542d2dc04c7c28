"""The comparison with PyTorch over many steps: its lists and its verdict."""

import json
from pathlib import Path

import numpy as np

from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import DomainSampler
from dataset.transform import open_image, to_input
from options.train_options import get_arguments
from tests import trajectory
from tests.scripts import train_words

GOLDEN = {"torch": "2", "differences": {"default": dict.fromkeys(trajectory.GOLDEN_LIMITS, 1e-4)}}


def test_lists_name_what_a_training_reads(data, tmp_path):
    args = get_arguments(train_words(data, tmp_path, "--recipe", "released", "--num-steps", 9))
    lists = json.loads(json.dumps(trajectory.images_of_steps(args)))
    source = GTA5DataSet(args.data_dir, None, args.input_size)
    sampler = DomainSampler(source, 0, 9, 1, [args.random_seed, 0], True, True)
    for k, (image, label, scale, mirror) in enumerate(lists["source"]):
        x = to_input(open_image(Path(image)), args.input_size, scale, mirror)
        assert np.array_equal(x, sampler[k][0])
        assert Path(label) == data / "GTA5" / "labels" / Path(image).name
    assert {scale for *_, scale, _ in lists["target"]} == {0.8, 1.0, 1.1}
    assert len({path for path, *_ in lists["target"]}) == 3


def results(seeds: list[int]) -> dict:
    """Results of all runs: those of perturbed runs differ from PyTorch's by 0.1, ours by 0.01, by turns."""
    runs = {}
    for recipe, form, seed, side in trajectory.list_of_runs(seeds):
        steps, sign = 60 if form == "sharp" else 800, (-1) ** seed
        by = {"ours": 0.01, "PyTorch": 0}.get(side, 0.1) * sign
        losses = np.ones((steps, 5)) * (1 + (1e-6 * by if form == "sharp" else by))
        runs[recipe, form, seed, side] = {"mIoU": 30 + by, "mIoU_running": 28 + by, "losses": losses}
    return runs


def verdict(runs: dict, seeds: list[int]) -> str:
    return trajectory.report(GOLDEN, runs, seeds).split("Verdict")[1].split("\n")[0].split(": ", 1)[1]


def test_verdict():
    seeds = [1, 2, 3, 4]
    runs = results(seeds)
    assert verdict(runs, seeds) == "it holds."
    some = {key: run for key, run in runs.items() if key[0] == "default" and key[3][:9] != "perturbed"}
    assert "nan" not in trajectory.report(GOLDEN, some, seeds) and verdict(some, seeds) == "it holds."

    runs["released", "sharp", 1, "ours"]["losses"][24, 2] += 2e-4
    runs["default", "long", 3, "ours"]["losses"][700:, 4] *= 1.6
    for seed in seeds:
        runs["default", "long", seed, "ours"]["mIoU"] += 0.15
    assert verdict(runs, seeds).removeprefix("it does not hold: ").split("; ") == [
        "sharp form, released: beyond 1e-04 in 25 steps",
        "default, loss_D_t, means of 100 steps, relative: 0.58 is more than twice 0.1",
        "default, mIoU, re-estimated: the mean difference +0.15 is more than two standard errors.",
    ]
