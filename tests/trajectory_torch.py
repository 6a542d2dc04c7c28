"""The PyTorch side of tests/trajectory.py: train, take single steps, or repeat the reference outputs.

    python -m tests.trajectory_torch golden FILE
    python -m tests.trajectory_torch train FOLDER
    python -m tests.trajectory_torch single FOLDER

Networks and steps are those of tests/benchmark_torch.py; nothing here needs mindspore.
"""

import json
import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from dataset.transform import LABEL_TO_TRAIN
from options.train_options import get_arguments
from tests import golden
from tests.benchmark_torch import Discriminator, Generator, Trainer, load_weights, read_image
from utils import tables
from utils.tables import LOSSES

# What precedes the names of the first moments of G and of D in a state of this project.
MOMENTS = "optimizer_G.moments.net_G.", "optimizer_D.moment1.net_D."


def schedule(i: int, args: Namespace) -> tuple[float, ...]:
    """Return damp, base, local and the learning rates of G and D in step i."""
    left, weighted = 1 - i / args.num_steps, i > args.preheat_steps
    rate = i / args.preheat_steps if i < args.preheat_steps else left**args.power
    weights = (args.epsilon, args.lambda_local) if weighted else (1.0, 0.0)
    return left, *weights, rate * args.learning_rate, rate * args.learning_rate_D


def read_source(image: str, label: str, scale: float, mirror: bool, size: tuple[int, int]) -> tuple:
    """Return x (1, 3, h, w) at `scale` times size and y (1, H, W) at size, a trainId of each pixel."""
    y = LABEL_TO_TRAIN[np.asarray(Image.open(label).resize(size, Image.Resampling.NEAREST))].astype(int)
    y = np.ascontiguousarray(y[:, ::-1]) if mirror else y
    return read_target(image, scale, mirror, size), torch.from_numpy(y)[None]


def read_target(image: str, scale: float, mirror: bool, size: tuple[int, int]) -> torch.Tensor:
    """Return x (1, 3, h, w) at `scale` times size."""
    x = torch.from_numpy(read_image(image, (int(size[0] * scale), int(size[1] * scale))))[None]
    return x.flip(3) if mirror else x


def train(trainer: Trainer, source: list[list], target: list[list]) -> list[list]:
    """Take a step for each item of the lists; return the rows of loss.csv without seconds.

    source: image, label, scale and mirror of each step. target: the same without a label.
    """
    rows = []
    for i, items in enumerate(zip(source, target, strict=True)):
        rows.append([i, *take_step(trainer, i, *items), *schedule(i, trainer.args)[-2:]])
    return rows


def take_step(trainer: Trainer, i: int, source: list, target: list) -> list[float]:
    """Take step i with an item of each list of `train`; return the losses."""
    args, dtype = trainer.args, trainer.G.conv1.weight.dtype
    x_s, y_s = read_source(*source, args.input_size)
    x_t = read_target(*target, args.input_size_target)
    return trainer.step(x_s.to(dtype), y_s, x_t.to(dtype), *schedule(i, args))


def train_run(folder: Path) -> None:
    """Do the run that job.json describes; write loss.csv and G's weights.

    Their file is called GTA5_<steps>.ckpt, as where the run is evaluated; its content tells what it is.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    args = get_arguments(job["argv"])
    G, D = Generator(args.model), Discriminator(args.model)
    for net, name in ((G, "G"), (D, "D")):
        load_weights(net, load_file(Path(job["weights"]) / f"{name}.safetensors"))
    if job["perturb"]:
        rng = np.random.default_rng(job["perturb"])
        with torch.no_grad():
            for p in (*G.parameters(), *D.parameters()):
                p.mul_(torch.from_numpy(1 + 2e-7 * rng.standard_normal(p.shape)))
    rows = train(Trainer(G, D, args), job["source"], job["target"])
    assert np.isfinite(rows).all(), "a loss is not finite"
    torch.save(G.state_dict(), folder / f"GTA5_{len(rows)}.ckpt")
    tables.write(folder / "loss.csv", ("step", *LOSSES, "lr", "lr_D"), rows)


def single_steps(folder: Path) -> None:
    """Take each step once from a state of this project's run; write differences.json, (steps, 2, 2).

    They are the relative differences from PyTorch in float64 of the gradients of G and D (axis 1) of this
    project and of PyTorch in float32 (axis 2). State i, in i.npz, is that before step i.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    args, differences = get_arguments(job["argv"]), []
    after = dict(np.load(folder / "1.npz"))
    for i in range(1, args.num_steps_stop):
        before, after = after, dict(np.load(folder / f"{i + 1}.npz"))
        ends = [after]
        for dtype in (torch.float32, torch.float64):
            trainer, moments, decays = trainer_at(before, args, dtype)
            take_step(trainer, i, job["source"][i], job["target"][i])
            ends.append({name: moment.numpy() for name, moment in moments.items()})
        ours, single, double = (gradients(before, end, decays) for end in ends)
        differences.append([[golden.norm(x - exact) / golden.norm(exact) for x in both]
                            for *both, exact in zip(ours, single, double)])
    (folder / "differences.json").write_text(json.dumps(differences), encoding="utf-8")


def trainer_at(state: dict, args: Namespace, dtype: torch.dtype) -> tuple[Trainer, dict, dict]:
    """Return a trainer with the networks and first moments of a state.

    And, by the names in the state, these moments and by what a step multiplies each. D's second moments are
    left at 0: they decide only how far D's weights move.
    """
    G, D = Generator(args.model), Discriminator(args.model)
    for net, prefix in ((G, "net_G."), (D, "net_D.")):
        load_weights(net, {name.removeprefix(prefix): value for name, value in state.items()
                           if name.startswith(prefix)})
        net.to(dtype)
    trainer, moments = Trainer(G, D, args), {}
    for prefix, net, weights in zip(MOMENTS, (G, D), (trainer.weights_G, trainer.weights_D)):
        names = [f"{prefix}{name}" for name, p in net.named_parameters() if p.requires_grad]
        moments |= {name: entry[1] for name, entry in zip(names, weights, strict=True)}
    for name, moment in moments.items():
        moment.copy_(torch.from_numpy(state[name]))
    decays = [args.momentum**times for *_, times in trainer.weights_G] + [0.9] * len(trainer.weights_D)
    return trainer, moments, dict(zip(moments, decays, strict=True))


def gradients(before: dict, after: dict, decays: dict[str, float]) -> list[np.ndarray]:
    """Return what a step has added to the first moments of G and of D; decays: from `trainer_at`.

    That is each weight's gradient times a factor, and for G the weight decay.
    """
    added = {name: after[name] - decay * before[name].astype(float) for name, decay in decays.items()}
    return [np.concatenate([x.ravel() for name, x in added.items() if name.startswith(prefix)])
            for prefix in MOMENTS]


def compare_golden(trace: str) -> dict[str, float]:
    """Return the largest relative differences in the 8 steps of a trace.

    They are those of the losses, and of the norms by which weights of G and D have changed.
    """
    gold = golden.load(trace)
    setup, nets = gold["setup"], (Generator(), Discriminator())
    starts = [golden.state(shapes, setup["salt"] + salt)
              for shapes, salt in ((golden.shapes_G(), ""), (golden.shapes_D(), "D."))]
    for net, start in zip(nets, starts):
        load_weights(net, start)
    argv = ["--recipe", trace.partition("_")[0], "--input-size", "{},{}".format(*setup["source"]),
            "--input-size-target", "{},{}".format(*setup["target"])]
    for name in ("num_steps", "preheat_steps", "weight_decay"):
        argv += ["--" + name.replace("_", "-"), str(setup[name])]
    with tempfile.TemporaryDirectory() as name:
        data = golden.write_gta5(Path(name) / "GTA5", {"00001": setup["picture_seed_source"]})
        city = golden.write_city(Path(name) / "City", "train", {"000001": setup["picture_seed_target"]})
        folders = data / "images", data / "labels", city / "leftImg8bit"
        image, label, target = (next(folder.rglob("*.png")) for folder in folders)
        steps, as_is = setup["num_steps_stop"], [1.0, False]
        rows = train(Trainer(*nets, get_arguments(argv)), [[image, label, *as_is]] * steps,
                     [[target, *as_is]] * steps)
    ours, theirs = np.array(rows)[:, 1:], np.array(gold["rows"])[:, 1:]
    assert np.allclose(ours[:, 5:], theirs[:, 5:], rtol=1e-6)  # learning rates
    changes = []
    for net, start, key in zip(nets, starts, ("state_delta_norm", "state_delta_norm_D")):
        state = net.state_dict()
        changes += [golden.norm(state[name].numpy().astype(float) - start[name]) / change - 1
                    for name, change in gold[key].items()]
    differences = abs(ours[:, :5] / theirs[:, :5] - 1)
    return {"losses of steps 0 to 2": differences[:3].max(), "losses of steps 3 to 7": differences[3:].max(),
            "changes of weights": max(map(abs, changes))}


def compare_all_golden(path: str) -> None:
    """Write the differences of all traces to a file."""
    traces = ("default", "released", "default_decay", "released_decay")
    differences = {trace: compare_golden(trace) for trace in traces}
    content = {"differences": differences, "torch": torch.__version__}
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the process that started this one has blocked them
    if sys.argv[1] == "golden":
        compare_all_golden(sys.argv[2])
    else:
        {"train": train_run, "single": single_steps}[sys.argv[1]](Path(sys.argv[2]))
