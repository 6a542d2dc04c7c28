"""Read and write checkpoints: this project's, and those of others under the names that they use.

Our .ckpt is one file: net_G.*, net_D.*, the state of both optimizers, the step, the best mIoU and, as text,
the network's name and its classes. MindSpore's checksum ends it.
"""

import logging
import math
import os
import re
import zlib
from itertools import groupby
from pathlib import Path

import mindspore
import numpy as np
from google.protobuf.message import DecodeError
from mindspore import Parameter, nn
from mindspore.train.checkpoint_pb2 import Checkpoint

from dataset.classes import CLASS_NAMES, INFO_PATH, NUM_CLASSES
from model.CLAN_G import CLASSIFIERS
from utils import torch_file
from utils.system.device import assign, simulated
from utils.system.errors import UserError
from utils.system.files import atomic

BN_NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
            "running_var": "moving_variance"}
# A tensor that every file of the network has: what precedes its name precedes all names of the network.
ANCHOR = {"net_G": "layer4.0.conv1.weight", "net_D": "conv4.weight"}
LOSS_SCALING = ("scale_value", "counter", "skipped")
CKPT_TYPES = {"Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "Float16", "Float32", "Float64"}
NO_CHECKSUM = "no checksum"  # an entry of what `read_ckpt` returns, for a file without one
OTHER_CLASSES = "take the info.json that it was trained with, or another checkpoint"
# Files that are no checkpoints of MindSpore or PyTorch: how they begin, what they are, what to do. The place
# for safetensors, once they are supported, is in `read`.
OTHER_KINDS = (
    (rb"\0*\Z", "an empty file", "copy or download it again"),
    (rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z]", "a web page", "the download failed: repeat it (Google Drive: gdown)"),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (rb'.{6}\0\0\{"', "a safetensors file, which is not supported", torch_file.RESAVE),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar", "an archive", "unpack it and give a file in it"),
    (rb"\x08.\x12|\n.{2,9}\x12\x09MindSpore", "an exported model", "give the checkpoint it is made from"),
    (rb"\x80[\2-\5]", "a pickle that torch.save did not write", torch_file.RESAVE),
)


def find(path: str) -> str:
    """Return `path` if it exists, else the same name with .ckpt, .pth or .pt; UserError if there is none."""
    head, suffix = os.path.splitext(path)
    stem = head if suffix in (".ckpt", ".pth", ".pt") else path
    for candidate in (path, f"{stem}.ckpt", f"{stem}.pth", f"{stem}.pt"):
        if Path(candidate).is_file():
            return candidate
    raise UserError(f"{path}: no such checkpoint, nor with the suffix .ckpt, .pth or .pt")


def read(path: str) -> dict[str, np.ndarray | str]:
    """Return all tensors and texts of a checkpoint of MindSpore or PyTorch, under the names in the file.

    Its content decides what kind it is, not its suffix. UserError if it is of another kind or damaged.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if torch_file.recognizes(head):
        return tensors_in(torch_file.load(path), path)
    for beginning, kind, remedy in OTHER_KINDS:
        if re.match(beginning, head, re.DOTALL):
            raise UserError(f"{path}: not a readable checkpoint but {kind}; {remedy}")
    try:
        if not head.startswith(b"\n"):
            raise ValueError(f"nor one of PyTorch: it begins with {head[:12]!r}")
        return read_ckpt(Path(path).read_bytes())
    except (ValueError, DecodeError) as error:
        raise UserError(f"{path}: not a readable MindSpore checkpoint ({error})") from None


def tensors_in(content: object, path: str) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict, or of the state dicts in a dict: as model.NAME if that is "model".

    Other values, such as an epoch, and the state of optimizers are left out. UserError if there is no tensor.
    """
    tensors = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        wrapped = isinstance(value, dict)
        for name, tensor in value.items() if wrapped else [("", value)]:
            if isinstance(tensor, np.ndarray) and isinstance(key, str) and isinstance(name, str):
                tensors[f"{key}.{name}" if wrapped else key] = tensor
    if not tensors:
        raise UserError(f"{path}: has no state dict (names and tensors); {torch_file.RESAVE}")
    return tensors


def read_ckpt(raw: bytes) -> dict[str, np.ndarray | str]:
    """Return the tensors and texts of a .ckpt; ValueError or DecodeError if it is damaged.

    mindspore.load_checkpoint is not used: it trusts the shapes in the file and compares the checksum only on
    request.
    """
    raw = memoryview(raw)  # whose slices are no copies
    has_checksum = raw[-17:-10] == b"crc_num"
    if has_checksum:
        if zlib.crc32(raw[:-17]) != int.from_bytes(raw[-10:], "big"):
            raise ValueError("damaged: its checksum does not fit")
        raw = raw[:-17]
    message, content = Checkpoint(), {}
    message.ParseFromString(raw)
    for name, group in groupby(message.value, lambda value: value.tag):  # large tensors come in slices
        slices = [value.tensor for value in group]
        data, kind, dims = b"".join(t.tensor_content for t in slices), slices[-1].tensor_type, slices[-1].dims
        shape = () if list(dims) == [0] else tuple(dims)
        if kind == "str":
            content[name] = data.decode("utf-32-le")
        elif kind not in CKPT_TYPES:
            raise ValueError(f"{name[:80]!r} is of type {kind[:20]!r}")
        else:
            values = np.frombuffer(data, kind.lower())
            if len(shape) > 8 or min(shape, default=0) < 0 or math.prod(shape) != values.size:
                raise ValueError(f"{name[:80]!r} has another size than its shape says")
            content[name] = values.reshape(shape)
    if not content:
        raise ValueError("there is nothing in it")
    if not has_checksum:
        # `save` writes one. Networks alone, net_G.* and net_D.*, are also saved by other programs.
        if any(name in ("step", "model") or name.startswith("optimizer_") for name in content):
            raise ValueError("the checksum at its end is missing: truncated, or saved by something else")
        content[NO_CHECKSUM] = ""
    return content


def step_of(path: Path) -> int | None:
    """Return the number of steps in a checkpoint that `save` wrote; None if it is missing or damaged."""
    try:
        return int(read(str(path))["step"])
    except (UserError, OSError, KeyError, ValueError):
        return None


def model_of(content: dict) -> str:
    """Return the name of a checkpoint's network; files of others hold the paper's ResNet-101."""
    model = content.get("model")
    return model if isinstance(model, str) else "resnet101"


def check_classes(content: dict, path: str | Path) -> None:
    """Raise UserError if a checkpoint names other classes than info.json; files of others name none."""
    theirs, ours = content.get("classes"), ",".join(CLASS_NAMES)
    if isinstance(theirs, str) and theirs != ours:
        raise UserError(
            f"{path} has {theirs.count(',') + 1} classes ({theirs}), but {INFO_PATH} {len(CLASS_NAMES)} "
            f"({ours}); {OTHER_CLASSES}"
        )


def tensors_of(content: dict, net: str, path: str = "") -> tuple[dict[str, np.ndarray], list[str]]:
    """Return one network's tensors ("net_G", "net_D") under this project's names, and the names left out.

    What precedes the names is removed: "net_G." of this project, "Scale." of the DeepLab init, "module." of
    DataParallel, "_orig_mod." of torch.compile, … UserError if the file has the network more than once.
    """
    found = {name[: -len(ANCHOR[net])] for name in content if f".{name}".endswith(f".{ANCHOR[net]}")}
    own = f"{net}." in found
    if len(found) > 1 and not own:
        first, second, *_ = (f"{prefix[:40]}*" for prefix in sorted(found))
        raise UserError(f"{path}: holds {net} twice, as {first!r} and {second!r}; save one of them alone")
    prefix = f"{net}." if own else next(iter(found), "")
    inside = {n: v for n, v in content.items() if n.startswith(prefix) and not isinstance(v, str)}
    left_out = [] if own else [n for n, v in content.items() if n not in inside and not isinstance(v, str)]
    # Load the classifiers only if the file has two of the same shapes. A single one (DeepLab's) or two that
    # differ (AdaptSegNet's, whose first one sees layer3) are left out.
    shapes_C1, shapes_C2 = (
        {v.shape for name, v in inside.items() if name.startswith(prefix + classifier)}
        for classifier in CLASSIFIERS
    )
    tensors = {}
    for name, value in inside.items():
        ours = name.removeprefix(prefix).replace("down_sample", "downsample")  # MindCV
        if net == "net_G" and shapes_C1 != shapes_C2 and ours.startswith(CLASSIFIERS):
            left_out.append(name)
            continue
        bn = re.fullmatch(r"(.*\b(?:bn\d|downsample\.1))\.(\w+)", ours)
        tensors[f"{bn[1]}.{BN_NAMES.get(bn[2], bn[2])}" if bn else ours] = value
    return tensors, left_out


def check_finite(name: str, value: np.ndarray, path: str | Path) -> None:
    """Raise UserError if a tensor of a checkpoint has nan or inf. In a DryRun no values mean anything."""
    if not np.isfinite(value).all() and not simulated():
        raise UserError(f"{path}: {name} has values that are not finite (nan, inf); take another checkpoint")


def load(net: nn.Cell, content: dict, path: str, prefix: str, complete: bool = False) -> str:
    """Copy the tensors that fit into G ("net_G") or D ("net_D"); return a line that reports them.

    UserError unless the file has all of D or of G's backbone and, with `complete`, of G's classifiers, and
    all their values are finite. The network is unchanged then.
    """
    check_classes(content, path)
    tensors, skipped = tensors_of(content, prefix, path)
    parameters = dict(net.parameters_and_names())
    matched = [name for name, value in tensors.items()
               if name in parameters and value.shape == parameters[name].shape and value.dtype.kind == "f"]
    left = [name for name in parameters if name not in matched]
    needed = [name for name in left if complete or not name.startswith(CLASSIFIERS)]
    if needed:
        raise UserError(f"{path}: " + mismatch(needed, parameters, tensors, prefix))
    for name in matched:
        check_finite(name, tensors[name], path)
    for name in matched:
        assign(parameters[name], tensors[name])
    skipped += [name for name in tensors if name not in matched]

    def listed(names: list[str]) -> str:
        return f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" if names else ""

    return (
        f"{path} -> {prefix[-1]}: {len(matched)} tensors matched, {len(skipped)} skipped{listed(skipped)}, "
        f"{len(left)} left at their initial value{listed(left)}"
        f"{'; the file has no checksum' if NO_CHECKSUM in content else ''}"
    )


def mismatch(needed: list[str], parameters: dict, tensors: dict[str, np.ndarray], prefix: str) -> str:
    """Return why a file does not fit a network: the parameters `needed` are not in it or differ in shape."""
    pairs = [(np.shape(tensors.get(name)), parameters[name].shape) for name in needed]
    sizes = {pair for theirs, ours in pairs for pair in zip(theirs, ours) if pair[0] != pair[1]}
    if all(len(theirs) == len(ours) for theirs, ours in pairs) and {n for _, n in sizes} == {NUM_CLASSES}:
        return f"has {min(sizes)[0]} classes, not {NUM_CLASSES}; {OTHER_CLASSES}"
    hint = "is it of another network?" if prefix == "net_G" else "does it hold G alone?"
    return (
        f"{len(needed)} of {len(parameters)} tensors of {prefix} are not in it or differ in shape, such as "
        f"{', '.join(needed[:3])}; {hint}"
    )


def state(step_cell: nn.Cell) -> list[Parameter]:
    """Return the parameters to save: all except learning rates, which options give, and summed gradients."""
    return [p for p in step_cell.get_parameters() if not re.match(r"sum\.|.*learning_rate", p.name)]


def fingerprint(step_cell: nn.Cell, step: int, about: str) -> int:
    """Return a CRC-32 of `step`, `about` and all values to save: equal if two processes start alike."""
    crc = zlib.crc32(about.encode(), step)
    for p in state(step_cell):
        crc = zlib.crc32(np.ascontiguousarray(p.asnumpy()), crc)
    return crc


def save(path: Path, step_cell: nn.Cell, model: str, step: int, best_mIoU: float) -> None:
    """Write the networks and optimizers of a training step to `path` (.ckpt), atomically.

    UserError if a value is not finite; nothing is written then.
    """
    entries = [{"name": p.name, "data": p} for p in state(step_cell)]
    broken = [e["name"] for e in entries if not np.isfinite(e["data"].asnumpy()).all()]
    if broken:
        raise UserError(
            f"{path} is not written: after {step} steps {len(broken)} tensors are not finite ({broken[0]}, …)"
        )
    about = {"model": model, "classes": ",".join(CLASS_NAMES), "step": step, "best_mIoU": best_mIoU}
    with atomic(path) as temporary:
        logging.disable(logging.CRITICAL)  # MindSpore logs the error that it raises as well
        try:
            mindspore.save_checkpoint(entries, str(temporary), append_dict=about, crc_check=True)
        finally:
            logging.disable(logging.NOTSET)
            temporary.with_suffix(".tmp").unlink(missing_ok=True)  # left by MindSpore on a full disk


def restore(content: dict, path: Path, step_cell: nn.Cell) -> tuple[int, float]:
    """Copy the values that `save` wrote into a training step; return the number of steps and the best mIoU.

    UserError if the checkpoint is of another kind of run.
    """
    check_classes(content, path)
    for p in state(step_cell):
        value = content.get(p.name)
        if value is None and p.name in LOSS_SCALING:
            continue  # saved on a device that computes in float32: loss scaling starts here
        if not isinstance(value, np.ndarray) or value.shape != p.shape:
            raise UserError(
                f"{path}: {p.name} is missing or of another shape; --resume needs a checkpoint of this "
                "project, made with the same --method, --model and --amp-level"
            )
        check_finite(p.name, value, path)
        assign(p, value)
    return int(content["step"]), float(content["best_mIoU"])
