"""Options of CLAN_evaluate_city.py."""
import argparse
import os

from dataset.classes import CLASS_SETS, NUM_CLASSES
from options import Parser, add_machine_options, group_adder, number, size


def scales(text: str) -> tuple[float, ...]:
    """Return the scales in "0.75,1,1.25", the one nearest to 1 first, whose alignment map panels show."""
    values = sorted(map(number(float, 0.1, 4), text.split(",")), key=lambda scale: (abs(scale - 1), scale))
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"'{text}' has a scale twice")
    return tuple(values)


def build_parser() -> Parser:
    parser = Parser("mIoU of a CLAN checkpoint on Cityscapes.")
    add = group_adder(parser, "checkpoint and data")
    add("--restore-from", metavar="PATH", required=True,
        help="checkpoint, .ckpt, .pth or .safetensors, e.g. ./checkpoint/GTA5_best.ckpt; a folder: evaluate "
        "every GTA5_<steps>.ckpt or .pth in it and write miou.csv, or resume that")
    add("--model", choices=("auto", "resnet101", "small"), default="auto",
        help="auto: that of the checkpoint")
    add("--data-dir", metavar="DIR", default="./data/Cityscapes",
        help="Cityscapes, official tree or data/{gtFine,leftimg8bit}, or images/ and labels/ as of GTA5; for "
        "--adapt-bn with --predict also a plain folder of images (default: ./data/Cityscapes; with --predict "
        "what is predicted)")
    add("--set", default="val", metavar="NAME", help="split of Cityscapes to evaluate on")
    add("--data-list", metavar="FILE",
        help="one image per line, relative to leftImg8bit/SET/ or images/ (default: all found, sorted)")
    add("--demo", type=number(int, 0), nargs="?", const=1234, metavar="SEED",
        help="evaluate on the images that --demo of the training script generated for this --random-seed "
        "(default: %(const)s), in ./data/demo")

    add = group_adder(parser, "evaluation")
    add("--input-size", type=size, metavar="W,H",
        help="images as the network sees them, pixels (default: as the checkpoint's run trained its target; "
        "if neither the checkpoint nor an options.json next to it says, 1024,512)")
    add("--scales", type=scales, default=(1.0,), metavar="X,X",
        help="average the probabilities of inputs at several scales of --input-size, such as 0.75,1,1.25 "
        "(default: 1)")
    add("--flip", action="store_true", help="average the probabilities of each input and its mirror image")
    add("--classifier", choices=("sum", "1", "2"), default="sum", help="logits of C1 + C2, or of one of them")
    add("--classes", type=int, choices=tuple(CLASS_SETS), default=NUM_CLASSES,
        help="classes to print and average over: all, or a subset of dataset/cityscapes_list/info.json, as "
        "usual from SYNTHIA; result.json has all these means")
    add("--batch-size", type=number(int, 1), default=1, help="images per batch")
    add("--adapt-bn", type=number(int, 0), default=0,
        help="first re-estimate BN statistics on N unlabelled images of the train set, or of a "
        "plain folder, in batches of --batch-size (default: 0, the checkpoint's)")

    add = group_adder(parser, "results")
    add("--save-path", default="./result/cityscapes", metavar="DIR", help="all results")
    add("--save", action="store_true", help="write the predictions as images, and panels of some")
    add("--panels", type=number(int, 0), default=20,
        help="with --save: figures of image, prediction, ground truth, errors and alignment map for N images "
        "evenly spaced over the set")
    add("--predict", metavar="PATH",
        help="inference only: predict this image, or every .png, .jpg and .jpeg below this folder, of up "
        "to 67 megapixels")
    add("--export", choices=("mindir", "safetensors"),
        help="no evaluation; write one file: mindir, the network for images of --input-size, or safetensors, "
        "its weights under their PyTorch names")
    add_machine_options(parser)
    return parser


def get_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with one line if options contradict each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    tasks = [name for name in ("save", "predict", "export") if getattr(args, name)]
    if len(tasks) > 1:
        parser.error(f"--{tasks[0]} and --{tasks[1]} are two tasks: start the script once for each")
    folder = os.path.isdir(args.restore_from)
    if folder and tasks:
        parser.error(f"--{tasks[0]} takes one checkpoint: name a file in {args.restore_from}")
    if folder and os.path.exists(os.path.join(args.save_path, "loss.csv")):
        parser.error(f"--save-path {args.save_path} is the folder of a training, which has a miou.csv of its "
                     "own: choose another")
    unused = {} if args.save else {"panels": "without --save"}
    if args.predict or args.export:
        unused |= dict.fromkeys(("set", "data_list", "classes"), f"with --{tasks[0]}")
        if not args.adapt_bn:
            unused["data_dir"] = f"with --{tasks[0]} without --adapt-bn"
    if args.export:
        unused |= dict.fromkeys(("scales", "flip"), "with --export")
    for name, where in unused.items():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {where}: leave it out")
    if args.demo is not None:
        parser.set_defaults(data_dir=f"./data/demo/seed{args.demo}/Cityscapes")
    elif args.predict and args.adapt_bn:
        parser.set_defaults(data_dir=args.predict)
    return parser.parse_args(argv)
