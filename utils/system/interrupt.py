"""Deferred signals: Ctrl-C, SIGTERM and SIGHUP are polled between two steps or images.

MindSpore installs handlers that kill the process, for SIGINT in each run of a graph and for SIGTERM with a
data pipeline. So SIGINT and SIGTERM are blocked before it starts threads, and polled. CANN unblocks them
again (its compile pool starts Python's multiprocessing resource tracker), so every poll blocks them again and
reinstalls handlers that only remember. A thread that was started in between keeps them unblocked: there
MindSpore turns SIGINT into SIGTERM, which is remembered too, but ends a process of msrun (see `watch`).
"""

import ctypes
import os
import re
import signal
import stat
import sys
import threading
from contextlib import suppress
from pathlib import Path

BLOCKED = {signal.SIGINT, signal.SIGTERM}
handlers: dict[signal.Signals, object] = {}  # what `reblock` restores; empty until `block`
delivered: set[signal.Signals] = set()


def block() -> None:
    """Make the signals wait (POSIX only). To be called before mindspore is imported.

    What nohup, or a shell for its background jobs, had ignored when the program started stays ignored.
    """
    if hasattr(signal, "pthread_sigmask"):
        for number in (*BLOCKED, signal.SIGHUP):
            ignored = signal.getsignal(number) == signal.SIG_IGN
            handlers[number] = signal.SIG_IGN if ignored else remember
        reblock()
    if "MS_ROLE" not in os.environ or sys.platform != "linux":
        return
    launcher = b""
    with suppress(OSError):  # started by something outside the container
        launcher = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    if re.search(rb"--join(=|\0)True\0", launcher):  # otherwise it leaves its processes alone
        # msrun hands no SIGTERM on: when it dies of one, its processes get theirs from the kernel.
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ["MS_ROLE"] == "MS_WORKER":
        threading.Thread(target=watch, daemon=True).start()


def watch() -> None:
    """Exit at once when MindSpore sends this process SIGTERM, as another one or a machine of the job is lost.

    The main thread may then wait for it in a collective for half an hour (HCCL_EXEC_TIMEOUT). A SIGTERM of
    anybody else is left to `pending_signal`.
    """
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getpid():
            os.write(2, b"ended by MindSpore: another process or machine of the job may be lost\n")
            os._exit(128 + signal.SIGTERM)
        delivered.add(signal.SIGTERM)


def reblock() -> None:
    """Block and handle the signals as `block` decided, whatever other software has set since."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if handlers:
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # not SIGHUP: see `remember`


def remember(number: int, _) -> None:
    """Handler of a signal that was delivered. SIGHUP is handled at once: it takes the terminal away.

    Writing to a lost terminal, or to a pipe whose reader went with it, is an error from then on; files stay.
    """
    delivered.add(signal.Signals(number))
    if number == signal.SIGHUP:
        for stream in (1, 2):
            with suppress(OSError):
                if not stat.S_ISREG(os.fstat(stream).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def pending_signal() -> signal.Signals | None:
    """Return the signal that is pending or was delivered, the lowest of several; None if there is none."""
    if not handlers:
        return None
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        reblock()
    wanted = {number for number, handler in handlers.items() if handler == remember}
    return min(delivered | (signal.sigpending() & wanted), default=None)


def exit_if_pending(*_) -> None:
    """Raise SystemExit with the customary code, 128 plus the signal's number, if a signal is pending."""
    if pending_signal():
        exit_for_signal()


def exit_for_signal(quiet: bool = False) -> None:
    """Raise SystemExit with the code of the pending signal, of SIGTERM if another process has it.

    quiet: print nothing, as all processes but rank 0.
    """
    number = pending_signal() or signal.SIGTERM
    if not quiet:
        print(f"stopped by {number.name}")
    raise SystemExit(128 + number)
