"""Endings: signals, whatever other software does to masks and handlers, and output that nobody reads."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.scripts import ROOT, TRAIN, python, rows_of, train_words, wait_until

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


def start(prefix: str, program: str = PROGRAM) -> subprocess.Popen:
    """Start the program by a shell, in a process group of its own; return once it is ready."""
    command = f"{prefix} {shlex.join([sys.executable, '-c', program])}"
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
    assert output.splitlines()[-1] == f"stopped by {name}"


def test_ctrl_c_is_acknowledged_at_once_and_the_second_one_ends():
    """Although the main thread is busy, as it is for minutes in a graph that compiles."""
    busy = "import time; from utils.system import interrupt; interrupt.block(); print('ready', flush=True); "
    process = start("exec", busy + "time.sleep(60)")
    process.send_signal(signal.SIGINT)
    lines = process.stdout.readline(), process.stdout.readline()
    assert lines == ("\n", "finishing the step or image; once more ends at once\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


@pytest.mark.parametrize(
    "prefix, ignored", [("exec nohup", signal.SIGHUP), ("trap '' INT; exec", signal.SIGINT)]
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
from utils.system.errors import run_script
def state():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ()), list(map(signal.getsignal, signal.Signals))
def stop(_):
    os.kill(os.getpid(), signal.SIGUSR1)
    while True:
        interrupt.exit_if_pending()
before = state()
for main in (stop, print):
    interrupt.block()
    try:
        run_script(main, "printed")
    except SystemExit as error:
        print(error.code)
    assert state() == before and interrupt.pending_signal() is None, main
"""


def test_a_run_gives_mask_and_handlers_back():
    """To a notebook, where the next run, and Ctrl-C, need them."""
    assert python(["-c", RUNS], ROOT, 0).stdout == "stopped by SIGUSR1\n138\nprinted\n"


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


@pytest.mark.parametrize(
    "send, code, told",
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "machine of the job may be lost"),
        ("os.system(f'kill {os.getpid()}')", 0, "SIGTERM"),
    ],
)
def test_a_lost_machine_ends_its_survivors(send, code, told):
    """MindSpore's heartbeat sends SIGTERM from within the process; one of a user is deferred."""
    program = "import os, signal, time; from utils.system import interrupt; interrupt.block(); "
    program += f"{send}; time.sleep(1); print(interrupt.pending_signal().name)"
    done = python(["-c", program], ROOT, code, MS_ROLE="MS_WORKER")
    assert told in done.stdout + done.stderr


@pytest.mark.parametrize("join", ["--join=True", "--join=False"])
def test_processes_end_with_an_msrun_that_waits_for_them(tmp_path, join):
    """Without --join=True, msrun exits at once and they continue."""
    ready = str(tmp_path / "ready")
    child = "import os, time; from utils.system import interrupt; "
    child += f"parent = os.getppid(); interrupt.block(); os.mkdir({ready!r})\n"
    child += "while os.getppid() == parent: time.sleep(0.05)\n"
    child += "time.sleep(0.5); print(int(interrupt.pending_signal() or 0))"
    launcher = f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    launcher += f"while not os.path.exists({ready!r}): time.sleep(0.05)"
    done = python(["-c", launcher, join, "script.py"], ROOT, 0, MS_ROLE="MS_WORKER")
    assert done.stdout == ("15\n" if join == "--join=True" else "0\n")


def test_a_signal_ends_a_training_with_a_checkpoint(data, tmp_path):
    """SIGHUP comes with the loss of the terminal: writing to it fails before the checkpoint is saved."""
    more = ["--num-steps", 100_000, "--not-val", "--num-workers", 1, "--method", "source"]
    argv = [sys.executable, ROOT / TRAIN, *train_words(data, tmp_path, *more)]
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, argv)
    wait_until(lambda: (tmp_path / "loss.csv").exists() and len(rows_of(tmp_path / "loss.csv")) > 4)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    done = len(rows_of(tmp_path / "loss.csv"))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"GTA5_{done}.ckpt"]
    assert f"{done} steps are done; resume with" in (tmp_path / "Train_log.log").read_text(encoding="utf-8")
