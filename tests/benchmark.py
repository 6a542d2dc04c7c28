"""The speed of this project next to plain PyTorch and to the machine's limit. One run, one table.

    python -m tests.benchmark [--torch PYTHON] [--markdown FILE] [--size 320x180+256x128 ...]

Both sides are processes of their own, fed over pipes, that take turns: a step of one, a step of the other.
So what else the machine does hits both; but on a busy machine PyTorch's threads, which wait for each other in
a spin, lose far more. Then add --busy: the threads of both sides sleep while they wait, and CPU seconds are
the better measure. The load is printed. PYTHON is an interpreter with torch, numpy and pillow; without it
only this project is measured.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests import golden
from tests.scripts import ROOT

SIZES, FULL = ("320x180+256x128", "640x360+512x256"), "1280x720+1024x512"
STAGES = ("read", "forward", "upsample, argmax", "confusion matrix", "save")
SETTINGS = (0.9, 0.4, 40.0)  # damp, base, local: a step after the preheating, every pixel weighted
CITY = "leftImg8bit/val/aachen/aachen_000000_000019_leftImg8bit.png"
IMAGES = 8  # in the sets for reading and evaluation
READ = 64  # images per turn of reading: many more than are held ahead


def pair(text: str) -> list[tuple[int, int]]:
    """"320x180+256x128" -> [(320, 180), (256, 128)], source and target."""
    return [tuple(map(int, part.split("x"))) for part in text.split("+")]


def inputs(size: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One source image, its labels and one target image, generated."""
    (w, h), (w_t, h_t) = pair(size)
    rng = np.random.default_rng(0)
    x_s, x_t = (rng.normal(0, 60, (1, 3, *s)).astype(np.float32) for s in ((h, w), (h_t, w_t)))
    y = rng.integers(0, 20, (1, h, w)).astype(np.int32)
    return x_s, np.where(y == 19, 255, y), x_t


def serve(work: Callable[[], list[float]]) -> None:
    """Answer each line "k" on stdin by doing `work` k times: seconds, CPU seconds, peak GB, last result."""
    for line in sys.stdin:
        seconds, cpu = [], []
        for _ in range(int(line)):
            started, used = time.perf_counter(), time.process_time()
            result = work()
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        answer = {"seconds": seconds, "cpu": cpu, "peak": peak, "result": result}
        print("ANSWER " + json.dumps(answer), flush=True)


class Worker:
    """A process that serves; `ask(k)` returns its answer."""

    def __init__(self, python: str, module: str, *argv: str, **env: str):
        self.process = subprocess.Popen(
            [python, "-m", module, *argv], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), **env},
        )

    def ask(self, k: int) -> dict:
        self.process.stdin.write(f"{k}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line[7:])
        raise SystemExit(f"a worker ended: {self.process.args}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(workers: list[Worker], rounds: int, k: int = 1) -> list[dict]:
    """Medians of all workers after `rounds` turns of k; "first" is what the first call took above that."""
    firsts = [w.ask(1) for w in workers]
    answers = [[w.ask(k) for w in workers] for _ in range(rounds)]
    out = []
    for first, mine in zip(firsts, zip(*answers)):
        seconds = [s for answer in mine for s in answer["seconds"]]
        median = statistics.median(seconds)
        start = first["seconds"][0] - median
        out.append({**mine[-1], "median": median, "best": min(seconds), "first": start})
        out[-1]["loss"] = first["result"]
        out[-1]["cpu"] = statistics.median(c for answer in mine for c in answer["cpu"])
    for w in workers:
        w.close()
    return out


def serve_step(size: str) -> None:
    """This project's training step, as the training script builds it."""
    import CLAN_train_gta5_2_city as script  # sets the environment; mindspore comes after it  # isort: skip
    from mindspore import Tensor

    from options.train_options import get_arguments
    from utils import checkpoint, device

    device.setup("cpu", 0, "graph")
    source, target = (f"{w},{h}" for w, h in pair(size))
    args = get_arguments(["--input-size", source, "--input-size-target", target])
    net_G, net_D = script.generator("resnet101"), script.discriminator("resnet101")
    checkpoint.load(net_G, golden.state(golden.shapes_G(), "t"), "generated", "net_G")
    checkpoint.load(net_D, golden.state(golden.shapes_D(), "tD."), "generated", "net_D")
    step = script.CLANStep(args, net_G, net_D, np.full(1000, 1e-4)).set_train()
    images = tuple(Tensor(x) for x in inputs(size))
    serve(lambda: step.step([images], *SETTINGS, lr=2.5e-4).tolist())


def serve_convolution() -> None:
    """A 3x3 convolution of 256 channels at the features' size of a 320x180 image."""
    from utils import device

    device.prepare_environment()
    device.setup("cpu", 0, "graph")
    from mindspore import Tensor, ops

    rng = np.random.default_rng(0)
    x, w = (Tensor(rng.normal(size=s).astype(np.float32)) for s in ((1, 256, 23, 41), (256, 256, 3, 3)))
    serve(lambda: float(ops.conv2d(x, w, None, 1, "pad", 2, 2)[0, 0, 0, 0].asnumpy()))


def serve_limit() -> None:
    """One 2048 x 2048 matrix product of the library that MindSpore's convolutions use."""
    from utils import device

    device.prepare_environment()
    device.setup("cpu", 0, "graph")
    from mindspore import Tensor, ops

    a = Tensor(np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32))
    serve(lambda: float(ops.matmul(a, a)[0, 0].asnumpy()))


def serve_evaluation(folder: str) -> None:
    """One image of the validation set, stage by stage, as the evaluation script does it."""
    import CLAN_evaluate_city as script  # isort: skip
    import mindspore
    from mindspore import Tensor, nn, ops

    from dataset.cityscapes_dataset import cityscapesDataSet
    from utils import checkpoint, device
    from utils.metrics import confusion_matrix
    from utils.upsample import up
    from utils.visual import save_prediction

    device.setup("cpu", 0, "graph")
    net_G = script.generator("resnet101").set_train(False)
    checkpoint.load(net_G, golden.state(golden.shapes_G()), "generated", "net_G")
    data = cityscapesDataSet(folder, "val", labels=True)

    class Forward(nn.Cell):
        def __init__(self):
            super().__init__()
            self.net_G = net_G

        def construct(self, x):
            a, b = self.net_G(x)
            return a + b

    class Choose(nn.Cell):
        def construct(self, logits):
            return ops.Argmax(axis=1, output_type=mindspore.int32)(up(logits, (1024, 2048)))

    forward, choose, i = Forward(), Choose(), iter(range(10**9))

    def work():
        k = next(i) % len(data)
        times = [time.perf_counter()]
        image, label = data[k]
        times.append(time.perf_counter())
        logits = Tensor(forward(Tensor(image[None])).asnumpy())
        times.append(time.perf_counter())
        trainIds = choose(logits).asnumpy()[0]
        times.append(time.perf_counter())
        confusion_matrix(label, trainIds)
        times.append(time.perf_counter())
        save_prediction(Path(folder) / "ours", data.names[k], trainIds)
        times.append(time.perf_counter())
        return np.diff(times).tolist()

    serve(work)


def serve_evaluation_script(folder: str) -> None:
    """One pass of `evaluate` over the whole set: reading runs ahead, all in one graph."""
    import CLAN_evaluate_city as script
    from dataset.cityscapes_dataset import cityscapesDataSet
    from utils import checkpoint, device
    from utils.evaluation import evaluate

    device.setup("cpu", 0, "graph")
    net_G = script.generator("resnet101")
    checkpoint.load(net_G, golden.state(golden.shapes_G()), "generated", "net_G")
    data = cityscapesDataSet(folder, "val", labels=True)
    serve(lambda: int(evaluate(net_G, data).sum()))


def serve_reading(folder: str, which: str, workers: str) -> None:
    """READ images per turn through the input pipeline with so many workers."""
    from utils import device

    device.prepare_environment()
    from dataset.cityscapes_dataset import cityscapesDataSet
    from dataset.gta5_dataset import GTA5DataSet
    from dataset.pipeline import DomainSampler, batches

    data = GTA5DataSet(folder) if which == "GTA5" else cityscapesDataSet(folder, "val")
    stream = iter(batches(DomainSampler(data, 0, 10**6, 1, [0, 0], False, False), 1, int(workers)))

    def work():
        for _ in range(READ):
            last = next(stream)
        return list(last[0].shape)

    serve(work)


def pillow(path: Path, size: tuple[int, int]) -> float:
    """Images per second of one core that Pillow alone can decode and resize."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        with Image.open(path) as image:
            image.resize(size, Image.Resampling.BICUBIC)
        times.append(time.perf_counter() - started)
    return 1 / statistics.median(times)


def reading_wait(folder: Path) -> float:
    """Median seconds that a full-size training step would wait for its data when it computes for 1 s."""
    from utils import device

    device.prepare_environment()
    from dataset.cityscapes_dataset import cityscapesDataSet
    from dataset.gta5_dataset import GTA5DataSet
    from dataset.pipeline import DomainSampler, batches

    sets = GTA5DataSet(folder), cityscapesDataSet(folder, "val")
    samplers = [DomainSampler(d, 0, 100, 1, [0, i], False, False) for i, d in enumerate(sets)]
    streams = [iter(batches(sampler, 1, 4)) for sampler in samplers]
    waits = []
    for _ in range(8):
        started = time.perf_counter()
        for stream in streams:
            next(stream)
        waits.append(time.perf_counter() - started)
        time.sleep(1)
    return statistics.median(waits[1:])


def operations(size: str) -> int:
    """Operations of a step's convolutions."""
    from model.CLAN_D import discriminator
    from model.CLAN_G import generator
    from utils.flops import step_flop

    return step_flop(generator("resnet101"), discriminator("resnet101"), *pair(size))


def seconds_of(*argv: str) -> float:
    """Median of three runs of a Python command."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch, numpy and pillow")
    parser.add_argument("--also", metavar="PYTHON", help="an interpreter with another MindSpore, say 2.10")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table there")
    parser.add_argument("--size", nargs="*", default=list(SIZES), help="SOURCE+TARGET in pixels")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: 9)")
    parser.add_argument("--busy", action="store_true", help="OMP_WAIT_POLICY=passive for both sides")
    parser.add_argument("--only", choices=("step", "evaluation", "reading", "start"), help="one part alone")
    args = parser.parse_args()

    if args.busy:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # the workers inherit it

    rows: list[tuple[str, str, str, str]] = []
    load = os.getloadavg()

    def row(what: str, ours: str, torch: str = "", ratio: float | None = None) -> None:
        rows.append((what, ours, torch, "" if ratio is None else f"{ratio:.2f}"))
        print(" | ".join(rows[-1]), flush=True)

    def ours_alone(*argv: str) -> Worker:
        return Worker(sys.executable, "tests.benchmark", "--serve", *argv)

    def workers(*argv: str) -> list[Worker]:
        theirs = [Worker(args.torch, "tests.benchmark_torch", *argv)] if args.torch else []
        return [ours_alone(*argv), *theirs]

    def matrix_rate() -> float:
        return 2 * 2048**3 / take_turns([ours_alone("limit")], 20)[0]["best"]

    if args.only in (None, "step"):
        for size in args.size:
            before = matrix_rate()
            both = take_turns(workers("step", size), args.rounds)
            rate, flop = max(before, matrix_rate()), operations(size)

            def ratio(key: str, both=both) -> list[float]:
                return [both[0][key] / both[1][key]] if len(both) == 2 else []

            row(f"training step {size}, s", *(f"{s['median']:.2f}" for s in both), *ratio("median"))
            row("– the fastest", *(f"{s['best']:.2f}" for s in both), *ratio("best"))
            row("– CPU seconds", *(f"{s['cpu']:.2f}" for s in both), *ratio("cpu"))
            row("– its peak memory, GB", *(f"{s['peak']:.2f}" for s in both), *ratio("peak"))
            row("– compiling (first step − median), s", *(f"{s['first']:.1f}" for s in both))
            limit = f"{flop / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s (best matrix product)"
            row(f"– at the machine's limit, s: {limit}", f"{flop / rate:.2f}")
            row("– convolutions per second, GFLOP/s", *(f"{flop / s['median'] / 1e9:.0f}" for s in both))
            if len(both) == 2:
                worst = max(abs(a / b - 1) for a, b in zip(*(s["loss"] for s in both)))
                row("– largest relative difference of the first step's losses", f"{worst:.0e}")

        # The paper's size by ourselves: beside PyTorch the two would not fit into 24 GB.
        alone = take_turns([ours_alone("step", FULL)], 2)[0]
        row(f"training step {FULL}, s (2 after the first)", f"{alone['median']:.1f}")
        row("– its peak memory, GB", f"{alone['peak']:.2f}")
    if args.also and args.only in (None, "step"):
        argv = [args.also, "-c", "import mindspore; print('MindSpore', mindspore.__version__)"]
        name = subprocess.run(argv, capture_output=True, text=True).stdout.strip()

        def other(*argv: str, **env: str) -> Worker:
            return Worker(args.also, "tests.benchmark", "--serve", *argv, **env)

        a, b = take_turns([other("step", args.size[0]), ours_alone("step", args.size[0])], 5)
        row(f"{name}: training step {args.size[0]}, s", f"{a['median']:.2f} (this one {b['median']:.2f})")
        for text, env in (("as the scripts set it", {}), ("left alone", {"ONEDNN_MAX_CPU_ISA": "DEFAULT"})):
            ms = 1e3 * take_turns([other("convolution", **env)], 5)[0]["median"]
            row(f"– one 3x3 convolution, ONEDNN_MAX_CPU_ISA {text}, ms", f"{ms:.1f}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = {f"{i:06d}": i for i in range(IMAGES)}
        if args.only in (None, "evaluation", "reading"):
            # With this much noise an image's file has 2.7 MB; the mean of real ones, of both sets, is 2.3.
            golden.write_city(folder, "val", seeds, noise=1)
            golden.write_gta5(folder, {f"{i:05d}": i for i in range(IMAGES)}, noise=1)
        if args.only in (None, "evaluation"):
            pair_of_workers = workers("evaluation", name)
            firsts, stages = [w.ask(1) for w in pair_of_workers], [[] for _ in pair_of_workers]
            for _ in range(3):
                for w, mine in zip(pair_of_workers, stages):
                    mine.append(w.ask(1))
            times = [np.median([a["result"] for a in mine], axis=0) for mine in stages]
            for k, stage in enumerate(STAGES):
                ratio = [times[0][k] / times[1][k]] if args.torch else []
                row(f"evaluation, {stage}, s per image", *(f"{t[k]:.3f}" for t in times), *ratio)
            ratio = [times[0].sum() / times[1].sum()] if args.torch else []
            row("– all stages one after the other", *(f"{t.sum():.3f}" for t in times), *ratio)
            share = (times[0][2] + times[0][3]) / times[0][1]
            row("– upsampling, argmax and confusion matrix over the forward pass", f"{share:.1%}")
            row("– peak memory, GB", *(f"{mine[-1]['peak']:.2f}" for mine in stages))
            row("– compiling, s", f"{firsts[0]['seconds'][0] - times[0].sum():.1f}")
            for w in pair_of_workers:
                w.close()
            whole = take_turns([ours_alone("evaluation_script", name)], 3)[0]
            row("– by the script (reading runs ahead, nothing saved)", f"{whole['median'] / IMAGES:.3f}")
        if args.only in (None, "reading"):
            for which, path in (("GTA5", "images/00000.png"), ("Cityscapes", CITY)):
                to = (1280, 720) if which == "GTA5" else (1024, 512)
                rate = pillow(folder / path, to)
                row(f"{which}: Pillow decodes and resizes, images/s and core", f"{rate:.1f}")
            sizes = {"GTA5": "1914x1052 to 1280x720, with labels", "Cityscapes": "2048x1024 to 1024x512"}
            for which, text in sizes.items():
                for n in "124":
                    done = take_turns([ours_alone("reading", name, which, n)], 5)[0]
                    row(f"{which} {text}, workers: {n}, images/s", f"{READ / done['median']:.1f}")
            row("wait for the data of a step that computes 1 s, ms", f"{1e3 * reading_wait(folder):.1f}")
    if args.only in (None, "start"):
        row("--help of the training script, s", f"{seconds_of('CLAN_train_gta5_2_city.py', '--help'):.2f}")
        row("importing everything, s", f"{seconds_of('-c', 'import CLAN_train_gta5_2_city'):.2f}")

    lines = ["| what | this repository | PyTorch | ratio |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(r) + " |" for r in rows]
    versions = f"MindSpore {importlib.metadata.version('mindspore')}"
    if args.torch:
        argv = [args.torch, "-c", "import torch; print('PyTorch', torch.__version__)"]
        versions += ", " + subprocess.run(argv, capture_output=True, text=True).stdout.strip()
    load = f"Load average at the start {load[0]:.1f}, at the end {os.getloadavg()[0]:.1f}"
    waiting = ", OMP_WAIT_POLICY=passive" if args.busy else ""
    lines += ["", f"({versions}, Python {platform.python_version()}, {machine()}{waiting}. "
              f"Medians of {args.rounds} turns. {load}.)"]
    print("\n" + "\n".join(lines))
    if args.markdown:
        Path(args.markdown).write_text("\n".join(lines) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [r.split(":")[1].strip() for r in info.splitlines() if r.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        globals()["serve_" + sys.argv[2]](*sys.argv[3:])
    else:
        main()
