"""Start the two scripts as a user does, for the tests."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import cache
from pathlib import Path

import numpy as np

from options.train_options import get_arguments
from utils.tables import LOSSES

ROOT = Path(__file__).parent.parent
TRAIN, EVALUATE = "CLAN_train_gta5_2_city.py", "CLAN_evaluate_city.py"
# Saves the 9 s of compiling a step, in tests of files and not of what graphs compute.
EAGER = ["--mode", "pynative"]
STEPS = 6  # of the run that most tests use (see conftest.reference); RUN has its other options
RUN = ["--num-steps", STEPS, "--save-pred-every", 1, "--preheat-steps", 2, "--batch-size", 2]
RUN += ["--random-mirror"]


def checked(done: subprocess.CompletedProcess, code: int) -> subprocess.CompletedProcess:
    """Return `done`, asserting that it ended with `code`, and with one line on stderr if that is 2."""
    assert done.returncode == code, done.stdout + done.stderr
    one_line = done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert code != 2 or one_line, done.stdout + done.stderr
    return done


def python(argv: list, cwd: Path, code: int, **env: str) -> subprocess.CompletedProcess:
    """Run `python ARGV`; see `checked`."""
    command, env = [sys.executable, *map(str, argv)], {**os.environ, **env}
    return checked(subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True), code)


@cache
def forks() -> subprocess.Popen:
    """Start tests/forked.py once; it ends with this process."""
    command, pipe = [sys.executable, "-m", "tests.forked"], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def run(script: str, *argv, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script as a user does, but in a fork of a process that has imported MindSpore; see `checked`."""
    words, server = [str(word) for word in (ROOT / script, *argv)], forks()
    with tempfile.TemporaryDirectory() as folder:
        output = [f"{folder}/stdout", f"{folder}/stderr"]
        print(json.dumps([words, str(cwd), dict(os.environ), *output]), file=server.stdin, flush=True)
        returncode = int(server.stdout.readline())
        texts = [Path(path).read_text(encoding="utf-8") for path in output]
    return checked(subprocess.CompletedProcess(words, returncode, *texts), code)


def fails(script: str, *argv, cwd: Path = ROOT) -> str:
    """Run a script that has to end with exit code 2; return the line on stderr."""
    return run(script, *argv, cwd=cwd, code=2).stderr


def refused(*argv) -> str:
    """Return the error message for options that the training script's parser refuses, without a process."""
    with redirect_stderr(io.StringIO()) as stderr, suppress(SystemExit):
        get_arguments([str(word) for word in argv])
    assert stderr.getvalue().count("\n") == 1, stderr.getvalue()
    return stderr.getvalue()


def module(name: str, *argv, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess:
    """Run `python -m NAME ARGV` in any folder."""
    return python(["-m", name, *argv], cwd, code, PYTHONPATH=str(ROOT))


def start_parallel(logs: Path, count: int, script: str, *argv) -> subprocess.Popen:
    """Start msrun with `count` processes of a script, in a new process group; output goes to `logs`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["msrun", f"--worker_num={count}", f"--local_worker_num={count}", "--join=True",
               f"--master_port={port}", f"--log_dir={logs}", ROOT / script, *map(str, argv)]  # fmt: skip
    # msrun starts this `python`, and notices a dead process after 10 s, not 30.
    path, nothing = f"{Path(sys.executable).parent}:{os.environ['PATH']}", subprocess.DEVNULL
    env = {**os.environ, "PATH": path, "MS_NODE_TIMEOUT": "10"}
    return subprocess.Popen(command, cwd=logs.parent, env=env, stdout=nothing, stderr=nothing,
                            start_new_session=True)  # fmt: skip


def run_parallel(logs: Path, count: int, script: str, *argv, ends_well: bool = True) -> list[str]:
    """Run `count` processes of a script; return the output of each."""
    job = start_parallel(logs, count, script, *argv)
    try:
        code = job.wait(300)
    finally:
        job.kill()
    output = [(logs / f"worker_{n}.log").read_text() for n in range(count)]
    assert (code == 0) == ends_well, "\n".join(output)
    return output


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until the condition is true, for three minutes at most."""
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train_words(data: Path, snapshot_dir: Path, *more) -> list[str]:
    """Return the options of a training of the small network on the images of the fixture `data`."""
    argv = ["--data-dir", data / "GTA5", "--data-dir-target", data / "City", "--snapshot-dir", snapshot_dir]
    argv += ["--model", "small", "--device", "cpu", "--input-size", "96,64", "--input-size-target", "64,48"]
    return [str(word) for word in (*argv, *more)]


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> np.ndarray:
    """Return the losses of a run, (steps, 5)."""
    return np.array([[float(row[name]) for name in LOSSES] for row in rows_of(folder / "loss.csv")])
