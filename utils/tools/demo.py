"""The demo: the real training and evaluation code on generated street scenes, with a small network.

Stage A trains on the source alone, from scratch. Stage B continues from its checkpoint three times, with
equal steps, schedule and source images: source only; the control, where target images pass through the
network, and so through its BN statistics, without a discriminator (lambda_adv 0); CLAN. Each is evaluated on
the target's val set, with BN statistics re-estimated on unlabelled target images and with the running ones.
Target labels are for evaluation only. Every training is a process of its own.
"""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import TextIO

import numpy as np
from mindspore import Tensor
from PIL import Image

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES
from model.CLAN_G import Res_Deeplab, generator
from model.upsample import up
from utils import checkpoint, run_folder
from utils.evaluation import adapt_bn, evaluate
from utils.loss import alignment_map
from utils.metrics import class_iou, mean_iou, number_or_none, percent
from utils.system import device, interrupt
from utils.system.errors import UserError
from utils.system.files import atomic, write_json
from utils.tools.demo_scenes import write_demo_data
from utils.visual import CLASSES, colourise, heatmap, panels

TRAIN = Path(__file__).parents[2] / "CLAN_train_gta5_2_city.py"
SIZE = (192, 96)
COMMON = ["--model", "small", "--input-size", "192,96", "--input-size-target", "192,96", "--batch-size", "2",
          "--random-mirror", "--classifier-lr-mult", "1", "--not-val"]
STAGE_A = ["--method", "source", "--learning-rate", "0.06", "--train-bn-affine", "--restore-from", "none"]
STAGE_B = ["--learning-rate", "0.05"]
CLAN = ["--method", "clan", "--learning-rate-D", "0.001", "--lambda-weight", "0.1", "--detach-weight-map"]
METHODS = {
    "source": ["--method", "source"],
    "control": [*CLAN, "--lambda-adv", "0"],
    "tan": ["--method", "tan", "--learning-rate-D", "0.001", "--lambda-adv", "1"],
    "clan": [*CLAN, "--lambda-adv", "1"],
}
COMPARED = ("source", "control", "clan")  # the methods that the demo shows; the ablation has all
ADAPT, BATCH = 160, 20  # images for the BN statistics; per batch of the evaluation
SHOWN = (3, 31, 62, 85)  # images of the val set in demo.png


def demo(args) -> None:
    """Run the demo; write demo.png and demo_result.json to --snapshot-dir."""
    started, folder, steps, seed = time.time(), Path(args.snapshot_dir), args.num_steps, args.random_seed
    if (folder / "stage_a").exists():
        raise UserError(f"{folder} already holds a demo; choose another --snapshot-dir or move that one away")
    run_folder.lock_run_dir(folder, "working")  # until this process ends
    data = write_demo_data("./data/demo", seed)
    run_stages(args, data)

    print("\nevaluating on the target's val set")
    val = cityscapesDataSet(data / "Cityscapes", "val", size=SIZE, labels=True)
    net_G, result, logits = generator("small").set_train(False), {}, {}
    for name in COMPARED:
        path = folder / name / f"GTA5_{steps}.ckpt"
        result[name] = evaluate_both_bn(net_G, path, data / "Cityscapes", SIZE, args.num_workers)
        logits[name] = [up(c, SIZE[::-1]) for c in net_G(Tensor(np.stack([val[i][0] for i in SHOWN])))]

    with atomic(folder / "demo.png") as temporary:
        comparison(val, logits["source"], logits["clan"]).save(temporary)
    seconds = time.time() - started
    write_json(folder / "demo_result.json", {**result, "seed": seed, "steps": steps,
                                             "seconds": round(seconds, 1), "versions": device.versions()})
    print(table(result))
    print(f"{seconds:.0f} s in all; written: {folder / 'demo.png'}, {folder / 'demo_result.json'}")


def run_stages(args, data: Path) -> None:
    """Train stage A, then the methods COMPARED from its checkpoint, each into a folder of its own."""
    folder, steps_a = Path(args.snapshot_dir), args.num_steps * 5 // 2
    # The small network cannot keep two CPU cores busy; an NPU runs one training at a time.
    at_once = len(COMPARED) if device.on_cpu() else 1
    machine = ["--save-memory"] if device.on_cpu() else []  # its compilation pays after 200 steps
    machine += ["--device", device.target(), "--device-id", args.device_id, "--mode", args.mode,
                "--conv-precision", args.conv_precision, "--num-workers", args.num_workers]
    machine += ["--jit-level", args.jit_level] if args.jit_level else []

    def run(name: str, steps: int, options: list, at_once: int) -> None:
        train(name, build_argv(data, folder / name, steps, args.random_seed, [*options, *machine]), at_once)

    run("stage_a", steps_a, STAGE_A, 1)
    start = [*STAGE_B, "--restore-from", folder / "stage_a" / f"GTA5_{steps_a}.ckpt"]
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda name: run(name, args.num_steps, [*start, *METHODS[name]], at_once), COMPARED))
    interrupt.exit_if_pending()


def train(name: str, argv: list[str], at_once: int) -> None:
    """Run the training script in a process that has its share of the processors if `at_once` are running.

    Its output is shown with the name in front. UserError if it fails. After a signal to this process it is
    told to end, which it does after its step, or is not started.
    """
    if interrupt.pending_signal():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = (int(limit) if limit.isdecimal() else cores) // at_once
    print(f"\n{name}: python {TRAIN.name} {shlex.join(argv)}", flush=True)
    process = subprocess.Popen([sys.executable, TRAIN, *argv], encoding="utf-8", stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": str(max(threads, 1))})
    reader = Thread(target=show, args=(name, process.stdout))
    reader.start()
    while process.poll() is None and not interrupt.pending_signal():
        time.sleep(0.2)
    process.terminate()  # does nothing if it has ended
    code = process.wait()
    reader.join()
    if code and not interrupt.pending_signal():
        raise UserError(f"{name} ended with exit code {code}; its last lines say why")


def show(name: str, lines: TextIO) -> None:
    """Print what a process writes to a pipe, line by line, with its name in front."""
    for line in lines:
        print(f"{name:<7} | {line}", end="", flush=True)


def build_argv(data: Path, folder: Path, steps: int, seed: int, options: list,
               source: str = "GTA5") -> list[str]:
    """Return the options of a training of the small network on the images that were generated in `data`."""
    words = [*COMMON, *options, "--data-dir", data / source, "--data-dir-target", data / "Cityscapes",
             "--num-steps", steps, "--preheat-steps", steps // 10, "--save-pred-every", steps,
             "--snapshot-dir", folder, "--random-seed", seed]
    return [str(word) for word in words]


def evaluate_both_bn(net_G: Res_Deeplab, path: Path, city: Path, size: tuple[int, int],
                     workers: int = 4) -> dict:
    """Load a checkpoint into net_G and evaluate it on the val set of `city` at this size (W, H), in percent.

    mIoU, and IoU of each class, are those with BN statistics re-estimated on the train images, which net_G
    keeps; mIoU_running is that with the checkpoint's own statistics.
    """
    val = cityscapesDataSet(city, "val", size=size, labels=True)
    settings = "sum", BATCH, workers, interrupt.exit_if_pending
    checkpoint.load(net_G, checkpoint.read(str(path)), str(path), "net_G")
    running = mean_iou(evaluate(net_G, val, *settings))
    adapt_bn(net_G, cityscapesDataSet(city, "train", size=size), ADAPT, BATCH, workers)
    adapted = evaluate(net_G, val, *settings)
    return {"mIoU": mean_iou(adapted), "mIoU_running": running,
            "IoU": {c: number_or_none(v) for c, v in zip(CLASS_NAMES, class_iou(adapted))}}


def comparison(val: cityscapesDataSet, source: list[Tensor], clan: list[Tensor]) -> Image.Image:
    """Return demo.png: a row for each of the images SHOWN, with predictions, ground truth, alignment map.

    `source` and `clan` are the logits of C1 and C2 for these images, (N, classes, H, W) each.
    """
    M = alignment_map(*clan).asnumpy()[:, 0]
    top = float(np.quantile(M, 0.995))
    prediction = [(c1 + c2).asnumpy().argmax(1) for c1, c2 in (source, clan)]
    rows = [[np.asarray(Image.open(val.images[i])), *(colourise(p[n]) for p in prediction),
             colourise(val[i][1]), heatmap(M[n] / top)] for n, i in enumerate(SHOWN)]
    captions = ["target image", "source only", "CLAN", "ground truth", "alignment map M (CLAN)"]
    return panels(rows, captions, top, 160, CLASSES)


def table(result: dict) -> str:
    """Return a table of IoU of each class and mIoU with both kinds of BN statistics, a column per method."""
    lines = [f"{'':<26}" + "".join(f"{name:>9}" for name in result)]
    for c in CLASS_NAMES:
        lines.append(f"{c:<26}" + "".join(f"{percent(r['IoU'][c], 1):>9}" for r in result.values()))
    for key, name in (("mIoU", "mIoU"), ("mIoU_running", "mIoU, running BN statistics")):
        lines.append(f"{name:<26}" + "".join(f"{r[key]:9.2f}" for r in result.values()))
    return "\n".join(lines)
