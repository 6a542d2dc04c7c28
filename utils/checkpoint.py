"""Checkpoints: our own single file, and the names that other people's files use for the same tensors.

Our .ckpt holds net_G.*, net_D.*, the state of both optimisers and, as text, the network's name, the step and
the best mIoU, so that reading one needs no further option.
"""

import os
import re
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from utils import torch_file
from utils.errors import UserError
from utils.files import atomic

BN_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
BACKBONE = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
CLASSIFIERS = ("layer5.", "layer6.")


def find(path: str) -> str:
    """`path` if it is there, else the same name with .ckpt, .pth or .pt; UserError if there is none."""
    stem = os.path.splitext(path)[0]
    for candidate in (path, f"{stem}.ckpt", f"{stem}.pth", f"{stem}.pt"):
        if Path(candidate).is_file():
            return candidate
    raise UserError(f"{path}: no such checkpoint, nor with the suffix .ckpt, .pth or .pt")


def read(path: str) -> dict[str, np.ndarray | str]:
    """All tensors (and texts) of a .ckpt or of a PyTorch .pth / .pt file, under the names in the file."""
    if Path(path).suffix in (".pth", ".pt"):
        content = torch_file.load(path)
        content = content.get("state_dict", content) if isinstance(content, dict) else content
        if not isinstance(content, dict) or not all(isinstance(v, np.ndarray) for v in content.values()):
            raise UserError(
                f"{path}: holds no plain state dict (names and tensors); save model.state_dict() alone"
            )
        return content
    try:
        content = mindspore.load_checkpoint(path)
    except Exception as error:  # MindSpore raises a different type for each kind of damage
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable MindSpore checkpoint ({reason})") from None
    return {name: value if isinstance(value, str) else value.asnumpy() for name, value in content.items()}


def model_of(content: dict) -> str:
    """The name of the network in a checkpoint; other people's files are the paper's ResNet-101."""
    return content.get("model", "resnet101")


def tensors_of(content: dict, net: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of one network ("net_G", "net_D") under this project's names, and the names left out."""
    own = {name[len(net) + 1 :]: v for name, v in content.items() if name.startswith(net + ".")}
    if own:
        return own, []
    # A single classifier (the DeepLab init's) would make C1 start elsewhere than C2: both start afresh.
    one_classifier = net == "net_G" and not any("layer6." in name for name in content)
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
        if isinstance(value, str) or (one_classifier and ours.startswith("layer5.")):
            left_out.append(name)
        else:
            tensors[ours] = value
    return tensors, left_out


def load(net: nn.Cell, content: dict, path: str, prefix: str) -> str:
    """Copy what fits into G ("net_G") or D ("net_D"); returns a report of what matched and what did not.

    UserError if the backbone of G, or D, is not covered completely: a checkpoint that silently did not load
    is the most common failure with this family of code.
    """
    tensors, skipped = tensors_of(content, prefix)
    matched, left = [], []
    for name, parameter in net.parameters_and_names():
        value = tensors.get(name)
        if value is not None and value.shape == parameter.shape and value.dtype.kind == "f":
            parameter.set_data(Tensor(value.astype(np.float32)))
            matched.append(name)
        else:
            left.append(name)
    needed = [name for name in left if not name.startswith(CLASSIFIERS)]
    if needed:
        hint = "" if matched else "; is it a checkpoint of another network?"
        raise UserError(
            f"{path}: {len(needed)} of {len(matched) + len(left)} tensors of {prefix} are not in it or "
            f"differ in shape, such as {', '.join(needed[:3])}{hint}"
        )
    skipped += [name for name in tensors if name not in matched]

    def listed(names: list[str]) -> str:
        return f" ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" if names else ""

    return (
        f"{path} -> {prefix[-1]}: {len(matched)} tensors matched, {len(skipped)} skipped{listed(skipped)}, "
        f"{len(left)} left at their initial value{listed(left)}"
    )


def state(step_cell: nn.Cell) -> list[Parameter]:
    """What a run must keep: all parameters of networks and optimisers but the rates, which options give."""
    return [p for p in step_cell.get_parameters() if "learning_rate" not in p.name]


def save(path: Path, step_cell: nn.Cell, model: str, step: int, best_mIoU: float) -> None:
    """Write all parameters of a training step, networks and optimisers, to `path` (.ckpt), atomically."""
    with atomic(path) as temporary:
        mindspore.save_checkpoint(
            [{"name": p.name, "data": p} for p in state(step_cell)],
            str(temporary),
            append_dict={"model": model, "step": step, "best_mIoU": best_mIoU},
        )
        temporary.chmod(0o644)  # MindSpore makes it read-only for its owner


def restore(path: str, step_cell: nn.Cell) -> tuple[int, float]:
    """The inverse of `save`; returns the number of steps done and the best mIoU so far."""
    content = read(path)
    for p in state(step_cell):
        value = content.get(p.name)
        if value is None or value.shape != p.shape:
            raise UserError(
                f"{path}: {p.name} is missing or of another shape; --continue-train needs a checkpoint "
                "of this project, made with the same --method and --model"
            )
        p.set_data(Tensor(value, p.dtype))
    return int(content["step"]), float(content["best_mIoU"])
