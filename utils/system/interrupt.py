"""Endings from outside: signals, polled between two steps or images, and output that nobody reads any more.

MindSpore installs handlers that kill the process, for SIGINT in each run of a graph and for SIGTERM with a
data pipeline. So the signals are blocked before it starts threads, and polled. CANN unblocks SIGINT and
SIGTERM again (its compile pool starts Python's multiprocessing resource tracker), so every poll blocks them
again and reinstalls handlers that only remember. A thread that was started in between keeps them unblocked:
there MindSpore turns SIGINT into SIGTERM, which is remembered too, but ends a process of msrun (see `watch`).
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

# Ctrl-C, a batch system's warnings before its time limit (Slurm, LSF), and the loss of the terminal.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
handlers: dict[signal.Signals, object] = {}  # what `reblock` sets; empty until `block`
previous: dict[signal.Signals, tuple] = {}  # what `release` sets again: handler, and whether it was blocked
delivered: set[signal.Signals] = set()


def block() -> None:
    """Defer the signals until `release` (POSIX only), and call `keep_output`.

    To be called before mindspore is imported. A signal that was ignored when the program started (by nohup,
    or by a shell for its background jobs) stays ignored.
    """
    release()
    keep_output()
    if hasattr(signal, "pthread_sigmask"):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        for number in SIGNALS:
            previous[number] = signal.getsignal(number), number in blocked
            handlers[number] = signal.SIG_IGN if previous[number][0] == signal.SIG_IGN else remember
        reblock()
    if "MS_ROLE" not in os.environ or sys.platform != "linux":
        return
    launcher = b""
    with suppress(OSError):  # started by something outside the container
        launcher = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    if re.search(rb"--join(=|\0)True\0", launcher):  # otherwise msrun exits at once and the processes go on
        # msrun does not pass on SIGTERM: when it is killed, the kernel sends SIGTERM to its processes.
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ["MS_ROLE"] == "MS_WORKER":
        threading.Thread(target=watch, daemon=True).start()


def release() -> None:
    """Restore handlers and mask from before `block`, for another program in this process (a notebook's %run).

    A signal that is still pending is dropped.
    """
    for number, (handler, blocked) in previous.items():
        signal.signal(number, signal.SIG_IGN)  # drops it if it is pending
        if not blocked:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that Python did not install
    for state in (previous, handlers, delivered):
        state.clear()


class Output(io.FileIO):
    """A file descriptor that leads to /dev/null once its reader or terminal is gone, for MindSpore too."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
                raise
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            return len(data)


def keep_output() -> None:
    """Let a program continue, with its logs in files, when nobody reads its stdout or stderr any more.

    As with `| head -2`, a tee that was killed, a lost terminal, and streams that were closed from the start
    (POSIX only).
    """
    if os.name != "posix":
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get this number, and MindSpore's messages
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdout", "stderr"), 1):
        given = getattr(sys, name)
        if given is not getattr(sys, f"__{name}__"):  # a notebook's, or one of these from an earlier call
            continue
        stream = given or open(number, "w", encoding="utf-8", closefd=False)  # None: it was closed
        stream.flush()
        buffer = io.BufferedWriter(Output(number, "w", closefd=False))
        every_line = stream.line_buffering or stream.write_through  # a terminal, or python -u
        guarded = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=every_line)
        setattr(sys, name, guarded)


def watch() -> None:
    """Exit at once when MindSpore sends this process SIGTERM, as another one or a machine of the job is lost.

    Otherwise the main thread may wait for it in a collective for half an hour (HCCL_EXEC_TIMEOUT). A SIGTERM
    of another sender is left to `pending_signal`.
    """
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getpid():
            with suppress(OSError):  # nobody reads it
                os.write(2, b"ended by MindSpore: another process or machine of the job may be lost\n")
            os._exit(128 + signal.SIGTERM)
        delivered.add(signal.SIGTERM)


def reblock() -> None:
    """Block and handle the signals as `block` decided, whatever other software has set since."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if handlers:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def remember(number: int, _) -> None:
    """Handle a signal that was delivered because other software had unblocked it."""
    delivered.add(signal.Signals(number))


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
