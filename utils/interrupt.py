"""Ctrl-C and SIGTERM as wishes, which the scripts grant between two steps or pictures.

MindSpore brings handlers of its own into place while graphs and data pipelines run, and those end the
process. So both signals are blocked, in the main thread before there are others, and looked for in between.
"""

import ctypes
import signal
import sys

from utils.device import launched

SIGNALS = {signal.SIGINT, signal.SIGTERM}


def block() -> None:
    """Make both signals wait (POSIX only). To be called before mindspore is imported."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if launched() and sys.platform == "linux":
        # msrun hands no SIGTERM on: when it dies of one, its processes get theirs from the kernel.
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def asked() -> signal.Signals | None:
    """The signal that waits, if one does."""
    waiting = signal.sigpending() & SIGNALS if hasattr(signal, "sigpending") else set()
    return min(waiting, default=None)


def exit_if_asked(*_) -> None:
    """SystemExit with the customary code, 130 or 143, if a signal waits."""
    if asked():
        stop()


def stop() -> None:
    """SystemExit with the code of the signal that waits; of SIGTERM if it waits in another process."""
    number = asked() or signal.SIGTERM
    print(f"stopped by {number.name}")
    raise SystemExit(128 + number)
