"""The evaluation script, apart from evaluating one checkpoint: folders, panels, own images, export."""

import os
import shutil

import mindspore
import numpy as np
import pytest
from mindspore import Tensor, nn
from PIL import ExifTags, Image

import CLAN_evaluate_city
from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES
from dataset.images import names_crc32
from dataset.transform import LABEL_TO_TRAIN, open_image, to_input
from model.CLAN_G import generator
from model.upsample import up
from tests.golden import write_city
from tests.scripts import EAGER, EVALUATE, TRAIN, fails, rows_of, run, run_parallel, train_words
from utils import checkpoint, evaluation, run_folder
from utils.evaluation import adapt_bn, best_class, evaluate, predictions, read_views
from utils.loss import alignment_map
from utils.system import device, interrupt, parallel
from utils.system.errors import UserError
from utils.system.files import read_json, write_json
from utils.tools import ccd
from utils.visual import CLASSES, ERRORS, colourise, heatmap

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return the folder of a short run, with checkpoints of 1, 2 and 3 steps."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    argv = ["--num-steps", 3, "--save-pred-every", 1, "--not-val", "--method", "source", *EAGER]
    run(TRAIN, *train_words(data, folder, *argv))
    return folder


@pytest.fixture(scope="module")
def argv(data):
    return ["--data-dir", data / "City", *CPU]


@pytest.fixture(scope="module")
def scored(trained, argv, tmp_path_factory):
    """Evaluate the folder of the run; return the folder of the results and the output."""
    folder = tmp_path_factory.mktemp("scored")
    return folder, run(EVALUATE, "--restore-from", trained, "--save-path", folder, *argv).stdout


@pytest.fixture(scope="module")
def saved(trained, argv, tmp_path_factory):
    """Return the folder of the first checkpoint's predictions, with two panels."""
    folder = tmp_path_factory.mktemp("saved")
    more = ["--save", "--panels", 2, "--save-path", folder]
    run(EVALUATE, "--restore-from", trained / "GTA5_1.ckpt", *argv, *more)
    return folder


def network(trained):
    """Return the network of the first checkpoint, in this process."""
    mindspore.set_context(mode=mindspore.GRAPH_MODE, jit_config={"jit_level": "O0"})
    path = str(trained / "GTA5_1.ckpt")
    net_G = generator("small")
    checkpoint.load(net_G, checkpoint.read(path), path, "net_G")
    return net_G.set_train(False)


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_folder_of_checkpoints_is_evaluated_in_order(trained, argv, scored, tmp_path):
    folder, output = scored
    rows = rows_of(folder / "miou.csv")
    assert list(rows[0]) == ["step", "mIoU", *CLASS_NAMES]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    expected = [f"GTA5_{row['step']}.ckpt: mIoU {float(row['mIoU']):.2f}" for row in rows]
    assert [line for line in output.splitlines() if line.startswith("GTA5_")] == expected
    best = max(rows, key=lambda row: float(row["mIoU"]))
    assert f"best: GTA5_{best['step']}, mIoU {float(best['mIoU']):.2f}\n" in output
    assert "precision: device CPU, convolutions of G float32" in output
    run(EVALUATE, "--restore-from", trained / "GTA5_2.ckpt", *argv, "--save-path", tmp_path)
    alone, result = (read_json(path) for path in (tmp_path / "result.json", folder / "GTA5_2.json"))
    assert alone["precision"]["convolutions of G"] == "float32"
    assert alone["mIoU"] == result["mIoU"] and alone["IoU"] == result["IoU"]
    values = (alone["mIoU"], *alone["IoU"].values())
    assert list(rows[1].values())[1:] == ["nan" if v is None else f"{v:.9g}" for v in values]


def test_a_second_start_skips_what_is_done_and_loses_nothing(trained, argv, scored, tmp_path):
    """The table is made from the results, as a forged one shows; a damaged result is made again."""
    folder = shutil.copytree(scored[0], tmp_path / "scored")
    rows, forged = rows_of(folder / "miou.csv"), read_json(folder / "GTA5_1.json") | {"mIoU": 77.5}
    write_json(folder / "GTA5_1.json", forged)
    (folder / "GTA5_3.json").write_text("{")
    again = [EVALUATE, "--restore-from", trained, *argv, "--save-path", folder]
    output = run(*again).stdout
    assert "2 of them evaluated already" in output and "GTA5_1.ckpt: mIoU" not in output
    assert "best: GTA5_1, mIoU 77.50" in output
    assert rows_of(folder / "miou.csv") == [{**rows[0], "mIoU": "77.5"}, *rows[1:]]
    assert rows_of(folder / "miou_1.csv") == rows and (folder / "GTA5_3_1.json").read_text() == "{"

    output = run(*again, "--classifier", 2).stdout
    assert "earlier results, of other options or files, are now" in output and "0 of them" in output
    assert read_json(folder / "GTA5_1_2.json") == forged
    assert rows_of(folder / "miou_2.csv")[0]["mIoU"] == "77.5" and rows_of(folder / "miou.csv")[1] != rows[1]


def test_other_checkpoints_and_labels_are_evaluated_again(trained, argv, data, scored, tmp_path):
    """A checkpoint or labels replaced under their old names. The row of a deleted checkpoint stays."""
    result, rows = tmp_path / "result", rows_of(scored[0] / "miou.csv")
    source, city = folder_of(tmp_path, trained, 1, 2), shutil.copytree(data / "City", tmp_path / "City")
    command = [EVALUATE, "--restore-from", source, *argv, "--data-dir", city, "--save-path", result]
    run(*command)
    shutil.copy(trained / "GTA5_3.ckpt", source / "GTA5_1.ckpt")
    output = run(*command).stdout
    assert "1 of them evaluated already" in output and "result/GTA5_1_1.json" in output
    assert rows_of(result / "miou.csv") == [{**rows[2], "step": "1"}, rows[1]]
    (source / "GTA5_1.ckpt").unlink()
    assert "1 of them evaluated already" in run(*command).stdout
    assert rows_of(result / "miou.csv") == [{**rows[2], "step": "1"}, rows[1]]
    for label in (city / "gtFine" / "val" / "aachen").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(label)), 7)).save(label)
    output, absent = run(*command).stdout, CLASS_NAMES[1:]
    assert "0 of them evaluated already" in output and f"without a label: {', '.join(absent)}" in output
    assert read_json(result / "GTA5_2.json")["classes without a label"] == absent
    (row,) = rows_of(result / "miou.csv")
    assert row["step"] == "2" and row["mIoU"] != rows[1]["mIoU"]


@pytest.mark.parametrize("argv, content, beside, expected", [
    ([], {}, None, ("resnet101", (1024, 512), "the paper")),
    ([], {"conv1.weight": np.zeros((16, 3, 7, 7))}, [96, 64], ("small", (96, 64), "options.json")),
    ([], {"model": "small", "input_size": "64,48"}, [96, 64], ("small", (64, 48), "the checkpoint")),
    (["--model", "resnet101", "--input-size", "80,40"], {"model": "small", "input_size": "64,48"}, [96, 64],
     ("resnet101", (80, 40), "--input-size")),
])  # fmt: skip
def test_an_evaluation_knows_the_run(tmp_path, argv, content, beside, expected):
    if beside:
        write_json(tmp_path / "options.json", {"input_size_target": beside})
    path = tmp_path / "GTA5_1.ckpt"
    args = CLAN_evaluate_city.get_arguments(["--restore-from", str(path), *argv])
    found, line = CLAN_evaluate_city.with_run(args, path, content)
    assert (found.model, found.input_size) == expected[:2] and line.endswith(f"{expected[2]})")
    assert args.input_size is None or argv  # the given options are not changed


@pytest.mark.parametrize("content, beside", [
    ({"input_size": "abc"}, None), ({"input_size": 5}, None), ({}, [0, 0]), ({}, 64), ({}, [64, 48, 3]),
])  # fmt: skip
def test_a_damaged_input_size_is_told(tmp_path, content, beside):
    write_json(tmp_path / "options.json", {"input_size_target": beside})
    path = tmp_path / "GTA5_1.ckpt"
    args = CLAN_evaluate_city.get_arguments(["--restore-from", str(path)])
    with pytest.raises(UserError, match=f"{path}: the input size in .* is damaged; give --input-size W,H"):
        CLAN_evaluate_city.with_run(args, path, content)


def test_a_checkpoint_alone_knows_its_run(trained, data, tmp_path):
    path, city = folder_of(tmp_path, trained, 1) / "GTA5_1.ckpt", ["--data-dir", data / "City"]
    argv = ["--restore-from", path, *city, "--save-path", tmp_path / "result", *EAGER, *CPU]
    line = f"{path}: network small (from the checkpoint), input size 64,48 (from the checkpoint)\n"
    assert line in run(EVALUATE, *argv).stdout
    result = read_json(tmp_path / "result" / "result.json")
    assert (result["model"], result["input_size"], result["scales"]) == ("small", [64, 48], [1.0])
    assert f"{path}: " in (message := fails(EVALUATE, *argv, "--model", "resnet101"))
    assert message.endswith("; add --model small\n")


def test_checkpoints_of_other_sizes_are_skipped(trained, argv, scored, tmp_path):
    source, result = folder_of(tmp_path, trained, 1), tmp_path / "result"
    content = checkpoint.read(str(trained / "GTA5_2.ckpt")) | {"input_size": "96,64"}
    texts = {name: value for name, value in content.items() if isinstance(value, str)}
    tensors = [{"name": name, "data": Tensor(content[name])} for name in content.keys() - texts]
    mindspore.save_checkpoint(tensors, str(source / "GTA5_2.ckpt"), append_dict=texts, crc_check=True)
    command = [EVALUATE, "--restore-from", source, *argv, "--save-path", result]
    output, sizes = run(*command).stdout, [("GTA5_2", "96,64"), ("GTA5_1", "64,48")]
    first, second = (f"{source}/{name}.ckpt: network small (from the checkpoint), input size {size}"
                     for name, size in sizes)  # fmt: skip
    assert f"skipped {first} (from the checkpoint), but {second}" in output
    run(*command, "--input-size", "64,48")
    assert rows_of(result / "miou.csv") == rows_of(scored[0] / "miou.csv")[:2]


def upsampled(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return (C, h, w) at size (H, W): bilinear with aligned corners, as two matrix products."""
    for axis, N in enumerate(size, 1):
        n = x.shape[axis]
        at = np.linspace(0, n - 1, N)[:, None] - np.arange(n)
        x = np.moveaxis(np.tensordot(np.maximum(1 - abs(at), 0), x, (1, axis)), 0, axis)
    return x


def test_scales_and_flip_average_probabilities(trained, data, compiled, monkeypatch):
    """NumPy averages the probabilities at the label's size. Each scale is compiled once."""
    monkeypatch.setattr(evaluation, "STRIP", 40)  # of 102 rows
    net_G, city, found = network(trained), cityscapesDataSet(data / "City", "val", None, (64, 48), True), []
    evaluate(net_G, city, each=lambda *args: found.append(args[1:]), scales=(1.0, 0.75), flip=True)
    assert compiled == [net_G, net_G]
    for path, (label, trainIds, logits) in zip(city.images, found, strict=True):
        total = 0
        for scale, step in ((1, 1), (1, -1), (0.75, 1), (0.75, -1)):
            x = np.ascontiguousarray(to_input(open_image(path), (64, 48), scale)[:, :, ::step])
            e = np.exp(upsampled(sum(c.asnumpy()[0] for c in net_G(Tensor(x[None]))), label.shape))
            total = total + (e / e.sum(0))[:, :, ::step]
        assert (total.argmax(0) == trainIds).mean() > 0.999
        assert (best_class(logits, label.shape).asnumpy()[0] != trainIds).mean() > 0.001


def test_flip_of_a_mirrored_image_is_the_mirrored_result(trained, data):
    net_G, city = network(trained), cityscapesDataSet(data / "City", "val", None, (64, 48), True)
    items, mirrored = [read_views(city, i, flip=True) for i in range(3)], []
    for i, inputs, label in items:
        mirrored.append((i, inputs[::-1], label[:, ::-1]))
    results = [[trainIds for _, _, trainIds, _ in predictions(net_G, iter(group), 3, "sum", 2, True)]
               for group in (items, mirrored)]  # fmt: skip
    assert all(np.array_equal(a, b[:, ::-1]) for a, b in zip(*results, strict=True))
    assert np.array_equal(items[0][1][1], items[0][1][0][:, :, ::-1])


def test_views_are_refused_for_large_images(data, monkeypatch):
    city = cityscapesDataSet(data / "City", "val", None, (64, 48), True)
    monkeypatch.setattr(evaluation, "AVERAGED_PIXELS", 204 * 102 - 1)
    assert len(read_views(city, 0)[1]) == 1
    for scales, flip in (((1.0, 0.75), False), ((1.0,), True)):
        with pytest.raises(UserError, match="204 x 102 pixels are too many for --scales and --flip"):
            read_views(city, 0, scales, flip)


def test_results_say_that_they_are_averages(trained, argv, scored, data, tmp_path):
    """Predictions of own images are those of --save."""
    views, images = ["--scales", "0.75,1", "--flip", *EAGER], data / "City" / "leftImg8bit" / "val" / "aachen"
    command = [EVALUATE, "--restore-from", folder_of(tmp_path, trained, 1), "--save-path", tmp_path / "r"]
    assert "predictions are means over scales 1 0.75, flip yes\n" in run(*command, *argv, *views).stdout
    (row,), result = rows_of(tmp_path / "r" / "miou.csv"), read_json(tmp_path / "r" / "GTA5_1.json")
    assert (row.pop("scales"), row.pop("flip")) == ("1 0.75", "yes")
    assert row != rows_of(scored[0] / "miou.csv")[0]
    assert result["scales"] == [1.0, 0.75] and result["flip"]
    command[2] = trained / "GTA5_1.ckpt"
    run(*command, *argv, *views, "--save", "--panels", 1)
    assert read_json(tmp_path / "r" / "result.json")["mIoU"] == result["mIoU"]
    run(*command, *CPU, *views, "--predict", images)
    for path in (tmp_path / "r" / "labelIds").iterdir():
        assert np.array_equal(pixels_of(path), pixels_of(tmp_path / "r" / "predict" / "labelIds" / path.name))


def folder_of(tmp_path, trained, *steps):
    """Return a new folder with copies of some of the checkpoints."""
    (tmp_path / "source").mkdir()
    for n in steps:
        shutil.copy(trained / f"GTA5_{n}.ckpt", tmp_path / "source")
    return tmp_path / "source"


def test_results_depend_on_the_images_of_adapt_bn(trained, argv):
    words = ["--restore-from", trained, *argv, "--adapt-bn", 2]
    args = CLAN_evaluate_city.get_arguments([*map(str, words), "--input-size", "64,48"])
    val, train = CLAN_evaluate_city.images_of(args)
    before = CLAN_evaluate_city.settings_of(args, val, train)
    for i, same in ((1, True), (2, False)):  # of three images the first and the last are used
        os.utime(train.images[i])
        assert (CLAN_evaluate_city.settings_of(args, val, train) == before) == same


def test_damaged_checkpoints_are_skipped(trained, argv, scored, tmp_path):
    """If a step has a .ckpt and a .pth, the .ckpt is taken; unnumbered files are not."""
    source, rows = folder_of(tmp_path, trained, 3), rows_of(scored[0] / "miou.csv")
    (source / "GTA5_20.ckpt").write_bytes((trained / "GTA5_2.ckpt").read_bytes()[:-100])
    shutil.copy(trained / "GTA5_1.ckpt", source / "GTA5_30.pth")
    for name in ("GTA5_3.pth", "GTA5_30_D.pth", "GTA5_best.ckpt", "GTA5_7.ckpt.part"):
        (source / name).write_bytes(b"nothing")
    output = run(EVALUATE, "--restore-from", source, *argv, "--save-path", tmp_path / "result").stdout
    assert f"skipped {source / 'GTA5_20.ckpt'}: not a readable" in output and output.count("skipped") == 1
    assert rows_of(tmp_path / "result" / "miou.csv") == [rows[2], {**rows[0], "step": "30"}]
    command = [EVALUATE, "--restore-from", tmp_path / "result", *argv, "--save-path", tmp_path / "other"]
    assert f"{tmp_path / 'result'}: no checkpoint GTA5_<steps>.ckpt" in fails(*command)
    (tmp_path / "result" / "GTA5_5.ckpt").write_bytes(b"nothing")
    assert "none of its 1 checkpoints can be read" in fails(*command)


def test_label_sizes_do_not_compile_the_network_again(tmp_path, compiled):
    """Ten images with labels of five sizes take one compilation; each prediction has its label's size."""
    sizes = [(204, 102), (200, 100), (190, 102), (96, 204), (70, 60)]
    for i in range(10):
        write_city(tmp_path, "val", {f"{i:06d}": i}, sizes[i % 5])
    mindspore.set_context(mode=mindspore.GRAPH_MODE, jit_config={"jit_level": "O0"})
    net_G, shapes = generator("small"), []
    data = cityscapesDataSet(tmp_path, "val", size=(64, 48), labels=True)
    confusion = evaluate(net_G, data, each=lambda i, label, trainIds, _: shapes.append(trainIds.shape[::-1]))
    assert shapes == sizes * 2 and confusion.sum() == sum((data[i][1] != 255).sum() for i in range(10))
    assert compiled == [net_G] and not net_G.training
    assert (evaluate(net_G, data, batch_size=5) == confusion).all()


def statistics_of(net_G) -> np.ndarray:
    """Return all running means and variances of batch norm."""
    return np.concatenate([p.asnumpy() for p in net_G.get_parameters() if ".moving_" in p.name])


def test_every_image_counts_alike_in_batch_statistics(trained, data, monkeypatch):
    """Five images in batches of two; then shared by four processes, of which the last has none."""
    net_G, city = network(trained), cityscapesDataSet(data / "City", "train", size=(64, 48))
    five = [city[i] for i in (0, 1, 1, 2, 0)]
    batch = {}
    for chosen in ((0, 1), (1, 2), (0,)):
        adapt_bn(net_G, [city[i] for i in chosen], 9, 2)
        batch[chosen] = statistics_of(net_G)
    net_G.set_train(True)
    adapt_bn(net_G, five, 9, 2)
    assert net_G.training  # as it was before
    net_G.set_train(False)
    expected = (2 * batch[0, 1] + 2 * batch[1, 2] + batch[0,]) / 5
    assert np.allclose(statistics_of(net_G), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(sum(batch.values()) / 3, expected, rtol=1e-2)

    sums = []  # of each process
    monkeypatch.setattr(parallel, "processes", lambda: 4)
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda values: sums.append(values) or values)
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        adapt_bn(net_G, five, 9, 2)
    assert len(sums) == 4 and not sums[3].any() and not net_G.training
    assert np.allclose(sum(sums) / 5, expected, rtol=1e-5, atol=1e-5)


def test_processes_leave_for_a_signal_together(monkeypatch):
    """A process that left alone would block the others. Of five images the first process has three."""
    asked = []
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda values: asked.append(values) or values)
    for i in (0, 2, 4):
        parallel.exit_if_signalled(i, 5)
    assert len(asked) == 2  # as in the process with images 1 and 3
    monkeypatch.setattr(interrupt, "pending_signal", lambda: None)
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda values: values + 1)  # a signal in another process
    with pytest.raises(SystemExit, match="143"):
        parallel.exit_if_signalled(0, 5)


@pytest.mark.parametrize("differs", ["val", "train"])
def test_processes_that_see_different_images_end(trained, argv, data, tmp_path, monkeypatch, differs):
    other = names_crc32(cityscapesDataSet(data / "City", differs))
    monkeypatch.setattr(parallel, "all_equal", lambda number: number != other)
    monkeypatch.setattr(device, "setup", lambda _: None)  # other tests have chosen it
    command = ["--restore-from", trained / "GTA5_1.ckpt", *argv, "--adapt-bn", 2, "--save-path", tmp_path]
    with pytest.raises(UserError, match="the processes see different images"):
        CLAN_evaluate_city.main(CLAN_evaluate_city.get_arguments(list(map(str, command))))


@pytest.mark.slow
def test_two_processes_evaluate_a_folder_and_predict(trained, argv, scored, saved, data, tmp_path):
    """The results are those of one process; rank 0 alone reads earlier results and prints."""
    result, rows = tmp_path / "result", rows_of(scored[0] / "miou.csv")
    source = folder_of(tmp_path, trained, 1)
    command = [EVALUATE, "--restore-from", source, *argv, "--save-path", result]
    run(*command)
    (source / "GTA5_2.ckpt").write_bytes(b"damaged")
    shutil.copy(trained / "GTA5_3.ckpt", source)
    output, other = run_parallel(tmp_path / "logs", 2, *command)
    assert "1 of them evaluated already" in output and "best: " in output
    assert "GTA5_1.ckpt: mIoU" not in output
    assert output.count("skipped") == 1
    assert rows_of(result / "miou.csv") == [rows[0], rows[2]]

    command[2], images = source / "GTA5_1.pth", data / "City" / "leftImg8bit" / "val" / "aachen"
    own = [*command[:3], *CPU, "--save-path", result, "--predict", images]
    output, another = run_parallel(tmp_path / "predict", 2, *own)
    assert f"{source / 'GTA5_1.ckpt'} -> G" in output
    assert all(line.startswith("[INFO]") for line in (other + another).splitlines())  # MindSpore's own
    for path in (saved / "labelIds").iterdir():
        assert np.array_equal(pixels_of(path), pixels_of(result / "predict" / "labelIds" / path.name))
    more = ["--adapt-bn", 3, "--batch-size", 2]
    run_parallel(tmp_path / "adapt", 2, *command, *more)
    run(*command, *more, "--save-path", tmp_path / "one")
    one, two = (read_json(folder / "result.json")["IoU"] for folder in (result, tmp_path / "one"))
    assert one == pytest.approx(two, abs=0.05)  # a sum over processes is rounded differently


def test_panels_show_what_was_predicted(trained, saved, data):
    """The test computes every cell from the files and the network."""
    city = cityscapesDataSet(data / "City", "val", size=(64, 48), labels=True)
    paths = sorted((saved / "panels").iterdir())
    assert [path.name for path in paths] == [f"{city.names[i]}_panel.png" for i in (0, 2)]
    net_G, seen = network(trained), set()
    for i, path in zip((0, 2), paths):
        figure = pixels_of(path).astype(int)
        assert figure.shape == (67 + 246 + 220, 6 + 5 * 486 + 186, 3)
        cells = [figure[67:307, x : x + 480] for x in range(6, 2436, 486)]
        x, truth = city[i]
        prediction = LABEL_TO_TRAIN[pixels_of(saved / "labelIds" / f"{city.names[i]}_labelIds.png")]
        seen |= set(np.unique(prediction))
        error = np.where((prediction == truth)[..., None], ERRORS["correct"], ERRORS["wrong"])
        error[truth == 255] = ERRORS["ignored"]
        for cell, pixels in zip(cells[1:4], (colourise(prediction), colourise(truth), error)):
            image = Image.fromarray(pixels.astype(np.uint8))
            assert np.array_equal(cell, np.asarray(image.resize((480, 240), Image.Resampling.NEAREST)))
        assert abs(cells[0].mean((0, 1)) - pixels_of(city.images[i]).mean((0, 1))).max() < 2
        M = alignment_map(*(up(c, (240, 480)) for c in net_G(Tensor(x[None])))).asnumpy()[0, 0]
        assert abs(cells[4] - heatmap(M / np.quantile(M, 0.995)).astype(int)).max() <= 2
        legend = {tuple(colour) for colour in figure[313:].reshape(-1, 3)}
        assert legend >= {*CLASSES.values(), *ERRORS.values()}
    assert {tuple(colour) for colour in pixels_of(saved / "legend.png").reshape(-1, 3)} >= {*CLASSES.values()}
    assert len(seen) > 2


def test_own_images_of_any_size(trained, saved, data, tmp_path):
    """Label maps equal those of --save, at the images' sizes; two files of one name keep both results.

    Phones store portraits rotated, with an EXIF orientation: the results are upright.
    """
    source, result = tmp_path / "images", tmp_path / "images" / "result"
    city, exif = sorted((data / "City" / "leftImg8bit" / "val" / "aachen").iterdir()), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (source / "a" / "b").mkdir(parents=True)
    shutil.copy(city[0], source / "a" / "b" / "street.png")
    with Image.open(city[0]) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(source / "a" / "lying.png", exif=exif)
        image.save(source / "damaged.png", exif=b"Exif\0\0no TIFF at all")
        image.resize((131, 77)).save(source / "wide.JPG")
        image.resize((1, 1)).save(source / "dot.png")
    command = [EVALUATE, "--restore-from", trained / "GTA5_1.ckpt", *CPU, "--save-path", result]
    command += ["--predict", source]
    assert "5 images, written" in run(*command).stdout
    folder = result / "predict"
    maps = {str(path.relative_to(folder / "labelIds"))[: -len("_labelIds.png")]: pixels_of(path)
            for path in (folder / "labelIds").rglob("*.png")}  # fmt: skip
    expected = pixels_of(saved / "labelIds" / f"{city[0].stem}_labelIds.png")
    assert len(np.unique(expected)) > 1
    for name in ("a/b/street", "a/lying", "damaged"):
        assert np.array_equal(maps.pop(name), expected)
    assert {name: ids.shape[::-1] for name, ids in maps.items()} == {"wide": (131, 77), "dot": (1, 1)}
    for image, name, ids in ((source / "wide.JPG", "wide", maps["wide"]), (city[0], "a/lying", expected)):
        mean = (pixels_of(image).astype(int) + colourise(LABEL_TO_TRAIN[ids])) // 2
        assert np.array_equal(pixels_of(folder / "overlay" / f"{name}_overlay.png"), mean)

    shutil.copy(source / "wide.JPG", source / "wide.jpg")
    assert "earlier results are now" in (output := run(*command, "--batch-size", 3).stdout)
    assert "6 images, written" in output and (result / "predict_1").is_dir()
    names = {path.name for path in (folder / "color").glob("w*.png")}
    assert names == {"wide.JPG_color.png", "wide.jpg_color.png"}


def test_images_that_cannot_be_predicted(trained, tmp_path):
    """The others are predicted, and the exit code is 2."""
    command = [EVALUATE, "--restore-from", trained / "GTA5_1.ckpt", *CPU, "--save-path", tmp_path / "r"]
    assert "--predict nowhere: no such file or folder" in fails(*command, "--predict", "nowhere")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("after", "before"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{name}.png")
    Image.new("CMYK", (30, 20)).save(tmp_path / "before_too.jpg")
    done = run(*command, "--predict", tmp_path, "--batch-size", 2, code=2)
    assert f"skipped {tmp_path / 'broken.png'}: not a readable image" in done.stdout
    assert f"skipped {tmp_path / 'before_too.jpg'}: an image of mode CMYK" in done.stdout
    assert "2 images, written" in done.stdout
    assert "2 of 4 images could not be read and were skipped: before_too, broken" in done.stderr
    names = {path.name for path in (tmp_path / "r" / "predict" / "color").iterdir()}
    assert names == {"after_color.png", "before_color.png"}
    (tmp_path / f"{'n' * 240}.png").write_bytes((tmp_path / "after.png").read_bytes())
    message = fails(*command, "--predict", tmp_path)
    assert f"{'n' * 240}: too long for the names of its results; give the image a shorter name" in message
    assert not (tmp_path / "r" / "predict_1").exists()  # nothing is renamed


@pytest.mark.parametrize("script", [CLAN_evaluate_city, ccd])
def test_a_folder_of_results_is_for_one_process(trained, data, tmp_path, monkeypatch, script):
    """Two at once would overwrite each other's results."""
    path, folder = trained / "GTA5_1.ckpt", tmp_path / "result"
    command = ["--restore-from", path, "--data-dir", data / "City"]
    if script is ccd:
        command = ["--restore-from", path, path]
        command += ["--data-dir", data / "GTA5", "--data-dir-target", data / "City"]
    lock = run_folder.lock_run_dir(folder)
    monkeypatch.setattr(device, "setup", lambda *_: "CPU")  # other tests have chosen it
    monkeypatch.setattr("sys.argv", ["script", *map(str, (*command, "--save-path", folder))])
    with pytest.raises(UserError, match="result: another .* there; wait for it, or choose .* --save-path"):
        script.main(script.get_arguments())
    assert not any(folder.iterdir())
    os.close(lock)


@pytest.mark.slow
def test_an_exported_network_predicts_the_same(trained, argv, data, tmp_path):
    folder = tmp_path / "a b+c=数据"  # a path that mindspore.export refuses
    command = [EVALUATE, "--restore-from", trained / "GTA5_1.ckpt", *CPU, "--save-path", folder]
    assert "input: (1, 3, 48, 64) float32" in run(*command, "--export", "mindir").stdout
    again = run(*command, "--export", "mindir", "--adapt-bn", 3, *argv[:2]).stdout
    assert "re-estimated on 3" in again and "earlier results are now" in again
    paths = sorted(folder.rename(tmp_path / "plain").iterdir())
    assert [path.name for path in paths] == ["CLAN_small_64x48.mindir", "CLAN_small_64x48_1.mindir"]
    adapted, first = (nn.GraphCell(mindspore.load(str(path))) for path in paths)
    # MindSpore's own pooling with ceil_mode runs on the slow AI CPU of an NPU.
    assert b"MaxPool3D" not in paths[0].read_bytes()
    net_G, differs = network(trained), False
    for path in sorted((data / "City" / "leftImg8bit" / "val" / "aachen").iterdir()):
        x = Tensor(to_input(open_image(path), (64, 48))[None])
        trainIds, expected = first(x), best_class(net_G(x), (48, 64))
        assert trainIds.dtype == mindspore.int32 and trainIds.shape == (1, 48, 64)
        assert (trainIds.asnumpy() == expected.asnumpy()).all() and len(np.unique(trainIds.asnumpy())) > 1
        differs |= bool((adapted(x).asnumpy() != trainIds.asnumpy()).any())
    assert differs


@pytest.mark.parametrize("source, more, message", [  # source: a checkpoint of the run, or its folder
    ("GTA5_1.ckpt", ["--save", "--predict", "x.png"], "--save and --predict are two tasks"),
    ("GTA5_1.ckpt", ["--predict", "x.png", "--export", "mindir"], "--predict and --export are two tasks"),
    ("GTA5_1.ckpt", ["--panels", 3], "--panels has no effect without --save"),
    ("GTA5_1.ckpt", ["--predict", "x.png", "--set", "test"], "--set has no effect with --predict"),
    ("GTA5_1.ckpt", ["--predict", "x.png"], "--data-dir has no effect with --predict without --adapt-bn"),
    ("GTA5_1.ckpt", ["--predict", ""], "--predict is empty: give it a value"),
    ("GTA5_1.ckpt", ["--predict", "a.png", "b.png"], "unexpected b.png: it belongs to no option"),
    ("GTA5_1.ckpt", ["—predict", "a.png"], "unknown option —predict, did you mean --predict?"),
    ("GTA5_1.ckpt", ["--lr", 1], "unknown option --lr (--help"),  # nothing of ours is meant
    (".", ["--export", "mindir"], "--export takes one checkpoint"),
    ("GTA5_1.ckpt", ["--export", "mindir", "--adapt-bn", 2, "--flip"], "--flip has no effect with --export"),
    ("GTA5_1.ckpt", ["--scales", "1,x"], "'x' is not a number"),
    ("GTA5_1.ckpt", ["--scales", "1,0.5,1.0"], "'1,0.5,1.0' has a scale twice"),
    ("GTA5_1.ckpt", ["--scales", "0.5"], "--scales 0.5: makes inputs of 32x24"),
    (".", ["--save-path", "."], "is the folder of a training"),  # which has a miou.csv of its own
])
def test_contradicting_options_are_refused(trained, argv, source, more, message):
    assert message in fails(EVALUATE, "--restore-from", source, *argv, *more, cwd=trained)


def test_export_is_for_one_process(trained, monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")  # as msrun does
    message = fails(EVALUATE, "--restore-from", trained / "GTA5_1.ckpt", *CPU, "--export", "mindir")
    assert "--export is for one process" in message
