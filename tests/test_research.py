"""What researchers build on, through the command lines: the ablation, curves of a run, class distances."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset.transform import CLASS_NAMES
from tests.scripts import TRAIN, module, run, train_words


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A short run with a checkpoint and a validation half-way."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    run(TRAIN, *train_words(data, folder, "--num-steps", "4", "--save-pred-every", "2"))
    return folder


def test_ablation_names_mistakes_in_one_line(tmp_path):
    assert "no such row" in module("tests.ablation", "--rows", "source,clam", code=2).stderr
    assert "--seeds" in module("tests.ablation", "--seeds", "one", code=2).stderr


@pytest.mark.slow
def test_ablation_at_its_smallest_resumes_and_keeps_what_is_done(tmp_path):
    words = ["--steps", 4, "--seeds", 1, "--rows", "source,clan", "--markdown", "t.md", "--chart", "c.png"]
    done = module("tests.ablation", *words, cwd=tmp_path)
    folder = tmp_path / "checkpoint" / "ablation" / "seed1"
    results = {row: json.loads((folder / row / "result.json").read_text()) for row in ("source", "clan")}
    gain = results["clan"]["mIoU"] - results["source"]["mIoU"]
    line = next(line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| CLAN"))
    assert line.split(" | ")[1:5] == ["1", f"{results['clan']['mIoU']:.2f}", f"{gain:+.2f}", "–"]
    assert line in done.stdout and Image.open(tmp_path / "c.png").width > 800

    (folder / "clan" / "result.json").unlink()  # as if it had been killed
    again = module("tests.ablation", *words, cwd=tmp_path).stdout
    assert "source: mIoU" in again and again.count("done before") == 2  # stage A and source
    assert json.loads((folder / "clan" / "result.json").read_text())["mIoU"] == results["clan"]["mIoU"]
    module("tests.ablation", *words[2:], "--steps", 5, "--rows", "source", cwd=tmp_path)
    kept = json.loads((folder / "source_1" / "result.json").read_text())  # of other options: renamed
    assert kept["mIoU"] == results["source"]["mIoU"]


def test_curves_of_a_run_and_of_one_under_way(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    done = module("utils.curves", folder)
    assert re.search(r"after 4 steps: mIoU [0-9.]+\n", done.stdout) and "missing" not in done.stdout
    whole = Image.open(folder / "curves.png").tobytes()
    # Under way: no validation yet, and the last row is being written. As if at full size: the authors' curve.
    (folder / "miou.csv").unlink()
    table = (folder / "loss.csv").read_text()
    (folder / "loss.csv").write_text(table[:-9])
    assert "miou.csv is missing" in module("utils.curves", folder).stdout
    partial = Image.open(folder / "curves.png").tobytes()
    options = json.loads((folder / "options.json").read_text())
    full = {"model": "resnet101", "input_size": [1280, 720], "input_size_target": [1024, 512]}
    (folder / "options.json").write_text(json.dumps({**options, **full}))
    (folder / "miou.csv").write_text("step,mIoU\n2000,27.5\n4000,30.25\n")
    done = module("utils.curves", folder)
    assert "after 4000 steps: mIoU 30.25; the authors' run had 28.83" in done.stdout
    assert len({whole, partial, Image.open(folder / "curves.png").tobytes()}) == 3


def test_curves_without_matplotlib_or_a_run_say_so_in_one_line(trained, tmp_path):
    assert "no rows in loss.csv" in module("utils.curves", tmp_path, code=2).stderr
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # found first
    assert "pip install matplotlib" in module("utils.curves", trained, cwd=tmp_path, code=2).stderr
    (tmp_path / "loss.csv").write_text("step,loss_seg\n0,1\n1,x\n")
    assert "loss.csv: damaged" in module("utils.curves", tmp_path, code=2).stderr


def test_ccd_of_two_checkpoints(trained, data, tmp_path):
    words = ["--data-dir", data / "City", "--input-size", "64,48", "--device", "cpu"]
    both = [trained / "GTA5_2.ckpt", trained / "GTA5_4.ckpt"]
    done = module("utils.ccd", "--restore-from", *both, *words, cwd=tmp_path)
    folder = tmp_path / "result" / "ccd"
    result = json.loads((folder / "ccd.json").read_text())
    assert result["pictures"] == [3] and sum(result["points"].values()) <= 3 * 9 * 7
    for name in CLASS_NAMES:
        before, after = result["CCD"][name]
        assert (before is None) == (after is None) == (result["points"][name] == 0)
        if before is not None:
            assert f"{name:<14}{before:10.3f}{after:10.3f}" in done.stdout and before != after
    assert Image.open(folder / "ccd.png").width > 800
    # Once more: repeats, the old result is renamed; with the source's pictures there is more to count.
    more = ["--data-dir-source", data / "GTA5", "--input-size-source", "96,64", "--count", 2, "--adapt-bn", 2]
    again = module("utils.ccd", "--restore-from", *both[:1], *both[:1], *words, *more, cwd=tmp_path).stdout
    assert "ccd_1.json" in again and (folder / "ccd_1.png").exists()
    result = json.loads((folder / "ccd.json").read_text())
    assert result["pictures"] == [2, 2]
    assert all(a == b for a, b in result["CCD"].values())  # one checkpoint beside itself


def test_ccd_is_what_its_definition_says():
    from utils.ccd import add_sums, ccd, shrink

    rng = np.random.default_rng(5)
    x, y = rng.normal(2, 1, (600, 7)).astype(np.float32), rng.choice([0, 3, 4, 11, 255], 600)
    x += y[:, None] % 5
    sums = {}
    for part in np.array_split(np.arange(600), 4):
        add_sums(sums, x[part], y[part])
    classes = [0, 3, 4, 11]
    centre = {i: x[y == i].astype(float).mean(0) for i in classes}
    for i in classes:
        within = ((x[y == i] - centre[i]) ** 2).sum(1).mean()
        ratios = [within / ((centre[i] - centre[j]) ** 2).sum() for j in classes if j != i]
        assert ccd(sums)[i] == pytest.approx(np.mean(ratios), rel=1e-6)
    assert np.isnan(np.delete(ccd(sums), classes)).all()
    labels = np.arange(35).reshape(1, 5, 7)
    assert shrink(labels, 3, 4).tolist() == [[[0, 2, 4, 6], [14, 16, 18, 20], [28, 30, 32, 34]]]
