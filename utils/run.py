"""One training run: the folder it starts or resumes, its log, tables, checkpoints and validations."""

import os
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
from mindspore import nn
from tqdm import tqdm

from dataset.classes import NUM_CLASSES
from dataset.images import names_crc32
from dataset.layouts import has_pairs, is_cityscapes
from options.train_options import absolute_paths, shared_options
from utils import checkpoint, run_folder, tables
from utils.evaluation import evaluate
from utils.flops import step_flop
from utils.metrics import class_iou, mean_iou, mean_name, unlabelled_classes
from utils.run_folder import ResumePoint
from utils.system import device, interrupt, parallel
from utils.system.errors import UserError
from utils.system.files import flush
from utils.tables import LOSSES


def images_per_step(args: Namespace) -> int:
    """Return how many images of each domain a step takes, over all processes."""
    return args.batch_size * args.iter_size * parallel.processes()


class Run:
    """The state of a training run, `done` steps and best mIoU, and all that it writes to --snapshot-dir.

    `exchange` is called before each step, `record` after it, and `save_and_validate` every --save-pred-every
    steps; `begin` before the first step and `close` after the last. Several processes make the same calls, in
    which they wait for each other; rank 0 writes.
    """

    def __init__(self, args: Namespace, resume: ResumePoint, step_cell: nn.Cell, source, target, val):
        """Start or resume a run: restore `step_cell`, compare the processes, write options.json and tables.

        source, target, val: data sets, of which the last two may be None. --snapshot-dir has to be locked.
        UserError if the checkpoint does not fit, a list chooses other images or the processes differ.
        """
        self.args, self.folder, self.step_cell, self.val = args, Path(args.snapshot_dir), step_cell, val
        self.is_main, self.per_step = parallel.rank() == 0, images_per_step(args)
        self.precision = device.precision(args.amp_level, args.conv_precision)
        self.last, self.done, self.best, stop = resume.checkpoint, resume.steps, 0.0, args.num_steps_stop
        if self.done > stop:
            raise UserError(f"{self.last} has {self.done} steps, more than --num-steps-stop {stop}")
        if self.last:
            self.best = checkpoint.restore(resume.content, self.last, step_cell)
            resume.content.clear()  # 400 MB, which would be held until the end
        domains = {"source": source} | ({"target": target} if target else {})
        checksums = {name: names_crc32(data) for name, data in domains.items()}
        checksums |= {"val": names_crc32(val, labels=True)} if val else {}
        if parallel.processes() > 1:
            about = f"{shared_options(args)} {checksums}"
            if not parallel.all_equal(checkpoint.fingerprint(step_cell, self.done, about)):
                raise UserError(
                    "the processes start from different values, options or images: do all have the same "
                    "command, and see the same files in --snapshot-dir, ./model and the data sets?"
                )
        notes = [f"skipped {error}" for error in resume.damaged.values()]
        if self.last:
            notes.append(f"resuming from {self.last}")
        elif resume.folder:
            notes.append(f"{resume.folder}: no readable checkpoint, starting from scratch")
        notes += run_folder.check_images(resume, args, checksums)
        self.means = tables.class_counts(args.source)  # the first decides on the best
        self.loss_csv, self.miou_csv = (self.folder / name for name in run_folder.TABLES)
        self.validated: list[str] = []  # after how many steps
        # Of the last step: its losses in this process, and what else its row needs until that is written.
        self.losses, self.unsettled = np.zeros(len(LOSSES)), {}
        self.logged, self.waited, self.elapsed = 0, 0.0, 0.0  # steps and seconds at the last line of the log
        if self.is_main:
            notes += self._prepare_folder(resume, checksums)
        if val is None and not args.not_val:
            notes.append(f"no validation: {args.data_dir_target} is no Cityscapes tree; see --data-dir-val")
        for data in filter(None, (source, target, val)):
            notes += data.reports
        self.log(
            f"{args.method}, recipe {args.recipe}, {args.model} on {device.target()}: {len(source)} source "
            f"images, {'no' if target is None else len(target)} target images, {self.per_step} of each per "
            f"step (batch size {args.batch_size} x iter size {args.iter_size} x {parallel.processes()} "
            f"processes), steps {self.done} to {stop}; files in {self.folder}"
        )
        for line in (device.precision_line(self.precision), *notes, self.disk_line()):
            self.log(line)
        self.bar = parallel.progress(total=stop, initial=self.done, desc=args.method, unit="step")
        nets = step_cell.net_G, step_cell.net_D
        self.flop_of = cache(lambda *sizes: step_flop(*nets, *sizes, args.method, self.per_step))

    def _prepare_folder(self, resume: ResumePoint, checksums: dict[str, int]) -> list[str]:
        """Write the files that the run starts with; return lines for the log."""
        folder, args, notes = self.folder, self.args, []
        if resume.folder == folder.resolve():
            notes = run_folder.truncate_run(resume)
        elif self.last:
            run_folder.copy(self.last, folder / f"GTA5_{self.done}.ckpt")
        options = {name: value for name, value in vars(args).items() if not name.startswith("_")}
        checksums = resume.options.get("names_crc32", {}) | checksums  # with that of an earlier val set
        options |= {**absolute_paths(args), "names_crc32": checksums, "processes": parallel.processes()}
        options |= {"precision": self.precision, "device": device.target(), "versions": device.versions()}
        run_folder.write_options(folder, options, resume.options, self.done)
        for name, columns in tables.columns(args.source).items():
            tables.write(folder / name, columns, resume.rows.get(name, []))
        rows = resume.rows.get("miou.csv", [])
        self.validated = [row[0] for row in rows]
        scores = {row[0]: float(row[1]) for row in rows if row[1] != "nan"}
        if scores:
            run_folder.restore_best(resume, folder, max(scores, key=scores.get))
            self.best = max(scores.values())  # with that of the checkpoint's own validation
        if not (folder / run_folder.BEST).exists():
            self.best = 0.0
        return notes

    def disk_line(self) -> str:
        """Return a line for the log: how much disk the checkpoints of the run will take, how much is free."""
        every, stop, keep = self.args.save_pred_every, self.args.num_steps_stop, self.args.keep_checkpoints
        count = -(-stop // every) - self.done // every  # the last one is of step `stop`
        count = min(count, keep + 1 if keep else count) + (self.val is not None)  # and GTA5_best.ckpt
        size = sum(p.size * p.itemsize for p in checkpoint.state(self.step_cell)) / 1e9
        return (f"disk: {count} checkpoints of {size:.2g} GB each, {count * size:.3g} GB in all; "
                f"{shutil.disk_usage(self.folder).free / 1e9:.3g} GB are free (--keep-checkpoints K keeps K)")

    def log(self, text: str) -> None:
        """Write a line to the screen and, with the time, to Train_log.log."""
        if self.is_main:
            log = self.folder / "Train_log.log"
            with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:  # paths of any encoding
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            tqdm.write(text)

    def begin(self, samplers: list) -> None:
        """Make up for a validation that was pending when the run stopped, and start to time the steps.

        samplers: the DomainSampler of each domain, to name the images of a failed step.
        """
        self.samplers = samplers
        self.end_if_signalled()
        if device.on_npu():
            self.log("first steps compile for the NPU: some minutes, perhaps ten; again for every new size")
        self.step_cell.set_train()
        self.step_cell.clear_overflow()
        at_checkpoint = self.done % self.args.save_pred_every == 0 or self.done == self.args.num_steps_stop
        missing = self.done > 0 and at_checkpoint and str(self.done) not in self.validated
        if parallel.any_rank(missing and self.is_main and self.val is not None):  # rank 0 has read miou.csv
            self.validate()
        self.started = time.perf_counter()

    def exchange(self, labelled: int, error: UserError | None) -> float:
        """Settle the step before; end all processes if one could not read its images or has a signal pending.

        Several processes need one AllReduce for it. Steps since the last checkpoint are saved before the run
        ends; `error` is raised in the process that has one.
        labelled: the number of labelled pixels of this process's next step. Returns their mean number in a
        batch, over the batches and processes of the step.
        """
        self.waited += time.perf_counter() - self.started
        high, low = divmod(labelled, 2**16)  # float32 sums them exactly, for up to 256 processes
        shared = [bool(error), bool(interrupt.pending_signal()), high, low, *self.losses]
        failed, signalled, high, low, *losses = parallel.all_reduce_sum(np.array(shared, float))
        self.settle(losses)
        if failed or signalled:
            if self.done % self.args.save_pred_every:
                self.save()
            parallel.barrier()  # until the checkpoint is written
            if failed:
                raise error or UserError("another process could not read an image")
            self.end_if_signalled()
        interrupt.task = f"finishing step {self.done}, then saving; once more ends without a checkpoint"
        # None labelled: L_seg is 0, too.
        return max(int(high) * 2**16 + int(low), 1) / (self.args.iter_size * parallel.processes())

    def record(self, losses: np.ndarray, lr: float, lr_D: float, batch: tuple) -> None:
        """Count one step; its losses are looked at before the next step or checkpoint.

        losses: those of LOSSES, the mean of this process. batch: the last (x_s, y_s, x_t) of the step.
        """
        self.done += 1
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        flop = self.flop_of(*(x.shape[:1:-1] for x in (batch[0], batch[2])))
        self.losses = losses
        self.unsettled = {"lr": lr, "lr_D": lr_D, "s/step": seconds, "TFLOP/s": flop / seconds / 1e12}
        self.elapsed += seconds

    def settle(self, sums: Sequence[float]) -> None:
        """Write the last step's row of loss.csv and its line of the log, if that has not been done.

        sums: the losses, summed over the processes. UserError if one is not finite.
        """
        if not self.unsettled:
            return
        i, values = self.done - 1, np.array(sums) / parallel.processes()
        shown = {name: f"{value:.3g}" for name, value in zip(LOSSES, values)}
        if not np.isfinite(values).all() and not device.simulated():
            named = ", ".join(f"{name} {value}" for name, value in shown.items())
            images = ", ".join(name for sampler in self.samplers for name in sampler.names(i))
            raise UserError(f"step {i}: a loss is not finite: {named}; its images: {images}; look at these, "
                            "lower --learning-rate, or use --amp-level O0")  # fmt: skip
        lr, lr_D, seconds, _ = self.unsettled.values()
        if self.is_main:
            tables.append(self.loss_csv, [i, *(f"{v:.9g}" for v in (*values, lr, lr_D, seconds))])
        shown |= {name: f"{value:.3g}" for name, value in self.unsettled.items()}
        self.unsettled = {}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if i % max(1, min(100, self.args.num_steps_stop // 10)) == 0:
            shown["waiting for data"] = f"{100 * self.waited / self.elapsed:.0f} %"
            if self.logged:  # the first step is no measure: its graphs are compiled
                rest = self.elapsed / (self.done - self.logged) * (self.args.num_steps_stop - self.done)
                shown["left"] = str(timedelta(seconds=round(rest)))
            if self.step_cell.scaler is not None:
                shown["skipped steps"] = str(self.step_cell.update.skipped.asnumpy())
            # A loss that the method does not have is 0; loss_seg 0 means that nothing is labelled.
            terms = [f"{k} {v}" for k, v in shown.items() if v != "0" or k == "loss_seg"]
            self.log(f"step {i}: {', '.join(terms)}")
            self.logged, self.waited, self.elapsed = self.done, 0.0, 0.0

    def save(self) -> None:
        """Write GTA5_<steps>.ckpt; it becomes `last`. UserError if a loss of its last step is not finite."""
        self.settle(parallel.all_reduce_sum(np.array(self.losses, float)))
        if device.simulated():
            return
        self.last = self.folder / f"GTA5_{self.done}.ckpt"
        parallel.average([p for p in self.step_cell.net_G.get_parameters() if ".moving_" in p.name])
        if self.is_main:
            flush(self.loss_csv)  # tables are on disk before the checkpoint that refers to them
            flush(self.miou_csv)
            checkpoint.save(self.last, self.step_cell, self.args, self.done, self.best)
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
        """Evaluate G on the val set, write its row of miou.csv and keep the checkpoint if it is the best."""
        args, net_G = self.args, self.step_cell.net_G
        # Of several processes, one that ended alone would leave the others waiting.
        each = self.end_if_signalled if parallel.processes() == 1 else None
        confusion = evaluate(net_G, self.val, "sum", args.batch_size, args.num_workers, each)
        self.step_cell.clear_overflow()
        means = [f"{mean_iou(confusion, n):.9g}" for n in self.means]
        score = float(means[0])  # as miou.csv has it, which a continued run reads
        text = ", ".join(f"{mean_name(n)} {float(mean):.2f}" for n, mean in zip(self.means, means))
        self.log(f"validation after {self.done} steps: {text}; best before {self.best:.2f}")
        missing = unlabelled_classes(confusion, self.means[0])
        if missing and not self.validated:  # once per run
            self.log(f"the val set has no label of {', '.join(missing)}: the mean leaves them out, or counts "
                     "0 for those that are predicted")  # fmt: skip
        if self.is_main:
            if score > self.best and not device.simulated():
                best = self.folder / run_folder.BEST
                checkpoint.save(best, self.step_cell, args, self.done, score)
            tables.append(self.miou_csv, [self.done, *means, *(f"{v:.9g}" for v in class_iou(confusion))])
        self.best = max(self.best, score)
        self.validated.append(str(self.done))

    def end_if_signalled(self, *_) -> None:
        """Exit with the signal's code if one is pending in any process; the log says how to resume."""
        if parallel.any_rank(interrupt.pending_signal()):
            self.bar.close()
            options = shlex.join(["--resume", os.path.abspath(self.folder), *self.device_options()])
            self.log(f"{self.done} steps are done; resume with: {parallel.command()} {options}")
            parallel.barrier()  # msrun kills all processes when one exits: wait until rank 0 has logged
            interrupt.exit_for_signal(quiet=not self.is_main)

    def device_options(self) -> list[str]:
        """Return the options that choose this run's device again."""
        number = self.args.device_id
        return ["--device", device.target(), *(["--device-id", str(number)] if number else [])]

    def close(self) -> None:
        """Log how to evaluate the complete run, or what a DryRun has found."""
        self.bar.close()
        if device.simulated():
            self.log(device.simulation_report())
            return
        script = Path(__file__).parents[1] / "CLAN_evaluate_city.py"
        target = Path(self.args.data_dir_val or self.args.data_dir_target)
        plain = target.is_dir() and not is_cityscapes(target) and not has_pairs(target)
        # Absolute paths: the command works from any folder.
        argv = ["python", str(script), "--restore-from", os.path.abspath(self.last)]
        argv += ["--predict" if plain else "--data-dir", os.path.abspath(target)]
        argv += ["--input-size", "{},{}".format(*self.args.input_size_target)]
        if self.means[0] != NUM_CLASSES and not plain:
            argv += ["--classes", str(self.means[0])]
        command, best = shlex.join([*argv, *self.device_options()]), self.folder / run_folder.BEST
        known = f"{best} has {mean_name(self.means[0])} {self.best:.2f}; " if best.exists() else ""
        self.log(f"all {self.done} steps are done; {known}evaluate the last checkpoint with: {command}")
