"""Endings from outside: signals, polled between two steps or images, and output that nobody reads any more.

MindSpore installs handlers that kill the process, so the signals are blocked before it starts threads; a
thread takes them, as the main one may be in a graph for minutes. CANN unblocks SIGINT and SIGTERM again, so
every poll blocks them again and reinstalls handlers that only remember. Threads that were started in between
keep them unblocked: there MindSpore turns SIGINT into SIGTERM, which is remembered too, but ends a process of
msrun (see `watch`).
"""

import ctypes
import errno
import io
import os
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

# Ctrl-C, the loss of the terminal, and what batch systems (Slurm, LSF) send before their time limit.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
previous: dict[signal.Signals, object] = {}  # the handlers from before `block`, which `release` sets again
delivered: set[signal.Signals] = set()
watchers: list[threading.Thread] = []
task = "finishing the step or image; once more ends at once"  # what happens after Ctrl-C


def block() -> None:
    """Defer the signals until `release` (POSIX only); to be called before mindspore is imported.

    A signal that was ignored when the program started (by nohup, or by a shell for its background jobs) stays
    ignored.
    """
    if os.name != "posix":
        return
    previous.update((signal.Signals[name], signal.getsignal(signal.Signals[name])) for name in NAMES)
    reblock()
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        watchers.append(threading.Thread(target=watch, daemon=True))
        watchers[-1].start()
    if "MS_ROLE" not in os.environ:
        return
    parent = Path(f"/proc/{os.getppid()}/cmdline")  # absent if it is outside the container
    if parent.exists() and re.search(rb"--join(=|\0)True\0", parent.read_bytes()):
        # This msrun does not pass on SIGTERM: when it is killed, the kernel sends SIGTERM to its processes.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def release() -> None:
    """Restore the handlers and unblock, for another program in this process (a notebook's %run)."""
    handlers = dict(previous)
    previous.clear()
    while watchers:
        watchers.pop().join()
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_IGN)  # drops a signal that is still pending
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        signal.signal(number, handler)
    delivered.clear()


def reblock() -> None:
    """Block and handle the signals as `block` decided, whatever other software has set since."""
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_IGN if handler == signal.SIG_IGN else remember)
    signal.pthread_sigmask(signal.SIG_BLOCK, previous)


def remember(number: int, _=None) -> None:
    """Remember a signal for `pending_signal`; acknowledge Ctrl-C, and exit at the second one."""
    if number == signal.SIGINT and number in delivered:
        os._exit(128 + number)
    delivered.add(signal.Signals(number))
    if number == signal.SIGINT:
        tell(task)


def tell(text: str) -> None:
    """Write a line to stderr from any thread."""
    with suppress(OSError):  # nobody reads it
        os.write(2, f"\n{text}\n".encode())


def wanted() -> set[signal.Signals]:
    """Return the signals that were not ignored when the program started."""
    return {number for number, handler in list(previous.items()) if handler != signal.SIG_IGN}


def watch() -> None:
    """Remember the signals as they come; exit when MindSpore sends SIGTERM to this process of a job.

    It does so if another process or machine is lost. The main thread may wait for that in a collective for
    half an hour (HCCL_EXEC_TIMEOUT).
    """
    while previous:
        info = signal.sigtimedwait(wanted(), 0.1)
        own = info and info.si_signo == signal.SIGTERM and info.si_pid == os.getpid()
        if own and os.environ.get("MS_ROLE") == "MS_WORKER":
            tell("ended by MindSpore: another process or machine of the job may be lost")
            os._exit(128 + signal.SIGTERM)
        if info:
            remember(info.si_signo)


def pending_signal() -> signal.Signals | None:
    """Return the signal that is pending or was delivered, the lowest of several; None if there is none."""
    if not previous:
        return None
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        reblock()
    return min(delivered | (signal.sigpending() & wanted()), default=None)


def exit_if_pending(*_) -> None:
    """Raise SystemExit with the customary code, 128 plus the signal's number, if a signal is pending."""
    if pending_signal():
        exit_for_signal()


def exit_for_signal(quiet: bool = False) -> None:
    """Raise SystemExit with the code of the pending signal, of SIGTERM if another process has it."""
    number = pending_signal() or signal.SIGTERM
    if not quiet:
        print(f"stopped by {number.name}")
    raise SystemExit(128 + number)


class Output(io.FileIO):
    """A file descriptor that leads to /dev/null once its reader or terminal is gone, for MindSpore too."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            return len(data)


def keep_output() -> None:
    """Let a program continue, with its logs in files, when nobody reads its stdout or stderr (POSIX only).

    As with `| head -2`, a tee that was killed, a lost terminal, and streams that were closed from the start.
    """
    if os.name != "posix":
        sys.stdout.reconfigure(errors="backslashreplace")
        return
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: else the next file would get its number, and MindSpore's messages
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):  # not a notebook's, nor an Output
            stream.flush()
            buffer = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            errors = "backslashreplace"  # file names may have bytes of any encoding
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, line_buffering=True))
