"""The one place that decides on the device, the mode and the CPU's convolution workaround.

Call `prepare_environment()` before mindspore is imported; this module itself imports it only when asked to.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError


def prepare_environment() -> str | None:
    """Set what must be set before mindspore is imported; returns a line for the log if something was.

    MindSpore 2.9 and 2.10 hand plain NCHW weights to a oneDNN that has no fast AVX-512 kernel for them: 3x3
    convolutions then run 100-300 times slower. Limiting oneDNN to AVX2 brings them back.
    """
    os.environ.setdefault("GLOG_v", "3")  # errors only: MindSpore's warnings are not for our users
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        sys.stderr.write(f"no mindspore for {sys.executable}: pip install -r requirements.txt\n")
        sys.exit(2)
    cpuinfo = Path("/proc/cpuinfo")
    avx512 = cpuinfo.exists() and "avx512" in cpuinfo.read_text(encoding="utf-8")
    if (
        tuple(map(int, version.split(".")[:2])) in ((2, 9), (2, 10))
        and avx512
        and "ONEDNN_MAX_CPU_ISA" not in os.environ
    ):
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        return (
            f"MindSpore {version}: set ONEDNN_MAX_CPU_ISA=AVX2, its AVX-512 convolutions are slow on the CPU"
        )
    return None


def launched() -> bool:
    """Whether msrun, MindSpore's launcher, started this process."""
    return "MS_ROLE" in os.environ


def setup(device: str, device_id: int, mode: str, jit_level: str | None = None) -> str:
    """Choose device and mode of MindSpore; returns the device used: "Ascend", "GPU" or "CPU".

    A process that msrun started joins the others; then each has the card of its number on its machine.
    """
    import mindspore

    name = {"ascend": "Ascend", "gpu": "GPU", "cpu": "CPU"}.get(device)
    if name is None:
        name = "Ascend" if mindspore.device_context.ascend.is_available() else "CPU"
    if device_id and launched():
        raise UserError("--device-id has no effect under msrun: each process takes the card of its number")
    if device_id and name == "CPU":
        raise UserError(f"--device-id {device_id} names a card, but the device is the CPU: --device-id 0")
    try:
        mindspore.set_device(name, None if name == "CPU" or launched() else device_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--device {device} --device-id {device_id} cannot be used: {reason}; --device cpu needs no card"
        ) from None
    mindspore.set_context(mode=mindspore.GRAPH_MODE if mode == "graph" else mindspore.PYNATIVE_MODE)
    if jit_level or name == "CPU":
        # O1 compiles longer and is no faster on the CPU; Ascend keeps its own default.
        mindspore.set_context(jit_config={"jit_level": jit_level or "O0"})
    if launched():
        mindspore.set_auto_parallel_context(parallel_mode="data_parallel", gradients_mean=True)
        try:
            mindspore.communication.init()
        except RuntimeError as error:  # msrun's scheduler waits in there for the processes
            if os.environ["MS_ROLE"] != "MS_SCHED":
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"a process ended early: see \"error:\" in worker_*.log ({reason})") from None
    return name


def half_precision(net) -> None:
    """Let a network compute in float16, apart from batch norm, with weights kept in float32."""
    import mindspore

    net.to_float(mindspore.float16)
    for _, cell in net.cells_and_names():
        if isinstance(cell, mindspore.nn.BatchNorm2d):
            cell.to_float(mindspore.float32)


def recompute(net_G) -> None:
    """Let the activations inside ResNet's blocks be computed again when their gradients are.

    But not batch norm's, whose running statistics would move twice.
    """
    from mindspore import nn

    for layer in (net_G.layer1, net_G.layer2, net_G.layer3, net_G.layer4):
        for block in layer:
            block.recompute()
            for _, cell in block.cells_and_names():
                if isinstance(cell, nn.BatchNorm2d):
                    cell.bn_train.recompute(False)


def compiled(function: Callable, jit_level: str | None) -> Callable:
    """A method of a cell as one graph; by default at MindSpore's own level."""
    import mindspore

    return mindspore.jit(function, jit_level=jit_level or "O0", backend="ms_backend")


def on_cpu() -> bool:
    """Whether MindSpore computes on the CPU; `setup` decides."""
    import mindspore

    return mindspore.get_context("device_target") == "CPU"


def versions() -> dict[str, str]:
    """Python, platform and the five packages, for options.json and the results."""
    packages = ("mindspore", "numpy", "pillow", "scipy", "tqdm")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
