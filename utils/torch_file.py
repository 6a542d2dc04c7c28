"""Read PyTorch checkpoints as NumPy arrays, without PyTorch and without running code from the file.

Both formats of `torch.save` are read: the zip of PyTorch 1.6 and later, and the legacy stream (for both see
`torch/serialization.py` and `torch/_utils.py`). The unpickler accepts only the names in GLOBALS.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.system.errors import UserError

ZIP = b"PK\3\4"
MAGIC = 0x1950A86A20F9469CFC6C  # of the legacy format
RESAVE = "re-save it in PyTorch as a plain state dict: torch.save(model.state_dict(), path)"
DAMAGED = "damaged, or not written by torch.save; download it again or re-save it"
CODES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2", "Long": "i8", "Int": "i4",
         "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
STORAGES = {f"torch.{name}Storage": np.dtype(f"<{code}") for name, code in CODES.items()}
Place = Callable[[str, int], tuple[bytes, int] | None]  # (key, bytes per item) -> bytes, where it begins


def recognizes(head: bytes) -> bool:
    """Return whether a file that begins with `head`, at least 32 bytes, is a zip or a legacy file."""
    return head.startswith(ZIP) or MAGIC.to_bytes(10, "little") in head[:32]


def load(path: str | os.PathLike) -> object:
    """Return what `torch.load(path)` returns, with NumPy arrays for tensors and parameters.

    An array has its tensor's dtype (integers, bool, floats), but bfloat16 becomes float32, exactly. It may be
    read-only or not contiguous. `torch.Size` becomes a tuple, `torch.device` and `torch.dtype` become text.
    UserError if the file is damaged, not of torch.save, or holds any other object, which the line names.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP)) == ZIP:
                return _read_zip(file)
        return _read_legacy(Path(path).read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can trip any check of Python, NumPy and zipfile
        raise UserError(f"{path}: {DAMAGED} ({type(error).__name__}: {ascii(str(error)[:100])})") from error


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 values (N,), given as uint16, as float32, of which they are the upper halves."""
    return np.left_shift(bits, 16, dtype="<u4").view("<f4")


def _read_zip(file: BinaryIO) -> object:
    """Return the object in a zip: its pickle is `NAME/data.pkl`, its storages are `NAME/data/KEY`."""
    archive = zipfile.ZipFile(file)
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1 or any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise UserError(f"a zip, but not one of torch.save; unpack it and give a file in it, or {RESAVE}")
    stream = io.BytesIO(archive.read(f"{roots[0]}data.pkl"))
    return _Unpickler(stream, lambda key, _: (archive.read(f"{roots[0]}data/{key}"), 0)).load()


def _read_legacy(data: bytes) -> object:
    """Return the object in a legacy file: five pickles, then a count and the items of each storage.

    The pickles are the magic number, the version, the machine, the object and the storages' keys. The object
    is read twice: first only for the sizes of the items, which are needed to find the storages behind it.
    """
    stream = io.BytesIO(data)
    if [_Unpickler(stream).load() for _ in range(3)][:2] != [MAGIC, 1001]:
        raise UserError(DAMAGED)
    begin, itemsizes, places = stream.tell(), {}, {}
    _Unpickler(stream, itemsizes.__setitem__).load()
    for key in _Unpickler(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        places[key] = data, stream.tell()
        stream.seek(count * itemsizes[key], os.SEEK_CUR)
    if stream.tell() != len(data):
        raise UserError(DAMAGED)
    stream.seek(begin)
    return _Unpickler(stream, lambda key, _: places[key]).load()


class _Unpickler(pickle._Unpickler):
    """Unpickle plain values and tensors; in Python, as the C version allocates any memo size it reads."""

    def __init__(self, stream: io.BytesIO, place: Place | None = None):
        super().__init__(stream, encoding="utf-8")  # for files from Python 2
        self.place, self.storages = place, {}

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}".replace("torch.cuda.", "torch.")
        if full not in GLOBALS:
            raise UserError(f"holds {ascii(full[:80])}, refused because files must not run code; {RESAVE}")
        return GLOBALS[full]

    def load_build(self) -> None:
        """Leave out attributes, which could shadow methods; state dicts have one, `_metadata`."""
        self.stack.pop()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def persistent_load(self, pid: tuple) -> np.ndarray | None:
        """Return a storage as a 1-D array; None in the first pass over a legacy file."""
        _kind, storage_type, key, _device, numel, *view = pid
        if numel < 0 or any(view):
            raise UserError(DAMAGED)
        if key not in self.storages:
            dtype = STORAGES[storage_type]
            where = self.place(key, dtype.itemsize)
            if where is None:
                return None
            array = np.frombuffer(where[0], dtype, numel, where[1])
            if storage_type == "torch.BFloat16Storage":
                array = from_bfloat16(array)
            self.storages[key] = array
        return self.storages[key]


def _tensor(storage: np.ndarray | None, offset: int, size: tuple, stride: tuple, *flags) -> np.ndarray | None:
    """Return a strided view into a storage. Bounds are checked here because NumPy's check can overflow."""
    if storage is None:
        return None
    if len(flags) > 2:  # after requires_grad and the hooks
        raise UserError(f"a tensor is conjugated or negated; {RESAVE}")
    if 0 in size:
        return np.empty(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if min(offset, *size, *stride, 0) < 0 or len(size) != len(stride) or last >= storage.size:
        raise UserError(f"a tensor reaches outside its storage; {DAMAGED}")
    item = storage.itemsize
    return np.ndarray(size, storage.dtype, storage, offset * item, [step * item for step in stride])


GLOBALS = {
    "collections.OrderedDict": OrderedDict, "torch.Size": tuple,
    "torch.device": lambda *kind_and_index: ":".join(map(str, kind_and_index)),
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    **{name: name for name in (*STORAGES, "torch.bfloat16", *(f"torch.{d.name}" for d in STORAGES.values()))},
}  # fmt: skip
