"""Read and write checkpoints: this project's, and those of others under the names that they use.

Our .ckpt is one file: net_G.*, net_D.*, the state of both optimizers, the step, the best mIoU and, as text,
the network's name, its classes and the target's input size. MindSpore's checksum ends it.
"""

import logging
import math
import re
import zlib
from argparse import Namespace
from itertools import groupby
from pathlib import Path
from shlex import quote

import mindspore
import numpy as np
import safetensors.numpy
from google.protobuf.message import DecodeError
from mindspore import Parameter, nn
from mindspore.train.checkpoint_pb2 import Checkpoint

from dataset.classes import CLASS_NAMES, INFO_PATH, NUM_CLASSES
from dataset.file_lists import few
from model.CLAN_G import CLASSIFIERS
from utils import torch_file
from utils.system.device import assign, simulated
from utils.system.errors import UserError
from utils.system.files import atomic

BN_NAMES = dict(weight="gamma", bias="beta", running_mean="moving_mean", running_var="moving_variance")
# A tensor that every file of the network has: what precedes its name precedes all names of the network.
ANCHOR = {"net_G": "layer4.0.conv1.weight", "net_D": "conv4.weight"}
NETWORKS = {(64, 3, 7, 7): "resnet101", (16, 3, 7, 7): "small"}  # by the shape of conv1.weight
CKPT_TYPES = {"Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "Float16", "Float32", "Float64"}
SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
SAFETENSORS = rb".{4}\0{4}\{"  # the length of the header, 8 bytes, and its beginning
NO_CHECKSUM = "no checksum"  # an entry of the content of a file without one
OTHER_CLASSES = "take the info.json that it was trained with, or another checkpoint"
# How files that are no checkpoints begin, what they are and what to do.
OTHER_KINDS = {
    rb"\0*\Z": "an empty file; download it again",
    rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z]": "a web page; repeat the download, from Google Drive with gdown",
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file itself: git lfs pull",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar": "an archive; unpack it",
    rb"\x08.\x12|\n.{2,9}\x12\x09MindSpore": "an exported model; give the checkpoint it is made from",
    rb"\x80[\2-\5]": f"a pickle that torch.save did not write; {torch_file.RESAVE}",
    rb"[^\n]": "an unknown kind of file; give a checkpoint",
}


def find(path: str) -> str:
    """Return `path` if it exists, else the same name with .ckpt, .pth or .pt; UserError if there is none."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name a file in it, such as GTA5_best.ckpt; to continue its "
                        f"training: --resume {quote(path)}")
    stem = re.sub(r"\.(ckpt|pth|pt)$", "", path)
    for candidate in (path, f"{stem}.ckpt", f"{stem}.pth", f"{stem}.pt"):
        if Path(candidate).is_file():
            return candidate
    raise UserError(f"{path}: no such checkpoint, nor with the suffix .ckpt, .pth or .pt")


def read(path: str) -> dict[str, np.ndarray | str]:
    """Return all tensors and texts of a checkpoint of MindSpore or PyTorch, under the names in the file.

    Its content decides what kind it is, not its suffix: a .ckpt, a file of torch.save, or safetensors.
    UserError if it is of another kind or damaged.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if torch_file.recognizes(head):
        return tensors_in(torch_file.load(path), path)
    if re.match(SAFETENSORS, head, re.DOTALL):
        return read_safetensors(path)
    for beginning, kind in OTHER_KINDS.items():
        if re.match(beginning, head, re.DOTALL):
            raise UserError(f"{path}: not a readable checkpoint, but {kind}")
    try:
        return read_ckpt(Path(path).read_bytes())
    except (ValueError, DecodeError) as error:
        raise UserError(f"{path}: not a readable MindSpore checkpoint ({error})") from None


def tensors_in(content: object, path: str) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict, or of the state dicts in a dict: as model.NAME if that is "model".

    Other values, such as an epoch, and the state of optimizers are left out. UserError if there is no tensor.
    """
    tensors = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        for name, tensor in (value if isinstance(value, dict) else {"": value}).items():
            if isinstance(tensor, np.ndarray) and isinstance(key, str):
                tensors[f"{key}.{name}" if name else key] = tensor
    if not tensors:
        raise UserError(f"{path}: has no state dict (names and tensors); {torch_file.RESAVE}")
    return tensors


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, bfloat16 as float32; UserError if it is damaged."""
    try:
        content = safetensors.deserialize(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: a damaged safetensors file ({error}); download it again") from None
    tensors = {}
    for name, tensor in content:
        kind = tensor["dtype"]
        if kind not in SAFETENSORS_TYPES:
            raise UserError(f"{path}: {name[:80]!r} is of the type {kind}; save the weights as F32")
        values = np.frombuffer(tensor["data"], SAFETENSORS_TYPES[kind])
        values = torch_file.from_bfloat16(values) if kind == "BF16" else values
        tensors[name] = values.reshape(tensor["shape"])
    return tensors


def read_ckpt(raw: bytes) -> dict[str, np.ndarray | str]:
    """Return the tensors and texts of a .ckpt; ValueError or DecodeError if it is damaged.

    mindspore.load_checkpoint trusts the shapes in the file and compares the checksum only on request.
    """
    has_checksum = raw[-17:-10] == b"crc_num"  # and the checksum in the last 10 bytes
    body = memoryview(raw)[: -17 if has_checksum else None]  # not a copy
    if has_checksum and zlib.crc32(body) != int.from_bytes(raw[-10:], "big"):
        raise ValueError("damaged: its checksum does not fit")
    message, content = Checkpoint(), {} if has_checksum else {NO_CHECKSUM: ""}
    message.ParseFromString(body)
    for name, group in groupby(message.value, lambda value: value.tag):  # large tensors come in slices
        slices = [value.tensor for value in group]
        data, kind, dims = b"".join(t.tensor_content for t in slices), slices[-1].tensor_type, slices[-1].dims
        shape = () if list(dims) == [0] else tuple(dims)
        if kind == "str":
            content[name] = data.decode("utf-32-le")
        elif kind not in CKPT_TYPES or math.prod(shape) * np.dtype(kind.lower()).itemsize != len(data):
            raise ValueError(f"{name[:80]!r} is of an unknown type or has another size than its shape says")
        else:
            content[name] = np.frombuffer(data, kind.lower()).reshape(shape)
    # `save` writes a checksum; networks alone, net_G.* and net_D.*, are also saved by other programs.
    ours = any(name in ("step", "model") or name.startswith("optimizer_") for name in content)
    if ours and not has_checksum:
        raise ValueError("the checksum at its end is missing: truncated, or saved by something else")
    return content


def read_training(path: Path) -> dict:
    """Return the content of a training's checkpoint; UserError if it cannot be resumed from."""
    content = read(str(path))
    step = content.get("step")
    if not isinstance(step, np.ndarray) or step.size != 1:
        raise UserError(f"{path}: not a checkpoint of this project's training")
    check_finite(content, path)
    return content


def step_of(path: Path) -> int | None:
    """Return the number of steps of a training's checkpoint; None if it is missing or damaged."""
    try:
        return int(read_training(path)["step"])
    except (UserError, OSError):
        return None


def model_of(content: dict, path: str = "") -> str:
    """Return the name of a checkpoint's network: as it says, else by its shapes."""
    if "model" in content:
        return content["model"]
    return network_of(tensors_of(content, "net_G", path)) or "resnet101"


def network_of(tensors: dict[str, np.ndarray]) -> str | None:
    """Return the name of the network that has tensors of these shapes, if one has."""
    return NETWORKS.get(getattr(tensors.get("conv1.weight"), "shape", None))


def check_classes(content: dict, path: str | Path) -> None:
    """Raise UserError if a checkpoint names other classes than info.json; files of others name none."""
    ours = ",".join(CLASS_NAMES)
    theirs = content.get("classes", ours)
    if theirs != ours:
        raise UserError(f"{path} has {theirs.count(',') + 1} classes ({theirs}), but {INFO_PATH} "
                        f"{len(CLASS_NAMES)} ({ours}); {OTHER_CLASSES}")


def tensors_of(content: dict, net: str, path: str = "") -> dict[str, np.ndarray]:
    """Return one network's tensors ("net_G", "net_D") under this project's names.

    What precedes the names is removed: "net_G." of this project, "Scale." of the DeepLab init, "module." of
    DataParallel, "_orig_mod." of torch.compile, … UserError if the file has the network more than once.
    """
    anchor, prefix = ANCHOR[net], f"{net}."
    prefixes = [name.removesuffix(anchor) for name in content if name.endswith(anchor)] or [""]
    if prefix not in prefixes:
        if len(prefixes) > 1:
            raise UserError(f"{path}: holds {net} twice, below {prefixes[:2]}; save one of them alone")
        [prefix] = prefixes
    tensors = {}
    for name, value in content.items():
        if name.startswith(prefix) and not isinstance(value, str):
            ours = name.removeprefix(prefix).replace("down_sample", "downsample")  # MindCV
            bn = re.fullmatch(r"(.*\b(?:bn\d|downsample\.1))\.(\w+)", ours)
            tensors[f"{bn[1]}.{BN_NAMES.get(bn[2], bn[2])}" if bn else ours] = value
    return tensors


def check_finite(content: dict, path: str | Path) -> None:
    """Raise UserError if a tensor of a checkpoint has nan or inf. In a DryRun no values mean anything."""
    for name, value in content.items():
        if not isinstance(value, str) and not np.isfinite(value).all() and not simulated():
            raise UserError(f"{path}: {name} has nan or inf; take another checkpoint")


def load(net: nn.Cell, content: dict, path: str, prefix: str, complete: bool = False) -> str:
    """Copy the tensors that fit into G ("net_G") or D ("net_D"); return a line that reports them.

    UserError unless the file has all of D or of G's backbone and, with `complete`, of G's classifiers, and
    all their values are finite. The network is unchanged then.
    """
    check_classes(content, path)
    tensors, parameters = tensors_of(content, prefix, path), dict(net.parameters_and_names())
    # Load the classifiers only if the file has two of the same shapes. A single one (DeepLab's) or two that
    # differ (AdaptSegNet's, whose first one sees layer3) are left out.
    shapes_C1, shapes_C2 = ({v.shape for n, v in tensors.items() if n.startswith(C)} for C in CLASSIFIERS)
    matched = {
        name: value for name, value in tensors.items()
        if name in parameters and value.shape == parameters[name].shape and value.dtype.kind == "f"
        and (shapes_C1 == shapes_C2 or not name.startswith(CLASSIFIERS))
    }
    left = [name for name in parameters if name not in matched]
    needed = [name for name in left if complete or not name.startswith(CLASSIFIERS)]
    sizes = {(theirs, ours) for name in needed if name in tensors
             for theirs, ours in zip(tensors[name].shape, parameters[name].shape) if theirs != ours}
    if {ours for _, ours in sizes} == {NUM_CLASSES}:
        raise UserError(f"{path}: has {min(sizes)[0]} classes, not {NUM_CLASSES}; {OTHER_CLASSES}")
    if needed:
        ours, theirs = network_of(parameters), network_of(tensors)
        other = theirs not in (ours, None) and prefix == "net_G"
        hint = f"add --model {theirs}" if other else "is it of another network?"
        raise UserError(f"{path}: {len(needed)} of {len(parameters)} tensors of {prefix} are not in it or "
                        f"differ in shape, such as {', '.join(needed[:3])}; {hint}")
    check_finite(matched, path)
    for name, value in matched.items():
        assign(parameters[name], value)
    skipped = [name for name in tensors if name not in matched]
    return (f"{path} -> {prefix[-1]}: {len(matched)} tensors matched, {len(skipped)} skipped"
            f"{f' ({few(skipped)})' if skipped else ''}, {len(left)} left at their initial value"
            f"{'; the file has no checksum' if NO_CHECKSUM in content else ''}")


def state(step_cell: nn.Cell) -> list[Parameter]:
    """Return the parameters to save: all except accumulated gradients."""
    return [p for p in step_cell.get_parameters() if not p.name.startswith("sum.")]


def fingerprint(step_cell: nn.Cell, step: int, about: str) -> int:
    """Return a CRC-32 of `step`, `about` and all values to save: equal if two processes start alike."""
    crc = zlib.crc32(about.encode(), step)
    for p in state(step_cell):
        crc = zlib.crc32(np.ascontiguousarray(p.asnumpy()), crc)
    return crc


def save(path: Path, step_cell: nn.Cell, args: Namespace, step: int, best_mIoU: float) -> None:
    """Write the networks and optimizers of a training step to `path` (.ckpt), atomically.

    args: the run's options, of which an evaluation needs the network and the target's input size.
    UserError if a value is not finite; nothing is written then.
    """
    for p in state(step_cell):
        if not np.isfinite(p.asnumpy()).all() and not simulated():
            raise UserError(f"{path} is not written: after {step} steps {p.name} is not finite")
    entries = [{"name": p.name, "data": p} for p in state(step_cell)]
    about = {"model": args.model, "classes": ",".join(CLASS_NAMES), "step": step, "best_mIoU": best_mIoU}
    about["input_size"] = "{},{}".format(*args.input_size_target)
    with atomic(path) as temporary:
        logging.disable(logging.CRITICAL)  # MindSpore logs the error that it raises as well
        try:
            mindspore.save_checkpoint(entries, str(temporary), append_dict=about, crc_check=True)
        finally:
            logging.disable(logging.NOTSET)
            temporary.with_suffix(".tmp").unlink(missing_ok=True)  # left by MindSpore on a full disk


def torch_name(name: str) -> str:
    """Return the authors' PyTorch name of a parameter: the last part of those of batch norm differs."""
    module, leaf = name.rsplit(".", 1)
    return f"{module}.{next((theirs for theirs, ours in BN_NAMES.items() if ours == leaf), leaf)}"


def save_safetensors(path: Path, net_G: nn.Cell) -> None:
    """Write G to a safetensors file under the authors' PyTorch names, float32, atomically.

    num_batches_tracked is left out: load_state_dict, with strict=True too, sets it to 0 where it is missing
    in a state dict without versions.
    """
    tensors = {torch_name(name): parameter.asnumpy() for name, parameter in net_G.parameters_and_names()}
    with atomic(path) as temporary:  # not save_file, whose error of a full disk is no OSError
        temporary.write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))


def restore(content: dict, path: Path, step_cell: nn.Cell) -> float:
    """Copy the values that `save` wrote into a training step; return the best mIoU of earlier validations.

    UserError if the checkpoint is of another kind of run.
    """
    check_classes(content, path)
    for p in state(step_cell):
        if p.name in ("scale_value", "counter", "skipped") and p.name not in content:
            continue  # saved on a device that computes in float32: loss scaling starts here
        if p.name not in content or content[p.name].shape != p.shape:
            raise UserError(f"{path}: {p.name} is missing or of another shape; --resume needs a checkpoint "
                            "of this project with the same --method, --model and --amp-level")
        assign(p, content[p.name])
    return float(content["best_mIoU"])
