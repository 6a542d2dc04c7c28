"""PyTorch checkpoints (`.pth`, `.pt`) as NumPy arrays, without PyTorch, and never running code from a file.

Both formats of `torch.save` are read: the zip of PyTorch 1.6 and later, and the legacy stream (for both see
`torch/serialization.py` and `torch/_utils.py`). `pickle` is not used: the few opcodes that `torch.save` needs
are interpreted here, a global is only ever a name in the tables below, and sizes are checked before use.
"""
import io
import math
import os
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

MAX_OPCODES = 500_000  # of one pickle, some 10 000 tensors: bounds the time and memory of a hostile one
MAGIC = 0x1950A86A20F9469CFC6C  # of the legacy format
RESAVE = "re-save it in PyTorch as a plain state dict: torch.save(model.state_dict(), path)"
DAMAGED = "damaged, or not written by torch.save; download it again or re-save it"
CODES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2", "Long": "i8", "Int": "i4",
         "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?", "ComplexFloat": "c8", "ComplexDouble": "c16"}
STORAGES = {f"torch.{name}Storage": np.dtype("<" + code) for name, code in CODES.items()}
STORAGES["torch.UntypedStorage"] = np.dtype("u1")
TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
NAMES = {"collections.OrderedDict", "torch.Size", "torch.device", "torch.bfloat16", *STORAGES, *TENSORS,
         *PARAMETERS, *(f"torch.{dtype.name}" for dtype in STORAGES.values())}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
            "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
Spend = Callable[[int], None]  # takes bytes off what the arrays of a file may use
Place = Callable[[str, int], tuple[int, int] | None]  # (key, bytes per item) -> first byte, bytes


def load(path: str | os.PathLike) -> object:
    """Return what `torch.load(path)` returns, with NumPy arrays for tensors and parameters.

    dict, OrderedDict, list, tuple, numbers, text, bytes and None come back as they are, `torch.Size` as a
    tuple, `torch.device` and `torch.dtype` as text. An array has its tensor's dtype (integers, bool, floats,
    complex); only bfloat16 becomes float32, exactly. Arrays are C-contiguous and writeable; tensors that are
    contiguous in the same storage still share memory. All arrays of a file may take 4 times its size and
    1 MiB together, so a large tensor expanded by strides of 0 is refused.

    Raises UserError, one line beginning with the path, if the file is missing, damaged, not a checkpoint, or
    holds anything but the above (its name is in the line).
    """
    try:
        if not Path(path).is_file():
            raise UserError("no such file; check the path")
        return _read(Path(path).read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:  # a hostile file can trip any check of Python, NumPy and zipfile
        raise UserError(f"{path}: {DAMAGED} ({type(error).__name__}: {ascii(str(error)[:100])})") from error


def _read(data: bytes) -> object:
    left = 4 * len(data) + 2**20

    def spend(nbytes: int) -> None:
        nonlocal left
        left -= nbytes
        if left < 0:
            raise UserError(f"its tensors would take far more memory than the file; {RESAVE}")

    if data.startswith(b"PK\3\4"):
        return _read_zip(data, spend)
    if MAGIC.to_bytes(10, "little") in data[:32]:
        return _read_legacy(data, spend)
    if data[257:262] == b"ustar":
        raise UserError(f"the tar format of PyTorch before 0.1.10 is not supported; {RESAVE}")
    raise UserError(f"not a PyTorch checkpoint (begins with {data[:8]!r}); give a file written by torch.save")


def _read_zip(data: bytes, spend: Spend) -> object:
    """Zip format: the pickle `NAME/data.pkl`, the storages `NAME/data/KEY`."""
    members = {member.filename: member for member in zipfile.ZipFile(io.BytesIO(data)).infolist()}
    roots = [name[:-len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1 or roots[0] + "constants.pkl" in members:
        raise UserError(f"a zip, but not one of torch.save (nor is TorchScript supported); {RESAVE}")

    def place(name: str) -> tuple[int, int]:
        member = members[roots[0] + name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UserError(f"a compressed or encrypted zip, which torch.save never writes; {RESAVE}")
        start = member.header_offset + 30 + sum(struct.unpack_from("<26x2H", data, member.header_offset))
        if start < 0 or start + member.file_size > len(data):
            raise UserError(DAMAGED)
        return start, member.file_size

    def content(name: str) -> bytes:
        start, nbytes = place(name)
        return data[start:start + nbytes]

    if roots[0] + "byteorder" in members and content("byteorder") != b"little":
        raise UserError(f"saved on a big-endian machine, which is not supported; on another one, {RESAVE}")
    storage = _storages(data, lambda key, _: place("data/" + key), spend)
    return _unpickle(io.BytesIO(content("data.pkl")), storage, spend)


def _read_legacy(data: bytes, spend: Spend) -> object:
    """Legacy format: the pickles magic, version, machine, object and keys, then each key's count and items.

    A first pass over the object learns only the sizes of the items, which the storages after it do not tell.
    """
    stream = io.BytesIO(data)
    magic, version, _ = (_unpickle(stream) for _ in range(3))  # the items are little-endian on any machine
    if (magic, version) != (MAGIC, 1001):
        raise UserError(f"an unknown version of the legacy format; {RESAVE}")
    begin, itemsizes, places = stream.tell(), {}, {}
    _unpickle(stream, _storages(data, itemsizes.__setitem__, spend), spend)
    for key in map(_text, _unpickle(stream)):
        count = struct.unpack("<q", stream.read(8))[0]
        start, nbytes = places[key] = stream.tell(), count * itemsizes[key]
        if count < 0 or stream.seek(nbytes, os.SEEK_CUR) > len(data):
            raise UserError(DAMAGED)
    stream.seek(begin)
    return _unpickle(stream, _storages(data, lambda key, _: places[key], spend), spend)


def _storages(data: bytes, place: Place, spend: Spend) -> Callable[[Any], np.ndarray | None]:
    """A function from persistent ids to 1-D arrays, or to None while `place` gives none."""
    cache: dict[tuple[str, str, int], np.ndarray] = {}

    def storage(pid: Any) -> np.ndarray | None:
        kind, name, key, _device, numel, view = pid if len(pid) == 6 else (*pid, None)
        dtype, where = STORAGES[_text(name)], place(_text(key), STORAGES[name].itemsize)
        if where is None:
            return None
        if _text(kind) != "storage" or type(numel) is not int or not 0 <= numel * dtype.itemsize <= where[1]:
            raise UserError(DAMAGED)
        if (name, key, numel) not in cache:
            array = np.frombuffer(data, dtype, numel, where[0])
            spend(array.nbytes)
            if name == "torch.BFloat16Storage":  # the upper half of a float32
                spend(array.nbytes)
                array = np.left_shift(array, 16, dtype="<u4").view("<f4")
            else:  # a damaged bool can be any byte
                array = array.view("u1") != 0 if dtype.kind == "b" else array.copy()
            cache[name, key, numel] = array
        array = cache[name, key, numel]
        return array if view is None else _tensor(array, view[1], (view[2],), (1,), spend)

    return storage


def _tensor(storage: np.ndarray, offset: Any, size: Any, stride: Any, spend: Spend) -> np.ndarray:
    """A strided view into a storage, never outside it, copied unless it is C-contiguous."""
    if not (type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= 32
            and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))):
        raise UserError(f"a tensor has an impossible shape; {DAMAGED}")
    if math.prod(size) == 0:
        return np.empty(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.size:
        raise UserError(f"a tensor reaches outside its storage; {DAMAGED}")
    item = storage.itemsize
    array = np.ndarray(size, storage.dtype, storage, offset * item, [step * item for step in stride])
    if array.flags.c_contiguous:
        return array
    spend(array.nbytes)
    return array.copy()


def _call(name: str, args: Any, spend: Spend) -> object:
    """Return what an allowed callable returns; None for tensors of the first pass over a legacy file."""
    if type(args) is tuple and name == "collections.OrderedDict":  # Python 2 gives it the items, 3 does not
        pairs = args[0] if args else []
        spend(100 * len(pairs))
        return _set_items(OrderedDict(), [item for key, value in pairs for item in (key, value)])
    if type(args) is not tuple or not args or name not in NAMES:
        raise UserError(DAMAGED)
    if name in PARAMETERS or name == "torch.Size" and type(args[0]) is tuple:
        return args[0]
    if name == "torch.device":
        return f"{_text(args[0])[:16]}:{int(args[1])}" if len(args) > 1 else _text(args[0])
    if name not in TENSORS or any(args[6:]):
        raise UserError(f"a tensor is conjugated, negated or malformed; {RESAVE}")
    return None if args[0] is None else _tensor(*args[:4], spend)


def _set_items(target: Any, items: list) -> dict:
    """Put alternating keys and values into a dict; keys that could take for ever to hash are refused."""
    if type(target) not in (dict, OrderedDict):
        raise UserError(DAMAGED)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | float) and not (isinstance(key, int) and key.bit_length() < 64):
            raise UserError(f"a dict has a key that is neither text nor a number; {RESAVE}")
        target[key] = value
    return target


def _text(value: Any) -> str:
    if type(value) is not str:
        raise UserError(DAMAGED)
    return value


def _name(module: str, name: str) -> str:
    """An allowed global, as its name only."""
    full = f"{module}.{name}".replace("torch.cuda.", "torch.").replace("torch.storage.", "torch.")
    if full not in NAMES:
        raise UserError(f"holds {ascii(full[:80])}, refused because files must not run code; {RESAVE}")
    return full


def _unpickle(stream: io.BytesIO, storage: Callable | None = None, spend: Spend | None = None) -> Any:
    """The object of one pickle, leaving the stream after it; `storage` maps persistent ids."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(start: int) -> list:
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        op = opcode.name
        if op in LITERALS:
            stack.append(arg)
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op == "MARK":
            marks.append(len(stack))
        elif op == "TUPLE":
            stack.append(tuple(pop(marks.pop())))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(-int(op[-1]))))
        elif op in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if op == "EMPTY_DICT" else [])
        elif op in ("SETITEM", "SETITEMS"):
            items = pop(-2 if op == "SETITEM" else marks.pop())
            _set_items(stack[-1], items)
        elif op in ("APPEND", "APPENDS"):
            items = pop(-1 if op == "APPEND" else marks.pop())
            list.extend(stack[-1], items)
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_name(*(arg.split(" ", 1) if arg else map(_text, pop(-2)))))
        elif op in ("REDUCE", "NEWOBJ"):
            name, args = pop(-2)
            stack.append(_call(_text(name), args, spend))
        elif op == "BUILD" and type(stack[-1]) is dict and stack[-1].keys() <= {"_metadata"}:
            vars(stack[-2]).update(pop(-1)[0])  # what torch.save puts on a state dict
        elif op == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif op == "STOP":
            return stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise UserError(f"pickled with {op}, which a state dict does not need; {RESAVE}")
        if count > MAX_OPCODES:
            raise UserError(f"takes more than {MAX_OPCODES} steps to build; {RESAVE}")
