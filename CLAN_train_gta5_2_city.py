"""Train CLAN (Luo et al., CVPR 2019) from GTA5 or SYNTHIA to Cityscapes. See --help; --demo needs no data."""

from options.train_options import NOT_IN_GRAPH, get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import os
import shlex
import time
from functools import cache
from itertools import repeat
from pathlib import Path

from utils import device, interrupt

workaround = device.prepare_environment()  # before mindspore is imported
if args:
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of a step

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, amp, nn, ops
from tqdm import tqdm

from CLAN_evaluate_city import class_iou, evaluate, mean_iou, mean_name
from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import Stream, batches
from dataset.synthia_dataset import SYNTHIADataSet
from dataset.transform import CLASS_NAMES, IGNORE_LABEL
from model.CLAN_D import discriminator
from model.CLAN_G import freeze_bn_affine, generator
from utils import checkpoint, parallel, run_folder
from utils.convolution import save_memory
from utils.errors import UserError, run
from utils.files import flush
from utils.flops import step_flop
from utils.loss import adv_loss, alignment_map, seg_loss, weight_discrepancy
from utils.softmax import softmax
from utils.upsample import CPUUp, Up

SOURCE, TARGET = 0.0, 1.0  # what D is to answer
CLASSIFIERS = ("net_G.layer5", "net_G.layer6")  # C1 and C2
LOSSES = ("loss_seg", "loss_adv", "loss_weight", "loss_D_s", "loss_D_t")


class CLANStep(nn.Cell):
    """One training step. All gradients are taken at the weights before the step; then both optimisers move.

    Inputs: x_s (N, 3, H, W) float32, y_s (N, H, W) int32, x_t (N, 3, H, W) float32, and three scalars:
    damp = 1 - step / num_steps, and base, local, which give a pixel the adversarial weight base + local M.
    Returns the five losses of LOSSES as they enter the objectives.

    A step of several batches (--iter-size, processes) needs two more: labelled, the mean number of labelled
    pixels in its batches, so that the segmentation loss is a mean over the pixels of the step; and last, a
    bool: with the last batch of this process the optimisers move, by the mean of the gradients.
    """

    def __init__(self, args, net_G, net_D, lr, lr_D):
        super().__init__(auto_prefix=False)
        # The full network on a CPU: gradients of convolutions and up-sampling as matrix products.
        thrifty = args.save_memory
        if thrifty is None:
            thrifty = device.on_cpu() and args.model == "resnet101" and args.amp_level == "O0"
        if thrifty:
            save_memory(net_G, net_D)
        for net in {"O0": (), "O2": (net_G,), "O3": (net_G, net_D)}[args.amp_level]:
            device.half_precision(net)
        if args.recompute:
            device.recompute(net_G)
        net_G.update_parameters_name("net_G.")  # the names in checkpoints
        net_D.update_parameters_name("net_D.")
        self.net_G, self.net_D = net_G, net_D
        self.method, self.focal = args.method, args.seg_loss == "focal"
        self.detach_map = args.detach_weight_map
        self.lambda_adv, self.lambda_weight = args.lambda_adv, args.lambda_weight
        Upsample = CPUUp if thrifty else Up
        self.up_source = Upsample(args.input_size[::-1])  # (height, width)
        self.up_target = Upsample(args.input_size_target[::-1])
        self.w5 = ParameterTuple(net_G.layer5.trainable_params())
        self.w6 = ParameterTuple(net_G.layer6.trainable_params())
        self.weights_G = ParameterTuple(net_G.trainable_params())
        self.weights_D = ParameterTuple(net_D.trainable_params())

        # Momentum for G, classifiers at ten times the backbone's rate; Adam for D.
        self.optimizer_G = momentum(self.weights_G, lr, args)
        self.optimizer_D = nn.Adam(self.weights_D, lr_D.tolist(), beta1=0.9, beta2=0.99)

        # The released code lists backbone weights several times: 3 times in bottlenecks, 4 times on
        # `downsample`. PyTorch then updates them so many times a step, with the same gradient and a shared
        # moment; in the first step, however, every update starts a moment of its own, hence momentum 0 there.
        again, self.again_index = [], []
        for count in (2, 3, 4) if args.repeat_backbone_updates else ():
            index = [i for i, w in enumerate(self.weights_G) if updates_per_step(w.name) >= count]
            optimizer = momentum([self.weights_G[i] for i in index], lr, args)
            optimizer.momentum.set_data(Tensor(0.0))
            optimizer.moments = ParameterTuple([self.optimizer_G.moments[i] for i in index])
            again.append(optimizer)
            self.again_index.append(tuple(index))
        self.again = nn.CellList(again, auto_prefix=False)
        moved = [self.optimizer_G, *again, *([] if self.method == "source" else [self.optimizer_D])]
        self.optimizers = nn.CellList(moved, auto_prefix=False)

        for part, optimizer in (("G", self.optimizer_G), ("D", self.optimizer_D), *enumerate(again, 2)):
            for p in optimizer.get_parameters():
                if not p.name.startswith(("net_", "optimizer_")):
                    p.name = f"optimizer_{part}.{p.name}"

        # What a step of several batches, of several processes, or in half precision needs; see `update`.
        self.map, self.iter_size, self.processes = ops.HyperMap(), args.iter_size, parallel.processes()
        weights = ParameterTuple((*self.weights_G, *(self.weights_D if self.method != "source" else ())))
        if self.iter_size > 1:
            self.sums = weights.clone("sum", init="zeros")
        if self.processes > 1:
            self.mean = nn.DistributedGradReducer(weights, True, self.processes)
            self.all_reduce = ops.AllReduce()
        self.scaler = None
        if args.amp_level != "O0":
            # From 2^12: 2^16 overflows in the first steps, which would then be skipped.
            self.scaler = amp.DynamicLossScaler(2.0**12, 2, 2000)
            # Of this cell too, so that checkpoints have them.
            self.scale_value, self.scale_counter = self.scaler.scale_value, self.scaler.counter
            self.skipped = Parameter(Tensor(0, mindspore.int32), name="skipped")

        self.source_grad = mindspore.value_and_grad(self.source_loss, None, self.weights_G, has_aux=True)
        self.target_grad = mindspore.value_and_grad(self.target_loss, None, self.weights_G, has_aux=True)
        self.D_grad = mindspore.value_and_grad(self.D_loss, None, self.weights_D, has_aux=True)

    def scaled(self, loss):
        """Loss scaling for half precision: small gradients would underflow."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def source_loss(self, x, y, labelled):
        p1, p2 = self.net_G(x)
        p1, p2 = self.up_source(p1), self.up_source(p2)
        loss = seg_loss(p1, y, self.focal, labelled) + seg_loss(p2, y, self.focal, labelled)
        return self.scaled(loss), loss, p1 + p2

    def target_loss(self, x, damp, base, local):
        t1, t2 = self.net_G(x)
        t1, t2 = self.up_target(t1), self.up_target(t2)
        q = softmax(t1 + t2)
        weight, loss_weight = base, damp * 0.0
        if self.method == "clan":
            # Where C1 and C2 disagree, the class is not aligned yet: its adversarial loss counts more.
            M = alignment_map(t1, t2)
            weight = base + local * (ops.stop_gradient(M) if self.detach_map else M)
            loss_weight = 2 * self.lambda_weight * damp * weight_discrepancy(self.w5, self.w6)
        o = self.up_target(self.net_D(q))
        loss_adv = self.lambda_adv * damp * adv_loss(o, SOURCE, weight)  # G wants to pass for the source
        return self.scaled(loss_adv + loss_weight), loss_adv, loss_weight, q, weight

    def D_loss(self, q_s, q_t, weight):
        loss_s = adv_loss(self.up_source(self.net_D(q_s)), SOURCE, Tensor(1.0))
        loss_t = adv_loss(self.up_target(self.net_D(q_t)), TARGET, weight)
        return self.scaled(loss_s + loss_t), loss_s, loss_t

    def construct(self, x_s, y_s, x_t, damp, base, local, labelled=None, last=True):
        # Source: segmentation loss of both classifiers. G sees each picture once; D reuses the predictions.
        (_, loss_seg, p), grads_G = self.source_grad(x_s, y_s, labelled)
        if self.method == "source":
            zero, grads_D = loss_seg * 0.0, ()
            loss_adv, loss_weight, loss_D_s, loss_D_t = zero, zero, zero, zero
        else:
            # The target's pass waits for the source's gradients: one picture's activations at a time.
            x_t = ops.depend(x_t, grads_G)
            # Target: G minimises damp (lambda_adv L_adv + 2 lambda_weight L_weight); D's weights stand still.
            (_, loss_adv, loss_weight, q_t, weight), grads_t = self.target_grad(x_t, damp, base, local)
            grads_G = self.map(ops.add, grads_G, grads_t)
            # D tells the domains apart, on detached predictions and with the same weights per pixel.
            (_, loss_D_s, loss_D_t), grads_D = self.D_grad(softmax(p), q_t, weight)
        grads = grads_G + grads_D
        if self.iter_size > 1:
            self.map(ops.assign_add, self.sums, grads)
        if last:
            self.update(grads)
        return loss_seg, loss_adv, loss_weight, loss_D_s, loss_D_t

    def update(self, grads):
        """Both optimisers move, by the mean gradient of all batches and processes of the step."""
        if self.iter_size > 1:
            grads = self.map(ops.partial(ops.mul, 1 / self.iter_size), self.sums)
            self.map(ops.assign, self.sums, self.map(ops.zeros_like, self.sums))
        if self.processes > 1:
            grads = self.mean(grads)
        finite = True
        if self.scaler is not None:  # half precision: a step that overflows is skipped
            finite = amp.all_finite(grads)
            if self.processes > 1:  # on some cards it is their own flag: the processes must agree
                finite = self.all_reduce(finite.astype(mindspore.float32)) > self.processes - 0.5
            grads = self.scaler.unscale(grads)
            self.scaler.adjust(finite)
        if finite:
            grads_G, grads_D = grads[: len(self.weights_G)], grads[len(self.weights_G) :]
            if self.method != "source":
                self.optimizer_D(grads_D)
            self.optimizer_G(grads_G)
            for optimizer, index in zip(self.again, self.again_index):
                optimizer(tuple([grads_G[i] for i in index]))
                ops.assign(optimizer.momentum, self.optimizer_G.momentum)
        else:
            ops.assign_add(self.skipped, 1)
            for optimizer in self.optimizers:  # rates belong to steps, not to updates
                ops.assign_add(optimizer.global_step, 1)
        return True


def momentum(weights, lr: np.ndarray, args) -> nn.Momentum:
    """v = momentum v + (g + weight_decay w); w = w - lr v, classifiers at a multiple of lr."""
    classifiers = [w for w in weights if w.name.startswith(CLASSIFIERS)]
    backbone = [w for w in weights if not w.name.startswith(CLASSIFIERS)]
    groups = [{"params": backbone, "lr": lr.tolist()}]
    if classifiers:
        groups.append({"params": classifiers, "lr": (args.classifier_lr_mult * lr).tolist()})
    return nn.Momentum(
        [*groups, {"order_params": weights}],
        learning_rate=0.0,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )


def updates_per_step(name: str) -> int:
    """How often the released code updates a weight of G in a step."""
    if ".downsample." in name:
        return 4
    return 1 if name.startswith(("net_G.conv1", "net_G.bn1", *CLASSIFIERS)) else 3


def schedule(rate: float, args) -> np.ndarray:
    """The rate of every step: linear warm-up over preheat_steps, then rate (1 - i / num_steps)^power."""
    i = np.arange(args.num_steps_stop)
    poly = rate * (1 - i / args.num_steps) ** args.power
    return np.where(i < args.preheat_steps, rate * i / max(args.preheat_steps, 1), poly)


def train(args) -> Path:
    """Run a training from parsed options and return the last checkpoint. UserError for a user's mistake."""
    folder, adapt = Path(args.snapshot_dir), args.method != "source"
    stop, batch = args.num_steps_stop, args.batch_size
    rank, processes = parallel.rank(), parallel.processes()
    chief, per_step = rank == 0, batch * args.iter_size * processes  # the chief writes the files

    # The folder: a new run, or one to go on with.
    lock = run_folder.hold(folder) if chief and args.continue_train and folder.is_dir() else None
    precision = device.precision(args.amp_level, args.conv_precision)
    reports, origin, last, damaged = [workaround] if workaround else [], None, None, {}
    if args.continue_train:
        origin, last, content, damaged = run_folder.newest(args.continue_train)
        reports += [f"passed over {reason}" for reason in damaged.values()]
        reports += [f"going on from {last}" if last else f"{origin}: no readable checkpoint, all over again"]
    if chief and origin != folder.resolve():
        run_folder.check_new(folder)

    # Data. The target's labels are read for validation alone.
    if args.source == "gta5":
        split = args.gta5_split, args.gta5_subset
        source = GTA5DataSet(args.data_dir, args.data_list, args.input_size, *split)
    else:
        source = SYNTHIADataSet(args.data_dir, args.data_list, args.input_size)
    target, val, city = None, None, args.data_dir_target
    if adapt:
        target = cityscapesDataSet(city, args.set, args.data_list_target, args.input_size_target)
    if not args.not_val:
        val = cityscapesDataSet(city, "val", size=args.input_size_target, labels=True)
    for data, name in ((source, "source"), (target, "target")):
        if data is not None and per_step > len(data):
            raise UserError(
                f"a step takes {per_step} pictures (--batch-size {batch} x --iter-size {args.iter_size} x "
                f"{processes} processes), more than the {len(data)} of the {name}: lower one of them"
            )

    # Networks, their start, optimisers, the step.
    mindspore.set_seed(args.random_seed)
    net_G, net_D = generator(args.model), discriminator(args.model)
    if not args.train_bn_affine:
        freeze_bn_affine(net_G)
    start = "none" if last else args.restore_from or default_start(args)
    start_D = "none" if last else args.restore_from_D or "none"
    for net, name, path in ((net_G, "net_G", start), (net_D, "net_D", start_D)):
        if path != "none":
            path = checkpoint.find(path)
            reports.append(checkpoint.load(net, checkpoint.read(path), path, name))
    lr, lr_D = schedule(args.learning_rate, args), schedule(args.learning_rate_D, args)
    step_cell = CLANStep(args, net_G, net_D, lr, lr_D)
    first, best = checkpoint.restore(content, last, step_cell) if last else (0, 0.0)
    if first > stop:
        raise UserError(f"{last} has {first} steps, more than --num-steps-stop {stop}")
    if processes > 1 and not parallel.same(checkpoint.fingerprint(step_cell, first)):
        raise UserError(
            "the processes do not start alike: do they see the same files in --snapshot-dir and ./model?"
        )
    if first == stop:
        at = ",".join(map(str, args.input_size_target))
        words = ["CLAN_evaluate_city.py", "--restore-from", str(last), "--data-dir", city, "--input-size", at]
        reports.append(f"all {stop} steps are done; scored by: python {shlex.join(words)}")

    # Files of the run. What lies after step `first` makes room: it will be written again.
    if chief and last and origin != folder.resolve():
        run_folder.adopt(origin, folder, last.name)
        lock = None  # it was on the folder that the copy has replaced
    if chief:
        lock = lock or run_folder.hold(folder)
        if not args.continue_train:
            run_folder.check_new(folder)  # again: another process may have been faster
        reports += run_folder.rewind(folder, origin or folder, first, damaged)
        facts = {"processes": processes, "precision": precision, "versions": device.versions()}
        run_folder.write_options(folder, {**vars(args), **facts}, first)
    loss_csv, miou_csv, best_ckpt = folder / "loss.csv", folder / "miou.csv", folder / run_folder.BEST
    sets = {"gta5": (19,), "synthia": (16, 13)}[args.source]  # classes of the means; the first decides
    scores = []
    if chief:
        run_folder.start_table(loss_csv, ("step", *LOSSES, "lr", "lr_D", "seconds"), first)
        scores = run_folder.start_table(miou_csv, ("step", *map(mean_name, sets), *CLASS_NAMES), first + 1)
    best = max([float(row[1]) for row in scores if row[1] != "nan"], default=best)
    best = best if best_ckpt.exists() else 0.0
    log_every = max(1, min(100, stop // 10))

    def log(text: str) -> None:
        if not chief:
            return
        tqdm.write(text)
        with open(folder / "Train_log.log", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    log(
        f"{args.method}, recipe {args.recipe}, {args.model} on {args.device}: {len(source)} source pictures, "
        f"{len(target) if adapt else 'no'} target pictures, {per_step} of each a step (batch size {batch} x "
        f"iter size {args.iter_size} x {processes} processes), steps {first} to {stop}; files in {folder}"
    )
    log("precision: " + ", ".join(f"{name} {value}" for name, value in precision.items()))
    for line in reports:
        log(line)

    def save() -> Path:
        path = folder / f"GTA5_{done}.ckpt"
        parallel.average([p for p in net_G.get_parameters() if ".moving_" in p.name])
        if chief:
            flush(loss_csv)  # what a checkpoint counts on is on disk before it
            flush(miou_csv)
            checkpoint.save(path, step_cell, args.model, done, best)
        log(f"saved {path}")
        return path

    def validate(done: int, best: float) -> float:
        """Score the weights after `done` steps on the val set, keep them if best; returns the best mIoU."""
        each = end_if_asked if processes == 1 else None  # a process must not leave the others waiting
        confusion = evaluate(net_G, val, batch_size=batch, workers=args.num_workers, each=each)
        step_cell.set_train()
        means = [f"{mean_iou(confusion, n):.9g}" for n in sets]
        score = float(means[0])  # as miou.csv has it, which a continued run reads
        more = "".join(f", {mean_name(n)} {float(mean):.2f}" for n, mean in zip(sets[1:], means[1:]))
        log(f"validation after {done} steps: {mean_name(sets[0])} {score:.2f}, best before {best:.2f}{more}")
        if score > best and chief:
            checkpoint.save(best_ckpt, step_cell, args.model, done, score)
        if chief:
            run_folder.append(miou_csv, [done, *means, *(f"{v:.9g}" for v in class_iou(confusion))])
        return max(score, best)

    def end_if_asked(*_) -> None:
        if parallel.anywhere(interrupt.asked()):
            bar.close()
            hint = f"{parallel.command()} --continue-train {shlex.quote(str(folder))}"
            log(f"{done} steps are done; goes on with: {hint}")
            parallel.wait()  # until the chief has said so: msrun ends all with the first
            interrupt.stop()

    # Pictures of step i are a function of the seed and i alone, so that a run can go on anywhere.
    streams = []
    for domain, data in enumerate((source, target) if adapt else (source,)):
        seed, augment = [args.random_seed, domain], (args.random_mirror, args.random_scale)
        streams.append(Stream(data, first, stop, per_step, seed, *augment, rank, processes))
    sources, *targets = [batches(stream, batch, args.num_workers) for stream in streams]
    targets = targets[0] if adapt else repeat((Tensor(0.0),))

    bar = tqdm(total=stop, initial=first, desc=args.method, unit="step", disable=rank > 0 or None)
    done = first
    end_if_asked()
    step_cell.set_train()
    flop_of = cache(lambda *sizes: step_flop(net_G, net_D, *sizes, args.method, per_step))
    cached = args.compile_cache and args.mode == "graph" and args.device == "cpu" and processes == 1
    graph = {name: value for name, value in vars(args).items() if name not in NOT_IN_GRAPH}
    due = first > 0 and (first % args.save_pred_every == 0 or first == stop)
    due = due and val is not None and chief and str(first) not in [row[0] for row in scores]
    if parallel.anywhere(due):
        best = validate(first, best)  # the run was killed before this validation had ended
    started = time.perf_counter()
    for i in range(first, stop):
        # The pictures of this process. A broken one, or a signal, in any process ends all; it costs no step.
        batches_of_step, broken = [], None
        try:
            for _ in range(args.iter_size):
                batches_of_step.append((*next(sources), *next(targets)))
        except UserError as error:
            broken = error
        if parallel.anywhere(broken or interrupt.asked()):
            if done > first and done % args.save_pred_every:
                save()
            if parallel.anywhere(broken):  # all have come here: the checkpoint is written
                raise broken or UserError("another process could not read a picture")
            end_if_asked()
        # Unweighted adversarial loss up to preheat_steps, then epsilon + lambda_local M per pixel.
        weighted = args.method == "clan" and i > args.preheat_steps
        base, local = (args.epsilon, args.lambda_local) if weighted else (1.0, 0.0)
        scalars = [Tensor(v, mindspore.float32) for v in (1 - i / args.num_steps, base, local)]
        if per_step > batch:  # the pixels of all its batches count alike in L_seg
            labels = sum(np.count_nonzero(y.asnumpy() != IGNORE_LABEL) for _, y, _ in batches_of_step)
            mean = max(parallel.total(np.array(labels)), 1) / (args.iter_size * processes)
            scalars.append(Tensor(mean, mindspore.float32))
        values = []
        for k, (x_s, y_s, x_t) in enumerate(batches_of_step):
            last_batch = [Tensor(k == args.iter_size - 1)] if args.iter_size > 1 else []
            with device.compile_cache(cached and i == first and k == 0, [graph, x_s.shape, x_t.shape]):
                losses = step_cell(x_s, y_s, x_t, *scalars, *last_batch)
            values.append([float(v.asnumpy()) for v in losses])
        values = list(parallel.total(np.mean(values, 0)) / processes)
        done = i + 1
        if not np.isfinite(values).all():
            named = ", ".join(f"{name} {value:.3g}" for name, value in zip(LOSSES, values))
            pictures = ", ".join(name for stream in streams for name in stream.names(i))
            raise UserError(
                f"step {i}: a loss is not finite: {named}; its pictures: {pictures}. No checkpoint was "
                f"written; look at them and at {loss_csv}, or lower --learning-rate in a new --snapshot-dir"
                + (" (float16 may be too small: --amp-level O0)" if args.amp_level != "O0" else "")
            )

        seconds, started = time.perf_counter() - started, time.perf_counter()
        if chief:
            run_folder.append(loss_csv, [i, *(f"{v:.9g}" for v in (*values, lr[i], lr_D[i], seconds))])
        flop = flop_of(x_s.shape[:1:-1], x_t.shape[:1:-1])
        figures = (*values, lr[i], lr_D[i], seconds, flop / seconds / 1e12)
        names = (*LOSSES, "lr", "lr_D", "s/step", "TFLOP/s")
        shown = {name: f"{value:.3g}" for name, value in zip(names, figures)}
        if args.amp_level != "O0":
            shown["skipped steps"] = str(step_cell.skipped.asnumpy())
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if i % log_every == 0:
            log(f"step {i}: " + ", ".join(f"{k} {v}" for k, v in shown.items() if v != "0"))

        if done % args.save_pred_every == 0 or done == stop:
            last = save()
            end_if_asked()
            if val is not None:
                best = validate(done, best)
            if args.keep_checkpoints and chief:
                run_folder.prune(folder, args.keep_checkpoints)
            started = time.perf_counter()
    bar.close()
    if lock is not None:
        os.close(lock)
    return last


def default_start(args) -> str:
    """The DeepLab init file (ImageNet + COCO) under its usual names; the small model starts at random."""
    if args.model == "small":
        return "none"
    for copy in ("", "(1)"):
        for suffix in (".ckpt", ".pth"):
            path = Path("model") / f"DeepLab_resnet_pretrained_init-f81d91e8{copy}{suffix}"
            if path.is_file():
                return str(path)
    raise UserError(
        "no start for G: model/DeepLab_resnet_pretrained_init-f81d91e8.ckpt or .pth is not there; README "
        "says where to get it, --restore-from FILE takes another, --restore-from none starts at random"
    )


def main(args) -> None:
    if args.demo and device.launched():
        raise UserError("--demo is for one process: start it without msrun")
    machine = args.device, args.device_id, args.mode, args.jit_level, args.conv_precision
    args.device = device.setup(*machine).lower()
    if args.demo:
        from utils.demo import demo

        demo(args, train)
    else:
        train(args)


if __name__ == "__main__":
    run(main, args)
