"""Readers against hostile files: a value or one line that names the file, soon, and in little memory."""

import io
import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import mindspore
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mindspore.train.checkpoint_pb2 import Checkpoint
from PIL import ExifTags, Image

from dataset.file_lists import list_images
from dataset.labels import open_label
from dataset.transform import LABEL_TO_TRAIN, open_image, to_input
from options.train_options import get_arguments
from tests.golden import synthetic_image
from utils import checkpoint, tables
from utils.system.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
# CLAN_FUZZ=5000 looks longer than every run of the tests does.
settings.register_profile("clan", max_examples=int(os.environ.get("CLAN_FUZZ", "150")), derandomize=True,
                          deadline=10_000,  # milliseconds, for one file
                          suppress_health_check=list(HealthCheck))
settings.load_profile("clan")


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Generate `data` with up to four spans, or all from somewhere on, replaced by other bytes or none."""
    for _ in range(draw(st.integers(1, 4))):
        at, span = draw(st.integers(0, len(data))), draw(st.integers(0, 64) | st.just(len(data)))
        data = data[:at] + draw(st.binary(max_size=16)) + data[at + span :]
    return data


def read_within_bounds(reader, path: Path, data: bytes, factor: int = 12):
    """Return reader(path) or its UserError; neither may take much more memory than the file has bytes."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        return reader(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < factor * len(data) + 2**22


def saved(folder: Path, crc_check: bool) -> bytes:
    values = {"net_G.a": np.ones((3, 4), np.float32), "net_G.b": np.float32(2), "n": np.arange(5)}
    entries = [{"name": name, "data": mindspore.Tensor(value)} for name, value in values.items()]
    path, about = folder / "saved.ckpt", {"model": "small", "step": 3, "best_mIoU": 0.5}
    mindspore.save_checkpoint(entries, str(path), append_dict=about, crc_check=crc_check)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["torch_zip.pth", "torch_legacy.pth", "no_checksum.ckpt", "safetensors"])
@given(st.data())
def test_damaged_checkpoints(tmp_path_factory, kind, draw):
    folder = tmp_path_factory.getbasetemp()
    if kind == "safetensors":
        data = safetensors.numpy.save({"a": np.ones((3, 4), np.float32), "b": np.arange(5)})
    else:
        data = saved(folder, crc_check=False) if kind.endswith("ckpt") else (FIXTURES / kind).read_bytes()
    path, data = folder / f"fuzz_{kind}", draw.draw(damaged(data))
    assert isinstance(read_within_bounds(checkpoint.read, path, data), dict | UserError)


def test_every_flipped_bit_of_a_ckpt_of_ours_is_noticed(tmp_path):
    """And every truncation; between two of its networks' entries, the rest is a file of networks alone."""
    data, path = saved(tmp_path, crc_check=True), tmp_path / "flipped.ckpt"
    assert len(checkpoint.read_ckpt(data)) == 6
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="flipped.ckpt: not a readable"):
            checkpoint.read(str(path))
    for end in range(len(data)):
        content = read_within_bounds(checkpoint.read, path, data[:end])
        assert isinstance(content, UserError) or content.keys() <= {"net_G.a", "net_G.b", "n", "no checksum"}


NAMES = st.sampled_from(("a", "b", "net_G.conv1.weight"))
DIMS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=10)
KINDS = st.sampled_from(("Float32", "Float16", "Bool", "str", "BFloat16", "", "object"))


@given(st.lists(st.tuples(NAMES, DIMS, KINDS, st.binary(max_size=64)), max_size=4))
@example([("a", [10**6, 10**6], "Float32", b"")])
@example([("a", [2**32, 2**32], "Float32", b"")])
@example([("a", [-1, -4], "Float32", bytes(16))])
@example([("a", [0], "str", b"\xff" * 8)])
def test_a_ckpt_that_lies_about_its_tensors(tmp_path_factory, entries):
    message = Checkpoint()
    for tag, dims, kind, content in entries:
        value = message.value.add()
        value.tag, value.tensor.tensor_type, value.tensor.tensor_content = tag, kind, content
        value.tensor.dims.extend(dims)
    path = tmp_path_factory.getbasetemp() / "lies.ckpt"
    read_within_bounds(checkpoint.read, path, message.SerializeToString())


def png(width: int, height: int, depth: int, colour: int, interlace: int, raw: bytes) -> bytes:
    """A PNG whose checksums are right, whatever its header and content say."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    data = b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + header, b"PLTE" + bytes(48), b"IDAT" + zlib.compress(raw), b"IEND"):
        data += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data


def read_photograph(path: Path) -> np.ndarray:
    x = to_input(open_image(path, upright=True), (16, 8))
    assert x.shape == (3, 8, 16) and x.dtype == np.float32
    return x


def read_label(path: Path) -> np.ndarray:
    y = LABEL_TO_TRAIN[np.asarray(open_label(path))]
    assert y.ndim == 2 and set(np.unique(y)) <= {*range(19), 255}
    return y


READERS = pytest.mark.parametrize("reader", [read_photograph, read_label])
SIDES, DEPTHS = st.integers(0, 40) | st.integers(0, 2**32 - 1), st.sampled_from((1, 2, 4, 8, 16, 0, 3))
COLOURS, LACES = st.sampled_from((0, 2, 3, 4, 6, 1)), st.sampled_from((0, 1, 2))


@READERS
@given(st.builds(png, SIDES, SIDES, DEPTHS, COLOURS, LACES, st.binary(max_size=200)))
@example(png(60_000, 60_000, 8, 2, 0, b""))
def test_png_files_with_any_header(tmp_path_factory, reader, data):
    read_within_bounds(reader, tmp_path_factory.getbasetemp() / "any.png", data)


@READERS
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@given(st.data())
def test_damaged_images(tmp_path_factory, reader, kind, draw):
    file, (rgb, ids), exif = io.BytesIO(), synthetic_image(1, 40, 30), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(ids if reader is read_label else rgb).save(file, kind, exif=exif)
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    read_within_bounds(reader, path, draw.draw(damaged(file.getvalue())))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "EPS", "PDF"])
def test_other_kinds_of_files_are_refused(tmp_path, kind):
    path = tmp_path / "00001.png"
    Image.new("RGB", (8, 8)).save(path, kind)
    with pytest.raises(UserError, match="00001.png: not a readable image"):
        open_image(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="00001.png: no such file"):
        open_image(path)


@given(st.binary(max_size=200))
def test_any_list_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "list.txt"
    read_within_bounds(lambda p: list_images(p, str(p)), path, data)


@example(b"step,mIoU\n1,1.2.3\n2,4.5\n3,6.7")
@given(st.binary(max_size=300) | st.text("0123456789,.\nmIoUe-\"\0", max_size=300).map(str.encode))
def test_any_table(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "loss.csv"
    for row in read_within_bounds(lambda p: tables.read(p)[1], path, data):
        assert int(row[0]) < 10**9 and [float(value) for value in row]


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANY = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=5), SCALAR, max_size=3)


@given(st.dictionaries(st.sampled_from(sorted(vars(get_arguments([])))), ANY, max_size=4).map(
    lambda options: json.dumps({"processes": 1, "names_crc32": {}, **options})))  # fmt: skip
@example('{"batch_size": -3, "processes": 1, "names_crc32": {}}')
@example('{"batch_size": 2}')
@example("[" * 100_000)
@example("[]")
def test_any_options_of_a_run(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "options"
    folder.mkdir(exist_ok=True)
    (folder / "options.json").write_text(text)
    try:
        args = get_arguments(["--continue-train", str(folder)])
    except SystemExit as end:
        assert end.code == 2
    else:
        assert args.batch_size >= 1 and args.learning_rate > 0
