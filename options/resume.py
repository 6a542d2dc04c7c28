"""Options of a resumed run."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from options import Parser
from utils.system.device import process_count
from utils.system.files import follow_link


def merge_resume_options(parser: Parser, args: Namespace, argv: list[str] | None) -> Namespace:
    """Return the options of a resumed run: its options.json, and what the command line may change.

    The content of options.json travels on as `args._saved_options`, so that no other code reads the file;
    without it this is {}. Exit with one line if an option contradicts it.
    """
    given = follow_link(Path(args.continue_train))
    path = (given if given.is_dir() else given.parent) / "options.json"
    if not path.is_file():
        if not any(os.path.exists(f"{given}{suffix}") for suffix in ("", ".ckpt")):
            parser.error(f"--resume {args.continue_train}: no such checkpoint or folder")
        if not args.snapshot_dir:
            parser.error(f"{path} is missing: check --resume, or give the run's options and --snapshot-dir")
        if args.restore_from or args.restore_from_D:
            parser.error("--resume takes the weights of the checkpoint: leave out --restore-from")
        args._saved_options = {}
        return args
    saved = read_saved_options(parser, path)
    # Replay saved options as argv so that they pass the same checks; the user's own come last and win.
    replayed = ["--snapshot-dir", str(path.parent)]
    for name, option in parser.options.items():
        value = saved.get(name, option.default)
        unused = name == "jit_level" and args.mode == "pynative"
        if value == option.default or option.resume == "new" or name == "snapshot_dir" or unused:
            continue
        if isinstance(value, bool):
            replayed.append(option.option_strings[0 if value else -1])  # --x, --no-x
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            replayed.append(f"{option.option_strings[0]}={text}")
    before = parser.parse_args(replayed)
    args = parser.parse_args(replayed + (sys.argv[1:] if argv is None else argv))
    args._saved_options = saved
    check_fixed_options(parser, args, before)
    return args


def read_saved_options(parser: Parser, path: Path) -> dict:
    """Return the content of a run's options.json; exit with one line if it is damaged."""
    kinds = {"processes": int, "names_crc32": dict, "before": list}  # the entries that are no options
    try:
        saved = {"before": [], **json.loads(path.read_text(encoding="utf-8"))}
        damaged = not all(isinstance(saved[name], kind) for name, kind in kinds.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        damaged = True
    if damaged:
        parser.error(f"{path} is damaged; move it away and give the options of the run by hand")
    return saved


def check_fixed_options(parser: Parser, args: Namespace, before: Namespace) -> None:
    """Exit with one line if an option that has to stay, or the number of images per step, was changed."""
    for name, option in parser.options.items():
        now, then = getattr(args, name), getattr(before, name)
        if option.path and now and then:  # one file has many spellings
            now, then = os.path.realpath(now), os.path.realpath(then)
        if now != then and option.resume == "fixed":
            flag = option.option_strings[0]
            parser.error(f"{flag} {now} contradicts the run of {args.continue_train}: there it is {then}")
    count = process_count()
    now = args.batch_size * args.iter_size * count
    then = before.batch_size * before.iter_size * args._saved_options["processes"]
    if now != then:
        parser.error(f"images per step: --batch-size {args.batch_size} x --iter-size {args.iter_size} x "
                     f"{count} processes = {now}, but in the run of {args.continue_train} it is {then}")
