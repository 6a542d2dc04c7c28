"""Train beside PyTorch on photographs, CamVid to IDD-Lite; write tests/results/trajectory.md.

    python -m tests.trajectory --torch PYTHON --camvid DIR --idd DIR [--seeds 1,2,3,4,5] [--perturbed 2]

Both sides start from the same weights (stage A on CamVid, a D from the seed) and see the same images in the
same order, scale and mirroring. This side is the training script; PyTorch's is tests/trajectory_torch.py,
which is first compared with the reference outputs of the authors' code. All weights are evaluated here. To
tell errors from chaos, PyTorch's run is repeated from weights that differ by about their last bit, and
PyTorch takes each step of this side's run once from the state before it, so that no difference can grow.

A run takes one thread. These single steps come first, and the states that they start from take 4 GB. The
tables are written after each run; a second start does only what has no result yet. PYTHON is an interpreter
with torch, safetensors, numpy and pillow.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from argparse import Namespace
from functools import cache
from pathlib import Path

from utils.system import device, interrupt

os.environ["OMP_NUM_THREADS"] = "1"  # before mindspore is imported; for the processes of the runs, too
device.prepare_environment()
if __name__ == "__main__":
    interrupt.block()  # the process of a run is told to end, then this one ends

import mindspore
import numpy as np

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import DomainSampler
from model.CLAN_D import discriminator
from model.CLAN_G import Res_Deeplab, generator
from options import Parser, number
from options.train_options import get_arguments
from tests.scripts import ROOT, losses
from utils import checkpoint, run_folder
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, read_json, rotate_existing, write_json
from utils.tables import LOSSES
from utils.tools import ablation

STEPS, WINDOW, SINGLE, FOLDER = 800, 100, 400, "./checkpoint/trajectory"
TORCH_NEEDS = "torch, safetensors, numpy and pillow"
COMMON = ["--model", "small", *ablation.PHOTO_SIZE, "--not-val", "--device", "cpu", "--lambda-weight", "0.1",
          "--save-pred-every", str(STEPS)]
RECIPES = {"default": ["--recipe", "default", "--lambda-adv", "1", "--detach-weight-map"],
           "released": ["--recipe", "released", "--lambda-adv", "0.1"]}
FORMS = {  # sharp: the steps with pixel weights come before chaos has made two equal runs different
    "sharp": ["--num-steps", "60", "--preheat-steps", "5", "--learning-rate", "0.0005",
              "--learning-rate-D", "0.0001"],
    "long": ["--num-steps", str(STEPS), "--preheat-steps", "80", "--learning-rate", "0.005",
             "--learning-rate-D", "0.001"]}
FORMS["single"] = [*FORMS["long"], "--num-steps-stop", str(SINGLE), "--save-pred-every", "1"]
SHARP_PARTS = ((0, 12), (12, 25), (25, 60))  # of steps, in the table
SHARP_LIMITS = {"default": {25: 1e-5, 60: 1e-3}, "released": {25: 1e-4, 60: 1e-3}}  # over so many steps
GOLDEN_LIMITS = {"losses of steps 0 to 2": 1e-3, "losses of steps 3 to 7": 3e-2, "changes of weights": 5e-2}
SINGLE_LIMITS = 3, 0.03  # of the median, as a multiple of float32's in PyTorch; of the largest difference
MIOU = {"running": "mIoU_running", "re-estimated": "mIoU"}  # batch norm's statistics
HEAD = """# 800 steps beside PyTorch

`python -m tests.trajectory --torch PYTHON --camvid DIR --idd DIR`: the training script beside plain PyTorch
with the optimisers of PyTorch 1.0, from the same weights, on the same photographs in the same order, scale
and mirroring; small network, 192x136, CamVid to IDD-Lite. Perturbed: PyTorch again, from weights multiplied
by 1 + 2e-7 z, z standard normal. Default: lambda_adv 1, no gradient through the alignment map; released:
lambda_adv 0.1, with that gradient; both: lambda_weight 0.1. This side counts as equal to PyTorch's if

- PyTorch's side keeps to the tolerances of `tests/golden.py` in 8 steps of the full network;
- in the sharp form (60 steps with small learning rates, so that pixel weights come before chaos) each loss
  is within a relative 1e-5 of PyTorch's over 25 steps (released: 1e-4), and within 1e-3 over all;
- in steps 1 to 399 of the 800, each taken once by PyTorch from the state that this side's run has reached,
  the gradients of G and of D (what a step adds to the first moments, with weight decay) differ from those of
  PyTorch in float64 by at most 3 %, and at the median by at most 3 times what those in float32 differ by;
- over 800 steps, mIoU and the means of each loss over 100 steps differ from PyTorch's by at most twice as
  much as those of the perturbed runs, each at its worst over the seeds;
- the mean difference of mIoU over the seeds is within two standard errors of 0.
"""


def list_of_runs(seeds: list[int], perturbed: int = 2) -> list[tuple[str, str, int, str]]:
    """Return recipe, form, seed and side of all runs in their order; `perturbed` of them for each seed."""
    both, others = ["ours", "PyTorch"], [f"perturbed_{k}" for k in range(1, perturbed + 1)]
    runs = [(recipe, "sharp", seeds[0], side) for recipe in RECIPES for side in both + others[:1]]
    return runs + [(recipe, "long", seed, side) for recipe in RECIPES for sides in (both, others)
                   for seed in seeds for side in sides]


def initial_weights(args: Namespace, seed: int) -> tuple[Path, Path]:
    """Return the checkpoints of stage A and of a D; both networks are beside D's for PyTorch, too.

    Stage A is that of utils/tools/ablation.py.
    """
    settings = Namespace(camvid=args.camvid, idd=args.idd, steps=STEPS, folder=args.folder, jobs=1)
    ablation.run_all(settings, [seed], {})
    folder, argv = ablation.runs_of_seed(settings, seed, {})["stage_a"]
    path_G, path_D = folder / f"GTA5_{get_arguments(argv).num_steps}.ckpt", folder.parent / "D.ckpt"
    mindspore.set_seed(seed)
    net_D, net_G = discriminator("small"), generator("small")
    checkpoint.load(net_G, checkpoint.read(str(path_G)), str(path_G), "net_G")
    mindspore.save_checkpoint(net_D, str(path_D))
    for name, net in (("G", net_G), ("D", net_D)):
        checkpoint.save_safetensors(folder.parent / f"{name}.safetensors", net)
    return path_G, path_D


class Listing(list):
    """Files of images. To read one returns them, and what a sampler has decided."""

    def read(self, i: int, scale: float, mirror: bool) -> tuple[list]:
        return ([*self[i], scale, mirror],)


def images_of_steps(args: Namespace) -> dict[str, list[list]]:
    """Return what each step of a training reads.

    "source": image, label, scale and mirror of each step; "target": the same without a label.
    """
    source = GTA5DataSet(args.data_dir)
    target = cityscapesDataSet(args.data_dir_target, "train")
    lists = {}
    for domain, (name, files) in enumerate({"source": zip(source.images, source.labels),
                                            "target": zip(target.images)}.items()):
        listing = Listing([os.path.abspath(path) for path in paths] for paths in files)
        sampler = DomainSampler(listing, 0, args.num_steps, 1, [args.random_seed, domain], args.random_mirror,
                                args.random_scale)
        lists[name] = [sampler[k][0] for k in range(len(sampler))]
    return lists


def options(weights: tuple[Path, Path], recipe: str, form: str, seed: int, folder: Path) -> list[str]:
    """Return the training script's options. weights: from `initial_weights`; folder: where the run goes."""
    path_G, path_D = weights
    data = Path(ablation.PHOTO_DATA)
    words = [*COMMON, *RECIPES[recipe], *FORMS[form], "--random-seed", seed, "--snapshot-dir", folder,
             "--data-dir", data / "GTA5", "--data-dir-target", data / "Cityscapes",
             "--restore-from", path_G, "--restore-from-D", path_D]  # fmt: skip
    return [str(word) for word in words]


def single_steps(torch: str, weights: tuple[Path, Path], recipe: str, seed: int) -> np.ndarray:
    """Return the relative differences of gradients from PyTorch's in float64, (SINGLE - 1, 2, 2).

    In axis 1 those of G and of D; in axis 2 this side's and those of PyTorch in float32. A step starts from
    the state that this side's run has reached.
    """
    folder = weights[1].parent / f"{recipe}_single"
    argv = options(weights, recipe, "single", seed, folder / "run")
    if not (known := ablation.known_result(folder, argv)):
        lock = run_folder.lock_run_dir(folder / "run", option="--folder")  # a run may outlive what started it
        shutil.rmtree(folder)  # nothing but states of a run that did not end
        os.close(lock)
        ablation.train(folder / "run", argv, 1)
        interrupt.exit_if_pending()
        for step in range(1, SINGLE + 1):
            path = folder / "run" / f"GTA5_{step}.ckpt"
            np.savez(folder / f"{step}.npz", **torch_state(checkpoint.read(str(path))))
            path.unlink()
        write_json(folder / "job.json", {"argv": argv, **images_of_steps(get_arguments(argv))})
        print(f"{recipe}, seed {seed}: PyTorch takes {SINGLE - 1} single steps", flush=True)
        run_torch(torch, "single", folder)
        for path in folder.glob("*.npz"):
            path.unlink()
        differences = json.loads((folder / "differences.json").read_text(encoding="utf-8"))
        known = {"differences": differences, "command": argv}
        write_json(folder / "result.json", known)
    return np.array(known["differences"])


def torch_state(content: dict) -> dict[str, np.ndarray]:
    """Return networks and moments of a checkpoint of the training script; batch norm has PyTorch's names."""
    return {checkpoint.torch_name(name): value for name, value in content.items() if "net_" in name}


def do_run(torch: str, weights: tuple[Path, Path], recipe: str, form: str, seed: int, side: str) -> dict:
    """Do one run unless it is done; return the content of its result.json, and its losses (steps, 5).

    torch: PyTorch's interpreter. weights: from `initial_weights`; the others are from `list_of_runs`.
    """
    folder = weights[1].parent / f"{recipe}_{form}" / side
    argv = options(weights, recipe, form, seed, folder)
    if side == "ours":
        ablation.train(folder, argv, 1)
    elif not ablation.known_result(folder, argv):
        if folder.exists():
            rotate_existing(folder)
        job = {"argv": argv, "weights": os.path.abspath(weights[1].parent),
               "perturb": int(side.partition("_")[2] or 0), **images_of_steps(get_arguments(argv))}
        write_json(folder / "job.json", job)
        run_torch(torch, "train", folder)
    interrupt.exit_if_pending()
    result = ablation.known_result(folder, argv) or ablation.evaluate(folder, argv, network())
    return {**result, "losses": losses(folder)}


@cache
def network() -> Res_Deeplab:
    """Return the small network, which is compiled once."""
    return generator("small")


def run_torch(python: str, what: str, path: Path) -> None:
    """Run tests/trajectory_torch.py until it or, after a signal, this program ends. UserError if it fails."""
    argv = ["-m", "tests.trajectory_torch", what, os.path.abspath(path)]
    process = subprocess.Popen([python, *argv], cwd=ROOT)
    while process.poll() is None and not interrupt.pending_signal():
        time.sleep(0.2)
    process.terminate()  # does nothing if it has ended
    code = process.wait()
    interrupt.exit_if_pending()
    if code:
        raise UserError(f"PyTorch's side failed (exit code {code}): has {python} {TORCH_NEEDS}?")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table and an empty one; nothing without rows. What has not been run is a dash."""
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return [*(line.replace("nan / nan", "–").replace("nan", "–") for line in lines), ""] if rows else []


def report(golden: dict, singles: dict[str, np.ndarray], runs: dict[tuple, dict], keys: list[tuple]) -> str:
    """Return the content of trajectory.md: tables of what has been run, and the verdict.

    golden: what tests/trajectory_torch.py found. singles: of each recipe, from `single_steps`. runs: the
    results, by their keys. keys: those of all runs, from `list_of_runs`.
    """
    seeds, sides = (list(dict.fromkeys(key[k] for key in keys)) for k in (2, 3))
    failures = [f"PyTorch's side, {trace}, {what}" for trace, values in golden["differences"].items()
                for what, limit in GOLDEN_LIMITS.items() if not values[what] <= limit]
    lines = table(["PyTorch's side against the authors' code", *GOLDEN_LIMITS],
                  [[trace, *(f"{values[what]:.1e}" for what in GOLDEN_LIMITS)]
                   for trace, values in golden["differences"].items()])  # fmt: skip
    lines += sharp_table(runs, seeds[0], failures) + single_table(singles, seeds[0], failures)
    for recipe in RECIPES:
        lines += long_tables(runs, seeds, sides, recipe, failures)
    of = "" if len(runs) == len(keys) else f" of the first {len(runs)} of {len(keys)} runs"
    verdict = f"it does not hold: {'; '.join(failures)}" if failures else "it holds"
    lines += [f"Verdict{of}: {verdict}.", ""]
    versions = f"MindSpore {importlib.metadata.version('mindspore')}, PyTorch {golden['torch']}"
    return "\n".join([HEAD, *lines, f"{versions}, Python {platform.python_version()}, one thread.", ""])


def sharp_table(runs: dict[tuple, dict], seed: int, failures: list[str]) -> list[str]:
    """Return the table of the sharp form; add what is beyond a limit to `failures`."""
    header = [f"sharp form, seed {seed}: largest relative difference of losses from PyTorch's",
              *(f"steps {a} to {b - 1}" for a, b in SHARP_PARTS)]
    rows = []
    for recipe, limits in SHARP_LIMITS.items():
        ours, torch, perturbed = (runs.get((recipe, "sharp", seed, side))
                                  for side in ("ours", "PyTorch", "perturbed_1"))
        for name, run in (("ours", ours), ("perturbed", perturbed)):
            if run and torch:
                gap = abs(run["losses"] / torch["losses"] - 1).max(1)
                rows.append([f"{recipe}, {name}", *(f"{gap[a:b].max():.1e}" for a, b in SHARP_PARTS)])
                failures += [f"sharp form, {recipe}: beyond {limit:.0e} in {steps} steps" for steps, limit
                             in limits.items() if run is ours and not gap[:steps].max() <= limit]
    return table(header, rows)


def single_table(singles: dict[str, np.ndarray], seed: int, failures: list[str]) -> list[str]:
    """Return the table of single steps; add what is beyond a limit to `failures`."""
    header = [f"single steps, seed {seed}: relative difference of gradients from PyTorch's in float64",
              *(f"{net}: {what}" for net in "GD" for what in ("median", "90 % below", "largest"))]
    rows, (times, limit) = [], SINGLE_LIMITS
    for recipe, gaps in singles.items():
        values = np.quantile(gaps, (0.5, 0.9, 1), 0)  # (3, 2, 2)
        for k, side in enumerate(("ours", "PyTorch in float32")):
            rows.append([f"{recipe}, {side}", *(f"{v:.1e}" for v in values[..., k].T.flat)])
        for net, (ours, torch), largest in zip("GD", values[0], values[2, :, 0]):
            if not (ours <= times * torch and largest <= limit):
                failures.append(f"single steps, {recipe}, {net}: median {ours:.1e} (float32: {torch:.1e}), "
                                f"largest {largest:.1e}")
    return table(header, rows)


def long_tables(runs: dict[tuple, dict], seeds: list[int], sides: list[str], recipe: str,
                failures: list[str]) -> list[str]:
    """Return the tables of a recipe; add what does not hold to `failures`. sides: this, PyTorch's, others."""
    seeds = [seed for seed in seeds if (recipe, "long", seed, "PyTorch") in runs]
    if not seeds:
        return []
    scores = np.full((len(seeds), len(sides), len(MIOU)), np.nan)  # nan: not run
    means = np.full((len(seeds), len(sides), STEPS // WINDOW, len(LOSSES)), np.nan)
    for n, seed in enumerate(seeds):
        for m, side in enumerate(sides):
            if run := runs.get((recipe, "long", seed, side)):
                scores[n, m] = [run[key] for key in MIOU.values()]
                means[n, m] = run["losses"].reshape(STEPS // WINDOW, WINDOW, -1).mean(1)
    rows = [[f"seed {seed}", *(" / ".join(f"{v:.2f}" for v in pair) for pair in pairs)]
            for seed, pairs in zip(seeds, scores)]  # fmt: skip
    lines = table([f"{recipe}: mIoU, {' / '.join(MIOU)}", *sides], rows)

    differences, relative = scores - scores[:, 1:2], abs(means / means[:, 1:2] - 1).max(2)
    gaps = {f"mIoU, {name}": abs(differences[..., k]) for k, name in enumerate(MIOU)}
    gaps |= {f"{name}, means of {WINDOW} steps, relative": relative[..., k] for k, name in enumerate(LOSSES)}
    largest = {what: [np.fmax.reduce(gap[:, part], None) for part in (slice(1), slice(2, None))]
               for what, gap in gaps.items()}
    lines += table([f"{recipe}: largest difference from PyTorch", "ours", "perturbed"],
                   [[what, *(f"{v:.2g}" for v in values)] for what, values in largest.items()])
    failures += [f"{recipe}, {what}: {ours:.2g} is more than twice {perturbed:.2g}"
                 for what, (ours, perturbed) in largest.items() if ours > 2 * perturbed]

    if len(seeds) > 1:
        ours = differences[:, 0]
        mean, error = ours.mean(0), ours.std(0, ddof=1) / len(seeds) ** 0.5
        texts = [f"{name} {m:+.2f} ({e:.2f})" for name, m, e in zip(MIOU, mean, error)]
        lines += [f"{recipe}: mean over {len(seeds)} seeds of the difference of mIoU, ours minus PyTorch's, "
                  f"and its standard error: {', '.join(texts)}.", ""]
        failures += [f"{recipe}, mIoU, {name}: the mean difference {m:+.2f} is more than two standard errors"
                     for name, m, e in zip(MIOU, mean, error) if abs(m) > 2 * e]
    return lines


def main(args: Namespace) -> None:
    device.setup(get_arguments(["--device", "cpu"]))
    path, first = Path(args.folder) / "golden.json", args.seeds[0]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        run_torch(args.torch, "golden", path)
    weights = {first: initial_weights(args, first)}
    singles = {recipe: single_steps(args.torch, weights[first], recipe, first) for recipe in RECIPES}
    runs, keys = {}, list_of_runs(args.seeds, args.perturbed)
    for key in keys:
        _, _, seed, _ = key
        if seed not in weights:
            weights[seed] = initial_weights(args, seed)
        runs[key] = run = do_run(args.torch, weights[seed], *key)
        print(f"{len(runs)}/{len(keys)}  {' '.join(map(str, key))}: mIoU {run['mIoU']:.2f} "
              f"(running {run['mIoU_running']:.2f})", flush=True)
        with atomic(args.markdown) as temporary:
            temporary.write_text(report(read_json(path), singles, runs, keys), encoding="utf-8")


def arguments() -> Namespace:
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--torch", metavar="PYTHON", required=True, help=f"an interpreter with {TORCH_NEEDS}")
    add("--camvid", metavar="DIR", required=True, help="CamVid, as for utils.tools.ablation")
    add("--idd", metavar="DIR", required=True, help="IDD-Lite, as for utils.tools.ablation")
    add("--seeds", type=ablation.list_of(number(int, 0, 2**31 - 1)), default="1,2,3,4,5",
        help="with commas between; the first is that of the sharp form and of single steps")
    add("--perturbed", type=number(int, 1), default=2, metavar="K",
        help="perturbed runs for each seed (default: 2)")
    add("--folder", default=FOLDER, help=f"of all runs (default: {FOLDER})")
    add("--markdown", metavar="FILE", default="tests/results/trajectory.md", help="the tables")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, arguments())
