"""Parsing of command-line options, shared by the scripts and the tools, and the options of the machine."""

import argparse
import difflib
import re
import sys
from argparse import BooleanOptionalAction
from collections.abc import Callable
from os.path import expanduser

# Options that people type because other programs have them: a message suggests ours, nothing accepts theirs.
OURS = {"lr": ("--learning-rate",), "seed": ("--random-seed",), "bs": ("--batch-size",),
        "workers": ("--num-workers",), "gpu": ("--device-id",),
        "epoch": ("--num-steps",), "epochs": ("--num-steps",),
        "checkpoint": ("--restore-from", "--resume"), "resume-from": ("--resume",)}


def size(text: str) -> tuple[int, int]:
    """Return width and height in pixels: (1280, 720) for "1280,720" or "1280x720"."""
    match = re.fullmatch(r"(\d+)[,x](\d+)", text)
    if not match or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTH,HEIGHT, both at least 32, such as 1280,720")
    return int(match[1]), int(match[2])


def number(kind: type, low: float, high: float = 1e9):
    """Return an argparse type: an int or float in [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"'{text}' is not a {whole}number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low:g} to {high:g}")
        return value

    parse.metavar = "N" if kind is int else "X"  # in --help
    return parse


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line with exit code 2, and reads --input_size as --input-size.

    --help shows the defaults: "(default: ...)" is added to each help text that does not have one.
    """

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=lambda prog:
                         argparse.HelpFormatter(prog, max_help_position=32, width=110))  # fmt: skip

    @property
    def options(self) -> dict[str, argparse.Action]:
        """Return the options by the names of their values, without --help; the last of two for one value."""
        return {option.dest: option for option in self._actions if option.dest != "help"}

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        if any(arg.endswith("\r") for arg in args):  # after a backslash it has cut off the following lines
            self.error("an argument ends with a carriage return, from a file with Windows line ends; convert "
                       "that: sed -i 's/\\r$//' FILE")  # fmt: skip
        args = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), arg) for arg in args]
        # Shells do not expand the ~ of --option=~/path.
        args = [re.sub(r"^(--[\w-]+=)?(~.*)", lambda m: (m[1] or "") + expanduser(m[2]), arg) for arg in args]
        args, unknown = self.parse_known_args(args, namespace)
        for name, option in self.options.items():
            if getattr(args, name) == "":  # "$IMAGES" of a shell where IMAGES is not set
                self.error(f"{(option.option_strings or [name])[0]} is empty: give it a value")
        if unknown:
            if unknown[0][:1] not in "-–—":  # what a shell makes of *.jpg; long dashes come from web pages
                self.error(f"unexpected {unknown[0]}: it belongs to no option; quote what has spaces or *")
            typed, known = unknown[0].split("=")[0], {*self._option_string_actions} - {"-h", "--help"}
            ours = OURS.get(typed.strip("-").lower())
            near = difflib.get_close_matches(typed, known, 1) if ours is None else known.intersection(ours)
            near = " or ".join(sorted(near))
            self.error(f"unknown option {unknown[0]}" + (f", did you mean {near}?" if near else ""))
        return args

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")

    def format_help(self) -> str:
        for option in self._actions:
            value = option.default
            if value is None or isinstance(value, bool) or option.dest == "help" or "(default" in option.help:
                continue
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            option.help += f" (default: {value:g})" if isinstance(value, float) else f" (default: {value})"
        return super().format_help()


def group_adder(parser: argparse.ArgumentParser, group: str) -> Callable[..., None]:
    """Return the `add_argument` of a new group of `parser`, which also takes the rules of an option:

    resume: "fixed" (--resume restores it and refuses another value), "mutable" (restored, but may be
    changed), "list" (restored, may move; the run compares which images it chooses) or "new" (not restored).
    path: whether it is a file or folder. demo: whether --demo accepts it. no_effect_with: the values of
    --method with which it is refused.
    """
    add_argument = parser.add_argument_group(group).add_argument

    def add(*flags, resume="fixed", path=False, demo=False, no_effect_with=(), **settings) -> None:
        if hasattr(settings.get("type"), "metavar"):
            settings.setdefault("metavar", settings["type"].metavar)
        option = add_argument(*flags, **settings)
        option.resume, option.path, option.demo = resume, path, demo
        option.no_effect_with = no_effect_with

    return add


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the machine, which do not change the method."""
    add = group_adder(parser, "machine")
    add("--device", choices=("auto", "ascend", "gpu", "cpu"), default="auto", resume="new", demo=True,
        help="auto: Ascend if there is one, else CPU; gpu: untested; CUDA 11, x86")
    add("--device-id", type=number(int, 0), default=0, resume="new", demo=True, help="number of the NPU")
    add("--mode", choices=("graph", "pynative"), default="graph", resume="mutable", demo=True,
        help="MindSpore's execution mode")
    add("--jit-level", choices=("O0", "O1", "O2"), resume="mutable", demo=True,
        help="optimisation level of MindSpore's compiler; O2: CANN's graph engine, NPUs only, untested and "
        "deprecated since MindSpore 2.9 (default: O0)")
    add("--conv-precision", choices=("default", "float32"), default="default", resume="mutable", demo=True,
        help="float32: no HF32 in convolutions on Ascend 910B and later; a 910A has only float16 "
        "(default: default, the device's own)")
    add("--deterministic", action=BooleanOptionalAction, default=False, resume="mutable",
        help="repeat results to the bit on an NPU, slower (default: off)")
    add("--num-workers", type=number(int, 1), default=4, resume="mutable", demo=True,
        help="threads that read images, for each domain, up to the number of processors")
