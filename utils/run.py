"""One training run: the folder it starts or resumes, its log, tables, checkpoints and validations."""

import os
import shlex
import time
from argparse import Namespace
from functools import cache
from pathlib import Path

import numpy as np
from mindspore import nn
from tqdm import tqdm

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import CLASS_NAMES, CLASS_SETS, NUM_CLASSES
from dataset.image_folder import is_cityscapes
from dataset.pipeline import names_crc32
from options.train_options import absolute_paths, shared_options
from utils import checkpoint, run_folder, tables
from utils.evaluation import evaluate
from utils.flops import step_flop
from utils.metrics import class_iou, mean_iou, mean_name
from utils.system import device, interrupt, parallel
from utils.system.errors import UserError
from utils.system.files import flush
from utils.tables import LOSSES


class Run:
    """The state of a training run, `done` steps and best mIoU, and all that it writes to --snapshot-dir.

    Order of the calls: __init__ (finds what to resume), `start` (once data and networks are there), `begin`,
    then per step `end_if_failed` and `record`, and `save_and_validate` every --save-pred-every steps. Every
    process has to make the same calls; rank 0 writes.
    """

    def __init__(self, args: Namespace):
        """Find the checkpoint to resume from; UserError if --snapshot-dir holds another run."""
        self.args, self.folder = args, Path(args.snapshot_dir)
        self.reports: list[str] = []  # lines for the log, written once the folder is ready
        self.is_main = parallel.rank() == 0
        self.per_step = args.batch_size * args.iter_size * parallel.processes()
        self.precision = device.precision(args.amp_level, args.conv_precision)
        self.origin, self.last, self.content, self.damaged = None, None, None, {}
        self.done, self.best = 0, 0.0
        self.lock = None
        if self.is_main and args.continue_train and self.folder.is_dir():
            self.lock = run_folder.lock_run_dir(self.folder)
        if args.continue_train:
            found = run_folder.find_resumable(args.continue_train)
            self.origin, self.last, self.content, self.damaged = found
            self.reports += [f"skipped {reason}" for reason in self.damaged.values()]
            scratch = f"{self.origin}: no readable checkpoint, starting from scratch"
            self.reports.append(f"resuming from {self.last}" if self.last else scratch)
        if self.is_main and self.origin != self.folder.resolve():
            run_folder.check_new(self.folder)

    def start(self, step_cell: nn.Cell, source, target, val: cityscapesDataSet | None) -> None:
        """Restore `step_cell` if the run is resumed, write options.json, begin or continue the tables."""
        self.step_cell, self.val = step_cell, val
        args, stop = self.args, self.args.num_steps_stop
        if self.last:
            self.done, self.best = checkpoint.restore(self.content, self.last, step_cell)
            self.content = None  # 400 MB, which would be held until the end
        if self.done > stop:
            raise UserError(f"{self.last} has {self.done} steps, more than --num-steps-stop {stop}")
        pair = (("source", source), ("target", target))
        checksums = {name: names_crc32(data) for name, data in pair if data is not None}
        if parallel.processes() > 1:
            about = f"{shared_options(args)} {checksums} {val and names_crc32(val)}"
            if not parallel.all_equal(checkpoint.fingerprint(step_cell, self.done, about)):
                raise UserError(
                    "the processes start from different values, options or images: do all have the same "
                    "command, and see the same files in --snapshot-dir, ./model and the data sets?"
                )
        if self.origin:
            self.reports += run_folder.check_images(self.origin, args, checksums)
        every, *subsets = CLASS_SETS
        self.means = args.source == "synthia" and subsets or [every]  # the first decides on the best
        self.loss_csv, self.miou_csv = self.folder / "loss.csv", self.folder / "miou.csv"
        self.validated = []
        if self.is_main:
            self._prepare_folder(checksums)
        count = len(target) if target is not None else "no"
        self.log(
            f"{args.method}, recipe {args.recipe}, {args.model} on {device.target()}: {len(source)} source "
            f"images, {count} target images, {self.per_step} of each per step (batch size "
            f"{args.batch_size} x iter size {args.iter_size} x {parallel.processes()} processes), steps "
            f"{self.done} to {stop}; files in {self.folder}"
        )
        self.log(device.precision_line(self.precision))
        for line in self.reports:
            self.log(line)
        quiet = parallel.rank() > 0 or None
        self.bar = tqdm(total=stop, initial=self.done, desc=args.method, unit="step", disable=quiet)
        nets = step_cell.net_G, step_cell.net_D
        self.flop_of = cache(lambda *sizes: step_flop(*nets, *sizes, args.method, self.per_step))

    def _prepare_folder(self, checksums: dict[str, int]) -> None:
        """Files of the run. Entries after the last completed step are moved aside and written again."""
        folder, args = self.folder, self.args
        self.lock = self.lock or run_folder.lock_run_dir(folder)
        if self.origin != folder.resolve():
            run_folder.check_new(folder)  # again: another process may have been faster
            if self.last:
                run_folder.fork_run(self.origin, folder, self.last.name, self.done)
        self.reports += run_folder.truncate_run(folder, self.origin or folder, self.done, self.damaged)
        about = {"names_crc32": checksums, "processes": parallel.processes(), "precision": self.precision}
        about |= {"device": device.target(), "versions": device.versions()}
        run_folder.write_options(folder, {**vars(args), **absolute_paths(args), **about}, self.done)
        tables.start(self.loss_csv, ("step", *LOSSES, "lr", "lr_D", "seconds"), self.done)
        header = ("step", *map(mean_name, self.means), *CLASS_NAMES)
        rows = tables.start(self.miou_csv, header, self.done + 1)
        self.validated = [row[0] for row in rows]
        self.best = max([float(row[1]) for row in rows if row[1] != "nan"], default=self.best)
        self.best = self.best if (folder / run_folder.BEST).exists() else 0.0

    def log(self, text: str) -> None:
        """A line on the screen and, with the time, in Train_log.log."""
        if not self.is_main:
            return
        tqdm.write(text)
        log = self.folder / "Train_log.log"
        with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:  # paths of any encoding
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def begin(self) -> None:
        """Before the first step: the validation that was pending when the run stopped."""
        self.end_if_signalled()
        self.step_cell.set_train()
        at_checkpoint = self.done % self.args.save_pred_every == 0 or self.done == self.args.num_steps_stop
        missing = self.done > 0 and at_checkpoint and str(self.done) not in self.validated
        self.step_cell.clear_overflow()
        if parallel.any_rank(missing and self.is_main and self.val is not None):
            self.validate()
        self.started = time.perf_counter()

    def record(self, losses: np.ndarray, lr: float, lr_D: float, batch: tuple, samplers: list) -> None:
        """Count one step and write its row of loss.csv; UserError if a loss is not finite.

        losses: those of LOSSES, the mean of this process. batch: the last (x_s, y_s, x_t) of the step.
        samplers: the DomainSampler of each domain, to name the images of a failed step.
        """
        i, args = self.done, self.args
        values = list(parallel.all_reduce_sum(losses) / parallel.processes())
        self.done += 1
        if not np.isfinite(values).all() and not device.simulated():
            named = ", ".join(f"{name} {value:.3g}" for name, value in zip(LOSSES, values))
            images = ", ".join(name for sampler in samplers for name in sampler.names(i))
            raise UserError(
                f"step {i}: a loss is not finite: {named}; its images: {images}. No checkpoint was "
                f"written; look at them and at {self.loss_csv}, or lower --learning-rate in a new "
                "--snapshot-dir" + (" (float16 may be too small: --amp-level O0)" * (args.amp_level != "O0"))
            )
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        if self.is_main:
            tables.append(self.loss_csv, [i, *(f"{v:.9g}" for v in (*values, lr, lr_D, seconds))])
        sizes = [x.shape[:1:-1] for x in (batch[0], batch[2])]
        flop = self.flop_of(*sizes)
        names = (*LOSSES, "lr", "lr_D", "s/step", "TFLOP/s")
        figures = (*values, lr, lr_D, seconds, flop / seconds / 1e12)
        shown = {name: f"{value:.3g}" for name, value in zip(names, figures)}
        if self.step_cell.scaler is not None:
            shown["skipped steps"] = str(self.step_cell.update.skipped.asnumpy())
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if i % max(1, min(100, args.num_steps_stop // 10)) == 0:
            self.log(f"step {i}: " + ", ".join(f"{k} {v}" for k, v in shown.items() if v != "0"))

    def save(self) -> None:
        """Write GTA5_<steps>.ckpt; it becomes `last`."""
        if device.simulated():
            return
        self.last = self.folder / f"GTA5_{self.done}.ckpt"
        statistics = [p for p in self.step_cell.net_G.get_parameters() if ".moving_" in p.name]
        parallel.average(statistics)
        if self.is_main:
            flush(self.loss_csv)  # tables are on disk before the checkpoint that refers to them
            flush(self.miou_csv)
            checkpoint.save(self.last, self.step_cell, self.args.model, self.done, self.best)
        self.log(f"saved {self.last}")

    def save_and_validate(self) -> None:
        """Checkpoint and validation, every --save-pred-every steps and at the end; not timed as a step."""
        self.save()
        self.end_if_signalled()
        if self.val is not None:
            self.validate()
        if self.args.keep_checkpoints and self.is_main:
            for _, path in run_folder.snapshots(self.folder)[self.args.keep_checkpoints :]:
                path.unlink()  # GTA5_best.ckpt has no number and stays
        self.started = time.perf_counter()

    def validate(self) -> None:
        """Evaluate G on the val set and keep it if it is the best."""
        # With several processes, the one that ended would leave the others waiting.
        each = self.end_if_signalled if parallel.processes() == 1 else None
        args = self.args
        confusion = evaluate(self.step_cell.net_G, self.val, "sum", args.batch_size, args.num_workers, each)
        self.step_cell.set_train()
        self.step_cell.clear_overflow()
        means = [f"{mean_iou(confusion, n):.9g}" for n in self.means]
        score = float(means[0])  # as miou.csv has it, which a continued run reads
        more = "".join(f", {mean_name(n)} {float(mean):.2f}" for n, mean in zip(self.means[1:], means[1:]))
        text = f"{mean_name(self.means[0])} {score:.2f}, best before {self.best:.2f}{more}"
        self.log(f"validation after {self.done} steps: {text}")
        if np.isnan(score):
            self.log("no class of the val set has a label: no best checkpoint of it; correct the labels "
                     "or use --not-val")  # fmt: skip
        if score > self.best and not device.simulated():  # not if it is NaN
            if self.is_main:
                path = self.folder / run_folder.BEST
                checkpoint.save(path, self.step_cell, args.model, self.done, score)
            self.best = score
        if self.is_main:
            tables.append(self.miou_csv, [self.done, *means, *(f"{v:.9g}" for v in class_iou(confusion))])

    def end_if_signalled(self, *_) -> None:
        """Exit with the signal's code if one waits in any process; the log says how to resume."""
        if parallel.any_rank(interrupt.pending_signal()):
            self.bar.close()
            hint = f"{parallel.command()} --continue-train {shlex.quote(str(self.folder))}"
            hint += f" {shlex.join(self.device_options())}"
            self.log(f"{self.done} steps are done; resume with: {hint}")
            parallel.barrier()  # until rank 0 has logged it: msrun ends all with the first
            interrupt.exit_for_signal(quiet=not self.is_main)

    def device_options(self) -> list[str]:
        """Return the options that choose this run's device again."""
        args, more = self.args, ["--device-id", str(self.args.device_id)]
        return ["--device", device.target(), *(more if args.device_id else [])]

    def end_if_failed(self, error: UserError | None, first: int) -> None:
        """Before a step: end in all processes if one could not read its images, or a signal waits.

        What was done since step `first`, where this process began, is saved, so that no step is lost.
        """
        if not parallel.any_rank(error or interrupt.pending_signal()):
            return
        if self.done > first and self.done % self.args.save_pred_every:
            self.save()
        if parallel.any_rank(error):  # all have come here: the checkpoint is written
            raise error or UserError("another process could not read an image")
        self.end_if_signalled()

    def close(self) -> None:
        """At the end of a complete run: say how to evaluate it, and release the folder."""
        self.bar.close()
        if device.simulated():
            self.log(device.simulation_report())
        elif self.is_main:
            # Absolute paths: the command works from any folder.
            target, size = os.path.abspath(self.args.data_dir_target), self.args.input_size_target
            plain = Path(target).is_dir() and not is_cityscapes(target)
            option = "--predict" if plain else "--data-dir"
            argv = ["--restore-from", os.path.abspath(self.last), option, target]
            argv += ["--input-size", "{},{}".format(*size)]
            argv += ["--classes", str(self.means[0])] if self.means[0] != NUM_CLASSES and not plain else []
            script = Path(__file__).parents[1] / "CLAN_evaluate_city.py"
            command = shlex.join(["python", str(script), *argv, *self.device_options()])
            self.log(f"all {self.done} steps are done; evaluate with: {command}")
        if self.lock is not None:
            os.close(self.lock)
