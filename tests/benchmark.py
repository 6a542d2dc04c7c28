"""Compare the speed of this project with plain PyTorch; write the table tests/results/benchmark.md.

    python -m tests.benchmark [--torch PYTHON] [--markdown FILE] [--size 320x180+256x128 ...]

Both sides are processes that wait for requests on a pipe and take turns, a step of one, a step of the other,
so that other load on the machine affects both. On a busy machine PyTorch still loses far more, as its threads
wait for each other in a spin (OMP_WAIT_POLICY=passive lets the threads of both sides sleep instead).
PYTHON is an interpreter with torch, numpy and pillow; without it only this project is measured.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np

from options import Parser, number
from tests import golden
from tests.scripts import ROOT
from utils.system.errors import UserError, run_script

SIZES, FULL = ("320x180+256x128", "640x360+512x256"), "1280x720+1024x512"
HEAD = """# Benchmark

`python -m tests.benchmark --torch PYTHON`: batches of one image, source + target size; evaluation of images
of 2048x1024 from an input of 1024x512.
"""
SETTINGS = (0.9, 0.4, 40.0)  # damp, base, local: those of a step after the warm-up, with pixel weights


def sizes(text: str) -> str:
    """Return a pair of sizes as it is; an argparse type."""
    if not re.fullmatch(r"\d+x\d+\+\d+x\d+", text) or min(map(int, re.findall(r"\d+", text))) < 32:
        raise argparse.ArgumentTypeError(f"'{text}' is not SOURCE+TARGET, at least 32, such as {SIZES[0]}")
    return text


def torch_version(python: str) -> str:
    """Return the version of PyTorch that an interpreter has; UserError if it cannot run our other side."""
    command = [python, "-c", "import numpy, PIL, torch; print('PyTorch', torch.__version__)"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except OSError as error:
        reason = error.strerror
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["it ends with an error"])[-1]
    raise UserError(f"--torch {python}: {reason}; name an interpreter with torch, numpy and pillow")


def inputs(size: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a source image, its labels and a target image, all random, as batches of one."""
    w, h, w_t, h_t = map(int, size.replace("+", "x").split("x"))
    rng = np.random.default_rng(0)
    x_s, x_t = (rng.normal(0, 60, (1, 3, *s)).astype(np.float32) for s in ((h, w), (h_t, w_t)))
    y = rng.integers(0, 20, (1, h, w)).astype(np.int32)
    return x_s, np.where(y == 19, 255, y), x_t


def serve(work: Callable[[], object]) -> None:
    """Do `work` for each line on stdin; print its seconds, the process's peak memory in GB and its result."""
    for _ in sys.stdin:
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        # Not getrusage: a child of a large process begins with that one's peak.
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1]) / 1e6
        print("ANSWER " + json.dumps({"seconds": seconds, "peak": peak, "result": result}), flush=True)


class Worker:
    """A process that runs `serve`; `ask()` returns its next answer."""

    def __init__(self, python: str, module: str, *argv: str):
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        self.process = subprocess.Popen([python, "-m", module, *argv], cwd=ROOT, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})

    def ask(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line[7:])
        raise SystemExit(f"a worker ended: {self.process.args}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(torch: str | None, rounds: int, what: str, *argv: str) -> list[list[dict]]:
    """Return the answers of this project's worker and, with an interpreter, PyTorch's: a first one, in which
    ours compiles, and one per turn.
    """
    workers = [Worker(sys.executable, "tests.benchmark", "--serve", what, *argv)]
    workers += [Worker(torch, "tests.benchmark_torch", what, *argv)] if torch else []
    answers = [[w.ask() for w in workers] for _ in range(1 + rounds)]
    for w in workers:
        w.close()
    return list(zip(*answers))


def median(answers: list[dict]) -> float:
    """Return the median of the seconds, without the first answer's."""
    return statistics.median(answer["seconds"] for answer in answers[1:])


def serve_step(size: str) -> None:
    """Serve this project's training step, built as in the training script."""
    import CLAN_train_gta5_2_city as script  # sets the environment; mindspore comes after it  # isort: skip
    from mindspore import Tensor

    from options.train_options import get_arguments
    from utils import checkpoint
    from utils.system import device

    source, target = size.split("+")
    args = get_arguments(["--input-size", source, "--input-size-target", target, "--device", "cpu"])
    device.setup(args)
    net_G, net_D = script.generator("resnet101"), script.discriminator("resnet101")
    checkpoint.load(net_G, golden.state(golden.shapes_G(), "t"), "generated", "net_G")
    checkpoint.load(net_D, golden.state(golden.shapes_D(), "tD."), "generated", "net_D")
    step = script.CLANStep(args, net_G, net_D).set_train()
    images = tuple(Tensor(x) for x in inputs(size))
    serve(lambda: step.step([images], golden.labelled(images[1]), *SETTINGS, lr=2.5e-4, lr_D=1e-4).tolist())


def serve_evaluation(folder: str) -> None:
    """Serve the evaluation of one image of the validation set, as in the evaluation script."""
    import CLAN_evaluate_city as script  # isort: skip
    from mindspore import Tensor

    from dataset.cityscapes_dataset import cityscapesDataSet
    from options.train_options import get_arguments
    from utils import checkpoint
    from utils.evaluation import best_class
    from utils.metrics import confusion_matrix
    from utils.system import device
    from utils.visual import save_prediction

    device.setup(get_arguments(["--device", "cpu"]))
    net_G = script.generator("resnet101").set_train(False)
    checkpoint.load(net_G, golden.state(golden.shapes_G()), "generated", "net_G")
    data = cityscapesDataSet(folder, "val", labels=True)
    indices = cycle(range(len(data)))

    def work() -> None:
        k = next(indices)
        image, label = data[k]
        logits = [Tensor(C.asnumpy()) for C in net_G(Tensor(image[None]))]
        trainIds = best_class(logits, label.shape).asnumpy()[0]
        confusion_matrix(label, trainIds)
        save_prediction(Path(folder) / "ours", data.names[k], trainIds)

    serve(work)


def measure(sizes: list[str], rounds: int, torch: str | None) -> Iterator[tuple[str, str, list]]:
    """Yield each row of the table as soon as it is measured: its name, the format of its values, and these.

    At the paper's size there is no step of PyTorch: the memory of both sides would exceed 24 GB.
    """
    for size, turns, theirs in [*((size, rounds, torch) for size in sizes), (FULL, 2, None)]:
        sides = take_turns(theirs, turns, "step", size)
        yield f"training step {size}, s", "{:.2f}", [median(side) for side in sides]
        times = [sorted(answer["seconds"] for answer in side[1:]) for side in sides]
        yield "– fastest to slowest", "{}", [f"{t[0]:.2f}–{t[-1]:.2f}" for t in times]
        yield "– peak memory, GB", "{:.2f}", [side[-1]["peak"] for side in sides]
        yield "– compiling (first step − median), s", "{:.1f}", [sides[0][0]["seconds"] - median(sides[0])]
        if theirs:
            worst = max(abs(a / b - 1) for a, b in zip(*(side[0]["result"] for side in sides)))
            yield "– largest relative difference of the first step's losses", "{:.0e}", [worst]
    with tempfile.TemporaryDirectory() as folder:
        golden.write_city(Path(folder), "val", {f"{i:06d}": i for i in range(4)})
        sides = take_turns(torch, 3, "evaluation", folder)
        yield "evaluation, s per image", "{:.2f}", [median(side) for side in sides]
        yield "– peak memory, GB", "{:.2f}", [side[-1]["peak"] for side in sides]


def main(args: argparse.Namespace) -> None:
    """Print the table, row by row, and write it with a line about the machine."""
    versions = f"MindSpore {importlib.metadata.version('mindspore')}"
    if args.torch:
        versions += f", {torch_version(args.torch)} (channels_last)"
    if not Path(args.markdown).parent.is_dir():
        raise UserError(f"--markdown {args.markdown}: no such folder; make it first")
    lines, load = ["| what | this repository | PyTorch | ratio |", "|---|---|---|---|"], os.getloadavg()
    for what, form, values in measure(args.size, args.rounds, args.torch):
        cells = [form.format(value) for value in values] + [""] * (3 - len(values))
        if len(values) == 2 and not isinstance(values[0], str):
            cells[2] = f"{values[0] / values[1]:.2f}"
        lines.append(f"| {' | '.join((what, *cells))} |")
        print(lines[-1], flush=True)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    cores = f"{len(os.sched_getaffinity(0))} cores of {processor[1] if processor else platform.processor()}"
    lines += ["", f"{versions}, Python {platform.python_version()}, {cores}. Medians of {args.rounds} turns, "
              f"of 2 at {FULL}, of 3 for the evaluation. "
              f"Load average {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after."]
    Path(args.markdown).write_text("\n".join([HEAD, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        globals()["serve_" + sys.argv[2]](*sys.argv[3:])
        sys.exit()
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch, numpy and pillow")
    parser.add_argument("--markdown", metavar="FILE", default="tests/results/benchmark.md", help="the table")
    parser.add_argument("--size", nargs="*", type=sizes, default=SIZES, help="SOURCE+TARGET in pixels")
    parser.add_argument("--rounds", type=number(int, 1), default=9, help="turns of each side")
    run_script(main, parser.parse_args())
