"""Endings: signals, whatever other software does to masks and handlers, and output that nobody reads."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.scripts import EAGER, ROOT, TRAIN, python, rows_of, train_words

# A program that polls signals as the scripts do. On Ascend, CANN's compile pool makes a forkserver queue, and
# so unblocks SIGINT and SIGTERM; MindSpore's data pipelines and graphs set handlers.
PROGRAM = """
import multiprocessing, signal, time
from utils.system import interrupt
interrupt.block()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt.exit_if_pending()
queue = multiprocessing.get_context("forkserver").Queue()
print("ready", flush=True)
while True:
    time.sleep(0.02)
    interrupt.exit_if_pending()
"""


def start(prefix: str) -> subprocess.Popen:
    """Start the program by a shell, in a process group of its own; return once it is ready."""
    command = f"{prefix} {shlex.join([sys.executable, '-c', PROGRAM])}"
    process = subprocess.Popen(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_is_seen_although_others_unblock_it(name):
    process = start("exec")
    process.send_signal(signal.Signals[name])
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + signal.Signals[name], output
    assert output == f"stopped by {name}\n"


@pytest.mark.parametrize(
    "prefix, ignored",
    [
        ("exec nohup", signal.SIGHUP),
        ("trap '' INT; exec", signal.SIGINT),
        ("trap '' USR1; exec", signal.SIGUSR1),
    ],
)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(prefix, ignored):
    """As with nohup, or in the background jobs of a shell script."""
    process = start(prefix)
    process.send_signal(ignored)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 143


RUNS = """
import os, signal
from utils.system import interrupt
from utils.system.errors import UserError, run_script
def state():
    numbers = sorted(signal.Signals)
    return signal.pthread_sigmask(signal.SIG_BLOCK, ()), [signal.getsignal(number) for number in numbers]
def end(_):
    pass
def fail(_):
    raise UserError("a mistake")
def stop(_):
    os.kill(os.getpid(), signal.SIGUSR1)
    interrupt.exit_if_pending()
before = state()
for main, code in ((end, 0), (stop, 138), (fail, 2), (end, 0)):
    interrupt.block()
    try:
        run_script(main, None)
        assert code == 0
    except SystemExit as error:
        assert error.code == code
    assert state() == before, main
    assert interrupt.pending_signal() is None
"""


def test_a_run_gives_mask_and_handlers_back():
    """To a notebook, where the next run, and Ctrl-C, need them."""
    python(["-c", RUNS], ROOT, 0)


PRINTS = """
import os, sys
from contextlib import suppress
from utils.system import interrupt
from utils.system.errors import run_script
def main(_):
    file = open(sys.argv[1], "w")
    with suppress(OSError):  # MindSpore's C++ code ignores errors
        os.write(2, b"a warning\\n")
        os.write(1, b"a message\\n")
    for i in range(1999):
        print(i, "of stdout", flush=i % 2)
        print(i, "of stderr", file=sys.stderr)
    file.write("done")
interrupt.block()
run_script(main, None)
"""


@pytest.mark.parametrize("streams", ["", "2>&1", "2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_program_continues_when_nobody_reads_its_output(tmp_path, streams):
    """The reader leaves after one line, or there never was one."""
    command = shlex.join([sys.executable, "-c", PRINTS, str(tmp_path / "result")])
    with open(tmp_path / "stderr", "wb") as stderr:
        process = subprocess.Popen(["sh", "-c", f"exec {command} {streams}"], cwd=ROOT, stderr=stderr,
                                   stdout=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0
    assert (tmp_path / "result").read_text() == "done"  # also if a closed stream's number was free for it
    lines = (tmp_path / "stderr").read_text().count("\n")
    assert lines == (0 if "2>" in streams else 2000)  # a stream that is read loses nothing


def test_a_training_continues_when_nobody_reads_its_output(data, tmp_path):
    argv = train_words(data, tmp_path / "run", "--num-steps", 3, "--not-val", "--method", "source", *EAGER)
    process = subprocess.Popen([sys.executable, ROOT / TRAIN, *argv], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert len(rows_of(tmp_path / "run" / "loss.csv")) == 3 and (tmp_path / "run" / "GTA5_3.ckpt").exists()
    assert "all 3 steps are done" in (tmp_path / "run" / "Train_log.log").read_text()


def test_a_lost_machine_ends_its_survivors():
    """MindSpore's heartbeat sends SIGTERM from within the process; one of a user is deferred."""
    program = "import os, signal, time; from utils.system import interrupt; "
    program += "interrupt.block(); pid = os.getpid(); "
    program += "os.kill(pid, signal.SIGTERM) if {own} else os.system(f'kill {{pid}}'); time.sleep(1); "
    program += "print(interrupt.pending_signal().name)"
    for own, code, told in ((True, 143, "machine of the job may be lost"), (False, 0, "SIGTERM")):
        done = python(["-c", program.format(own=own)], ROOT, code, MS_ROLE="MS_WORKER")
        assert told in done.stdout + done.stderr


@pytest.mark.parametrize("join", ["--join=True", "--join=False"])
def test_processes_end_with_an_msrun_that_waits_for_them(tmp_path, join):
    """Without --join=True, msrun exits at once and they continue."""
    child = "import os, time; from pathlib import Path; from utils.system import interrupt; "
    child += "parent = os.getppid(); "
    child += f"interrupt.block(); Path({str(tmp_path / 'ready')!r}).touch()\n"
    child += "while os.getppid() == parent: time.sleep(0.05)\n"
    child += "time.sleep(0.5); print(int(interrupt.pending_signal() or 0))"
    launcher = "import os, subprocess, sys, time\n"
    launcher += f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    launcher += f"while not os.path.exists({str(tmp_path / 'ready')!r}): time.sleep(0.05)"
    done = python(["-c", launcher, join, "script.py"], ROOT, 0, MS_ROLE="MS_WORKER")
    assert done.stdout == ("15\n" if join == "--join=True" else "0\n")


def test_a_lost_terminal_ends_a_training_with_a_checkpoint(data, tmp_path):
    """Writing to it fails from then on, which must not end the process before it has saved."""
    folder = tmp_path / "run"
    argv = train_words(data, folder, "--num-steps", 100_000, "--not-val", "--num-workers", 1)
    argv += ["--method", "source"]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, str(ROOT / TRAIN), *argv])
    deadline = time.monotonic() + 120
    while not (folder / "loss.csv").exists() or not rows_of(folder / "loss.csv"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    done = len(rows_of(folder / "loss.csv"))
    assert [path.name for path in folder.glob("*.ckpt")] == [f"GTA5_{done}.ckpt"]
    log = (folder / "Train_log.log").read_text(encoding="utf-8")
    assert f"{done} steps are done; resume with" in log


# The training script, with SIGINT and SIGTERM unblocked before MindSpore starts its threads.
UNBLOCKED = """
import multiprocessing, runpy, sys
from utils.system import device
setup = device.setup
def setup_and_unblock(args):
    setup(args)
    multiprocessing.get_context("forkserver").Queue()
device.setup = setup_and_unblock
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_unblocked_thread_ends_a_training_with_a_checkpoint(data, tmp_path, number):
    folder = tmp_path / "run"
    argv = train_words(data, folder, "--num-steps", 100_000, "--not-val", "--num-workers", 1)
    argv += ["--method", "source"]
    process = subprocess.Popen([sys.executable, "-c", UNBLOCKED, TRAIN, *argv], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    while not (folder / "loss.csv").exists() or len(rows_of(folder / "loss.csv")) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    # During a step, MindSpore turns SIGINT into SIGTERM.
    assert process.returncode in (128 + number, 128 + signal.SIGTERM), output
    done = len(rows_of(folder / "loss.csv"))
    assert f"{done} steps are done" in output
    assert [path.name for path in folder.glob("*.ckpt")] == [f"GTA5_{done}.ckpt"]
