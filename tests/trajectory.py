"""Train beside PyTorch on photographs, from CamVid to IDD-Lite, and compare losses and mIoU.

    python -m tests.trajectory --torch PYTHON --camvid DIR --idd DIR [--seeds 1,2,3,4,5]

Both sides start from the same weights (stage A on CamVid, then a D from the seed) and see the same images in
the same order, scale and mirroring. This side is the training script, the other one tests/trajectory_torch.py,
which is first compared with the reference outputs of the authors' code. All weights are evaluated here. To
tell chance from error, PyTorch's run is repeated from weights that are changed by their last bit or so.

Runs are made one after the other, with one thread each, and those that are done are not repeated; the tables
are written after each. PYTHON is an interpreter with torch, numpy and pillow.
"""

import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of all processes: before mindspore is imported

from utils.system import device, interrupt

device.prepare_environment()
if __name__ == "__main__":
    interrupt.block()  # a run that has begun ends before this program does

import mindspore
import numpy as np

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import DomainSampler
from model.CLAN_D import discriminator
from model.CLAN_G import generator
from options import Parser, number
from options.train_options import get_arguments
from tests.scripts import ROOT, losses
from utils import checkpoint, run_folder
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, read_json, rotate_existing, write_json
from utils.tables import LOSSES
from utils.tools import ablation, demo

FOLDER, STEPS = "./checkpoint/trajectory", 800
COMMON = ["--model", "small", *ablation.PHOTO_SIZE, "--not-val", "--device", "cpu", "--lambda-weight", "0.1"]
SETTINGS = {
    "default": ["--recipe", "default", "--lambda-adv", "1", "--detach-weight-map"],
    "released": ["--recipe", "released", "--lambda-adv", "0.1"],
}
LONG = ["--num-steps", str(STEPS), "--preheat-steps", "80", "--learning-rate", "0.005",
        "--learning-rate-D", "0.001"]
# So that the steps with pixel weights come before chaos has made the two runs different.
SHARP = ["--num-steps", "60", "--preheat-steps", "5", "--learning-rate", "0.0005",
         "--learning-rate-D", "0.0001"]
SHARP_PARTS = (0, 12, 25, 60)
SHARP_LIMITS = {"default": 1e-5, "released": 1e-4}  # over 25 steps, and
SHARP_LIMIT = 1e-3  # over all
GOLDEN_LIMITS = {"losses, steps 0 to 2": 1e-3, "losses, steps 3 to 7": 3e-2, "changes of weights": 5e-2}
PERTURBED = {"perturbed 1": 1, "perturbed 2": 2}  # and the seed of the noise
SIDES = ["ours", "PyTorch", *PERTURBED]
MIOU = {"running": "mIoU_running", "re-estimated": "mIoU"}


def initial_weights(args: Namespace, seed: int) -> tuple[Path, Path, Path]:
    """Return the data, stage A's checkpoint of a seed, and the folder of D.ckpt and weights.npz for PyTorch."""
    settings = Namespace(camvid=args.camvid, idd=args.idd, steps=STEPS, folder=args.folder)
    folder, command = ablation.runs_of_seed(settings, seed, {})["stage_a"]
    ablation.do_run(folder, command, jobs=1)
    interrupt.exit_if_pending()
    stage_a = get_arguments(command)
    path, place = folder / f"GTA5_{stage_a.num_steps_stop}.ckpt", folder.parent
    if not (place / "weights.npz").exists():
        mindspore.set_seed(seed)
        net_D = discriminator("small")
        mindspore.save_checkpoint(net_D, str(place / "D.ckpt"))
        weights = {f"D.{p.name}": p.asnumpy() for p in net_D.get_parameters()}
        for name, value in checkpoint.tensors_of(checkpoint.read(str(path)), "net_G").items():
            weights[f"G.{torch_name(name)}"] = value
        with atomic(place / "weights.npz") as temporary:
            np.savez(temporary, **weights)
    return Path(stage_a.data_dir).parent, path, place


def torch_name(name: str) -> str:
    """Return PyTorch's name of a tensor of G."""
    stem, _, leaf = name.rpartition(".")
    names = {ours: theirs for theirs, ours in checkpoint.BN_NAMES.items()}
    return f"{stem}.{names.get(leaf, leaf)}"


class Listing(list):
    """Images whose reading returns their paths and what the sampler has decided."""

    def read(self, i: int, scale: float, mirror: bool) -> list:
        return [*self[i], scale, mirror]


def images_of_steps(args: Namespace) -> dict[str, list[list]]:
    """Return what each step of a training with these options reads, one image of each domain.

    "source": image, label, scale, mirror. "target": the same without a label. Paths are absolute.
    """
    source = GTA5DataSet(args.data_dir, None, args.input_size)
    target = cityscapesDataSet(args.data_dir_target, args.set, None, args.input_size_target)
    files = {"source": zip(source.images, source.labels), "target": zip(target.images)}
    lists = {}
    for domain, (name, paths) in enumerate(files.items()):
        listing = Listing([str(Path(path).resolve()) for path in item] for item in paths)
        sampler = DomainSampler(listing, 0, args.num_steps_stop, 1, [args.random_seed, domain],
                                args.random_mirror, args.random_scale)
        lists[name] = [sampler[k] for k in range(len(sampler))]
    return lists


def do_run(args: Namespace, seed: int, setting: str, length: list[str], side: str) -> dict:
    """Do one run unless it is done; return its result.json with "losses", (steps, 5), added."""
    data, stage_a, place = initial_weights(args, seed)
    command = [*COMMON, *SETTINGS[setting], *length, "--restore-from", stage_a, "--restore-from-D",
               place / "D.ckpt", "--data-dir", data / "GTA5", "--data-dir-target", data / "Cityscapes",
               "--random-seed", seed]
    folder = place / (setting if length is LONG else f"{setting}_sharp") / side.replace(" ", "_")
    command = [str(word) for word in (*command, "--save-pred-every", STEPS, "--snapshot-dir", folder)]
    if side == "ours":
        result = ablation.do_run(folder, command, jobs=1)
    else:
        result = do_torch_run(args.torch, folder, command, place / "weights.npz", PERTURBED.get(side, 0))
    interrupt.exit_if_pending()
    return {**result, "losses": losses(folder)}


def do_torch_run(python: str, folder: Path, command: list[str], initial: Path, perturb: int) -> dict | None:
    """Let PyTorch do a run unless it is done, and evaluate it here; None if a signal has ended it."""
    result = read_json(folder / "result.json")
    if result and result["command"] == command:
        return result
    if folder.exists():
        rotate_existing(folder)
    train_args, started = get_arguments(command), time.time()
    job = {"command": command, "initial": str(initial), "perturb": perturb, **images_of_steps(train_args)}
    write_json(folder / "job.json", job)
    if not run_torch(python, "train", folder):
        return None
    seconds, path = round(time.time() - started, 1), folder / f"GTA5_{train_args.num_steps_stop}.pth"
    scores = demo.evaluate_both_bn(network(), path, train_args.data_dir_target, train_args.input_size_target)
    result = {**scores, "seconds": seconds, "command": command, "versions": device.versions()}
    write_json(folder / "result.json", result)
    return result


@cache
def network():
    """Return a small G to evaluate with, compiled once."""
    device.setup(get_arguments(["--device", "cpu"]))
    return generator("small")


def run_torch(python: str, *argv: str | Path) -> bool:
    """Run tests/trajectory_torch.py; return whether it ended well, UserError if it failed."""
    process = subprocess.Popen([python, "-m", "tests.trajectory_torch", *map(str, argv)], cwd=ROOT)
    [code] = demo.wait_for([process])
    if code and not interrupt.pending_signal():
        raise UserError(f"tests.trajectory_torch failed (exit code {code}); is there torch in {python}?")
    return code == 0


def relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return abs(a / b - 1)


def mean_difference(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error, nan for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if values[1:] else np.nan


def sharp_table(runs: dict[tuple, dict], verdict: list[str]) -> list[str]:
    """Return the table of the sharp form; add to the verdict what is beyond a limit."""
    parts = list(zip(SHARP_PARTS, SHARP_PARTS[1:]))
    lines = ["| largest relative difference of a loss | " + " | ".join(
        f"steps {a} to {b - 1}" for a, b in parts) + " |", "|---" * (len(parts) + 1) + "|"]
    for setting in SETTINGS:
        key = next((key for key in runs if key[1:] == (setting, "sharp", "ours")), None)
        for side in ("ours", "perturbed 1"):
            of_side = runs.get(key and (*key[:3], side))
            of_torch = runs.get(key and (*key[:3], "PyTorch"))
            if of_side and of_torch:
                difference = relative(of_side["losses"], of_torch["losses"])
                cells = [f"{difference[a:b].max():.1e}" for a, b in parts]
                lines.append(f"| {setting}, {side} against PyTorch | " + " | ".join(cells) + " |")
                if side == "ours":
                    for steps, limit in ((25, SHARP_LIMITS[setting]), (60, SHARP_LIMIT)):
                        if not difference[:steps].max() <= limit:
                            verdict.append(f"sharp form, {setting}, {steps} steps: beyond {limit:.0e}")
    return lines


def long_tables(runs: dict[tuple, dict], setting: str, verdict: list[str]) -> list[str]:
    """Return the tables of a setting over the seeds with all four runs; add what does not hold."""
    of = {seed: {side: runs[seed, setting, "long", side] for side in SIDES}
          for seed in dict.fromkeys(key[0] for key in runs)
          if all((seed, setting, "long", side) in runs for side in SIDES)}  # fmt: skip
    if not of:
        return []
    lines = [f"### {setting}: {' '.join(SETTINGS[setting])}", "",
             f"| mIoU, running / re-estimated | {' | '.join(SIDES)} |", "|---" * (len(SIDES) + 1) + "|"]
    for seed, sides in of.items():
        cells = [" / ".join(f"{sides[side][key]:.2f}" for key in MIOU.values()) for side in SIDES]
        lines.append(f"| seed {seed} | {' | '.join(cells)} |")
    lines += ["", "| largest difference from PyTorch | ours | perturbed |", "|---|---|---|"]
    for name, key in MIOU.items():
        row = [max(abs(sides[side][key] - sides["PyTorch"][key]) for sides in of.values() for side in group)
               for group in (["ours"], PERTURBED)]
        lines.append(f"| mIoU, {name}, points | {row[0]:.2f} | {row[1]:.2f} |")
        check_twice(f"{setting}, mIoU {name}", *row, verdict)
    for k, loss in enumerate(LOSSES):
        row = [max(relative(means(sides[side], k), means(sides["PyTorch"], k)).max()
                   for sides in of.values() for side in group) for group in (["ours"], PERTURBED)]
        lines.append(f"| {loss}, means of 100 steps, relative | {row[0]:.1e} | {row[1]:.1e} |")
        check_twice(f"{setting}, {loss}", *row, verdict)
    lines += ["", f"| mean over {len(of)} seeds of the difference of mIoU, and its standard error | "
              f"{' | '.join(MIOU)} |", "|---|---|---|"]
    for side in (side for side in SIDES if side != "PyTorch"):
        pairs = [mean_difference([sides[side][key] - sides["PyTorch"][key] for sides in of.values()])
                 for key in MIOU.values()]
        lines.append(f"| {side} − PyTorch | " + " | ".join(f"{m:+.2f} ({se:.2f})" for m, se in pairs) + " |")
        for name, (mean, error) in zip(MIOU, pairs):
            if side == "ours" and abs(mean) > 2 * error:
                verdict.append(f"{setting}, mIoU {name}: mean {mean:+.2f}, standard error {error:.2f}")
    return [*lines, ""]


def means(run: dict, k: int) -> np.ndarray:
    """Return the means of loss k over each 100 steps."""
    return run["losses"][:, k].reshape(-1, 100).mean(1)


def check_twice(what: str, ours: float, perturbed: float, verdict: list[str]) -> None:
    if ours > 2 * perturbed:
        verdict.append(f"{what}: {ours:.2g}, more than twice {perturbed:.2g}")


def report(golden: dict, runs: dict[tuple, dict]) -> str:
    """Return Markdown: the tables of all that has been run, and what does not hold.

    runs: by seed, setting, "sharp" or "long", and side.
    """
    verdict, lines = [], ["| PyTorch side, against the authors' code | " + " | ".join(GOLDEN_LIMITS) + " |",
                          "|---|---|---|---|"]
    for trace, differences in golden["differences"].items():
        lines.append(f"| {trace} | " + " | ".join(f"{v:.1e}" for v in differences.values()) + " |")
        verdict += [f"PyTorch side, {trace}: {name}" for name, limit in GOLDEN_LIMITS.items()
                    if not differences[name] <= limit]
    lines += ["", *sharp_table(runs, verdict), ""]
    for setting in SETTINGS:
        lines += long_tables(runs, setting, verdict)
    return "\n".join([*lines, f"Verdict: {'it does not hold: ' + '; '.join(verdict) if verdict else 'it holds'}."])


def main(args: Namespace) -> None:
    folder = Path(args.folder)
    path = folder / "golden.json"
    if not path.exists() and not run_torch(args.torch, "golden", path):
        interrupt.exit_if_pending()
    golden, runs, first = read_json(path), {}, args.seeds[0]
    keys = [(first, setting, "sharp", side) for setting in SETTINGS for side in SIDES[:3]]
    keys += [(seed, setting, "long", side) for setting in SETTINGS for sides in (SIDES[:2], SIDES[2:])
             for seed in args.seeds for side in sides]
    for key in keys:
        seed, setting, length, side = key
        runs[key] = do_run(args, seed, setting, LONG if length == "long" else SHARP, side)
        print(f"{len(runs)}/{len(keys)}  seed {seed}, {setting}, {length}, {side}: mIoU {runs[key]['mIoU']:.2f} "
              f"(running {runs[key]['mIoU_running']:.2f}), {runs[key]['seconds']:.0f} s", flush=True)
        with atomic(args.markdown) as temporary:
            temporary.write_text(report(golden, runs) + "\n", encoding="utf-8")


def arguments() -> Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch", metavar="PYTHON", required=True, help="an interpreter with torch, numpy and pillow")
    add("--camvid", metavar="DIR", required=True, help="CamVid in SegNet's version: {train,val,test} and {...}annot")
    add("--idd", metavar="DIR", required=True, help="IDD-Lite: leftImg8bit and gtFine")
    add("--seeds", type=ablation.list_of(number(int, 0, 2**31 - 1)), default="1,2,3,4,5", help="with commas between")
    add("--folder", default=FOLDER, help=f"of all runs (default: {FOLDER})")
    add("--markdown", metavar="FILE", default="tests/results/trajectory.md", help="the tables")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, arguments())
