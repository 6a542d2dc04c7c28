"""SYNTHIA as the source, and GTA5's own split, on small files made here."""

import json
import shutil

import numpy as np
import png
import pytest
from PIL import Image
from scipy.io import savemat

from dataset.classes import CLASS_NAMES, CLASS_SETS
from dataset.gta5_dataset import GTA5DataSet
from dataset.labels import check_labels
from dataset.pipeline import batches
from dataset.synthia_dataset import SYNTHIA_TO_LABEL, SYNTHIADataSet
from dataset.transform import LABEL_TO_TRAIN, open_image, to_input
from options.train_options import get_arguments
from tests.golden import synthetic_image, write_gta5
from tests.scripts import EAGER, EVALUATE, ROOT, TRAIN, fails, python, refused, rows_of, run, train_words
from utils import checkpoint
from utils.system.errors import UserError

NAMES = ("0000000.png", "0000001.png", "0000002.png")
SYNTHIA_IDS = {  # of the data set's own list of classes
    "road": 3, "sidewalk": 4, "building": 2, "wall": 21, "fence": 5, "pole": 7, "light": 15, "sign": 9,
    "vegetation": 6, "terrain": 16, "sky": 1, "person": 10, "rider": 17, "car": 8, "truck": 18, "bus": 19,
    "train": 20, "motorcycle": 12, "bicycle": 11,
}  # fmt: skip
RARE = ("terrain", "truck", "train")


def write_synthia(root, size=(128, 76)):
    """A tree as SYNTHIA-RAND-CITYSCAPES has it: labels of 16-bit RGB, classes and instances. Its root."""
    (root / "RGB").mkdir(parents=True)
    (root / "GT" / "LABELS").mkdir(parents=True)
    ids_of = np.zeros(256, np.uint16)
    for train_id, name in enumerate(CLASS_NAMES):
        ids_of[LABEL_TO_TRAIN == train_id] = SYNTHIA_IDS[name]
    for k, name in enumerate(NAMES):
        rgb, raw = synthetic_image(k + 1, *size)
        Image.fromarray(rgb).save(root / "RGB" / name)
        instances = np.random.default_rng(k).integers(0, 2**16, raw.shape, np.uint16)
        write_label(root / "GT" / "LABELS" / name, ids_of[raw], instances)
    return root


def write_label(path, ids, instances):
    pixels = np.stack([ids, instances, np.zeros_like(ids)], -1).astype(np.uint16)
    png.from_array(pixels.reshape(len(ids), -1), "RGB;16").save(path)


@pytest.fixture
def synthia(tmp_path):
    return write_synthia(tmp_path / "SYNTHIA")


def test_synthia_table_has_the_classes_of_cityscapes():
    expected = {SYNTHIA_IDS[name]: train_id for train_id, name in enumerate(CLASS_NAMES)}
    assert all(LABEL_TO_TRAIN[SYNTHIA_TO_LABEL[i]] == expected.get(i, 255) for i in range(2**16))
    assert [CLASS_NAMES[i] for i in range(19) if i not in CLASS_SETS[16]] == list(RARE)
    assert {CLASS_NAMES[i] for i in {*CLASS_SETS[16]} - {*CLASS_SETS[13]}} == {"wall", "fence", "pole"}
    assert [len(CLASS_SETS[n]) for n in (19, 16, 13)] == [19, 16, 13]


def test_synthia_image_and_label(synthia):
    data = SYNTHIADataSet(synthia, size=(64, 38))
    assert [path.name for path in data.images] == list(NAMES) and check_labels(data) == ()
    x, y = data[1]
    assert np.array_equal(x, to_input(open_image(synthia / "RGB" / NAMES[1]), (64, 38)))
    trainIds = LABEL_TO_TRAIN[synthetic_image(2, 128, 76)[1]]
    nearest = Image.fromarray(trainIds).resize((64, 38), Image.Resampling.NEAREST)
    assert y.dtype == np.int32 and np.array_equal(y, np.asarray(nearest)) and len(np.unique(y)) > 10


def test_synthia_errors_name_the_file(synthia):
    with pytest.raises(UserError, match="SYNTHIA not found.*RGB.*LABELS.*--data-dir"):
        SYNTHIADataSet("nowhere")
    data = SYNTHIADataSet(synthia, size=(64, 38))
    folder = synthia / "GT" / "LABELS"
    (folder / NAMES[1]).write_bytes((folder / NAMES[1]).read_bytes()[:-800])
    with pytest.raises(UserError, match="LABELS/0000001.png: not a readable image"):
        list(batches(data, 1, 2, [2, 1]))
    with Image.open(folder / NAMES[0]) as image:  # 8 bits, as Pillow would save it again
        image.convert("RGB").save(folder / NAMES[0])
    with pytest.raises(UserError, match="0000000.png: not a label of SYNTHIA; expected 16-bit RGB"):
        data[0]
    (folder / NAMES[2]).unlink()
    with pytest.raises(UserError, match="1 of 3 label files are missing: .*0000002.png"):
        SYNTHIADataSet(synthia)


def test_the_source_sets_defaults_and_explicit_options_win():
    def values(argv: str):
        args = get_arguments(argv.split())
        return args.data_dir, args.input_size, args.lambda_local

    assert values("") == ("./data/GTA5", (1280, 720), 40)
    assert values("--source synthia --method tan --data-dir x") == ("x", (1280, 760), 10)
    explicit = "--source synthia --lambda-local 40 --input-size 640,380"
    assert values(explicit) == ("./data/SYNTHIA", (640, 380), 40)


@pytest.mark.parametrize("argv, named", [
    ("--source synthia --gta5-split a.mat --gta5-subset val", "--source synthia"),
    ("--gta5-split a.mat --gta5-subset val --data-list b.txt", "--data-list"),
    ("--gta5-subset train", "--gta5-subset train needs --gta5-split"),
    ("--gta5-split a.mat", "--gta5-split has no effect with --gta5-subset all"),
    ("--source synthia --method tan --lambda-local 40", "--lambda-local has no effect"),
])
def test_contradictions_about_the_source_are_told(argv, named):
    assert named in refused(*argv.split())


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Four steps from SYNTHIA with two validations: folder, and what was printed."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    argv = train_words(data, folder, "--num-steps", 4, "--save-pred-every", 2, "--method", "source", *EAGER)
    root = write_synthia(folder.parent / "SYNTHIA")
    return folder, run(TRAIN, *argv, "--source", "synthia", "--data-dir", root)


def test_training_from_synthia_selects_by_16_classes(trained):
    folder, done = trained
    scores = rows_of(folder / "miou.csv")
    assert list(scores[0]) == ["step", "mIoU_16", "mIoU_13", *CLASS_NAMES]
    assert [row["step"] for row in scores] == ["2", "4"]
    for row in scores:
        for classes in (16, 13):
            mean = float(row[f"mIoU_{classes}"])
            ious = [float(row[CLASS_NAMES[i]]) for i in CLASS_SETS[classes]]
            assert mean == pytest.approx(np.nanmean(ious), rel=1e-7)
            assert f"mIoU_{classes} {mean:.2f}" in done.stdout
    assert "--input-size 64,48 --classes 16 --device cpu\n" in done.stdout  # the command to evaluate it
    best = checkpoint.read(str(folder / "GTA5_best.ckpt"))
    assert float(best["best_mIoU"]) == pytest.approx(max(float(row["mIoU_16"]) for row in scores), rel=1e-6)
    options = json.loads((folder / "options.json").read_text())
    assert options["source"] == "synthia" and options["lambda_local"] == 10
    assert all(np.isfinite(float(row["loss_seg"])) for row in rows_of(folder / "loss.csv"))


def test_going_on_from_synthia_knows_the_source(trained, data, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    assert "--source gta5 contradicts" in refused("--continue-train", folder, "--source", "gta5")
    for name in ("GTA5_4.ckpt", "GTA5_best.ckpt"):
        (folder / name).unlink()
    run(TRAIN, "--continue-train", folder)
    assert (folder / "miou.csv").read_text() == (trained[0] / "miou.csv").read_text()


def test_evaluation_over_16_and_13_classes(trained, data, tmp_path):
    argv = ["--restore-from", trained[0] / "GTA5_4.ckpt", "--data-dir", data / "City", "--classes", 16]
    done = run(EVALUATE, *argv, "--input-size", "64,48", "--save-path", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    last = rows_of(trained[0] / "miou.csv")[-1]
    for name in ("mIoU_16", "mIoU_13"):
        assert result[name] == pytest.approx(float(last[name]), abs=1e-6)
    assert result["mIoU"] == pytest.approx(np.mean([v for v in result["IoU"].values() if v is not None]))
    printed = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert {*printed} & {"mIoU", "mIoU_13", *CLASS_NAMES} == {*CLASS_NAMES} - {*RARE}
    assert printed["mIoU_16"] == f"{result['mIoU_16']:.2f}" and list(result["IoU"]) == CLASS_NAMES
    assert "--classes" in fails(EVALUATE, *argv[:-1], 12)


def test_without_pyspng_one_line_says_what_to_install(synthia, data, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "pyspng.py").write_text("raise ImportError('hidden by the test')")
    argv = train_words(data, tmp_path / "run", "--source", "synthia", "--data-dir", synthia)
    done = python([ROOT / TRAIN, *argv], tmp_path, 2, PYTHONPATH=str(tmp_path / "hidden"))
    assert "pip install pyspng" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def gta5(tmp_path):
    return write_gta5(tmp_path / "GTA5", {f"{i:05d}": i for i in range(1, 6)}, (64, 36))


@pytest.mark.parametrize("kind, shape", [(np.uint16, (1, -1)), (float, (-1, 1))])
def test_gta5_split(gta5, tmp_path, kind, shape):
    path = str(tmp_path / "split")  # whatever its name ends in
    ids = {"trainIds": [5, 1], "valIds": [2], "testIds": [3, 4]}
    content = {key: np.array(value, kind).reshape(shape) for key, value in ids.items()}
    savemat(path, content, appendmat=False)
    assert GTA5DataSet(gta5, split=path, subset="train").names == ["00001", "00005"]
    assert GTA5DataSet(gta5, split=path, subset="val").names == ["00002"]


def test_gta5_split_errors_are_named(gta5, tmp_path):
    path = tmp_path / "a.mat"

    def message() -> str:
        with pytest.raises(UserError, match=r"a\.mat: cannot read the numbers [^\n]*$") as caught:
            GTA5DataSet(gta5, split=str(path), subset="train")
        return str(caught.value)

    assert "No such file" in message() and "it comes with GTA5" in message()
    savemat(path, {"trainIds": np.arange(1, 999)})
    for content in (b"this is no such file" * 20, path.read_bytes()[:300]):
        path.write_bytes(content)
        assert message()
    for name, wrong in (("valIds", [1]), ("trainIds", []), ("trainIds", ["a"])):
        savemat(path, {name: wrong})
        assert message()
    savemat(path, {"trainIds": [0, 1]})
    with pytest.raises(UserError, match="1 of 2 image files are missing: .*/00000.png"):
        GTA5DataSet(gta5, split=str(path), subset="train")


def test_training_on_a_subset_of_gta5(data, tmp_path):
    savemat(tmp_path / "split.mat", {"trainIds": [[1, 3, 4]], "valIds": [[2]], "testIds": [[9]]})
    argv = ["--gta5-split", tmp_path / "split.mat", "--gta5-subset", "train", "--not-val", "--num-steps", 1]
    done = run(TRAIN, *train_words(data, tmp_path / "run", "--method", "source", *argv, *EAGER))
    assert "3 source images" in done.stdout
