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
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

from options import Parser
from tests import golden
from tests.scripts import ROOT

SIZES, FULL = ("320x180+256x128", "640x360+512x256"), "1280x720+1024x512"
STAGES = ("read", "forward", "upsample, argmax", "confusion matrix", "save")
SETTINGS = (0.9, 0.4, 40.0)  # damp, base, local: those of a step after the warm-up, with pixel weights
IMAGES = 8  # in the data sets for reading and evaluation
READ = 64  # images per turn of reading: many more than are read ahead
READING = {"GTA5": "1914x1052 to 1280x720, with labels", "Cityscapes": "2048x1024 to 1024x512"}


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


def take_turns(workers: list[Worker], rounds: int) -> list[dict]:
    """Return each worker's "median" and "spread" of seconds in `rounds` turns, and the "results" of these.

    "first" is how much longer than the median the first call took, which compiles, and "loss" its result;
    "peak" is that of the last turn.
    """
    firsts, out = [w.ask() for w in workers], []
    turns = [[w.ask() for w in workers] for _ in range(rounds)]
    for first, mine in zip(firsts, zip(*turns)):
        seconds = [answer["seconds"] for answer in mine]
        median = statistics.median(seconds)
        out.append({"median": median, "spread": f"{min(seconds):.2f}–{max(seconds):.2f}",
                    "results": [answer["result"] for answer in mine], "peak": mine[-1]["peak"],
                    "first": first["seconds"] - median, "loss": first["result"]})
    for w in workers:
        w.close()
    return out


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
    """Serve the evaluation of one image of the validation set, as in the evaluation script.

    The result is the seconds of each of STAGES.
    """
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

    def work() -> list[float]:
        k, times = next(indices), [time.perf_counter()]
        image, label = data[k]
        times.append(time.perf_counter())
        logits = [Tensor(C.asnumpy()) for C in net_G(Tensor(image[None]))]
        times.append(time.perf_counter())
        trainIds = best_class(logits, label.shape).asnumpy()[0]
        times.append(time.perf_counter())
        confusion_matrix(label, trainIds)
        times.append(time.perf_counter())
        save_prediction(Path(folder) / "ours", data.names[k], trainIds)
        times.append(time.perf_counter())
        return np.diff(times).tolist()

    serve(work)


def serve_reading(folder: str, which: str, workers: str) -> None:
    """Serve the reading of READ images through the input pipeline with so many threads."""
    from utils.system import device

    device.prepare_environment()
    from dataset.cityscapes_dataset import cityscapesDataSet
    from dataset.gta5_dataset import GTA5DataSet
    from dataset.pipeline import DomainSampler, batches

    data = GTA5DataSet(folder) if which == "GTA5" else cityscapesDataSet(folder, "val")
    stream = iter(batches(DomainSampler(data, 0, 10**6, 1, [0, 0], False, False), 1, int(workers)))
    serve(lambda: [next(stream)[0].shape for _ in range(READ)][-1])


def measure(args: argparse.Namespace, row: Callable, workers: Callable) -> None:
    """Add all rows of the table.

    At the paper's size there is no step of PyTorch: the memory of both sides would exceed 24 GB. Nor has it a
    counterpart of the input pipeline.
    """
    for size in args.size:
        both = take_turns(workers("step", size), args.rounds)
        row(f"training step {size}, s", "{:.2f}", [s["median"] for s in both])
        row("– fastest to slowest", "{}", [s["spread"] for s in both])
        row("– peak memory, GB", "{:.2f}", [s["peak"] for s in both])
        row("– compiling (first step − median), s", "{:.1f}", [both[0]["first"]])
        if len(both) == 2:
            worst = max(abs(a / b - 1) for a, b in zip(*(s["loss"] for s in both)))
            row("– largest relative difference of the first step's losses", "{:.0e}", [worst])
    [alone] = take_turns(workers("step", FULL, alone=True), 2)
    row(f"training step {FULL}, s (2 after the first)", "{:.1f}", [alone["median"]])
    row("– peak memory, GB", "{:.2f}", [alone["peak"]])
    with tempfile.TemporaryDirectory() as folder:
        # With this noise a file has 2.7 MB; the mean of GTA5 and Cityscapes is 2.3 MB.
        golden.write_city(Path(folder), "val", {f"{i:06d}": i for i in range(IMAGES)}, noise=1)
        golden.write_gta5(Path(folder), {f"{i:05d}": i for i in range(IMAGES)}, noise=1)
        both = take_turns(workers("evaluation", folder), 3)
        times = [np.median(side["results"], axis=0) for side in both]
        for k, stage in enumerate(STAGES):
            row(f"evaluation, {stage}, s per image", "{:.3f}", [t[k] for t in times])
        row("– all stages one after the other", "{:.3f}", [t.sum() for t in times])
        row("– peak memory, GB", "{:.2f}", [side["peak"] for side in both])
        for which, text in READING.items():
            for n in "124":
                [done] = take_turns(workers("reading", folder, which, n, alone=True), 5)
                row(f"reading {which} {text}, {n} threads, images/s", "{:.1f}", [READ / done["median"]])


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch, numpy and pillow")
    parser.add_argument("--markdown", metavar="FILE", default="tests/results/benchmark.md", help="the table")
    parser.add_argument("--size", nargs="*", default=SIZES, help="SOURCE+TARGET in pixels")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    args = parser.parse_args()
    lines, load = ["| what | this repository | PyTorch | ratio |", "|---|---|---|---|"], os.getloadavg()

    def row(what: str, form: str, values: list) -> None:
        cells = [form.format(value) for value in values] + [""] * (3 - len(values))
        if len(values) == 2 and not isinstance(values[0], str):
            cells[2] = f"{values[0] / values[1]:.2f}"
        lines.append(f"| {' | '.join((what, *cells))} |")
        print(lines[-1], flush=True)

    def workers(what: str, *argv: str, alone: bool = False) -> list[Worker]:
        ours = Worker(sys.executable, "tests.benchmark", "--serve", what, *argv)
        both = args.torch and not alone
        return [ours, Worker(args.torch, "tests.benchmark_torch", what, *argv)] if both else [ours]

    measure(args, row, workers)
    versions = f"MindSpore {importlib.metadata.version('mindspore')}"
    if args.torch:
        argv = [args.torch, "-c", "import torch; print('PyTorch', torch.__version__)"]
        torch = subprocess.run(argv, capture_output=True, text=True).stdout.strip()
        versions += f", {torch} (channels_last)"
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    cores = f"{len(os.sched_getaffinity(0))} cores of {processor[1] if processor else platform.processor()}"
    lines += ["", f"{versions}, Python {platform.python_version()}, {cores}. Medians of {args.rounds} turns. "
              f"Load average {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after."]
    Path(args.markdown).write_text("# Benchmark\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        globals()["serve_" + sys.argv[2]](*sys.argv[3:])
    else:
        main()
