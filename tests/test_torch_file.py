"""PyTorch checkpoints that are read without PyTorch: real ones, hand-written ones and hostile ones.

fixtures/torch_zip.pth and torch_legacy.pth hold the same object, written once with PyTorch by the script
fixtures/make_torch_fixtures.py; the expected arrays are computed here. Hostile files are assembled from
single pickle opcodes; test_fuzz.py damages real ones.
"""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from utils.system.errors import UserError
from utils.torch_file import MAGIC, load

FIXTURES = Path(__file__).parent / "fixtures"
REAL = [FIXTURES / "torch_zip.pth", FIXTURES / "torch_legacy.pth"]
ITEMS = np.arange(4, dtype="<f4").tobytes()
BASE = np.arange(24, dtype=np.float32)
EXPECTED = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / np.float32(7),
    "float16": np.arange(5, dtype=np.float16) / np.float16(8) - np.float16(0.25),
    "bfloat16": np.arange(-4, 4, dtype=np.float32) / 4,
    "float64": np.arange(3, dtype=np.float64) / 3,
    "int64": np.arange(4, dtype=np.int64) - 2**40,
    "int32": np.arange(4, dtype=np.int32) - np.int32(2),
    "uint8": np.arange(250, 256).astype(np.uint8),
    "bool": np.arange(4) % 2 == 1,
    "transposed": np.arange(12, dtype=np.int64).reshape(3, 4).T,
    "shared_head": BASE[:8].reshape(2, 4),
    "shared_tail": BASE[4:].reshape(4, 5),
    "shared_strided": BASE[1::3],
    "expanded": np.full((2, 3), 1.5, np.float32),
    "parameter": np.arange(3, dtype=np.float32),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.empty((0, 3), np.float32),
}


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def lit(value):
    """Return the opcodes of a plain value."""
    return pickle.dumps(value, 2)[2:-1]


ODICT = name("collections", "OrderedDict") + b")R"


def pid(key="0", numel=4, kind="FloatStorage", view=b"", module="torch"):
    return b"(" + lit("storage") + name(module, kind) + lit(key) + lit("cpu") + lit(numel) + view + b"tQ"


def tensor(offset=0, size=(4,), stride=(1,), storage=None):
    args = (storage or pid()) + lit(offset) + lit(size) + lit(stride) + b"\x89" + ODICT
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + args + b"tR"


def zipped(body, storages=(ITEMS,), compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage)
    return file.getvalue()


def legacy(body, storages=(ITEMS,), keys=None, count=None):
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {})) + b"\x80\x02" + body + b"."
    keys = [str(key) for key in range(len(storages))] if keys is None else keys
    counted = (struct.pack("<q", len(s) // 4 if count is None else count) + s for s in storages)
    return head + pickle.dumps(keys, 2) + b"".join(counted)


def saved(content, pack=zipped):
    """Return a file of torch.save with nested dicts of float32 arrays and plain values."""
    storages = []

    def opcodes(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(lit(key) + opcodes(inner) for key, inner in value.items()) + b"u"
        if not isinstance(value, np.ndarray):
            return lit(value)
        storages.append(value.astype("<f4").tobytes())
        strides = tuple(step // value.itemsize for step in value.strides)
        return tensor(0, value.shape, strides, pid(str(len(storages) - 1), value.size))

    return pack(opcodes(content), storages)


BOTH = pytest.mark.parametrize("pack", [zipped, legacy])


@pytest.fixture
def read(tmp_path):
    """Return a function that loads bytes; its errors must be one line that begins with the path."""
    path = tmp_path / "model.pth"

    def read(data):
        path.write_bytes(data)
        try:
            return load(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 500
            raise

    return read


@pytest.mark.parametrize("path", REAL, ids=["zip", "legacy"])
def test_a_real_checkpoint_reads_bit_exactly(path):
    checkpoint = load(str(path))
    state = checkpoint.pop("state_dict")
    assert checkpoint == {
        "epoch": 3, "best": 0.5, "name": "clan", "done": False, "steps": [1, (2, None)],
        "size": (2, 3), "dtype": "torch.bfloat16", "device": "cuda:0",
    }
    assert type(state) is OrderedDict and list(state) == list(EXPECTED)
    for key, want in EXPECTED.items():
        got = state[key]
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), key
        assert (Tensor(got).asnumpy() == want).all() or got.size == 0


@BOTH
def test_python_2_and_old_cuda_files(read, pack):
    cuda = pid(view=b"N", module="torch.cuda")
    old = name("torch._utils", "_rebuild_tensor") + b"(" + cuda + lit(1) + lit((3,)) + lit((1,)) + b"tR"
    attributes = lit({"items": 1}) + b"b"  # are left out, as they could shadow methods
    state = read(pack(name("collections", "OrderedDict") + b"(](](U\x01w" + old + b"eetR" + attributes))
    assert type(state) is OrderedDict and callable(state.items)
    np.testing.assert_array_equal(state["w"], np.float32([1, 2, 3]))


def test_every_bfloat16_becomes_its_float32(read):
    bits = np.arange(2**16, dtype="<u2")
    storage = pid(numel=2**16, kind="BFloat16Storage")
    got = read(zipped(tensor(size=(2**16,), storage=storage), [bits.tobytes()]))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), bits.astype(np.uint32) << 16)


@BOTH
@pytest.mark.parametrize("call, refused", [
    (name("posix", "system") + lit(("touch hacked",)) + b"R", "posix.system"),
    (name("argparse", "Namespace") + b")\x81}b", "argparse.Namespace"),
    (lit("os") + lit("system") + b"\x93" + lit(("touch hacked",)) + b"R", "os.system"),
    (b"(" + lit("touch hacked") + b"ios\nsystem\n", "os.system"),
    (b"(" + name("os", "system") + lit("touch hacked") + b"o", "os.system"),
])  # fmt: skip
def test_a_pickle_never_runs_code(read, pack, call, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(refused) + ".*re-save it"):
        read(pack(call))
    assert not (tmp_path / "hacked").exists()


@BOTH
@pytest.mark.parametrize("body", [
    name("torch", "FloatStorage") + lit((10**12,)) + b"R", lit("eval") + lit(("1",)) + b"R",
    b"K\x01)R", b"R", b"b", b"", b"Q", b"h\x05", b"}K\x01s", b"}]K\x01s",
    *(tensor(storage=pid(numel=numel)) for numel in (5, -1, 2**70, "4", None)),
    tensor(size=(2,), storage=pid(view=b"(" + lit("1") + lit(2) + lit(2) + b"t")),  # of PyTorch before 0.4
])  # fmt: skip
def test_nonsense_is_refused(read, pack, body):
    with pytest.raises(UserError):
        read(pack(body))


@BOTH
@pytest.mark.parametrize("changes", [
    {"size": (5,)}, {"offset": 1}, {"offset": 2**62}, {"offset": -1}, {"size": (-4,)}, {"stride": (2,)},
    {"stride": (-1,), "offset": 3}, {"size": (2, 2), "stride": (3, 1)}, {"size": (4, 1), "stride": (1,)},
    {"size": (2**62, 2**62), "stride": (1, 1)}, {"size": (0, 2**70), "stride": (1, 1)}, {"stride": None},
])  # fmt: skip
def test_a_tensor_never_leaves_its_storage(read, pack, changes):
    with pytest.raises(UserError):
        read(pack(tensor(**changes)))
    assert read(pack(tensor())).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("data, message", [
    *((legacy(tensor(), count=count), "damaged") for count in (-1, 5, 2**62)),
    *((legacy(tensor(), keys=keys), "damaged") for keys in (["1"], [["0"]])),
    (pickle.dumps(MAGIC, 2), "damaged"), (b"PK\3\4", "damaged"), (b"<html>404\nnot found</html>", "damaged"),
    (pickle.dumps(MAGIC, 2) + pickle.dumps(1000, 2) + pickle.dumps({}, 2), "damaged"),
    (zipped(tensor()).replace(b"data.pkl", b"data.txt"), "a zip, but not one of torch.save"),
    (zipped(tensor(), [bytes(10**7)], zipfile.ZIP_DEFLATED), "not one of torch.save"),  # 10 MB in 10 KB
], ids=range(11))  # fmt: skip
def test_files_that_are_no_checkpoints(read, data, message):
    with pytest.raises(UserError, match=message):
        read(data)


@pytest.mark.parametrize("path", REAL, ids=["zip", "legacy"])
def test_a_truncated_file_is_refused(read, path):
    data = path.read_bytes()
    for end in [*range(0, len(data), 13), len(data) - 1]:
        with pytest.raises(UserError):
            read(data[:end])
