"""The tools for research, through their command lines: ablation, curves of a run, centre distances."""

import json
import re
import shutil

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES
from dataset.gta5_dataset import GTA5DataSet
from model.CLAN_G import generator
from tests.scripts import ROOT, module, python
from utils import checkpoint
from utils.system.errors import UserError
from utils.system.files import read_json
from utils.tools import ablation, curves
from utils.tools.ccd import distances
from utils.tools.demo_scenes import write_demo_data


@pytest.mark.parametrize("argv, named", [
    (["--rows", "source,clam"], "--rows clam: no such row"),
    (["--seeds", "one"], "--seeds: 'one' is not a whole number"),
    (["--seeds", "101"], "--seeds: lambda_adv is chosen on 101, 102"),
])
def test_ablation_names_mistakes_in_one_line(argv, named, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablation", *argv])
    with pytest.raises(SystemExit, match="2"):
        ablation.get_arguments()
    assert named in (message := capsys.readouterr().err) and message.count("\n") == 1


@pytest.mark.parametrize("tool", ["ablation", "ccd", "curves"])
def test_tools_start_as_files_too(tool, tmp_path):
    assert "usage: " in python([ROOT / "utils" / "tools" / f"{tool}.py", "--help"], tmp_path, 0).stdout


@pytest.mark.slow
def test_ablation_at_its_smallest_resumes_and_keeps_what_is_done(tmp_path):
    write_demo_data(tmp_path / "data" / "demo", 1, source=8, target=8, val=4)
    argv = ["--steps", 4, "--seeds", "1,1", "--rows", "source,clan", "--markdown", "t.md"]
    done = module("utils.tools.ablation", *argv, cwd=tmp_path)
    folder = tmp_path / "checkpoint" / "ablation" / "seed1"
    results = {row: json.loads((folder / row / "result.json").read_text()) for row in ("source", "clan")}
    gain = results["clan"]["mIoU"] - results["source"]["mIoU"]
    line = next(line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| CLAN"))
    assert line.split(" | ")[1:5] == ["1", f"{results['clan']['mIoU']:.2f}", f"{gain:+.2f}", "–"]
    assert line in done.stdout

    (folder / "clan" / "result.json").unlink()  # as after a kill
    module("utils.tools.ablation", *argv, cwd=tmp_path)
    # The results of stage A and of source were there; what was left of clan is renamed.
    assert {path.name for path in folder.iterdir()} == {"stage_a", "source", "clan", "clan_1"}
    assert json.loads((folder / "clan" / "result.json").read_text())["mIoU"] == results["clan"]["mIoU"]
    module("utils.tools.ablation", *argv[2:], "--steps", 5, "--rows", "source", cwd=tmp_path)
    kept = json.loads((folder / "source_1" / "result.json").read_text())  # renamed, as it is of other options
    assert kept == results["source"]


def test_curves_of_a_finished_and_of_a_running_training(reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    done = module("utils.tools.curves", folder)
    assert re.search(r"after 6 steps: mIoU [0-9.]+\n", done.stdout) and "missing" not in done.stdout
    finished = Image.open(folder / "curves.png").tobytes()
    # Still running: there was no validation yet, and the last row is being written.
    (folder / "miou.csv").unlink()
    (folder / "loss.csv").write_text((folder / "loss.csv").read_text()[:-9])
    assert "miou.csv has no rows yet" in module("utils.tools.curves", folder).stdout
    running = Image.open(folder / "curves.png").tobytes()
    # At full size: the authors' curve is shown.
    options = json.loads((folder / "options.json").read_text())
    options |= {"model": "resnet101", "input_size": [1280, 720], "input_size_target": [1024, 512]}
    (folder / "options.json").write_text(json.dumps({**options, "batch_size": 1}))
    (folder / "miou.csv").write_text("step,mIoU\n2000,27.5\n4000,30.25\n")
    done = module("utils.tools.curves", folder)
    assert "after 4000 steps: mIoU 30.25; the authors' run had 28.83" in done.stdout
    assert len({finished, running, Image.open(folder / "curves.png").tobytes()}) == 3
    # From SYNTHIA: means over 16 and 13 classes, without the authors' curve.
    (folder / "options.json").write_text(json.dumps({**options, "batch_size": 1, "source": "synthia"}))
    (folder / "miou.csv").write_text("step,mIoU_16,mIoU_13\n4000,30.25,35.5\n")
    assert "after 4000 steps: mIoU_16 30.25\n" in module("utils.tools.curves", folder).stdout


def test_curves_say_what_they_show(reference):
    losses, options = curves.columns(reference / "loss.csv"), read_json(reference / "options.json")
    figure = curves.draw(losses, {}, options, "a run")
    texts = {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    assert {"λ_adv · damp · L_adv", "2 · λ_weight · damp · L_weight", "end of warm-up", "every step"} <= texts
    assert any("damp = 1 − step / 6" in text for text in texts)
    assert not any("mean of" in text for text in texts)  # of so few steps
    tops = [axes.get_ylim()[1] for axes in figure.axes if axes.get_ylabel().startswith("lr")]
    assert tops == pytest.approx([1.05 * losses["lr"].max(), 1.4 * losses["lr_D"].max()])
    losses = {name: np.resize(values, 200) for name, values in losses.items()}
    assert "mean of 4 steps" in str(curves.draw(losses, {}, {}, "").axes[0].get_legend_handles_labels())


def test_curves_without_matplotlib_or_a_run_say_so_in_one_line(reference, tmp_path):
    assert "no rows in loss.csv" in module("utils.tools.curves", tmp_path, code=2).stderr
    assert "folder is empty: give it a value" in module("utils.tools.curves", "", code=2).stderr
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # found first
    assert "pip install matplotlib" in module("utils.tools.curves", reference, cwd=tmp_path, code=2).stderr


@pytest.mark.slow
def test_ccd_is_the_distance_of_the_centres_that_numpy_finds(reference, data, tmp_path):
    argv = ["--data-dir", data / "GTA5", "--data-dir-target", data / "City", "--device", "cpu"]
    argv += ["--input-size", "96,64", "--input-size-target", "64,48", "--count", 2]
    both = [reference / "GTA5_2.ckpt", reference / "GTA5_4.ckpt"]
    folder = tmp_path / "result" / "ccd"
    folder.mkdir(parents=True)
    (folder / "ccd.json").write_text("an earlier one")
    done = module("utils.tools.ccd", "--restore-from", *both, *argv, cwd=tmp_path)
    assert (folder / "ccd_1.json").read_text() == "an earlier one" and "ccd_1.json" in done.stdout
    result = json.loads((folder / "ccd.json").read_text())
    for when, path in zip(("before", "after"), both):
        centre = {name: (np.mean(s, 0), np.mean(t, 0))
                  for name, s, t in zip(CLASS_NAMES, *class_features(path, data)) if s and t}
        assert 2 < len(centre) < 19  # so that some class has a dash
        scale = np.mean([np.linalg.norm(a - b) for one in centre for other in centre if one != other
                         for a in centre[one] for b in centre[other]])
        assert result["scale"][when] == pytest.approx(scale, rel=1e-4)
        expected = {name: np.linalg.norm(s - t) for name, (s, t) in centre.items()}
        expected["mean"] = np.mean(list(expected.values()))
        for name in (*CLASS_NAMES, "mean"):
            found = result["distance"][name][when], result["relative"][name][when]
            if name in expected:
                assert found == pytest.approx((expected[name], expected[name] / scale), rel=1e-4)
            else:
                assert found == (None, None) and re.search(rf"^{name}( +–){{6}}$", done.stdout, re.M)
    cells = ""  # the printed table has the same values
    for values in (result["distance"]["mean"], result["relative"]["mean"]):
        a, b = values["before"], values["after"]
        cells += f"{a:10.3f}{b:10.3f}{b - a:+10.3f}"
    assert f"mean          {cells}\n" in done.stdout and a != b


def class_features(path, data):
    """Yield, for source and target, a list of each class's features in the first and last image."""
    net_G = generator("small").set_train(False)
    checkpoint.load(net_G, checkpoint.read(path), path, "net_G")
    for domain in (GTA5DataSet(data / "GTA5", size=(96, 64)),
                   cityscapesDataSet(data / "City", "val", size=(64, 48), labels=True)):
        classes = [[] for _ in CLASS_NAMES]
        for image, label in (domain[0], domain[len(domain) - 1]):
            f = net_G.features(Tensor(image[None])).asnumpy()[0].astype(float)
            (H, W), (h, w) = label.shape, f.shape[1:]
            for y, x in np.ndindex(h, w):
                i = label[round(y * (H - 1) / (h - 1)), round(x * (W - 1) / (w - 1))]
                if i < 19:
                    classes[i].append(f[:, y, x])
        yield classes


def test_ccd_needs_two_classes_that_occur_in_both_domains():
    source, target = np.full((2, 19, 3), np.nan)
    source[[1, 2]], target[[2, 5]] = 1.0, 2.0
    with pytest.raises(UserError, match="fewer than two classes"):
        distances(source, target)
    target[1] = source[1]
    distance, scale = distances(source, target)
    assert distance[1] == 0 and distance[2] == pytest.approx(3**0.5) and np.isnan(distance[[0, 5]]).all()
    assert scale == pytest.approx(3**0.5 / 2)  # of s1-s2, s1-t2, t1-s2, t1-t2
