"""Compare this project's runs with reference outputs of the authors' PyTorch code.

golden/ holds reference outputs of the authors' released modules under PyTorch 1.0.1: losses of 8 steps with
both recipes and with two weight decays, logits, gradients and weights by their norms, and predictions. They
were made on the weights and images that the functions below generate again from names and seeds, so
that nothing large is stored and PyTorch is not needed.

    python -m tests.golden                     prints the largest differences (README, "What is verified")
    python -m tests.golden --device ascend     on an NPU: verdicts on its precision, and the time of a step
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from options import Parser, number, size
from tests.scripts import EVALUATE, ROOT, TRAIN, checked, rows_of
from utils.system import device
from utils.system.errors import UserError, run_script
from utils.tables import LOSSES

FOLDER = Path(__file__).parent / "golden"
LABEL_IDS = np.uint8([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 0, 4])
LAYERS = ((1, 64, 3), (2, 128, 4), (3, 256, 23), (4, 512, 3))  # number, planes, blocks


def shapes_G() -> dict[str, tuple[int, ...]]:
    """Names (PyTorch's) and shapes of the published G."""
    shapes, convs, c_in = {}, [("conv1", "bn1", (64, 3, 7, 7))], 64
    for layer, planes, blocks in LAYERS:
        for k in range(blocks):
            block = f"layer{layer}.{k}."
            convs.append((block + "conv1", block + "bn1", (planes, c_in, 1, 1)))
            convs.append((block + "conv2", block + "bn2", (planes, planes, 3, 3)))
            convs.append((block + "conv3", block + "bn3", (4 * planes, planes, 1, 1)))
            if k == 0:
                convs.append((block + "downsample.0", block + "downsample.1", (4 * planes, c_in, 1, 1)))
            c_in = 4 * planes
    for conv, bn, shape in convs:
        shapes[f"{conv}.weight"] = shape
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{leaf}"] = shape[:1]
    for classifier in [f"layer{layer}.conv2d_list.{k}" for layer in (5, 6) for k in range(4)]:
        shapes[f"{classifier}.weight"], shapes[f"{classifier}.bias"] = (19, 2048, 3, 3), (19,)
    return shapes


def shapes_D() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published D."""
    shapes, channels = {}, (19, 64, 128, 256, 512, 1)
    for name, a, b in zip(("conv1", "conv2", "conv3", "conv4", "classifier"), channels, channels[1:]):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (b, a, 4, 4), (b,)
    return shapes


def tensor(name: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    """The float32 values of one tensor, a function of its name, shape and the salt."""
    rng = np.random.RandomState(zlib.crc32((salt + name).encode()) & 0x7FFFFFFF)
    if name.endswith("running_var"):
        value = rng.uniform(0.6, 1.4, shape) * (3600.0 if name == "bn1.running_var" else 1.0)
    elif name.endswith("running_mean"):
        value = 0.1 * rng.standard_normal(shape) * (60.0 if name == "bn1.running_mean" else 1.0)
    elif name.endswith("bias"):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        value = (0.25 if ".bn3." in name else 1.0) * rng.uniform(0.8, 1.2, shape)
    elif "conv2d_list" in name:
        value = 0.01 * rng.standard_normal(shape)
    else:
        value = np.sqrt(2.0 / np.prod(shape[1:])) * rng.standard_normal(shape)
        value -= value.mean(axis=(1, 2, 3), keepdims=True)
    return value.astype(np.float32)


def state(shapes: dict[str, tuple[int, ...]], salt: str = "") -> dict[str, np.ndarray]:
    """A whole state dict, as PyTorch would name it."""
    return {name: tensor(name, shape, salt) for name, shape in shapes.items()}


def synthetic_image(seed: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Waves, 60 random rectangles and noise: RGB uint8 (H, W, 3) and raw label ids uint8 (H, W)."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.empty((height, width, 3), np.float32)
    for c in range(3):
        fx, fy, phase = rng.uniform(0.5, 3, 3)
        rgb[..., c] = 120 + 80 * np.sin(2 * np.pi * (fx * x / width + fy * y / height) + phase)
    ids = np.full((height, width), 23, np.uint8)
    for _ in range(60):
        x0, y0 = rng.randint(0, width), rng.randint(0, height)
        w, h = rng.randint(width // 40 + 1, width // 4), rng.randint(height // 40 + 1, height // 3)
        box = np.s_[y0 : y0 + h, x0 : x0 + w]
        ids[box] = LABEL_IDS[rng.randint(len(LABEL_IDS))]
        rgb[box] = rgb[box] * 0.3 + 0.7 * rng.uniform(0, 255, 3)
    rgb += rng.normal(0, 12, rgb.shape)
    return np.clip(rgb, 0, 255).astype(np.uint8), ids


def write_city(
    root: Path, set_name: str, seeds: dict[str, int], size: tuple[int, int] = (2048, 1024)
) -> Path:
    """A Cityscapes tree of generated images, name -> seed, named aachen_<name>_*; returns its root."""
    for name, seed in seeds.items():
        rgb, ids = synthetic_image(seed, *size)
        for kind, pixels, end in (("leftImg8bit", rgb, "leftImg8bit"), ("gtFine", ids, "gtFine_labelIds")):
            folder = root / kind / set_name / "aachen"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"aachen_{name}_000019_{end}.png", compress_level=1)
    return root


def write_gta5(root: Path, seeds: dict[str, int], size: tuple[int, int] = (1914, 1052)) -> Path:
    """A GTA5 tree of generated images, name -> seed; labels are palette images. Returns its root."""
    for name, seed in seeds.items():
        rgb, ids = synthetic_image(seed, *size)
        label = Image.fromarray(ids)
        label.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
        for kind, image in (("images", Image.fromarray(rgb)), ("labels", label)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            image.save(root / kind / f"{name}.png", compress_level=1)
    return root


TRACES = ("default", "released", "default_decay", "released_decay")  # decay: 0.05 instead of 5e-4


def load(trace: str) -> dict:
    """The authors' training steps of one recipe and weight decay."""
    return json.loads((FOLDER / f"train_gold_{trace}.json").read_text())


def save(path: Path, values: dict[str, np.ndarray]) -> Path:
    """Write tensors as a .ckpt."""
    import mindspore

    entries = [{"name": name, "data": mindspore.Tensor(value)} for name, value in values.items()]
    mindspore.save_checkpoint(entries, str(path))
    return path


def start(script: str, *argv) -> None:
    """Run a script as a process; a fork would not be safe on an NPU. UserError if it refuses its options."""
    command = [sys.executable, ROOT / script, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.splitlines()[-1].partition("error: ")[2])
    checked(done, 0)


def train_run(trace: str, folder: Path, *more: str) -> tuple[list[dict[str, str]], dict[str, np.ndarray]]:
    """8 steps of the training script from the golden weights: rows of loss.csv and the last tensors.

    `more` are further options of the script.
    """
    from utils import checkpoint

    folder.mkdir(exist_ok=True)
    setup = load(trace)["setup"]
    options = {
        "--recipe": trace.partition("_")[0],
        "--weight-decay": setup["weight_decay"],
        "--data-dir": write_gta5(folder / "GTA5", {"00001": setup["picture_seed_source"]}),
        "--data-dir-target": write_city(folder / "City", "train", {"000001": setup["picture_seed_target"]}),
        "--input-size": "{},{}".format(*setup["source"]),
        "--input-size-target": "{},{}".format(*setup["target"]),
        "--num-steps": setup["num_steps"],
        "--num-steps-stop": setup["num_steps_stop"],
        "--preheat-steps": setup["preheat_steps"],
        "--restore-from": save(folder / "golden_G.ckpt", state(shapes_G(), setup["salt"])),
        "--restore-from-D": save(folder / "golden_D.ckpt", state(shapes_D(), setup["salt"] + "D.")),
        "--snapshot-dir": folder / "run",
    }
    argv = [word for pair in options.items() for word in pair]
    argv += ["--not-val", "--no-random-mirror", "--no-random-scale", *more]
    start(TRAIN, *argv)
    last = checkpoint.read(str(folder / "run" / f"GTA5_{setup['num_steps_stop']}.ckpt"))
    return rows_of(folder / "run" / "loss.csv"), last


def batch(seed: int, generated: tuple[int, int], size: tuple[int, int]):
    """A batch of one: an image generated in one size, and its trainIds, both resized to `size`."""
    from mindspore import Tensor

    from dataset.transform import IMG_MEAN, LABEL_TO_TRAIN

    rgb, ids = map(Image.fromarray, synthetic_image(seed, *generated))
    x = np.asarray(rgb.resize(size, Image.Resampling.BICUBIC), np.float32)[:, :, ::-1] - IMG_MEAN
    y = LABEL_TO_TRAIN[np.asarray(ids.resize(size, Image.Resampling.NEAREST))]
    return Tensor(np.ascontiguousarray(x.transpose(2, 0, 1)[None])), Tensor(y[None].astype(np.int32))


def labelled(y_s) -> int:
    """Return the number of labelled pixels of a Tensor of trainIds."""
    return np.count_nonzero(y_s.asnumpy() != 255)


def gradients(step, x_s, y_s, x_t, factors: tuple[float, float, float]) -> dict[str, dict[str, np.ndarray]]:
    """The gradients of a CLANStep by pass ("source", "target", "D") and weight, without an update.

    factors: damp, base and local of CLANStep.step.
    """
    from mindspore import Tensor, float32

    def taken(weights, sums):
        values = {w.name: g.asnumpy().copy() for w, g in zip(weights, sums)}
        for g in sums:
            device.assign(g, np.zeros(g.shape))
        return values

    _, p = step.source_pass(x_s, y_s, Tensor(labelled(y_s), float32))
    source = taken(step.weights_G, step.sums_G)
    _, _, t, weight = step.target_pass(x_t, *(Tensor(v, float32) for v in factors))
    target = taken(step.weights_G, step.sums_G)
    step.D_source_pass(p)
    step.D_target_pass(t, weight)
    return {"source": source, "target": target, "D": taken(step.weights_D, step.sums_D)}


def compare_first_step(recipe: str) -> list[tuple[str, float, float]]:
    """(what, relative difference, tolerance) before any update: logits, alignment map and D's output by
    their mean, spread and largest value, gradients by their norms.
    """
    from CLAN_train_gta5_2_city import CLANStep
    from model.CLAN_D import discriminator
    from model.CLAN_G import freeze_bn_affine, generator
    from model.upsample import up
    from options.train_options import get_arguments
    from utils import checkpoint
    from utils.loss import alignment_map
    from utils.softmax import softmax

    trace = load(recipe)
    setup, gold = trace["setup"], trace["first_step_mean_std_absmax"]
    size, size_t = setup["source"], setup["target"]
    args = get_arguments(["--recipe", recipe, "--input-size", "{},{}".format(*size),
                          "--input-size-target", "{},{}".format(*size_t)])  # fmt: skip
    net_G, net_D = generator("resnet101"), discriminator("resnet101")
    freeze_bn_affine(net_G)
    checkpoint.load(net_G, state(shapes_G(), setup["salt"]), "golden", "net_G")
    checkpoint.load(net_D, state(shapes_D(), setup["salt"] + "D."), "golden", "net_D")
    step = CLANStep(args, net_G, net_D).set_train()
    x_s, y_s = batch(setup["picture_seed_source"], (1914, 1052), size)
    x_t, _ = batch(setup["picture_seed_target"], (2048, 1024), size_t)
    grads = gradients(step, x_s, y_s, x_t, (1.0, 1.0, 0.0))  # factors of step 0
    grads["G"] = {name: g + grads["target"][name] for name, g in grads["source"].items()}
    (c1_s, c2_s), (c1_t, c2_t) = net_G(x_s), net_G(x_t)
    ours = {"C1_source": c1_s, "C2_source": c2_s, "C1_target": c1_t, "C2_target": c2_t}
    t1, t2, t = (up(c, size_t[::-1]) for c in (c1_t, c2_t, c1_t + c2_t))
    ours["alignment_map"] = alignment_map(t1, t2)
    ours["D_out_target_upsampled"] = up(net_D(softmax(t)), size_t[::-1])
    out = []
    for name, x in ours.items():
        x, (mean, std, largest) = x.asnumpy(), gold[name]
        differences = (x.mean() - mean) / std, x.std(ddof=1) / std - 1, abs(x).max() / largest - 1
        out.append((name, max(map(abs, differences)), 5e-4))
    for net, key in (("G", "grad_norm"), ("D", "grad_norm_D")):
        for name, expected in gold[key].items():
            out.append((f"{key} {name}", abs(norm(grads[net][f"net_{net}.{name}"]) / expected - 1), 5e-3))
    return out


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def compare_train(trace: str, folder: Path, *more: str) -> list[tuple[str, float, float]]:
    """(what, relative difference, tolerance) for losses, learning rates and final weights of 8 steps."""
    from utils.checkpoint import tensors_of

    gold, (rows, last) = load(trace), train_run(trace, folder, *more)
    out = []
    for ours, (step, *values) in zip(rows, gold["rows"], strict=True):
        tolerance = 1e-3 if step <= 2 else 5e-3 if step <= 4 else 3e-2
        for name, value in zip(gold["columns"][1:], values):
            if name.startswith("lr"):
                out.append((f"{name}, step {step}", abs(float(ours[name]) - value) / 2.5e-4, 1e-6))
            else:
                out.append((f"{name}, step {step}", abs(float(ours[name]) / value - 1), tolerance))
    tolerance = 3e-2 if trace.endswith("_decay") else 5e-2  # of changes
    for net, shapes, key, salt in (("G", shapes_G(), "", ""), ("D", shapes_D(), "_D", "D.")):
        start = state(shapes, gold["setup"]["salt"] + salt)
        norms = gold[f"state_mean_norm{key}"]
        for (name, (_, expected)), our_name in zip(norms.items(), tensors_of(norms, f"net_{net}")):
            value = last[f"net_{net}.{our_name}"]
            out.append((f"norm of {net}'s {name}", abs(norm(value) / expected - 1), 1e-3))
            change = norm(value.astype(np.float64) - start[name]) / gold[f"state_delta_norm{key}"][name]
            out.append((f"change of {net}'s {name}", abs(change - 1), tolerance))
    return out


def compare_evaluation(folder: Path) -> list[tuple[str, float, float]]:
    """(what, difference, tolerance): differing pixels, mIoU and IoU in points, by the evaluation script."""
    weights = save(folder / "golden_G.ckpt", state(shapes_G()))
    city = write_city(folder / "City", "val", {"000011": 11, "000012": 12})
    gold = json.loads((FOLDER / "eval_gold.json").read_text())
    masks = np.load(FOLDER / "eval_gold.npz")
    out = []
    for classifier, key in (("sum", "sum"), ("1", "first"), ("2", "second")):
        result = folder / f"result_{classifier}"
        argv = ["--restore-from", weights, "--data-dir", city, "--classifier", classifier]
        start(EVALUATE, *argv, "--save-path", result, "--save", "--panels", 0)
        ours = json.loads((result / "result.json").read_text())
        out.append((f"mIoU, {key}", abs(ours["mIoU"] - gold["miou"][key]), 5e-3))
        worst = max(abs(a - b) for a, b in zip(ours["IoU"].values(), gold[key], strict=True))
        out.append((f"IoU of a class, {key}", worst, 2e-2))
    for seed in (11, 12):
        path = folder / "result_sum" / "labelIds" / f"aachen_0000{seed}_000019_leftImg8bit_labelIds.png"
        differing = float((np.asarray(Image.open(path)) != LABEL_IDS[masks[f"pred_{seed}"]]).mean())
        out.append((f"pixels of image {seed}", differing, 5e-4))
    return out


def official_iou(city: Path, result: Path) -> tuple[np.ndarray, float]:
    """IoU of each class and mIoU, in percent, of <result>/labelIds by Cityscapes' own evaluator."""
    os.environ["CITYSCAPES_DATASET"] = str(city)  # it insists on one, without using it here
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    from dataset.classes import CLASS_NAMES

    settings = official.args
    settings.quiet, settings.JSONOutput, settings.evalInstLevelScore = True, False, False
    settings.evalPixelAccuracy = False
    predictions = sorted(map(str, (result / "labelIds").glob("*.png")))
    truths = sorted(map(str, (city / "gtFine" / "val").glob("*/*_gtFine_labelIds.png")))
    scores = official.evaluateImgLists(predictions, truths, settings)
    names = {"light": "traffic light", "sign": "traffic sign"}
    ious = np.array([scores["classScores"][names.get(name, name)] for name in CLASS_NAMES])
    return 100 * ious, 100 * scores["averageScoreClasses"]


KINDS = {  # how the comparisons' names begin
    "evaluation": ("mIoU", "IoU", "pixels"),
    "first step: logits, alignment map, D's output": ("C1", "C2", "alignment", "D_out"),
    "first step: gradient norms of G and D": ("grad_norm",),
    "8 steps: losses and learning rates": ("loss", "lr"),
    "norms of the tensors after 8 steps": ("norm",),
    "norms of their changes": ("change",),
}


# Tolerance of losses where convolutions have 11 bits of mantissa. On the CPU, amp level O2 changes them by up
# to 0.17 % within three steps and 1.2 % within eight, rounding as HF32 does by 0.13 % and 0.7 %. The other
# tolerances stay. That of float32's losses, 0.1 % within three steps, is less than the effect of 11 bits.
FLOAT16 = 2e-2
UNCHANGED = 1e-6  # 11 bits change the losses of the first step by 5e-5 (amp level O3) or more, on the CPU


def compare_device(folder: Path, *argv: str) -> tuple[str, set[str], list[float]]:
    """Print the `report` of the default recipe on a device, with tolerances for its convolutions' precision.

    Returns a verdict, what the convolutions compute in, and the losses of the first step.
    """
    rows = compare_train("default", folder, *argv)
    about = json.loads((folder / "run" / "options.json").read_text(encoding="utf-8"))["precision"]
    used = {about["convolutions of G"], about["convolutions of D"]}
    precision = next((name for name in ("float16", "HF32") if name in used), "float32")
    if precision != "float32":
        rows = [(what, d, FLOAT16 if what.startswith("loss") else own) for what, d, own in rows]
    verdict = f"{'NOT ' if report(rows) else ''}as expected of {precision}"
    first = rows_of(folder / "run" / "loss.csv")[0]
    return verdict, used, [float(first[name]) for name in LOSSES]


def float32_verdict(default: list[float], float32: list[float]) -> str:
    """Return a verdict on --conv-precision float32 where the default is HF32, by losses of the first step.

    Later steps may differ by chance: on an NPU the gradient of upsampling is not reproducible to the bit.
    """
    change = max(abs(a / b - 1) for a, b in zip(default, float32))
    if change < UNCHANGED:
        return ("NOT as expected: --conv-precision float32 had no effect, the losses of the first step are "
                "the same without it")  # fmt: skip
    return f"as expected: --conv-precision float32 changes losses of the first step by up to {change:.0e}"


def check_device(folder: Path, argv: list[str]) -> list[str]:
    """Print and return verdicts on the precision of a device; where it is HF32, on float32's as well."""
    verdict, used, losses = compare_device(folder / "default", *argv)
    verdicts = [verdict]
    print(f"verdict: {verdict}", flush=True)
    if "HF32" in used:
        print("with --conv-precision float32:")
        verdict, _, exact = compare_device(folder / "float32", *argv, "--conv-precision", "float32")
        verdicts += [verdict, float32_verdict(losses, exact)]
        print("\n".join(f"verdict: {verdict}" for verdict in verdicts[1:]), flush=True)
    return verdicts


def speed(folder: Path, argv: list[str], sizes: list[tuple[int, int]], steps: int) -> None:
    """Print seconds and TFLOP/s of a training step and the share of time spent waiting for data.

    sizes: (W, H) of source and target. The training runs in this process.
    """
    import CLAN_train_gta5_2_city as script
    from options.train_options import get_arguments
    from utils.flops import step_flop

    write_gta5(folder / "GTA5", {f"{i:05d}": i for i in range(min(steps, 8))})
    write_city(folder / "City", "train", {f"{i:06d}": i for i in range(min(steps, 8))})
    waited, next_batches = [], script.next_batches

    def timed(*arguments):
        started = time.perf_counter()
        result = next_batches(*arguments)
        waited.append(time.perf_counter() - started)
        return result

    script.next_batches = timed
    argv += ["--data-dir", folder / "GTA5", "--data-dir-target", folder / "City", "--not-val"]
    argv += ["--snapshot-dir", folder / "run", "--restore-from", "none", "--num-steps", steps]
    source, target = ("{},{}".format(*size) for size in sizes)
    argv += ["--input-size", source, "--input-size-target", target]
    script.main(get_arguments([str(word) for word in argv]))
    seconds = [float(row["seconds"]) for row in rows_of(folder / "run" / "loss.csv")]
    later = slice(steps // 3, None)  # the first steps compile
    median, share = np.median(seconds[later]), sum(waited[later]) / sum(seconds[later])
    flop = step_flop(script.generator("resnet101"), script.discriminator("resnet101"), *sizes)
    print(f"{median:.3f} s per step at {source} + {target} (median of {len(seconds[later])}), "
          f"{flop / median / 1e12:.2f} TFLOP/s, {share:.0%} of the time waiting for data")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Print, for each kind of figure, the difference closest to its tolerance; exit 1 beyond one."""
    device.prepare_environment()  # before mindspore is imported
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.device:
            names = "device", "amp_level", "jit_level"
            argv = [f"--{name.replace('_', '-')}={v}" for name in names if (v := getattr(args, name))]
            dry = os.environ.get("MS_SIMULATION_LEVEL")  # a DryRun has no values
            verdicts = [] if dry else check_device(folder, argv)
            speed(folder, argv, args.sizes, args.steps)
            raise SystemExit(1 if any(verdict.startswith("NOT") for verdict in verdicts) else 0)
        rows = compare_evaluation(folder)
        for recipe in ("default", "released"):
            rows += [(f"{what}, {recipe}", *row) for what, *row in compare_first_step(recipe)]
        for trace in TRACES:
            rows += [(f"{what}, {trace}", *row) for what, *row in compare_train(trace, folder / trace)]
    if outside := report(rows):
        raise SystemExit(f"beyond their tolerance: {', '.join(outside)}")


def report(rows: list[tuple[str, float, float]]) -> list[str]:
    """Print the difference closest to its tolerance for each kind of figure; return those beyond it."""
    print("| what | closest to its tolerance | difference | tolerance |\n|---|---|---|---|")
    for kind, begins in KINDS.items():
        if found := [row for row in rows if row[0].startswith(begins)]:
            what, difference, tolerance = max(found, key=lambda row: row[1] / row[2])
            print(f"| {kind} | {what} | {difference:.1e} | {tolerance:.0e} |", flush=True)
    return [what for what, difference, tolerance in rows if not difference <= tolerance]


if __name__ == "__main__":
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("ascend", "cpu"), help="verdicts and the speed of this device")
    parser.add_argument("--amp-level", choices=("O2", "O3"), help="with --device: mixed precision")
    parser.add_argument("--jit-level", choices=("O0", "O1"), help="with --device: of MindSpore's compiler")
    parser.add_argument("--steps", type=number(int, 3), default=60, help="with --device: steps to time")
    parser.add_argument("--sizes", type=size, nargs=2, default=[(1280, 720), (1024, 512)],
                        metavar=("SOURCE", "TARGET"), help="of these steps (default: 1280,720 1024,512)")
    arguments = parser.parse_args()
    if (arguments.amp_level or arguments.jit_level) and not arguments.device:
        parser.error("--amp-level and --jit-level need --device")
    run_script(main, arguments)
