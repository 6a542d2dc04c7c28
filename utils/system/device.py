"""The device: its choice, what it computes in, and the versions of its software.

Call `prepare_environment` before mindspore is imported. This module imports it only within functions.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from utils.system.errors import UserError

# Chips by what their convolutions compute in.
FLOAT16_CHIPS, HF32_CHIPS = ("ascend910",), ("ascend910b", "ascend910_93")
DRIVER = Path("/usr/local/Ascend/driver/version.info")


def npu_evidence() -> str | None:
    """Return what shows that this machine has an NPU, usable or not: a device file or CANN's variable."""
    for path in sorted(Path("/dev").glob("davinci*")):
        return str(path)
    return "ASCEND_HOME_PATH" if os.environ.get("ASCEND_HOME_PATH") else None


def prepare_environment() -> str | None:
    """Set environment variables that MindSpore reads when it is imported; exit if it is not installed.

    Return a line for the log if its version calls for one.
    """
    # MindSpore's warnings matter only with an NPU, for example about a CANN of another version.
    os.environ.setdefault("GLOG_v", "2" if npu_evidence() else "3")
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        sys.stderr.write(f"no mindspore for {sys.executable}: pip install -r requirements.txt\n")
        sys.exit(2)
    cpuinfo = Path("/proc/cpuinfo")
    avx512 = cpuinfo.exists() and "avx512" in cpuinfo.read_text(encoding="utf-8")
    # These hand plain NCHW weights to a oneDNN that has no fast AVX-512 kernel for them: 3x3 convolutions run
    # 100 to 300 times slower.
    if version.startswith(("2.9.", "2.10.")) and avx512 and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        return f"MindSpore {version}: set ONEDNN_MAX_CPU_ISA=AVX2, as its AVX-512 convolutions are slow"
    if tuple(map(int, version.split(".")[:2])) > (2, 10):
        return (f"MindSpore {version} is newer than the tested 2.7.0 to 2.10.0; from 2.11 on, the momentum "
                "of batch norm was announced to change its meaning")  # fmt: skip
    return None


def process_count() -> int:
    """Return how many processes the launcher started: msrun, mpirun, a rank table, or a DryRun of several."""
    names = ("MS_WORKER_NUM", "OMPI_COMM_WORLD_SIZE", "RANK_SIZE")  # last: Ascend containers preset it to 1
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 1))


def launched() -> bool:
    """Return whether this process belongs to a job of several, or msrun started it."""
    return "MS_ROLE" in os.environ or process_count() > 1


def setup(args: argparse.Namespace) -> None:
    """Set MindSpore's device and mode by the machine options (see options.add_machine_options).

    Several processes join each other here, and each takes the device of its number on its machine. UserError
    if the device cannot be used or the options contradict each other.
    """
    import mindspore

    name, device_id, found = {"cpu": "CPU", "gpu": "GPU"}.get(args.device, "Ascend"), args.device_id, ""
    if args.device == "auto":  # an NPU that cannot be used is an error, not a reason to train on the CPU
        if evidence := npu_evidence():
            found = f": this machine has an NPU ({evidence}), which"
        elif not ascend().is_pkg_support_device("Ascend"):
            name = "CPU"
    if args.jit_level and args.mode == "pynative":
        raise UserError("--jit-level has no effect with --mode pynative")
    if args.jit_level == "O2" and (name != "Ascend" or os.environ.get("MS_SIMULATION_LEVEL")):
        raise UserError("--jit-level O2 needs an NPU; --device cpu, gpu and DryRuns have O0 and O1")
    by_rank_table = os.environ.get("RANK_TABLE_FILE") and not os.environ.keys() & {"MS_ROLE", "MS_SCHED_HOST"}
    if name == "Ascend" and by_rank_table and args.mode == "graph" and args.jit_level != "O2":
        raise UserError("RANK_TABLE_FILE makes MindSpore compile at O2, which is untested: unset it (several "
                        "processes start by msrun), or add --jit-level O2")  # fmt: skip
    if device_id and launched():
        raise UserError("--device-id has no effect under msrun: each process takes the device of its number")
    if device_id and name == "CPU":
        raise UserError(f"--device-id {device_id} names an NPU, but the device is the CPU: --device-id 0")
    if launched():  # None: MindSpore takes the process's number on its machine; a rank table says which
        device_id = int(os.environ.get("DEVICE_ID", 0)) if by_rank_table else None
    if args.deterministic:
        compute_deterministically()
    try:
        if not ascend().is_pkg_support_device(name):  # MindSpore's own check of a GPU logs errors of its own
            reason = ascend().load_plugin_error() if name == "Ascend" else "MindSpore finds no CUDA 11"
            raise RuntimeError(reason or "this MindSpore was built without it")
        mindspore.set_device(name, None if name == "CPU" else device_id)
        if args.conv_precision == "float32" and (name == "GPU" or chip() in FLOAT16_CHIPS):
            raise UserError(f"--conv-precision float32 is not for {chip() or name}: leave it out")
        if args.conv_precision == "float32" and name == "Ascend":
            # device_context.ascend.op_precision.conv_allow_hf32 is the newer interface, but in MindSpore 2.7
            # to 2.10 it affects only aclnn operators; nn.Conv2d and its gradients are aclop operators.
            mindspore.set_context(ascend_config={"conv_allow_hf32": False})
        if name == "Ascend" and not launched():
            mindspore.runtime.synchronize()  # starts the NPU, so that its errors are raised here
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--device {args.device}{found} cannot be used: {one_line(error)}; with an NPU, first: source "
            "/usr/local/Ascend/*/set_env.sh (README, \"Ascend 910B\"); --device cpu needs none"
        ) from None
    mindspore.set_context(mode=mindspore.GRAPH_MODE if args.mode == "graph" else mindspore.PYNATIVE_MODE)
    # Without a level, MindSpore 2.7 uses the deprecated GE backend (O2) on a 910A.
    mindspore.set_context(jit_config={"jit_level": args.jit_level or "O0"})
    if launched():
        init_communication()


@cache
def compute_deterministically() -> None:
    """Choose operators that repeat their results to the bit; once, as MindSpore refuses a second call."""
    import mindspore

    mindspore.set_deterministic(True)


def init_communication() -> None:
    """Join the other processes of the job; UserError if none comes, in the scheduler if one ends early."""
    import mindspore

    try:
        mindspore.communication.init()
    except RuntimeError as error:
        role = os.environ.get("MS_ROLE")
        if role == "MS_WORKER":
            raise
        message = f"{process_count()} processes cannot join: for a single one, unset RANK_SIZE"
        if role:  # msrun's scheduler, which stays in `init` until the processes end
            logs = Path(os.path.realpath("/proc/self/fd/1")).parent.glob("worker_*.log")
            named = [log for log in logs if "error:" in log.read_text("utf-8", errors="replace")]
            message = f'a process ended early: see "error:" in {named[0] if named else "worker_*.log"}'
        raise UserError(f"{message} ({one_line(error)})") from None


def ascend():
    """Return MindSpore's internal context: public functions report less about the NPU, and as warnings."""
    from mindspore._c_expression import MSContext

    return MSContext.get_instance()


def one_line(error: Exception) -> str:
    """Return an error message of MindSpore as one line, without its C++ call stack and horizontal rules."""
    text = re.sub(r"-+\n- C\+\+ Call Stack.*", "", str(error), flags=re.DOTALL)
    return " ".join(line.strip() for line in text.splitlines() if line.strip("- ")).rstrip(".")


def chip() -> str:
    """Return MindSpore's name of the NPU, as ascend910 (a 910A); "" elsewhere, and in DryRuns since 2.8."""
    return ascend().get_ascend_soc_version() if on_npu() else ""


def precision(amp_level: str, conv_precision: str) -> dict[str, str]:
    """Return the precision in which the device computes, for the log and options.json.

    A 910A computes convolutions and matrix products in float16 only. Newer NPUs round the inputs of
    convolutions to HF32 (11 bits of mantissa) by default, but not those of matrix products.
    """
    import mindspore

    target, convolution, product = mindspore.get_context("device_target"), "float32", "float32"
    if target == "Ascend" and chip() not in HF32_CHIPS:
        convolution = product = "float16" if chip() in FLOAT16_CHIPS else "unknown"
    elif conv_precision == "default" and target != "CPU":
        convolution = "HF32" if target == "Ascend" else "float32 or TF32"
    return {
        "device": chip() or target,
        "convolutions of G": convolution if amp_level == "O0" else "float16",
        "convolutions of D": "float16" if amp_level == "O3" else convolution,
        "matrix products": product,
    }


def precision_line(precision: dict[str, str]) -> str:
    """Return the values of `precision` as a line for the log."""
    return "precision: " + ", ".join(f"{name} {value}" for name, value in precision.items())


def target() -> str:
    """Return the device in use, which `setup` chose: "ascend", "gpu" or "cpu"."""
    import mindspore

    return mindspore.get_context("device_target").lower()


def on_cpu() -> bool:
    """Return whether MindSpore computes on the CPU."""
    return target() == "cpu"


def on_npu() -> bool:
    """Return whether MindSpore computes on Ascend."""
    return target() == "ascend"


def assign(parameter, values) -> None:
    """Change a parameter in place to `values`, an array of its shape.

    Graphs that are already compiled do not see a buffer replaced by Parameter.set_data.
    """
    from mindspore import Tensor, ops

    ops.assign(parameter, Tensor(values, parameter.dtype))


def profiled(steps: range, count: int, folder: Path) -> Iterator[int]:
    """Yield `steps` to a training loop; record `count` of them with MindSpore's profiler, from the 11th on.

    MindSpore writes to a new folder below `folder`, whose name has the process and the time. UserError if
    there are no more than ten steps, which compile and warm up.
    """
    if not count:
        yield from steps
        return
    if len(steps) <= 10:
        raise UserError(f"--profile skips 10 steps and this process has only {len(steps)}: give it more")
    from mindspore import profiler

    window = profiler.schedule(wait=9, warmup=1, active=count, repeat=1)
    write = profiler.tensorboard_trace_handler(str(folder))
    with profiler.profile(schedule=window, on_trace_ready=write) as recorder:
        for i in steps:
            yield i
            recorder.step()


def simulated() -> bool:
    """Return whether this is a DryRun: MindSpore compiles for an NPU, but computes nothing."""
    return on_npu() and bool(os.environ.get("MS_SIMULATION_LEVEL"))


def simulation_report() -> str:
    """Return a line for the log about a DryRun, with the device memory that it would take."""
    from mindspore import runtime

    used, reserved = runtime.max_memory_allocated() / 2**20, runtime.max_memory_reserved() / 2**20
    memory = f"{used:,.0f} MiB, {reserved:,.0f} MiB with fragments, and workspace of CANN's operators on top"
    return ("MS_SIMULATION_LEVEL is set: all values are simulated and no checkpoint is written; peak device "
            f"memory {memory}")  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform, the packages and, if found, CANN and the NPU's driver."""
    packages = ("mindspore", "numpy", "pillow", "scipy", "tqdm")
    found = {name: importlib.metadata.version(name) for name in packages}
    home = Path(os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest"))
    toolkit = [("CANN", path) for path in home.glob("*-linux/ascend_toolkit_install.info")]
    for name, path in [("NPU driver", DRIVER), ("CANN", home / "compiler" / "version.info"), *toolkit]:
        text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
        if match := re.search("^version=(.*)$", text, re.IGNORECASE | re.MULTILINE):
            found[name] = match[1].strip()
    return {"python": platform.python_version(), "platform": platform.platform(), **found}
