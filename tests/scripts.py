"""The two scripts as a user starts them, for the tests."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN, EVALUATE = "CLAN_train_gta5_2_city.py", "CLAN_evaluate_city.py"


def run(script: str, *words, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A script of this project as a user would start it; its output is shown if it fails."""
    command = [sys.executable, ROOT / script, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def fails(script: str, *words, cwd: Path = ROOT) -> str:
    """Exit code 2 and one line on stderr, which is returned."""
    command = [sys.executable, ROOT / script, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, (
        done.stdout + done.stderr
    )
    return done.stderr


def module(name: str, *words, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess:
    """`python -m NAME WORDS` from any folder; with `code` 2 one line on stderr is expected."""
    command = [sys.executable, "-m", name, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert code != 2 or (done.stderr.count("\n") == 1 and "Traceback" not in done.stderr), done.stderr
    return done


def train_words(data: Path, snapshot_dir: Path, *more) -> list[str]:
    """Options for a short training of the small network on the pictures of the fixture `data`."""
    words = ["--data-dir", data / "GTA5", "--data-dir-target", data / "City", "--snapshot-dir", snapshot_dir]
    words += ["--model", "small", "--device", "cpu", "--input-size", "96,64", "--input-size-target", "64,48"]
    words += more
    return [str(word) for word in words]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
