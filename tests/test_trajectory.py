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


def results(keys: list[tuple]) -> dict:
    """Results of all runs: those of perturbed runs differ from PyTorch's by 0.1, ours by 0.01, by turns."""
    runs = {}
    for recipe, form, seed, side in keys:
        steps, sign = 60 if form == "sharp" else 800, (-1) ** seed
        by = {"ours": 0.01, "PyTorch": 0}.get(side, 0.1) * sign
        losses = np.ones((steps, 5)) * (1 + (1e-6 * by if form == "sharp" else by))
        runs[recipe, form, seed, side] = {"mIoU": 30 + by, "mIoU_running": 28 + by, "losses": losses}
    return runs


def verdict(runs: dict, keys: list[tuple], **singles: np.ndarray) -> str:
    text = trajectory.report(GOLDEN, singles, runs, keys)
    return text.split("Verdict")[1].split("\n")[0].split(": ", 1)[1]


def test_verdict():
    seeds = [1, 2, 3, 4]
    keys = trajectory.list_of_runs(seeds)
    runs = results(keys)
    singles = {recipe: np.full((9, 2, 2), 1e-6) for recipe in trajectory.RECIPES}
    assert verdict(runs, keys, **singles) == "it holds."
    some = {key: run for key, run in runs.items() if key[0] == "default" and key[3][:9] != "perturbed"}
    assert "nan" not in trajectory.report(GOLDEN, {}, some, keys) and verdict(some, keys) == "it holds."

    runs["released", "sharp", 1, "ours"]["losses"][24, 2] += 2e-4
    runs["default", "long", 3, "ours"]["losses"][700:, 4] *= 1.6
    for seed in seeds:
        runs["default", "long", seed, "ours"]["mIoU"] += 0.15
    singles["default"][4, 0, 0] = 0.05
    singles["released"][:, 1, 0] = 4e-6
    assert verdict(runs, keys, **singles).removeprefix("it does not hold: ").split("; ") == [
        "sharp form, released: beyond 1e-04 in 25 steps",
        "single steps, default, G: median 1.0e-06 (float32: 1.0e-06), largest 5.0e-02",
        "single steps, released, D: median 4.0e-06 (float32: 1.0e-06), largest 4.0e-06",
        "default, loss_D_t, means of 100 steps, relative: 0.58 is more than twice 0.1",
        "default, mIoU, re-estimated: the mean difference +0.15 is more than two standard errors.",
    ]


def test_state_for_pytorch():
    content = {name: np.ones(1) for name in (
        "net_G.layer1.0.bn1.moving_mean", "net_G.layer1.0.bn1.gamma", "net_G.layer1.0.conv1.weight",
        "optimizer_D.moment1.net_D.conv1.bias", "optimizer_D.beta1_power", "step")}  # fmt: skip
    assert list(trajectory.torch_state(content)) == [
        "net_G.layer1.0.bn1.running_mean", "net_G.layer1.0.bn1.weight", "net_G.layer1.0.conv1.weight",
        "optimizer_D.moment1.net_D.conv1.bias"]  # fmt: skip
