"""Mistakes that the person at the keyboard can mend, and how the scripts end with them."""

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: the message is one line, without a traceback, and the exit code 2."""


def run_script(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call main(args); a UserError, or an OSError such as a full disk, becomes one line and exit code 2."""
    try:
        main(args)
    except (UserError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        hint = "; make room: what was written before is complete; resume a training with --continue-train"
        print(f"{Path(sys.argv[0]).name}: error: {error}{hint if full else ''}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
