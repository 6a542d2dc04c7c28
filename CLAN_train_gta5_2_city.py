"""Train CLAN (Luo et al., CVPR 2019): adapt a segmentation network from GTA5 or SYNTHIA to Cityscapes.

    python CLAN_train_gta5_2_city.py                        the paper's training; writes ./checkpoint
    python CLAN_train_gta5_2_city.py --resume ./checkpoint  continues it
    python CLAN_train_gta5_2_city.py --demo                 minutes on a CPU, on generated images
    msrun --worker_num=8 --local_worker_num=8 --join=True CLAN_train_gta5_2_city.py    on eight NPUs

Read `train` for the order of things, `CLANStep.step` for one step, and the passes for the losses.
"""

from options.train_options import get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from itertools import repeat
from pathlib import Path

from utils.system import device, interrupt

environment_note = device.prepare_environment()  # before mindspore is imported
if args:
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of a step

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, amp, mint, nn, ops

from dataset.gta5_dataset import GTA5DataSet
from dataset.labels import check_labels
from dataset.layouts import is_cityscapes, labelled_images, unlabelled_images
from dataset.pipeline import DomainSampler, batches
from dataset.synthia_dataset import SYNTHIADataSet
from model.CLAN_D import discriminator
from model.CLAN_G import CLASSIFIERS, freeze_bn_affine, generator, recompute, to_mixed_precision
from model.convolution import use_low_memory_grad
from model.upsample import CPUUpsample, Up
from utils import checkpoint, run_folder
from utils.loss import adv_loss, alignment_map, seg_loss, weight_discrepancy
from utils.run import Run, images_per_step
from utils.softmax import softmax
from utils.system import parallel
from utils.system.errors import UserError, run_script
from utils.tables import LOSSES

SOURCE, TARGET = 0, 1  # domain labels of the discriminator


class Pass(nn.Cell):
    """A forward and backward pass of one network over one domain; in graph mode one compiled graph.

    The method `losses` of a pass returns the loss to take the gradient of, and what the pass returns. The
    gradient is added to `sums`, like PyTorch's `.grad`: the parameters are updated in place, since graphs
    would keep copies of inputs and outputs. With --random-scale each pass is compiled for the three sizes of
    its own domain, not for 3 x 3 pairs of sizes.
    """

    def __init__(self, weights: ParameterTuple, sums: ParameterTuple, add: bool, scaler, factor: float = 1.0):
        """add: whether to add to `sums` or to replace them. factor: of this pass in loss scaling."""
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.gradient = mindspore.value_and_grad(self.losses, None, weights, has_aux=True)
        self.sums, self.accumulate = sums, ops.assign_add if add else ops.assign
        self.scaler, self.factor = scaler, factor
        self.map = ops.HyperMap()

    def construct(self, *inputs):
        (_, *results), grads = self.gradient(*inputs)
        if self.scaler is not None:
            grads = self.map(ops.partial(ops.mul, 1 / (self.factor * self.scaler.scale_value)), grads)
        self.map(self.accumulate, self.sums, grads)
        return results

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale of mixed precision: small gradients would underflow in float16."""
        return loss if self.scaler is None else loss * (self.factor * self.scaler.scale_value)


class SourcePass(Pass):
    """G on labelled source images: L_seg(C1) + L_seg(C2)."""

    def __init__(self, args, net_G: nn.Cell, up: nn.Cell, **accumulation):
        super().__init__(**accumulation)
        self.net_G, self.up, self.focal = net_G, up, args.seg_loss == "focal"

    def losses(self, x, y, labelled):
        """x (N, 3, H, W) float32, y (N, H, W) int32, labelled: the number of pixels to divide by.

        Returns the scaled loss, L_seg, and p1 + p2 (N, 19, h, w). G sees each image once: D's pass reuses
        these logits, which at G's own size take little memory until then.
        """
        p1, p2 = self.net_G(x)
        p = p1 + p2
        p1, p2 = self.up(p1), self.up(p2)
        loss = seg_loss(p1, y, labelled, self.focal) + seg_loss(p2, y, labelled, self.focal)
        return self.scaled(loss), loss, p


class TargetPass(Pass):
    """G on unlabelled target images: damp (lambda_adv L_adv + 2 lambda_weight L_weight)."""

    def __init__(self, args, net_G: nn.Cell, net_D: nn.Cell, up: nn.Cell, **accumulation):
        super().__init__(**accumulation)
        self.net_G, self.net_D, self.up = net_G, net_D, up
        self.w5 = ParameterTuple(net_G.layer5.trainable_params())
        self.w6 = ParameterTuple(net_G.layer6.trainable_params())
        self.is_clan, self.detach_map = args.method == "clan", args.detach_weight_map
        self.lambda_adv, self.lambda_weight = args.lambda_adv, args.lambda_weight

    def losses(self, x, damp, base, local):
        """x (N, 3, H, W) float32; a pixel of L_adv has the weight base + local M.

        t1, t2: logits of C1 and C2; q: probabilities; o: D's logits at image size; M: alignment map.
        Returns the scaled loss, both terms, t1 + t2 (N, 19, h, w) and pixel_weight, (N, 1, H, W) or a scalar.
        """
        t1, t2 = self.net_G(x)
        t = t1 + t2
        t1, t2 = self.up(t1), self.up(t2)
        q = softmax(t1 + t2)
        pixel_weight, loss_weight = base, damp * 0.0  # a Tensor, too
        if self.is_clan:
            # Where C1 and C2 disagree, the class is not aligned yet: its adversarial loss is weighted more.
            M = alignment_map(t1, t2)
            pixel_weight = base + local * (ops.stop_gradient(M) if self.detach_map else M)
            loss_weight = 2 * self.lambda_weight * damp * weight_discrepancy(self.w5, self.w6)
        # G is trained so that D labels target predictions as source. D's weights get no gradient here.
        o = self.up(self.net_D(q))
        loss_adv = self.lambda_adv * damp * adv_loss(o, SOURCE, pixel_weight)
        return self.scaled(loss_adv + loss_weight), loss_adv, loss_weight, t, pixel_weight


class DiscriminatorPass(Pass):
    """D on the predictions for one domain: binary cross-entropy with the domain's label."""

    def __init__(self, net_D: nn.Cell, up: nn.Cell, domain: int, **accumulation):
        super().__init__(**accumulation)
        self.net_D, self.up, self.domain = net_D, up, domain

    def losses(self, logits, pixel_weight=1.0):
        """logits: p1 + p2 or t1 + t2 (N, 19, h, w), as an input of the graph detached from G.

        pixel_weight: that of the target pass. Returns the scaled loss and the loss.
        """
        o = self.up(self.net_D(softmax(self.up(logits))))
        loss = adv_loss(o, self.domain, pixel_weight)
        return self.scaled(loss), loss


class Update(nn.Cell):
    """Update G (SGD with momentum) and D (Adam) by the mean of the accumulated gradients."""

    def __init__(self, args, weights_G, sums_G, weights_D, sums_D, scaler):
        """weights_D, sums_D: empty with --method source. scaler: of the passes; None without loss scaling."""
        super().__init__(auto_prefix=False)
        self.weights_G, self.weights_D = weights_G, weights_D
        self.sums, self.has_D = ParameterTuple(sums_G + sums_D), len(weights_D) > 0
        self.map = ops.HyperMap()
        self.iter_size, self.processes = args.iter_size, parallel.processes()
        if self.processes > 1:
            self.mean = nn.DistributedGradReducer(weights_G + weights_D, True, self.processes)
            self.all_reduce = ops.AllReduce()
        self.scaler = scaler
        if scaler is not None:
            # Registered here so that they are saved in checkpoints.
            self.scale_value, self.scale_counter = scaler.scale_value, scaler.counter
            self.skipped = Parameter(Tensor(0, mindspore.int32), name="skipped")

        # Momentum, with the classifiers at a multiple of the backbone's learning rate.
        self.lr_mult = tuple(args.classifier_lr_mult if is_classifier(w.name) else 1.0 for w in weights_G)
        repeated = args.repeat_backbone_updates
        self.updates = tuple(updates_per_step(w.name) if repeated else 1 for w in weights_G)
        self.momentum, self.weight_decay = Tensor(args.momentum, mindspore.float32), args.weight_decay
        self.moments = weights_G.clone("optimizer_G.moments", init="zeros")
        self.sgd = ops.SGD(weight_decay=args.weight_decay)
        # ops.SGD takes one flag per element; nonzero would start the buffer from the gradient. Our buffers
        # start at zero, so all flags are 0.
        flags = {w.shape: Tensor(np.zeros(w.shape, np.float32)) for w in weights_G}
        self.flags = tuple(flags[w.shape] for w in weights_G)

        self.adam = ops.Adam()
        if self.has_D:
            self.moments1 = weights_D.clone("optimizer_D.moment1", init="zeros")
            self.moments2 = weights_D.clone("optimizer_D.moment2", init="zeros")
            one = Tensor(1.0, mindspore.float32)
            self.beta1_power = Parameter(one, name="optimizer_D.beta1_power")
            self.beta2_power = Parameter(one, name="optimizer_D.beta2_power")

    def construct(self, lr, lr_D):
        """lr, lr_D: learning rates of G's backbone and of D, float32 scalars."""
        grads = self.sums
        if self.iter_size > 1:
            grads = self.map(ops.partial(ops.mul, 1 / self.iter_size), grads)
        if self.processes > 1:
            grads = self.mean(grads)
        finite = True
        if self.scaler is not None:  # a step that overflows float16 is skipped
            finite = amp.all_finite(grads)
            if self.processes > 1:
                # all_finite may be local to a device; reduce it so that all ranks skip the same step.
                finite = self.all_reduce(finite.astype(mindspore.float32)) > self.processes - 0.5
            self.scaler.adjust(finite)
        if finite:
            count = len(self.weights_G)
            self.map(ops.partial(self.update_G, lr), self.weights_G, self.moments, self.flags, grads[:count],
                     self.lr_mult, self.updates)  # fmt: skip
            if self.has_D:
                power1, power2 = 0.9 * self.beta1_power, 0.99 * self.beta2_power
                ops.assign(self.beta1_power, power1)
                ops.assign(self.beta2_power, power2)
                update_D = ops.partial(self.update_D, lr_D, power1, power2)
                self.map(update_D, self.weights_D, self.moments1, self.moments2, grads[count:])
        else:
            ops.assign_add(self.skipped, 1)
        if self.iter_size > 1:  # the first pass of a step of several batches adds, too
            self.map(ops.assign, self.sums, self.map(ops.zeros_like, self.sums))
        return True

    def update_G(self, lr, w, v, flags, g, lr_mult, updates):
        """SGD with momentum of PyTorch 1.0, applied `updates` times.

        PyTorch adds the weight decay to the gradient in place, so with several updates it accumulates.
        """
        for _ in range(updates):
            decayed = mint.add(g, w, alpha=self.weight_decay)
            # g = g + weight_decay w; v = momentum v + g; w = w - lr v
            self.sgd(w, g, lr if lr_mult == 1 else lr_mult * lr, v, self.momentum, flags)
            g = decayed  # the operator leaves g as it was
        return True

    def update_D(self, lr, power1, power2, w, m, v, g):
        """Adam of PyTorch 1.0, which adds epsilon before the bias correction; power: beta^updates."""
        self.adam(w, m, v, power1, power2, lr, 0.9, 0.99, 1e-8, g)
        return True


class CLANStep(nn.Cell):
    """One training step of CLAN: four passes, all at the weights before the step, and the update.

    Holds all that a checkpoint keeps: both networks and the state of their optimisers.
    """

    def __init__(self, args, net_G, net_D):
        super().__init__(auto_prefix=False)
        prepare_networks(args, net_G, net_D)
        self.net_G, self.net_D = net_G, net_D
        self.has_target, self.iter_size = args.method != "source", args.iter_size
        self.weights_G = ParameterTuple(net_G.trainable_params())
        self.weights_D = ParameterTuple(net_D.trainable_params() if self.has_target else ())
        self.sums_G = self.weights_G.clone("sum", init="zeros")
        self.sums_D = self.weights_D.clone("sum", init="zeros")
        self.scaler, factor = loss_scaling(args)

        Upsample = CPUUpsample if device.on_cpu() else Up
        up_source, up_target = (Upsample(size[::-1]) for size in (args.input_size, args.input_size_target))
        G = {"weights": self.weights_G, "sums": self.sums_G, "scaler": self.scaler}
        D = {"weights": self.weights_D, "sums": self.sums_D, "scaler": self.scaler}
        several = args.iter_size > 1  # otherwise the first pass replaces the sums of the step before
        self.source_pass = SourcePass(args, net_G, up_source, add=several, **G)
        if self.has_target:
            self.target_pass = TargetPass(args, net_G, net_D, up_target, add=True, factor=factor, **G)
            self.D_source_pass = DiscriminatorPass(net_D, up_source, SOURCE, add=several, **D)
            self.D_target_pass = DiscriminatorPass(net_D, up_target, TARGET, add=True, **D)
        networks = self.weights_G, self.sums_G, self.weights_D, self.sums_D
        self.update = Update(args, *networks, self.scaler)

    def step(self, step_batches, labelled: float, damp: float, base: float, local: float, lr: float,
             lr_D: float) -> np.ndarray:
        """One update of both networks; returns the five losses of LOSSES as they enter the objectives.

        step_batches: --iter-size tuples of x_s (N, 3, H, W) float32, y_s (N, H, W) int32 and x_t like x_s,
        which --method source ignores. labelled: the mean number of labelled pixels in a batch of the step,
        over its batches and processes: divided by it, L_seg is a mean over the pixels of the step.
        damp = 1 - step / num_steps; a pixel has the adversarial weight base + local M; lr, lr_D: learning
        rates of G's backbone and of D.
        """
        scalars = (labelled, damp, base, local, lr, lr_D)
        labelled, damp, base, local, lr, lr_D = (Tensor(v, mindspore.float32) for v in scalars)
        losses = []
        for x_s, y_s, x_t in step_batches:
            loss_seg, p = self.source_pass(x_s, y_s, labelled)
            values = {"loss_seg": loss_seg}
            if self.has_target:
                loss_adv, loss_weight, t, pixel_weight = self.target_pass(x_t, damp, base, local)
                [loss_D_s], [loss_D_t] = self.D_source_pass(p), self.D_target_pass(t, pixel_weight)
                values |= {"loss_adv": loss_adv, "loss_weight": loss_weight}
                values |= {"loss_D_s": loss_D_s, "loss_D_t": loss_D_t}
            losses.append(ops.stack(list(values.values())).asnumpy())
        self.update(lr, lr_D)
        means = dict(zip(values, np.mean(losses, 0)))
        return np.array([means.get(name, 0.0) for name in LOSSES])

    def clear_overflow(self) -> None:
        """Clear the 910A's overflow flag, which is global to the device.

        Without this, an overflow during validation would skip the next training step.
        """
        if device.chip() in device.FLOAT16_CHIPS:
            amp.all_finite((Tensor([0.0]),))  # reads the flag and clears it


def loss_scaling(args) -> tuple[amp.DynamicLossScaler | None, float]:
    """Return the scaler of all passes, None if everything is float32, and the target pass's extra factor.

    It is needed at --amp-level O2 and O3, and always on a 910A, which has no float32 convolutions.
    """
    if "float16" not in device.precision(args.amp_level, args.conv_precision).values():
        return None, 1.0
    # From 2^12: 2^16 overflows in the first steps, which would then be skipped. The target pass needs more,
    # as L_adv enters it times lambda_adv: most of its gradients would be 0 in float16. A further loss in that
    # pass has to be as small, or it overflows.
    factor = 2.0 ** round(np.log2(1 / np.clip(args.lambda_adv, 1e-4, 1)))
    return amp.DynamicLossScaler(2.0**12, 2, 2000), factor


def prepare_networks(args, net_G, net_D) -> None:
    """Apply the options for trainable weights, precision and memory; prefix the parameter names."""
    if not args.train_bn_affine:
        freeze_bn_affine(net_G)
    efficient = args.save_memory
    if efficient is None:  # the full network on a CPU; the small one compiles faster without
        efficient = device.on_cpu() and args.model != "small" and args.amp_level == "O0"
    if efficient:
        use_low_memory_grad(net_G, net_D)
    for net in {"O0": (), "O2": (net_G,), "O3": (net_G, net_D)}[args.amp_level]:
        to_mixed_precision(net)
    if args.recompute:
        recompute(net_G)
    net_G.update_parameters_name("net_G.")
    net_D.update_parameters_name("net_D.")


def updates_per_step(name: str) -> int:
    """Return how often the released code lists a weight of G in its optimiser, and so updates it per step."""
    if ".downsample." in name:
        return 4
    return 1 if name.startswith(("net_G.conv1", "net_G.bn1")) or is_classifier(name) else 3


def is_classifier(name: str) -> bool:
    """Return whether a weight of G belongs to C1 or C2."""
    return name.removeprefix("net_G.").startswith(CLASSIFIERS)


def learning_rate(base_lr: float, i: int, args) -> float:
    """Return the rate of step i: linear warm-up, then base_lr (1 - i / num_steps)^power."""
    if i < args.preheat_steps:
        return base_lr * i / args.preheat_steps
    return base_lr * (1 - i / args.num_steps) ** args.power


def loss_factors(i: int, args) -> tuple[float, float, float]:
    """damp, base and local of step i: the adversarial loss is unweighted up to and including preheat_steps,
    then a pixel weighs epsilon + lambda_local M.
    """
    weighted = args.method == "clan" and i > args.preheat_steps
    base, local = (args.epsilon, args.lambda_local) if weighted else (1.0, 0.0)
    return 1 - i / args.num_steps, base, local


def check_update(args) -> None:
    """Compare two updates of each optimiser operator with NumPy; UserError if they differ.

    They run as in training: in a compiled graph, on a weight of four dimensions, with moments that are not
    zero. Losses would not show a moment that the device does not keep.
    """
    args = Namespace(**{**vars(args), "iter_size": 1, "repeat_backbone_updates": False})
    rng, lr, lr_D = np.random.default_rng(0), 0.01, 0.02
    w, w_D, g, g_D, v, m, s = (rng.normal(size=(16, 16, 3, 3)).astype(np.float32) for _ in range(7))
    s = np.square(s)
    G, sum_G, D, sum_D = (
        ParameterTuple([Parameter(Tensor(values), name=name)])
        for name, values in (("net_G.check", w), ("sum.G", g), ("net_D.check", w_D), ("sum.D", g_D))
    )
    update = Update(args, G, sum_G, D, sum_D, None)
    for [moment], values in zip((update.moments, update.moments1, update.moments2), (v, m, s)):
        device.assign(moment, values)
    for t in (1, 2):
        update(Tensor(lr), Tensor(lr_D))
        v = args.momentum * v + (g + args.weight_decay * w)
        w = w - lr * v
        m, s = 0.9 * m + 0.1 * g_D, 0.99 * s + 0.01 * g_D**2
        w_D = w_D - lr_D * np.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m / (np.sqrt(s) + 1e-8)
    SGD = (G, w), (update.moments, v)
    Adam = (D, w_D), (update.moments1, m), (update.moments2, s)
    for name, pairs in (("SGD", SGD), ("Adam", Adam)):
        difference = np.max([np.abs(computed.asnumpy() - expected).max() for [computed], expected in pairs])
        if not difference < 1e-4:
            versions = ", ".join(f"{package} {version}" for package, version in device.versions().items())
            raise UserError(
                f"after two updates of ops.{name} on this device, a weight or moment differs from NumPy's by "
                f"{difference:.2g}, so training would go wrong without a sign: use another MindSpore or CANN "
                f'(README, "Ascend 910B"); here are {versions}'
            )


def train(args) -> Path:
    """Run a training from parsed options and return the last checkpoint. UserError for a user's mistake."""
    # ------------------------------------------------------------------------ the run to resume, if any
    resume = run_folder.find_resume_point(args)

    args, named = with_model(args, resume.content)

    # -------------------------------------------------------------------------------------------- data
    source, target, val = datasets(args)

    # ------------------------------------------------------------------- networks, schedules, the step
    mindspore.set_seed(args.random_seed)
    net_G, net_D = generator(args.model), discriminator(args.model)
    loaded = [] if resume.checkpoint else load_initial_weights(args, net_G, net_D)
    step_cell = CLANStep(args, net_G, net_D)

    # ------------------------------------------- the run, new or resumed; restores the step if resumed
    run = Run(args, resume, step_cell, source, target, val)
    for line in filter(None, (environment_note, named, *loaded)):
        run.log(line)

    stop, domains = args.num_steps_stop, (source, target) if target else (source,)
    samplers = [
        DomainSampler(data, run.done, stop, run.per_step, [args.random_seed, domain], args.random_mirror,
                      args.random_scale, parallel.rank(), parallel.processes())
        for domain, data in zip((SOURCE, TARGET), domains)
    ]  # fmt: skip
    sources, *targets = [batches(sampler, args.batch_size, args.num_workers) for sampler in samplers]
    targets = targets[0] if target else repeat((Tensor(0.0),))  # --method source uses no target images

    # ---------------------------------------------------------------------------------------- the loop
    run.begin(samplers)
    for i in device.profiled(range(run.done, stop), args.profile, run.folder / "profile"):
        step_batches, count, error = next_batches(sources, targets, args.iter_size)
        labelled = run.exchange(count, error)
        damp, base, local = loss_factors(i, args)
        lr, lr_D = (learning_rate(base_lr, i, args) for base_lr in (args.learning_rate, args.learning_rate_D))
        losses = step_cell.step(step_batches, labelled, damp, base, local, lr, lr_D)
        run.record(losses, lr, lr_D, step_batches[-1])
        if run.done % args.save_pred_every == 0 or run.done == stop:
            run.save_and_validate()
    run.close()
    return run.last


def datasets(args) -> tuple:
    """Return source, target (None with --method source), val set (None with --not-val or without labels)."""
    per_step, count = images_per_step(args), parallel.processes()
    given = args.data_dir, args.data_list, args.input_size
    if args.source == "gta5":
        source = GTA5DataSet(*given, args.gta5_split, args.gta5_subset)
    else:
        source = SYNTHIADataSet(*given)
    source.reports += check_labels(source)
    target, val, city, size = None, None, args.data_dir_target, args.input_size_target
    if args.method != "source":
        target = unlabelled_images(city, "--data-dir-target", size, args.set, args.data_list_target)
    if not args.not_val and args.data_dir_val:
        val = labelled_images(args.data_dir_val, "--data-dir-val", size)
    elif not args.not_val and (is_cityscapes(city) or not Path(city).exists()):
        val = labelled_images(city, "--data-dir-target", size)
    for data, name in ((source, "source"), (target, "target")):
        if data is not None and per_step > len(data):
            raise UserError(
                f"a step takes {per_step} images (--batch-size {args.batch_size} x --iter-size "
                f"{args.iter_size} x {count} processes), more than the {len(data)} of the {name}"
            )
    return source, target, val


def with_model(args, resumed: dict) -> tuple[Namespace, str]:
    """Return the options with the network: --model, else that of the weights to start from, with a line.

    resumed: the content of the checkpoint to resume, {} without one.
    """
    if args.model:
        return args, ""
    model, line = resumed.get("model", "resnet101"), ""
    if not resumed and args.restore_from not in (None, "none"):
        path = checkpoint.find(args.restore_from)
        model = checkpoint.model_of(checkpoint.read(path), path)
        line = f"network {model}, as in {path}"
    return Namespace(**{**vars(args), "model": model}), line


def load_initial_weights(args, net_G, net_D) -> list[str]:
    """Load --restore-from into G and --restore-from-D into D; return one log line per network."""
    reports, path_G = [], args.restore_from or default_initial_weights(args)
    for net, name, path in ((net_G, "net_G", path_G), (net_D, "net_D", args.restore_from_D or "none")):
        if path != "none":
            path = checkpoint.find(path)
            reports.append(checkpoint.load(net, checkpoint.read(path), path, name))
    return reports


def next_batches(sources: Iterator, targets: Iterator, count: int) -> tuple[list, int, UserError | None]:
    """Return the (x_s, y_s, x_t) of this process's next step, the number of their labelled pixels, and the
    error if an image cannot be read.

    The error is not raised here, so that all processes can end together in Run.exchange.
    """
    step_batches, labelled = [], 0
    try:
        for _ in range(count):
            x_s, y_s, counts = next(sources)
            step_batches.append((x_s, y_s, *next(targets)))
            labelled += int(counts.asnumpy().sum())
    except UserError as error:
        return [], 0, error
    return step_batches, labelled, None


def default_initial_weights(args) -> str:
    """Return the path of the DeepLab init file (ImageNet + COCO); "none" for the small model."""
    if args.model == "small":
        return "none"
    name = "DeepLab_resnet_pretrained_init-f81d91e8"
    for ending in (".ckpt", ".pth", "(1).ckpt", "(1).pth"):
        if (path := Path("model") / f"{name}{ending}").is_file():
            return str(path)
    raise UserError(f"no initial weights for G: model/{name}.ckpt or .pth is not there; see README, or give "
                    "--restore-from FILE, or --restore-from none to start at random")  # fmt: skip


def main(args) -> None:
    if args.demo and device.launched():
        raise UserError("--demo is for one process: start it without msrun")
    device.setup(args)
    if args.demo:
        from utils.tools.demo import demo

        demo(args)
        return
    if device.on_npu() and not device.simulated():
        check_update(args)
    existed = Path(args.snapshot_dir).is_dir()
    lock = run_folder.lock_run_dir(Path(args.snapshot_dir))
    try:
        train(args)
    finally:
        if not existed:
            with suppress(OSError):  # removes only an empty folder, that of a refused run
                os.rmdir(args.snapshot_dir)
        os.close(lock)


if __name__ == "__main__":
    run_script(main, args)
