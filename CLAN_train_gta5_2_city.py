"""Train CLAN (Luo et al., CVPR 2019) from GTA5 or SYNTHIA to Cityscapes. See --help; --demo needs no data."""

from options.train_options import get_arguments

args = get_arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

from utils.system import device, interrupt

environment_note = device.prepare_environment()  # before mindspore is imported
if args:
    interrupt.block()  # Ctrl-C and SIGTERM wait for the end of a step

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, amp, mint, nn, ops

from dataset.cityscapes_dataset import cityscapesDataSet
from dataset.classes import IGNORE_LABEL
from dataset.gta5_dataset import GTA5DataSet
from dataset.image_folder import plain_folder
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

SOURCE, TARGET = 0.0, 1.0  # domain labels of the discriminator


class Graph(nn.Cell):
    """A method of CLANStep as one compiled graph; mindspore.jit takes twice the time on the CPU."""

    def __init__(self, method):
        super().__init__(auto_prefix=False)
        self.method = method

    def construct(self, *inputs):
        return self.method(*inputs)


class CLANStep(nn.Cell):
    """One training step of CLAN: its losses, their gradients at the weights before the step, the update.

    `step` runs five compiled graphs one after the other: source and target pass of G and of D, update. With
    --random-scale every size of an image then compiles passes of its own, not every pair of sizes a step.
    """

    def __init__(self, args, net_G, net_D, lr_D: np.ndarray):
        super().__init__(auto_prefix=False)  # the parameters keep their names
        prepare_networks(args, net_G, net_D)
        Upsample = CPUUpsample if device.on_cpu() else Up
        self.net_G, self.net_D = net_G, net_D
        self.up_source = Upsample(args.input_size[::-1])  # (height, width)
        self.up_target = Upsample(args.input_size_target[::-1])
        self.method, self.focal = args.method, args.seg_loss == "focal"
        self.detach_map = args.detach_weight_map
        self.lambda_adv, self.lambda_weight = args.lambda_adv, args.lambda_weight
        self.w5 = ParameterTuple(net_G.layer5.trainable_params())
        self.w6 = ParameterTuple(net_G.layer6.trainable_params())
        self.weights_G = ParameterTuple(net_G.trainable_params())
        self.weights_D = ParameterTuple(net_D.trainable_params())
        self.source_grad = mindspore.value_and_grad(self.source_loss, None, self.weights_G, has_aux=True)
        self.target_grad = mindspore.value_and_grad(self.target_loss, None, self.weights_G, has_aux=True)
        self.D_source_grad = mindspore.value_and_grad(self.D_source_loss, None, self.weights_D, has_aux=True)
        self.D_target_grad = mindspore.value_and_grad(self.D_target_loss, None, self.weights_D, has_aux=True)
        # Gradient accumulators, like PyTorch's `.grad`. As inputs and outputs of the graphs, each graph would
        # keep a copy of its own.
        self.grads_G = self.weights_G.clone("sum", init="zeros")
        self.grads_D = self.weights_D.clone("sum", init="zeros")
        # The first pass of a step of one batch need not add: the sums are never set to zero.
        self.begin_sum = ops.assign if args.iter_size == 1 else ops.assign_add
        self.map = ops.HyperMap()

        # Momentum for G, classifiers at a multiple of the backbone's learning rate; Adam for D, which indexes
        # its learning rates with a step counter that checkpoints hold.
        repeat_updates = args.repeat_backbone_updates
        self.updates = tuple(updates_per_step(w.name) if repeat_updates else 1 for w in self.weights_G)
        mult = args.classifier_lr_mult
        self.lr_mult = tuple(mult if is_classifier(w.name) else 1.0 for w in self.weights_G)
        self.momentum, self.weight_decay = Tensor(args.momentum, mindspore.float32), args.weight_decay
        self.moments = self.weights_G.clone("optimizer_G.moments", init="zeros")
        self.sgd = ops.SGD(weight_decay=args.weight_decay)
        # It wants a flag for every value: 1 where the moment is yet to begin. Ours begin at 0.
        flags = {w.shape: Tensor(np.zeros(w.shape, np.float32)) for w in self.weights_G}
        self.flags = tuple(flags[w.shape] for w in self.weights_G)
        if self.method != "source":
            self.optimizer_D = nn.Adam(self.weights_D, lr_D.tolist(), beta1=0.9, beta2=0.99)
            for p in self.optimizer_D.get_parameters():
                if not p.name.startswith("net_"):
                    p.name = f"optimizer_D.{p.name}"

        self.set_up_scaling(args)
        self.graphs = (
            self.source_pass, self.target_pass, self.D_source_pass, self.D_target_pass, self.update
        )  # fmt: skip
        if args.mode == "graph":
            self.graphs = tuple(map(Graph, self.graphs))

    # ---------------------------------------------------------------------------------------------- losses

    def source_loss(self, x, y, labelled):
        """L_seg(C1) + L_seg(C2) of x (N, 3, H, W) float32 and y (N, H, W) int32.

        labelled: the number of pixels to divide by. Returns the scaled loss for the gradient, the loss and
        p1 + p2 (N, 19, h, w). G sees each image once: D's pass reuses these logits, which at G's own size
        take little memory until then.
        """
        p1, p2 = self.net_G(x)
        p = p1 + p2
        p1, p2 = self.up_source(p1), self.up_source(p2)
        loss = seg_loss(p1, y, labelled, self.focal) + seg_loss(p2, y, labelled, self.focal)
        return self.scaled(loss), loss, p

    def target_loss(self, x, damp, base, local):
        """damp (lambda_adv L_adv + 2 lambda_weight L_weight) of x (N, 3, H, W).

        A pixel of L_adv has the weight base + local M. t1, t2: logits of C1 and C2; q: probabilities;
        o: D's logits at image size; M: alignment map. Returns the scaled loss, both terms, t1 + t2
        (N, 19, h, w) and the pixel weights, (N, 1, H, W) or a scalar.
        """
        t1, t2 = self.net_G(x)
        t = t1 + t2
        t1, t2 = self.up_target(t1), self.up_target(t2)
        q = softmax(t1 + t2)
        weight, loss_weight = base, damp * 0.0
        if self.method == "clan":
            # Where C1 and C2 disagree, the class is not aligned yet: its adversarial loss is weighted more.
            M = alignment_map(t1, t2)
            weight = base + local * (ops.stop_gradient(M) if self.detach_map else M)
            loss_weight = 2 * self.lambda_weight * damp * weight_discrepancy(self.w5, self.w6)
        # G is trained so that D labels target predictions as source. D's weights get no gradient here.
        o = self.up_target(self.net_D(q))
        loss_adv = self.lambda_adv * damp * adv_loss(o, SOURCE, weight)
        return self.scaled(loss_adv + loss_weight, self.target_scale), loss_adv, loss_weight, t, weight

    def D_source_loss(self, p):
        """Binary cross-entropy of D on the source. p = p1 + p2 is an input of the graph: detached from G."""
        loss = adv_loss(self.up_source(self.net_D(softmax(self.up_source(p)))), SOURCE, Tensor(1.0))
        return self.scaled(loss), loss

    def D_target_loss(self, t, weight):
        """As D_source_loss on the target, t = t1 + t2, with the pixel weights of the target pass."""
        loss = adv_loss(self.up_target(self.net_D(softmax(self.up_target(t)))), TARGET, weight)
        return self.scaled(loss), loss

    # -------------------------------------------------------------------------------------------- one step

    def step(self, step_batches, damp: float, base: float, local: float, lr: float) -> np.ndarray:
        """One update of both networks; returns the five losses of LOSSES as they enter the objectives.

        step_batches: --iter-size tuples of x_s (N, 3, H, W) float32, y_s (N, H, W) int32 and x_t like x_s.
        damp = 1 - step / num_steps; a pixel has the adversarial weight base + local M; lr: the backbone's.
        """
        source_pass, target_pass, D_source_pass, D_target_pass, update = self.graphs
        damp, base, local, lr = (Tensor(v, mindspore.float32) for v in (damp, base, local, lr))
        labelled = self.labelled_per_batch(step_batches)
        losses = []  # in the order of LOSSES
        for x_s, y_s, x_t in step_batches:
            loss_seg, p = source_pass(x_s, y_s, labelled)
            values = (loss_seg,)
            if self.method != "source":
                loss_adv, loss_weight, t, weight = target_pass(x_t, damp, base, local)
                values = (loss_seg, loss_adv, loss_weight, D_source_pass(p), D_target_pass(t, weight))
            losses.append(ops.stack(values).asnumpy())
        update(lr)
        return np.pad(np.mean(losses, 0), (0, len(LOSSES) - len(values)))

    def source_pass(self, x, y, labelled):
        (_, loss, p), grads = self.source_grad(x, y, labelled)
        self.map(self.begin_sum, self.grads_G, self.unscaled(grads))
        return loss, p

    def target_pass(self, x, damp, base, local):
        (_, loss_adv, loss_weight, t, weight), grads = self.target_grad(x, damp, base, local)
        self.map(ops.assign_add, self.grads_G, self.unscaled(grads, self.target_scale))
        return loss_adv, loss_weight, t, weight

    def D_source_pass(self, p):
        (_, loss), grads = self.D_source_grad(p)
        self.map(self.begin_sum, self.grads_D, self.unscaled(grads))
        return loss

    def D_target_pass(self, t, weight):
        (_, loss), grads = self.D_target_grad(t, weight)
        self.map(ops.assign_add, self.grads_D, self.unscaled(grads))
        return loss

    def update(self, lr):
        """Update G and D by the mean gradient of all batches and processes; zero the sums of several."""
        sums = self.grads_G + (self.grads_D if self.method != "source" else ())
        grads = sums
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
            if self.method != "source":
                self.optimizer_D(grads[len(self.weights_G) :])
            momentum = ops.partial(self.momentum_update, lr)
            grads_G = grads[: len(self.weights_G)]
            self.map(momentum, self.weights_G, self.moments, self.flags, grads_G, self.lr_mult, self.updates)
        else:
            ops.assign_add(self.skipped, 1)
            if self.method != "source":
                # Skipped steps count too, so that the learning-rate schedule stays aligned.
                ops.assign_add(self.optimizer_D.global_step, 1)
        if self.iter_size > 1:
            self.map(ops.assign, sums, self.map(ops.zeros_like, sums))
        return True

    def momentum_update(self, lr, w, v, flags, g, lr_mult, updates):
        """SGD with momentum of PyTorch 1.0, applied `updates` times.

        PyTorch adds the weight decay to the gradient in place, so with several updates it accumulates.
        """
        for _ in range(updates):
            decayed = mint.add(g, w, alpha=self.weight_decay)
            # g = g + weight_decay w; v = momentum v + g; w = w - lr v
            self.sgd(w, g, lr if lr_mult == 1 else lr_mult * lr, v, self.momentum, flags)
            g = decayed  # the operator leaves g as it was
        return True

    # ------------------------- mixed precision, several batches and processes: optional on a first reading

    def set_up_scaling(self, args) -> None:
        """Set up gradient accumulation, data parallel training and loss scaling; see `update`."""
        self.iter_size, self.processes = args.iter_size, parallel.processes()
        if self.processes > 1:
            weights = (*self.weights_G, *(self.weights_D if self.method != "source" else ()))
            self.mean = nn.DistributedGradReducer(weights, True, self.processes)
            self.all_reduce = ops.AllReduce()
        self.scaler, self.target_scale = None, 1.0
        # At --amp-level O2 and O3, and on a 910A always, which has no float32 convolutions.
        if "float16" in device.precision(args.amp_level, args.conv_precision).values():
            # From 2^12: 2^16 overflows in the first steps, which would then be skipped. The target pass needs
            # more, as L_adv enters it times lambda_adv: most of its gradients would be 0 in float16.
            self.scaler = amp.DynamicLossScaler(2.0**12, 2, 2000)
            self.target_scale = 2.0 ** round(np.log2(1 / np.clip(args.lambda_adv, 1e-4, 1)))
            # Registered here so that they are saved in checkpoints.
            self.scale_value, self.scale_counter = self.scaler.scale_value, self.scaler.counter
            self.skipped = Parameter(Tensor(0, mindspore.int32), name="skipped")

    def clear_overflow(self) -> None:
        """Forget what overflowed before on a 910A, whose flag tells of all that ran, validation too."""
        if device.chip() in device.FLOAT16_CHIPS:
            amp.all_finite((Tensor([0.0]),))  # reads the flag and clears it

    def labelled_per_batch(self, step_batches: list) -> Tensor:
        """The mean number of labelled pixels in a batch of a step, over all its batches and processes.

        Divided by it, L_seg is a mean over the pixels of the step, and 0 if none is labelled.
        """
        labels = sum(np.count_nonzero(y.asnumpy() != IGNORE_LABEL) for _, y, _ in step_batches)
        mean = max(parallel.all_reduce_sum(np.array(labels)), 1) / (self.iter_size * self.processes)
        return Tensor(mean, mindspore.float32)

    def scaled(self, loss, factor=1.0):
        """Loss scaling for mixed precision: small gradients would underflow in float16."""
        return loss if self.scaler is None else loss * (factor * self.scaler.scale_value)

    def unscaled(self, grads, factor=1.0):
        if self.scaler is None:
            return grads
        return self.map(ops.partial(ops.mul, 1 / (factor * self.scaler.scale_value)), grads)


def prepare_networks(args, net_G, net_D) -> None:
    """Apply the options for trainable weights, precision and memory; prefix the parameter names."""
    if not args.train_bn_affine:
        freeze_bn_affine(net_G)
    efficient = args.save_memory
    if efficient is None:  # the full network on a CPU; the small one compiles faster without
        efficient = device.on_cpu() and args.model == "resnet101" and args.amp_level == "O0"
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


def schedule(base_lr: float, args) -> np.ndarray:
    """Learning rate per step: linear warm-up over preheat_steps, then base_lr (1 - i / num_steps)^power."""
    i = np.arange(args.num_steps_stop)
    poly = base_lr * (1 - i / args.num_steps) ** args.power
    return np.where(i < args.preheat_steps, base_lr * i / max(args.preheat_steps, 1), poly)


def loss_factors(i: int, args) -> tuple[float, float, float]:
    """damp, base and local of step i: the adversarial loss is unweighted up to and including preheat_steps,
    then a pixel weighs epsilon + lambda_local M.
    """
    weighted = args.method == "clan" and i > args.preheat_steps
    base, local = (args.epsilon, args.lambda_local) if weighted else (1.0, 0.0)
    return 1 - i / args.num_steps, base, local


def train(args) -> Path:
    """Run a training from parsed options and return the last checkpoint. UserError for a user's mistake."""
    with run_folder.locked(Path(args.snapshot_dir)):
        return train_in_locked_folder(args)


def train_in_locked_folder(args) -> Path:
    """Run the training of `train` while no other process may write to --snapshot-dir."""
    # ------------------------------------------------------------------------ the run to resume, if any
    resume = run_folder.find_resume_point(args)

    # -------------------------------------------------------------------------------------------- data
    source, target, val = datasets(args)

    # ------------------------------------------------------------------- networks, schedules, the step
    mindspore.set_seed(args.random_seed)
    net_G, net_D = generator(args.model), discriminator(args.model)
    loaded = [] if resume.checkpoint else load_initial_weights(args, net_G, net_D)
    lr, lr_D = schedule(args.learning_rate, args), schedule(args.learning_rate_D, args)
    step_cell = CLANStep(args, net_G, net_D, lr_D)

    # ----------------------------------------------------------------------- the run, new or resumed
    run = Run(args, resume, step_cell, source, target, val)
    for line in filter(None, (environment_note, *loaded)):
        run.log(line)

    # The images of step i are a function of the seed and i alone, so that a run can resume at any step.
    stop, domains = args.num_steps_stop, (source, target) if target else (source,)
    samplers = [
        DomainSampler(
            data, run.done, stop, run.per_step, [args.random_seed, domain], args.random_mirror,
            args.random_scale, parallel.rank(), parallel.processes(),
        )
        for domain, data in enumerate(domains)  # 0: source, 1: target
    ]  # fmt: skip
    sources, *targets = [batches(sampler, args.batch_size, args.num_workers) for sampler in samplers]
    targets = targets[0] if target else repeat((Tensor(0.0),))  # --method source uses no target images

    # ---------------------------------------------------------------------------------------- the loop
    run.begin()
    for i in range(run.done, stop):
        step_batches, error = next_batches(sources, targets, args.iter_size)
        run.end_if_failed(error)
        damp, base, local = loss_factors(i, args)
        losses = step_cell.step(step_batches, damp, base, local, lr[i])
        run.record(losses, lr[i], lr_D[i], step_batches[-1], samplers)
        if run.done % args.save_pred_every == 0 or run.done == stop:
            run.save_and_validate()
    run.close()
    return run.last


def datasets(args) -> tuple:
    """Return source, target (None with --method source), val set (None with --not-val or without labels)."""
    per_step = images_per_step(args)
    if args.source == "gta5":
        split = args.gta5_split, args.gta5_subset
        source = GTA5DataSet(args.data_dir, args.data_list, args.input_size, *split)
    else:
        source = SYNTHIADataSet(args.data_dir, args.data_list, args.input_size)
    target, val, city = None, None, args.data_dir_target
    folder = plain_folder(city, args.input_size_target, "--data-dir-target")
    if folder and (args.set != "train" or args.data_list_target):
        raise UserError(f"{city} is a plain folder: --set and --data-list-target are for Cityscapes")
    if args.method != "source":
        target = folder or cityscapesDataSet(city, args.set, args.data_list_target, args.input_size_target)
    if not args.not_val and not folder:  # the target's labels are read only for validation
        val = cityscapesDataSet(city, "val", size=args.input_size_target, labels=True)
    for data, name in ((source, "source"), (target, "target")):
        if data is not None and per_step > len(data):
            raise UserError(
                f"a step takes {per_step} images (--batch-size {args.batch_size} x --iter-size "
                f"{args.iter_size} x {parallel.processes()} processes), more than the {len(data)} of the "
                f"{name}: lower one of them"
            )
    return source, target, val


def load_initial_weights(args, net_G, net_D) -> list[str]:
    """Load --restore-from into G and --restore-from-D into D; return one log line per network."""
    reports, path_G = [], args.restore_from or default_initial_weights(args)
    for net, name, path in ((net_G, "net_G", path_G), (net_D, "net_D", args.restore_from_D or "none")):
        if path != "none":
            path = checkpoint.find(path)
            reports.append(checkpoint.load(net, checkpoint.read(path), path, name))
    return reports


def next_batches(sources: Iterator, targets: Iterator, count: int) -> tuple[list, UserError | None]:
    """Return the (x_s, y_s, x_t) of this process's next step, and the error if an image cannot be read."""
    try:
        return [(*next(sources), *next(targets)) for _ in range(count)], None
    except UserError as error:
        return [], error


def default_initial_weights(args) -> str:
    """Return the path of the DeepLab init file (ImageNet + COCO); "none" for the small model.

    UserError if the file is not there under one of its usual names.
    """
    if args.model == "small":
        return "none"
    for copy in ("", "(1)"):
        for suffix in (".ckpt", ".pth"):
            path = Path("model") / f"DeepLab_resnet_pretrained_init-f81d91e8{copy}{suffix}"
            if path.is_file():
                return str(path)
    raise UserError(
        "no initial weights for G: model/DeepLab_resnet_pretrained_init-f81d91e8.ckpt or .pth is not there; "
        "README says where to get it, --restore-from FILE takes another, --restore-from none starts at random"
    )


def main(args) -> None:
    if args.demo and device.launched():
        raise UserError("--demo is for one process: start it without msrun")
    device.setup(args)
    if args.demo:
        from utils.tools.demo import demo

        demo(args)
    else:
        train(args)


if __name__ == "__main__":
    run_script(main, args)
