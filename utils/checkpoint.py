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

from dataset.classes import CLASS_NAMES, INFO_PATH
from model.CLAN_G import CLASSIFIERS
from utils import torch_file
from utils.system.device import assign
from utils.system.errors import UserError
from utils.system.files import atomic

BN_NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
            "running_var": "moving_variance"}
BACKBONE = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
LOSS_SCALING = ("scale_value", "counter", "skipped")
CKPT_TYPES = {"Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "Float16", "Float32", "Float64"}


def find(path: str) -> str:
    """Return `path` if it exists, else the same name with .ckpt, .pth or .pt; UserError if there is none."""
    head, suffix = os.path.splitext(path)
    stem = head if suffix in (".ckpt", ".pth", ".pt") else path
    for candidate in (path, f"{stem}.ckpt", f"{stem}.pth", f"{stem}.pt"):
        if Path(candidate).is_file():
            return candidate
    raise UserError(f"{path}: no such checkpoint, nor with the suffix .ckpt, .pth or .pt")


def read(path: str) -> dict[str, np.ndarray | str]:
    """Return all tensors and texts of a .ckpt or a PyTorch .pth / .pt file, under the names in the file."""
    if Path(path).suffix in (".pth", ".pt"):
        content = torch_file.load(path)
        content = content.get("state_dict", content) if isinstance(content, dict) else content
        if not isinstance(content, dict) or not all(isinstance(v, np.ndarray) for v in content.values()):
            raise UserError(f"{path}: holds no plain state dict (names and tensors); save model.state_dict()")
        return content
    try:
        return read_ckpt(Path(path).read_bytes())
    except (ValueError, DecodeError) as error:
        raise UserError(f"{path}: not a readable MindSpore checkpoint ({error})") from None


def read_ckpt(raw: bytes) -> dict[str, np.ndarray | str]:
    """Return the tensors and texts of a .ckpt; ValueError or DecodeError if it is damaged.

    mindspore.load_checkpoint is not used: it trusts the shapes in the file and compares the checksum only on
    request.
    """
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
    if not has_checksum and any(name.startswith("net_G.") for name in content):
        raise ValueError("the checksum at its end is missing: truncated, or saved by something else")
    return content


def step_of(path: Path) -> int | None:
    """Return the number of steps in a checkpoint that `save` wrote; None if it is missing or damaged."""
    try:
        return int(read(str(path))["step"])
    except (UserError, OSError, KeyError, ValueError):
        return None


def model_of(content: dict) -> str:
    """Return the name of a checkpoint's network; files of others hold the paper's ResNet-101."""
    return content.get("model", "resnet101")


def check_classes(content: dict, path: str | Path) -> None:
    """Raise UserError if a checkpoint names other classes than info.json; files of others name none."""
    theirs, ours = content.get("classes"), ",".join(CLASS_NAMES)
    if isinstance(theirs, str) and theirs != ours:
        raise UserError(
            f"{path} has {theirs.count(',') + 1} classes ({theirs}), but {INFO_PATH} {len(CLASS_NAMES)} "
            f"({ours}); take the info.json that it was trained with, or another checkpoint"
        )


def tensors_of(content: dict, net: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return one network's tensors ("net_G", "net_D") under this project's names, and the names left out."""
    own = {name[len(net) + 1 :]: v for name, v in content.items() if name.startswith(net + ".")}
    if own:
        return own, []
    # Load the classifiers only if the file has two of the same shapes. A single one (DeepLab's) or two that
    # differ (AdaptSegNet's, whose first one sees layer3) are left out.
    shapes_C1, shapes_C2 = (
        {np.shape(v) for name, v in content.items() if part in name} for part in CLASSIFIERS
    )
    one_classifier = net == "net_G" and shapes_C1 != shapes_C2
    tensors, left_out = {}, []
    for name, value in content.items():
        ours = name.replace("down_sample", "downsample")  # MindCV
        if net == "net_G":
            _, _, rest = ours.partition(".")
            if not ours.startswith(BACKBONE + CLASSIFIERS) and rest.startswith(BACKBONE + CLASSIFIERS):
                ours = rest  # "Scale." of the DeepLab init, "module." of DataParallel
            bn = re.fullmatch(r"(.*\b(?:bn\d|downsample\.1))\.(\w+)", ours)
            if bn:
                ours = f"{bn[1]}.{BN_NAMES.get(bn[2], bn[2])}"
        if isinstance(value, str) or (one_classifier and ours.startswith(CLASSIFIERS)):
            left_out.append(name)
        else:
            tensors[ours] = value
    return tensors, left_out


def load(net: nn.Cell, content: dict, path: str, prefix: str, complete: bool = False) -> str:
    """Copy the tensors that fit into G ("net_G") or D ("net_D"); return a line that reports them.

    UserError unless the file has all of D or of G's backbone and, with `complete`, of G's classifiers.
    """
    check_classes(content, path)
    tensors, skipped = tensors_of(content, prefix)
    matched, left = [], []
    for name, parameter in net.parameters_and_names():
        value = tensors.get(name)
        if value is not None and value.shape == parameter.shape and value.dtype.kind == "f":
            assign(parameter, value)
            matched.append(name)
        else:
            left.append(name)
    needed = [name for name in left if complete or not name.startswith(CLASSIFIERS)]
    if needed:
        other = "is it of another network?" if prefix == "net_G" else "does it hold G alone?"
        raise UserError(
            f"{path}: {len(needed)} of {len(matched) + len(left)} tensors of {prefix} are not in it or "
            f"differ in shape, such as {', '.join(needed[:3])}; {other}"
        )
    skipped += [name for name in tensors if name not in matched]

    def listed(names: list[str]) -> str:
        return f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" if names else ""

    return (
        f"{path} -> {prefix[-1]}: {len(matched)} tensors matched, {len(skipped)} skipped{listed(skipped)}, "
        f"{len(left)} left at their initial value{listed(left)}"
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
        assign(p, value)
    return int(content["step"]), float(content["best_mIoU"])
