"""Options of CLAN_train_gta5_2_city.py. The defaults are the paper's."""
import argparse
import json
import os
import sys
from argparse import BooleanOptionalAction
from pathlib import Path

from options import Parser, add_machine_options, number, size
from utils.device import process_count

# Where the paper's text and the authors' released code differ; the published 43.2 mIoU comes from the code.
RECIPES = {
    "default": {"seg_loss": "ce", "repeat_backbone_updates": False,
                "random_mirror": False, "random_scale": False},
    "released": {"seg_loss": "focal", "repeat_backbone_updates": True,
                 "random_mirror": True, "random_scale": True},
}
SOURCES = {
    "gta5": {"data_dir": "./data/GTA5", "input_size": (1280, 720), "lambda_local": 40.0},
    "synthia": {"data_dir": "./data/SYNTHIA", "input_size": (1280, 760), "lambda_local": 10.0},
}
MAY_CHANGE = {"data_dir", "data_dir_target", "num_steps_stop", "continue_train", "snapshot_dir", "not_val",
              "save_pred_every", "keep_checkpoints", "mode", "jit_level", "conv_precision",
              "num_workers", "save_memory", "recompute",
              "batch_size", "iter_size"}  # these if their product with the number of processes stays
LISTS = {"data_list", "data_list_target", "gta5_split"}  # may move: train compares what they say
PATHS = {*LISTS, "data_dir", "data_dir_target", "restore_from", "restore_from_D", "continue_train",
         "snapshot_dir"}
OF_MACHINE = {"device", "device_id"}  # not taken over when a run is resumed
UNUSED = {"source": ("restore_from_D", "data_list_target", "learning_rate_D", "lambda_adv", "lambda_weight",
                     "lambda_local", "epsilon", "detach_weight_map"),
          "tan": ("lambda_weight", "lambda_local", "epsilon", "detach_weight_map"), "clan": ()}
DEMO_TAKES = {"demo", "num_steps", "random_seed", "snapshot_dir", "device", "device_id", "mode", "jit_level",
              "conv_precision", "num_workers"}
DEBUG = {"input_size": (160, 96), "input_size_target": (128, 64), "num_steps": 4, "save_pred_every": 2}


def get_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; derived defaults (source, recipe, schedule, debug sizes) are filled in."""
    parser = Parser("CLAN: adapt a segmentation network from GTA5 or SYNTHIA (labelled) to Cityscapes.")
    positive = number(float, 0, open_low=True)
    not_negative = number(float, 0)

    add = parser.add_argument_group("data").add_argument
    add("--source", choices=tuple(SOURCES), default="gta5", help="labelled images; sets --data-dir, "
        "--input-size and --lambda-local (default: gta5)")
    add("--data-dir", metavar="DIR", help="GTA5: images/ and labels/ (default: ./data/GTA5); "
        "SYNTHIA-RAND-CITYSCAPES: RGB/ and GT/LABELS/ (default: ./data/SYNTHIA)")
    add("--data-dir-target", default="./data/Cityscapes",
        help="Cityscapes, official tree or data/{gtFine,leftimg8bit} (default: ./data/Cityscapes)")
    add("--data-list", metavar="FILE",
        help="one image a line, relative to images/ or RGB/ (default: all images found, sorted)")
    add("--data-list-target", metavar="FILE",
        help="one image a line, relative to leftImg8bit/SET/ (default: all found, sorted)")
    add("--gta5-split", metavar="FILE", help="GTA5's split.mat, for --gta5-subset")
    add("--gta5-subset", choices=("train", "val", "all"), default="all",
        help="part of GTA5 to train on; all needs no --gta5-split (default: all)")
    add("--set", default="train", help="part of Cityscapes to adapt to (default: train)")
    add("--input-size", type=size, metavar="W,H", help="source images, pixels (default: 1280,720; "
        "of SYNTHIA 1280,760)")
    add("--input-size-target", type=size, metavar="W,H",
        help="target images, pixels (default: 1024,512)")
    add("--random-mirror", action=BooleanOptionalAction, help="mirror half of the images "
        "(default: by recipe)")
    add("--random-scale", action=BooleanOptionalAction,
        help="image, not label, at 1.1x or 0.8x, probability 0.3 each (default: by recipe)")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=("clan", "tan", "source"), default="clan",
        help="clan; tan: vanilla adversarial; source: no adaptation (default: clan)")
    add("--recipe", choices=tuple(RECIPES), default="default",
        help="default: the paper; released: focal loss, repeated backbone updates, augmentation "
        "(default: default)")
    add("--seg-loss", choices=("ce", "focal"), help="cross-entropy or focal loss (default: by recipe)")
    add("--repeat-backbone-updates", action=BooleanOptionalAction,
        help="momentum update 3 times in bottlenecks, 4 on downsample (default: by recipe)")
    add("--lambda-weight", type=not_negative, default=0.01, help="weight discrepancy (default: 0.01)")
    add("--lambda-adv", type=not_negative, default=0.001, help="adversarial loss (default: 0.001)")
    add("--lambda-local", type=not_negative, help="alignment map (default: 40; from SYNTHIA 10)")
    add("--epsilon", type=not_negative, default=0.4, help="weight of an aligned pixel (default: 0.4)")
    add("--preheat-steps", type=number(int, 0),
        help="steps of warm-up, of rates and of unweighted adversarial loss (default: "
        "num-steps-stop / 20)")
    add("--detach-weight-map", action=BooleanOptionalAction, default=False,
        help="no gradient through the alignment map (default: off)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--learning-rate", type=positive, default=2.5e-4, help="G's backbone (default: 2.5e-4)")
    add("--classifier-lr-mult", type=positive, default=10.0,
        help="classifiers' rate over the backbone's (default: 10)")
    add("--learning-rate-D", type=positive, default=1e-4, help="D (default: 1e-4)")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="G (default: 0.9)")
    add("--weight-decay", type=not_negative, default=5e-4, help="G (default: 5e-4)")
    add("--power", type=not_negative, default=0.9, help="of the decay of both rates (default: 0.9)")
    add("--batch-size", type=number(int, 1), default=1, help="images of each domain in a "
        "batch (default: 1)")
    add("--iter-size", type=number(int, 1), default=1, help="batches a step and process: the mean of their "
        "gradients moves the weights (default: 1)")
    add("--num-steps", type=number(int, 1), help="steps of the schedule (default: 100000; "
        "with --demo 500)")
    add("--num-steps-stop", type=number(int, 1), help="stop after this step (default: num-steps)")
    add("--random-seed", type=number(int, 0, 2**31 - 1), default=1234,
        help="weights, order and augmentation (default: 1234)")

    add = parser.add_argument_group("network and checkpoints").add_argument
    add("--model", choices=("resnet101", "small"), default="resnet101",
        help="resnet101: the paper's; small: 0.9 M parameters (default: resnet101)")
    add("--train-bn-affine", action=BooleanOptionalAction, default=False,
        help="train batch norm's scale and offset (default: off, frozen)")
    add("--restore-from", metavar="FILE",
        help="start of G, .ckpt or .pth, or 'none' (default: "
        "./model/DeepLab_resnet_pretrained_init-f81d91e8, .ckpt or .pth)")
    add("--restore-from-D", metavar="FILE", help="start of D (default: random)")
    add("--continue-train", metavar="CKPT",
        help="go on from this checkpoint, or from the newest in this folder; other options default to those "
        "of its run")
    add("--snapshot-dir", metavar="DIR", help="files of the run (default: ./checkpoint; with --demo "
        "./checkpoint/demo; with --continue-train that run's)")
    add("--save-pred-every", type=number(int, 1), help="steps between checkpoints (default: 2000)")
    add("--keep-checkpoints", type=number(int, 1), metavar="K",
        help="delete all but the K newest GTA5_<steps>.ckpt, never GTA5_best.ckpt (default: keep all)")
    add("--not-val", action=BooleanOptionalAction, default=False,
        help="no validation (default: at every checkpoint)")

    add_machine_options(parser)
    parser.add_argument("--amp-level", choices=("O0", "O2", "O3"), default="O0",
                        help="O2: G in float16, O3: G and D, apart from batch norm and losses (default: O0)")
    parser.add_argument("--recompute", action=BooleanOptionalAction, default=False,
                        help="less memory, more time: compute activations again for their gradients")
    parser.add_argument("--save-memory", action=BooleanOptionalAction,
                        help="thrifty gradients of convolutions (default: for resnet101 on the CPU)")
    parser.add_argument("--debug", action="store_true", help="tiny sizes, a few steps: does it run at all?")
    parser.add_argument("--demo", action="store_true",
        help="self-contained demonstration on generated images; of the other options it takes "
        "--num-steps, --random-seed, --snapshot-dir and the machine's")

    args = parser.parse_args(argv)
    if args.continue_train:
        args = continued(parser, args, argv)
    for name, value in vars(args).items():
        if args.demo and name not in DEMO_TAKES and value != parser.get_default(name):
            parser.error(f"--demo sets --{name.replace('_', '-')} itself; run without --demo to choose it")
    fill = {**RECIPES[args.recipe], **SOURCES[args.source], "input_size_target": (1024, 512),
            "num_steps": 500 if args.demo else 100_000, "save_pred_every": 2000,
            "snapshot_dir": "./checkpoint/demo" if args.demo else "./checkpoint"}
    if args.debug:
        fill.update(DEBUG)
    for name, value in fill.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.num_steps_stop is None:
        args.num_steps_stop = args.num_steps
    if args.num_steps_stop > args.num_steps:
        parser.error(f"--num-steps-stop {args.num_steps_stop} is more than --num-steps {args.num_steps}")
    if args.preheat_steps is None:
        args.preheat_steps = args.num_steps_stop // 20
    if args.preheat_steps > args.num_steps:
        parser.error(f"--preheat-steps {args.preheat_steps} is more than --num-steps {args.num_steps}")
    if args.amp_level != "O0" and args.save_memory:
        parser.error("--save-memory is for float32: leave it out, or --amp-level")
    for name in UNUSED[args.method]:
        if getattr(args, name) != fill.get(name, parser.get_default(name)):
            parser.error(f"--{name.replace('_', '-')} has no effect with --method {args.method}")
    check_split(parser, args)
    return args


def check_split(parser: Parser, args: argparse.Namespace) -> None:
    """An error if --gta5-split and --gta5-subset contradict each other or another option."""
    if args.source != "gta5" and (args.gta5_split or args.gta5_subset != "all"):
        parser.error(f"--gta5-split and --gta5-subset have no effect with --source {args.source}")
    if args.gta5_subset != "all" and not args.gta5_split:
        parser.error(f"--gta5-subset {args.gta5_subset} needs --gta5-split FILE, the split.mat of GTA5")
    if not args.gta5_split:
        return
    if args.data_list:
        parser.error("--gta5-split and --data-list both choose the images: leave one of them out")
    if args.gta5_subset == "all":
        parser.error("--gta5-split has no effect with --gta5-subset all: add --gta5-subset train or val")


def absolute_paths(args: argparse.Namespace) -> dict[str, str]:
    """The options that name files, for options.json: a run may be resumed from another working directory."""
    given = {name: getattr(args, name) for name in PATHS}
    return {name: os.path.abspath(path) for name, path in given.items() if path not in (None, "none")}


def continued(parser: Parser, args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """The options of a continued run: those in options.json beside the checkpoint, and harmless new ones."""
    folder = Path(args.continue_train)
    folder = folder if folder.is_dir() else folder.parent
    path = folder / "options.json"
    if not path.is_file():
        if args.restore_from or args.restore_from_D:
            parser.error("--continue-train goes on from the checkpoint: leave out --restore-from")
        if not args.snapshot_dir and any(folder.glob("GTA5_*.ckpt")):
            parser.error(f"{path} is missing: give the options of the run by hand, --snapshot-dir too")
        return args
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        processes_then = int(saved.get("processes", 1))
        saved = {"source": "gta5", "gta5_split": None, "gta5_subset": "all", **saved}  # older runs lack them
        may_change = MAY_CHANGE | (LISTS if isinstance(saved.get("names_crc32"), dict) else set())
        saved = {name: saved[name] for name in saved if name in vars(args) and name not in OF_MACHINE}
    except (ValueError, TypeError, AttributeError, RecursionError):
        parser.error(f"{path} is damaged; move it away and give the options of the run by hand")
    if saved.get("jit_level") == "O2":  # MindSpore's GE backend, deprecated since its 2.9
        if not args.jit_level:
            parser.error(f"{path} says --jit-level O2, which is no longer offered: add --jit-level O0 or O1")
        del saved["jit_level"]
    # As if they stood on the command line, so that they are checked alike; what the user gives comes later.
    words = ["--snapshot-dir", str(folder)]
    for name, value in saved.items():
        option = f"--{name.replace('_', '-')}"
        if name != "snapshot_dir" and value != parser.get_default(name):
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            flag = option if value is True else f"--no-{option[2:]}"
            words.append(flag if isinstance(value, bool) else f"{option}={text}")
    before = parser.parse_args(words)
    args = parser.parse_args(words + (sys.argv[1:] if argv is None else argv))
    processes = process_count()
    per_step = args.batch_size * args.iter_size * processes
    per_step_then = before.batch_size * before.iter_size * processes_then
    for name in saved:
        given, there = getattr(args, name), getattr(before, name)
        if name in PATHS and given and there:  # one file has many spellings
            given, there = os.path.realpath(given), os.path.realpath(there)
        if given != there and name not in may_change:
            parser.error(f"--{name.replace('_', '-')} {given} contradicts the run that {args.continue_train} "
                         f"is of: there it is {there}")
    if per_step != per_step_then:
        parser.error(f"images a step: --batch-size {args.batch_size} x --iter-size {args.iter_size} x "
                     f"{processes} processes = {per_step}, but {args.continue_train} is of a run with "
                     f"{per_step_then}; change one of them so that it stays")
    return args
