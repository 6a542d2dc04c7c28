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
MEANING = {"loss_seg": "L_seg(C1) + L_seg(C2)", "loss_weight": "2 · λ_weight · damp · L_weight",
           "loss_adv": "λ_adv · damp · L_adv", "loss_D_s": "L_D on source images",
           "loss_D_t": "L_D on target images", "mIoU": "%"}  # the y axes; as logged, with their factors
DARK, PALE, ORANGE, GREY = "#1f4e79", "#9dbbd6", "#c8762b", "#999999"


def columns(path: Path) -> dict[str, np.ndarray]:
    """Return the complete rows of a table by column, float64 (rows,) each; {} if it has none."""
    header, rows = tables.read(path)
    return dict(zip(header, np.array(rows, float).T)) if rows else {}


def draw(losses: dict[str, np.ndarray], scores: dict[str, np.ndarray], options: dict, title: str):
    """Return a matplotlib figure of loss.csv and miou.csv (see `columns`), of which one may be empty.

    `options` is the content of options.json. UserError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    theirs = options.items() >= THEIRS.items()
    layout = LAYOUT if scores or theirs else LAYOUT[:-1]
    figure, panels = pyplot.subplot_mosaic(layout, figsize=(11, 3.25 * len(layout)), layout="constrained")
    note = f"damp = 1 − step / {options.get('num_steps', 'num_steps')}"
    if options.get("method") == "clan":
        note += "; after the warm-up, pixels are weighted in loss_adv and loss_D_t"
    figure.suptitle(f"{title}\n{note}")
    for name, panel in panels.items():
        panel.set(title=name, xlabel="step", ylabel=MEANING.get(name))
        panel.grid(alpha=0.3)
    if losses:
        plot_losses(panels, losses, options)
    for name in [name for name in scores if name.startswith("mIoU")]:  # from SYNTHIA mIoU_16 and mIoU_13
        label = name.replace("mIoU_", "over classes: ").replace("mIoU", "this run")
        panels["mIoU"].plot(scores["step"], scores[name], "o-", label=label)
    if theirs:
        label = "the authors' run (released code)"
        panels["mIoU"].plot(AUTHORS_STEPS, AUTHORS, ".-", color=GREY, zorder=1, label=label)
    if scores or theirs:
        panels["mIoU"].set_title("mIoU on the validation set")
        panels["mIoU"].legend(loc="lower right")
    return figure


def plot_losses(panels: dict, losses: dict[str, np.ndarray], options: dict) -> None:
    """Plot the losses and, on axes of their own, the learning rates of G and D; mark the warm-up's end."""
    step, window, warm_up = losses["step"], len(losses["step"]) // 50, options.get("preheat_steps", 0)
    for name in LOSSES:
        if window > 1:
            panels[name].plot(step, losses[name], color=PALE, linewidth=0.5, label="every step")
            smooth = uniform_filter1d(losses[name], window, mode="nearest")
            panels[name].plot(step, smooth, color=DARK, label=f"mean of {window} steps")
        else:
            panels[name].plot(step, losses[name], ".-", color=DARK, label="every step")
    # Both have the same shape; more room above that of D keeps the lines apart.
    for axes, name, colour, label, room in ((panels["lr"], "lr", DARK, "lr: G's backbone", 1.05),
                                            (panels["lr"].twinx(), "lr_D", ORANGE, "lr_D: D", 1.4)):
        axes.plot(step, losses[name], color=colour)
        axes.set_ylim(0, room * losses[name].max() or 1)
        axes.set_ylabel(label, color=colour)
        axes.tick_params(axis="y", colors=colour)
    panels["lr"].set_title("learning rates")
    for name in (*LOSSES, "lr") if 0 < warm_up <= step[-1] else ():
        panels[name].axvline(warm_up, color=GREY, linestyle="--", linewidth=1, label="end of warm-up")
    panels["loss_seg"].legend(loc="upper right")


def main(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    losses, scores = columns(folder / "loss.csv"), columns(folder / "miou.csv")
    if not losses and not scores:
        raise UserError(f"{folder}: no rows in loss.csv or miou.csv; give the --snapshot-dir of a training")
    for name, content in (("loss.csv", losses), ("miou.csv", scores)):
        if not content:
            print(f"{folder / name} has no rows yet: its curves are missing")
    options = read_json(folder / "options.json") or {}
    figure = draw(losses, scores, options, str(folder))
    with atomic(folder / "curves.png") as temporary:
        figure.savefig(temporary, dpi=100)
    if scores:
        name = next(name for name in scores if name.startswith("mIoU"))
        step, text = scores["step"][-1], f"{name} {scores[name][-1]:.2f}"
        for i in np.flatnonzero(AUTHORS_STEPS == step) if options.items() >= THEIRS.items() else ():
            text += f"; the authors' run had {AUTHORS[i]:.2f}"
        print(f"after {step:.0f} steps: {text}")
    print(f"written: {folder / 'curves.png'}")


if __name__ == "__main__":
    parser = Parser("Plot losses, learning rates and mIoU of a training over steps.")
    parser.add_argument("folder", metavar="FOLDER", help="--snapshot-dir of a training, also one under way")
    run_script(main, parser.parse_args())
