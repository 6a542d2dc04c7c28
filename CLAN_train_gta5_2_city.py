"""Train CLAN (Luo et al., CVPR 2019) from GTA5 to Cityscapes. See --help; --demo needs no data."""

from options.train_options import NOT_IN_GRAPH, get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import os
import sys
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
from mindspore import ParameterTuple, Tensor, nn, ops
from tqdm import tqdm

from CLAN_evaluate_city import class_iou, evaluate, mean_iou
from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.gta5_dataset import GTA5DataSet
from dataset.pipeline import Stream, batches
from dataset.transform import CLASS_NAMES
from model.CLAN_D import discriminator
from model.CLAN_G import freeze_bn_affine, generator
from utils import checkpoint, run_folder
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
    """

    def __init__(self, args, net_G, net_D, lr, lr_D):
        super().__init__(auto_prefix=False)
        # The full network on a CPU: gradients of convolutions and up-sampling as matrix products.
        thrifty = args.save_memory
        if thrifty is None:
            thrifty = device.on_cpu() and args.model == "resnet101"
        if thrifty:
            save_memory(net_G, net_D)
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

        for part, optimizer in (("G", self.optimizer_G), ("D", self.optimizer_D), *enumerate(again, 2)):
            for p in optimizer.get_parameters():
                if not p.name.startswith(("net_", "optimizer_")):
                    p.name = f"optimizer_{part}.{p.name}"

        self.map = ops.HyperMap()
        self.source_grad = mindspore.value_and_grad(self.source_loss, None, self.weights_G, has_aux=True)
        self.target_grad = mindspore.value_and_grad(self.target_loss, None, self.weights_G, has_aux=True)
        self.D_grad = mindspore.value_and_grad(self.D_loss, None, self.weights_D, has_aux=True)

    def source_loss(self, x, y):
        p1, p2 = self.net_G(x)
        p1, p2 = self.up_source(p1), self.up_source(p2)
        return seg_loss(p1, y, self.focal) + seg_loss(p2, y, self.focal), p1 + p2

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
        return loss_adv + loss_weight, loss_adv, loss_weight, q, weight

    def D_loss(self, q_s, q_t, weight):
        loss_s = adv_loss(self.up_source(self.net_D(q_s)), SOURCE, Tensor(1.0))
        loss_t = adv_loss(self.up_target(self.net_D(q_t)), TARGET, weight)
        return loss_s + loss_t, loss_s, loss_t

    def construct(self, x_s, y_s, x_t, damp, base, local):
        # Source: segmentation loss of both classifiers. G sees each picture once; D reuses the predictions.
        (loss_seg, p), grads_G = self.source_grad(x_s, y_s)
        if self.method == "source":
            zero = loss_seg * 0.0
            loss_adv, loss_weight, loss_D_s, loss_D_t = zero, zero, zero, zero
        else:
            # The target's pass waits for the source's gradients: one picture's activations at a time.
            x_t = ops.depend(x_t, grads_G)
            # Target: G minimises damp (lambda_adv L_adv + 2 lambda_weight L_weight); D's weights stand still.
            (_, loss_adv, loss_weight, q_t, weight), grads_t = self.target_grad(x_t, damp, base, local)
            grads_G = self.map(ops.add, grads_G, grads_t)
            # D tells the domains apart, on detached predictions and with the same weights per pixel.
            (_, loss_D_s, loss_D_t), grads_D = self.D_grad(softmax(p), q_t, weight)
            self.optimizer_D(grads_D)
        self.optimizer_G(grads_G)
        for optimizer, index in zip(self.again, self.again_index):
            optimizer(tuple([grads_G[i] for i in index]))
            ops.assign(optimizer.momentum, self.optimizer_G.momentum)
        return loss_seg, loss_adv, loss_weight, loss_D_s, loss_D_t


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

    # The folder: a new run, or one to go on with.
    lock = run_folder.hold(folder) if args.continue_train and folder.is_dir() else None
    reports, origin, last, damaged = [workaround] if workaround else [], None, None, {}
    if args.continue_train:
        origin, last, content, damaged = run_folder.newest(args.continue_train)
        reports += [f"passed over {reason}" for reason in damaged.values()]
        reports += [f"going on from {last}" if last else f"{origin}: no readable checkpoint, all over again"]
    if origin != folder.resolve():
        run_folder.check_new(folder)

    # Data. The target's labels are read for validation alone.
    source = GTA5DataSet(args.data_dir, args.data_list, args.input_size)
    target, val, city = None, None, args.data_dir_target
    if adapt:
        target = cityscapesDataSet(city, args.set, args.data_list_target, args.input_size_target)
    if not args.not_val:
        val = cityscapesDataSet(city, "val", size=args.input_size_target, labels=True)
    for data, name in ((source, "source"), (target, "target")):
        if data is not None and batch > len(data):
            raise UserError(f"--batch-size {batch} is more than the {len(data)} pictures of the {name}")

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
    reports += [f"all {stop} steps are done"] if first == stop else []

    # Files of the run. What lies after step `first` makes room: it will be written again.
    if last and origin != folder.resolve():
        run_folder.adopt(origin, folder, last.name)
        lock = None  # it was on the folder that the copy has replaced
    lock = lock or run_folder.hold(folder)
    if not args.continue_train:
        run_folder.check_new(folder)  # again: another process may have been faster
    reports += run_folder.rewind(folder, origin or folder, first, damaged)
    run_folder.write_options(folder, {**vars(args), "versions": device.versions()}, first)
    loss_csv, miou_csv, best_ckpt = folder / "loss.csv", folder / "miou.csv", folder / run_folder.BEST
    run_folder.start_table(loss_csv, ("step", *LOSSES, "lr", "lr_D", "seconds"), first)
    scores = run_folder.start_table(miou_csv, ("step", "mIoU", *CLASS_NAMES), first + 1)
    best = max([float(row[1]) for row in scores if row[1] != "nan"], default=best)
    best = best if best_ckpt.exists() else 0.0
    log_every = max(1, min(100, stop // 10))

    def log(text: str) -> None:
        tqdm.write(text)
        with open(folder / "Train_log.log", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    log(
        f"{args.method}, recipe {args.recipe}, {args.model} on {args.device}: {len(source)} source pictures, "
        f"{len(target) if adapt else 'no'} target pictures, steps {first} to {stop}; files in {folder}"
    )
    for line in reports:
        log(line)

    def save() -> Path:
        path = folder / f"GTA5_{done}.ckpt"
        flush(loss_csv)  # what a checkpoint counts on is on disk before it
        flush(miou_csv)
        checkpoint.save(path, step_cell, args.model, done, best)
        log(f"saved {path}")
        return path

    def validate(done: int, best: float) -> float:
        """Score the weights after `done` steps on the val set, keep them if best; returns the best mIoU."""
        confusion = evaluate(net_G, val, batch_size=batch, workers=args.num_workers, each=end_if_asked)
        step_cell.set_train()
        score = float(f"{mean_iou(confusion):.9g}")  # as miou.csv has it, which a continued run reads
        log(f"validation after {done} steps: mIoU {score:.2f}, best before {best:.2f}")
        if score > best:
            best = score
            checkpoint.save(best_ckpt, step_cell, args.model, done, best)
        run_folder.append(miou_csv, [done, *(f"{v:.9g}" for v in (score, *class_iou(confusion)))])
        return best

    def end_if_asked(*_) -> None:
        if interrupt.asked():
            bar.close()
            log(f"{done} steps are done; python {sys.argv[0]} --continue-train {folder} goes on")
            interrupt.exit_if_asked()

    # Pictures of step i are a function of the seed and i alone, so that a run can go on anywhere.
    streams = []
    for domain, data in enumerate((source, target) if adapt else (source,)):
        seed, augment = [args.random_seed, domain], (args.random_mirror, args.random_scale)
        streams.append(Stream(data, first, stop, batch, seed, *augment))
    sources, *targets = [batches(stream, batch, args.num_workers) for stream in streams]
    targets = targets[0] if adapt else repeat((Tensor(0.0),))

    bar = tqdm(total=stop, initial=first, desc=args.method, unit="step", disable=None)
    done = first
    end_if_asked()
    step_cell.set_train()
    flop_of = cache(lambda *sizes: step_flop(net_G, net_D, *sizes, args.method, batch))
    cached = args.compile_cache and args.mode == "graph" and args.device == "cpu"
    graph = {name: value for name, value in vars(args).items() if name not in NOT_IN_GRAPH}
    due = first > 0 and (first % args.save_pred_every == 0 or first == stop)
    if val is not None and due and str(first) not in [row[0] for row in scores]:
        best = validate(first, best)  # the run was killed before this validation had ended
    started = time.perf_counter()
    for i in range(first, stop):
        try:
            (x_s, y_s), (x_t,) = next(sources), next(targets)
        except UserError:  # a broken picture costs no step
            if done > first and done % args.save_pred_every:
                save()
            raise
        # Unweighted adversarial loss up to preheat_steps, then epsilon + lambda_local M per pixel.
        weighted = args.method == "clan" and i > args.preheat_steps
        base, local = (args.epsilon, args.lambda_local) if weighted else (1.0, 0.0)
        scalars = [Tensor(v, mindspore.float32) for v in (1 - i / args.num_steps, base, local)]
        with device.compile_cache(cached and i == first, [graph, x_s.shape, x_t.shape]):
            values = [float(v.asnumpy()) for v in step_cell(x_s, y_s, x_t, *scalars)]
        done = i + 1
        if not np.isfinite(values).all():
            named = ", ".join(f"{name} {value:.3g}" for name, value in zip(LOSSES, values))
            pictures = ", ".join(name for stream in streams for name in stream.names(i))
            raise UserError(
                f"step {i}: a loss is not finite: {named}; its pictures: {pictures}. No checkpoint was "
                f"written; look at them and at {loss_csv}, or lower --learning-rate in a new --snapshot-dir"
            )

        seconds, started = time.perf_counter() - started, time.perf_counter()
        run_folder.append(loss_csv, [i, *(f"{v:.9g}" for v in (*values, lr[i], lr_D[i], seconds))])
        flop = flop_of(x_s.shape[:1:-1], x_t.shape[:1:-1])
        figures = (*values, lr[i], lr_D[i], seconds, flop / seconds / 1e12)
        names = (*LOSSES, "lr", "lr_D", "s/step", "TFLOP/s")
        shown = {name: f"{value:.3g}" for name, value in zip(names, figures)}
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if i % log_every == 0:
            log(f"step {i}: " + ", ".join(f"{k} {v}" for k, v in shown.items() if v != "0"))

        if done % args.save_pred_every == 0 or done == stop or interrupt.asked():
            last = save()
            end_if_asked()
            if val is not None:
                best = validate(done, best)
            if args.keep_checkpoints:
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
    args.device = device.setup(args.device, args.device_id, args.mode).lower()
    if args.demo:
        from utils.demo import demo

        demo(args, train)
    else:
        train(args)


if __name__ == "__main__":
    run(main, args)
