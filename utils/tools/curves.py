"""Plot five losses, both learning rates and mIoU of a training over its steps; it may still be running.

    python -m utils.tools.curves ./checkpoint

reads loss.csv, miou.csv and options.json and writes curves.png to that folder. Needs matplotlib
(pip install matplotlib). A full-size run of the paper's network is plotted next to the authors' own curve.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file, not with -m
    sys.path[0] = str(Path(__file__).parents[2])

import numpy as np
from scipy.ndimage import uniform_filter1d

from options import Parser
from utils import tables
from utils.system.errors import UserError, run_script
from utils.system.files import atomic, read_json
from utils.tables import LOSSES

# The authors' mIoU on the validation set after every 2,000 steps up to 100,000 (released code, one run).
AUTHORS = np.array([
    28.80, 28.83, 32.47, 36.40, 38.40, 35.08, 38.45, 36.54, 38.67, 42.14, 38.12, 37.69, 38.89, 42.84,
    41.61, 37.88, 40.74, 42.23, 41.85, 40.57, 41.03, 42.91, 39.89, 40.51, 42.25, 41.42, 42.48, 41.11,
    43.49, 41.57, 42.40, 42.41, 43.02, 41.87, 41.55, 41.68, 41.42, 42.50, 42.68, 42.66, 43.68, 42.25,
    41.87, 41.22, 40.25, 41.69, 42.85, 42.64, 41.67, 41.32])  # fmt: skip
AUTHORS_STEPS = 2000 * np.arange(1, len(AUTHORS) + 1)
# A run with these options can be compared to theirs step by step.
THEIRS = {"source": "gta5", "model": "resnet101", "input_size": [1280, 720], "input_size_target": [1024, 512],
          "batch_size": 1, "iter_size": 1, "processes": 1}
LAYOUT = [["loss_seg", "loss_weight"], ["loss_adv", "lr"], ["loss_D_s", "loss_D_t"], ["mIoU", "mIoU"]]


def columns(path: Path) -> dict[str, np.ndarray]:
    """Return the complete rows of a table by column, float64 (rows,) each; {} if it has none."""
    header, rows = tables.read(path)
    return dict(zip(header, np.array(rows, float).T)) if rows else {}


def draw(losses: dict[str, np.ndarray], scores: dict[str, np.ndarray], theirs: bool, title: str):
    """Return a matplotlib figure of loss.csv and miou.csv (see `columns`), of which one may be empty.

    theirs: show the authors' curve, too. UserError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    layout = LAYOUT if scores or theirs else LAYOUT[:-1]
    figure, panels = pyplot.subplot_mosaic(layout, figsize=(11, 3.25 * len(layout)), layout="constrained")
    figure.suptitle(title)
    for name, panel in panels.items():
        panel.set(title="learning rates" if name == "lr" else name, xlabel="step")
        panel.grid(alpha=0.3)
    if losses:
        step, window = losses["step"], max(1, len(losses["step"]) // 50)
        for name in LOSSES:
            panels[name].plot(step, losses[name], color="#9dbbd6", linewidth=0.5, label="every step")
            smooth = uniform_filter1d(losses[name], window, mode="nearest")
            panels[name].plot(step, smooth, color="#1f4e79", label=f"mean of {window} steps")
        panels["loss_seg"].legend()
        panels["lr"].plot(step, losses["lr"], color="#1f4e79", label="lr: G's backbone")
        panels["lr"].plot(step, losses["lr_D"], color="#c8762b", label="lr_D: D")
        panels["lr"].legend()
    for name in [name for name in scores if name.startswith("mIoU")]:  # from SYNTHIA mIoU_16 and mIoU_13
        label = name.replace("mIoU_", "over classes: ").replace("mIoU", "this run")
        panels["mIoU"].plot(scores["step"], scores[name], "o-", label=label)
    if theirs:
        panels["mIoU"].plot(AUTHORS_STEPS, AUTHORS, ".-", color="#999999", zorder=1,
                            label="the authors' run (released code)")
    if scores or theirs:
        panels["mIoU"].set(title="mIoU on the validation set", ylabel="%")
        panels["mIoU"].legend(loc="lower right")
    return figure


def main(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    losses, scores = columns(folder / "loss.csv"), columns(folder / "miou.csv")
    if not losses and not scores:
        raise UserError(f"{folder}: no rows in loss.csv or miou.csv; give the --snapshot-dir of a training")
    for name, content in (("loss.csv", losses), ("miou.csv", scores)):
        if not content:
            print(f"{folder / name} has no rows yet: its curves are missing")
    theirs = (read_json(folder / "options.json") or {}).items() >= THEIRS.items()
    figure = draw(losses, scores, theirs, str(folder))
    with atomic(folder / "curves.png") as temporary:
        figure.savefig(temporary, dpi=100)
    if scores:
        name = next(name for name in scores if name.startswith("mIoU"))
        step, text = scores["step"][-1], f"{name} {scores[name][-1]:.2f}"
        for i in np.flatnonzero(AUTHORS_STEPS == step) if theirs else ():
            text += f"; the authors' run had {AUTHORS[i]:.2f}"
        print(f"after {step:.0f} steps: {text}")
    print(f"written: {folder / 'curves.png'}")


if __name__ == "__main__":
    parser = Parser("Plot losses, learning rates and mIoU of a training over steps.")
    parser.add_argument("folder", metavar="FOLDER", help="--snapshot-dir of a training, also one under way")
    run_script(main, parser.parse_args())
