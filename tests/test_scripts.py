"""Both scripts through their command lines, as a user starts them, on small files."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset.classes import CLASS_NAMES
from dataset.transform import PALETTE, TRAIN_TO_LABEL
from options import evaluate_options
from options.train_options import build_parser, get_arguments
from tests.golden import official_iou
from tests.scripts import EVALUATE, ROOT, TRAIN, fails, python, refused, rows_of, run, train_words


@pytest.mark.parametrize("script", [TRAIN, EVALUATE])
def test_help_answers_at_once(tmp_path, script):
    """Without the packages that take seconds to import: here none of them can be."""
    for name in ("mindspore", "numpy", "scipy", "PIL", "tqdm"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is slow')")
    done = python([ROOT / script, "--help"], tmp_path, 0, PYTHONPATH=str(tmp_path))
    assert "--restore-from" in done.stdout


def test_mistakes_are_one_line_that_says_what_to_do(reference, tmp_path):
    message = fails(TRAIN, cwd=tmp_path)
    assert "data/GTA5" in message and "https://" in message and "--demo" in message
    message = fails(EVALUATE, "--restore-from", reference / "GTA5_6.ckpt", cwd=tmp_path)
    assert "Cityscapes not found" in message
    assert "--learning-rate" in fails(TRAIN, "--learning-rate", 0)  # before mindspore is imported


def test_evaluation_takes_the_images_of_the_demo_unless_told_otherwise():
    demo = evaluate_options.get_arguments(["--restore-from", "a.ckpt", "--demo", "7"])
    assert demo.data_dir == "./data/demo/seed7/Cityscapes"
    other = evaluate_options.get_arguments(["--restore-from", "a.ckpt", "--demo", "--data-dir", "d"])
    assert other.data_dir == "d"


def test_a_place_for_results_that_cannot_be_is_found_before_the_work(reference, data, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["--restore-from", reference / "GTA5_6.ckpt", "--data-dir", data / "City"]
    done = run(EVALUATE, *argv, "--save-path", tmp_path / "file", cwd=tmp_path, code=2)
    assert f"--save-path {tmp_path / 'file'}: is a file; choose" in done.stderr and not done.stdout


@pytest.mark.parametrize("argv, named", [
    (["--method", "clam"], "--method"),
    (["--demo", "--method", "source"], "--method"),
    (["--recompute", "--mode", "pynative"], "--recompute is for --mode graph"),
    (["--num-steps", "1e5"], "'1e5' is not a whole number"),
    (["--continue-train", "x" * 300], "File name too long"),
    (["--resume", "nowhere/GTA5_4.ckpt"], "--resume nowhere/GTA5_4.ckpt: no such checkpoint or folder"),
    (["--resume", "."], "options.json is missing"),
    (["--lambda-advv", "1"], "--lambda-advv, did you mean --lambda-adv?"),
    (["--method", "source", "--set", "val"], "--set has no effect with --method source"),
    (["--lr", "1e-4"], "--lr, did you mean --learning-rate?"),
    (["--checkpoint=a.ckpt"], "did you mean --restore-from or --resume?"),
    (["--preheat-steps", "9", "--num-steps", "6"], "--preheat-steps 9 is more than --num-steps 6"),
    (["--method", "tan", "--lambda-local", "10"], "--lambda-local has no effect with --method tan"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--input-size", "1280,8"], "--input-size"),
])  # fmt: skip
def test_bad_options_are_named_in_one_line(argv, named):
    assert named in refused(*argv)


def test_every_option_stands_in_a_group_and_says_whether_it_may_change_on_resuming():
    parser = build_parser()
    assert [option.dest for option in parser._optionals._group_actions] == ["help"]
    assert {option.resume for option in parser.options.values()} == {"fixed", "mutable", "list", "new"}
    assert get_arguments(["--not-val"]).not_val and not get_arguments(["--not-val", "--val"]).not_val


def test_training_writes_its_files(reference):
    folder = reference
    names = {path.name for path in folder.iterdir()}
    checkpoints = {f"GTA5_{n}.ckpt" for n in (1, 2, 3, 4, 5, 6, "best")}
    assert names == {"options.json", "loss.csv", "miou.csv", "Train_log.log", *checkpoints}
    rows = rows_of(folder / "loss.csv")
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5]
    losses = ["loss_seg", "loss_adv", "loss_weight", "loss_D_s", "loss_D_t"]
    assert list(rows[0]) == ["step", *losses, "lr", "lr_D", "seconds"]
    values = np.array([[float(row[name]) for name in list(row)[1:8]] for row in rows])
    assert np.isfinite(values).all() and (values[:, :5] > 0).all()
    assert values[0, 5] == 0 and values[1, 5] == pytest.approx(1.25e-4)
    scores = rows_of(folder / "miou.csv")
    assert [row["step"] for row in scores] == list("123456") and list(scores[0])[2:] == CLASS_NAMES
    options = json.loads((folder / "options.json").read_text())
    assert options["preheat_steps"] == 2 and options["versions"]["mindspore"]
    assert "validation after 6 steps: mIoU" in (folder / "Train_log.log").read_text()


@pytest.mark.parametrize("argv", [
    ["--method", "source", "--save-memory"],
    pytest.param(["--method", "tan", "--recipe", "released", "--batch-size", 2], marks=pytest.mark.slow),
    ["--mode", "pynative", "--detach-weight-map", "--train-bn-affine", "--not-val"],
])  # fmt: skip
def test_other_methods_run(data, tmp_path, argv):
    run(TRAIN, *train_words(data, tmp_path / "run", "--num-steps", "3", *argv))
    rows = rows_of(tmp_path / "run" / "loss.csv")
    assert len(rows) == 3 and all(float(row["loss_seg"]) > 0 for row in rows)
    adapted = argv[1] != "source"
    assert all((float(row["loss_D_t"]) > 0) == adapted for row in rows)
    assert all((float(row["loss_weight"]) > 0) == (adapted and argv[1] != "tan") for row in rows)


def test_evaluation_writes_predictions_and_agrees_with_validation(reference, data, tmp_path):
    folder = reference
    argv = ["--data-dir", data / "City", "--input-size", "64,48", "--save-path", tmp_path / "result"]
    argv.append("--save")
    done = run(EVALUATE, "--restore-from", folder / "GTA5_6.pth", *argv)  # .pth is not there, but .ckpt is
    assert "GTA5_6.ckpt -> G" in done.stdout and "mIoU" in done.stdout
    result = json.loads((tmp_path / "result" / "result.json").read_text())
    assert result["images"] == 3 and list(result["IoU"]) == CLASS_NAMES
    assert result["set"] == "val" and result["input_size"] == [64, 48]
    assert result["classes without a label"] == []
    last = rows_of(folder / "miou.csv")[-1]
    assert result["mIoU"] == pytest.approx(float(last["mIoU"]), abs=1e-6)
    theirs, mean = official_iou(data / "City", tmp_path / "result")  # the package cityscapesscripts
    ours = [np.nan if iou is None else iou for iou in result["IoU"].values()]
    assert np.allclose(ours, theirs, rtol=1e-12, equal_nan=True) and result["mIoU"] == pytest.approx(mean)
    for i in range(3):
        name = f"aachen_{i:06d}_000019_leftImg8bit"
        ids = np.asarray(Image.open(tmp_path / "result" / "labelIds" / f"{name}_labelIds.png"))
        colour = np.asarray(Image.open(tmp_path / "result" / "color" / f"{name}_color.png"))
        assert ids.shape == (102, 204) and colour.shape == (102, 204, 3)
        train_id = list(TRAIN_TO_LABEL[:19]).index(ids[50, 100])
        assert (colour[50, 100] == PALETTE[train_id]).all()
    # Without --save the earlier images are renamed too: they would seem to belong to the new result.
    again = run(EVALUATE, "--restore-from", folder / "GTA5_6.ckpt", *argv[:-1])
    assert "earlier results are now" in again.stdout
    assert again.stdout.splitlines()[-1] == f"written: {tmp_path / 'result' / 'result.json'}"
    names = {p.name for p in (tmp_path / "result").iterdir()}
    assert names == {"result.json", "result_1.json", "labelIds_1", "color_1", "panels_1", "legend_1.png"}


def test_adapt_bn_uses_no_labels_and_changes_the_statistics(reference, data, tmp_path):
    folder = reference
    argv = ["--restore-from", folder / "GTA5_6.ckpt", "--data-dir", data / "City", "--input-size", "64,48"]
    (data / "City" / "gtFine" / "train").rename(tmp_path / "hidden")
    try:
        done = run(EVALUATE, *map(str, argv), "--adapt-bn", "3", "--save-path", str(tmp_path / "result"))
    finally:
        (tmp_path / "hidden").rename(data / "City" / "gtFine" / "train")
    assert "re-estimated on 3 unlabelled" in done.stdout
    result = json.loads((tmp_path / "result" / "result.json").read_text())
    assert result["adapt_bn"] == 3 and result["batch_size"] == 1
    assert result["mIoU"] != pytest.approx(float(rows_of(folder / "miou.csv")[-1]["mIoU"]), abs=1e-9)


@pytest.mark.slow
def test_demo_at_its_smallest(tmp_path):
    run(TRAIN, "--demo", "--num-steps", "4", cwd=tmp_path)
    folder, methods = tmp_path / "checkpoint" / "demo", ("source", "control", "clan")
    result = json.loads((folder / "demo_result.json").read_text())
    for method in methods:
        assert set(result[method]) == {"mIoU", "mIoU_running", "IoU"}
        assert list(result[method]["IoU"]) == CLASS_NAMES
    assert result["seed"] == 1234 and result["steps"] == 4 and result["seconds"] > 0
    assert Image.open(folder / "demo.png").width > 1000
    losses = [rows_of(folder / method / "loss.csv") for method in methods]
    assert len({rows[0]["loss_seg"] for rows in losses}) == 1  # the same start and the same source images
    assert "already holds a demo" in fails(TRAIN, "--demo", cwd=tmp_path)
