"""Users' mistakes, and how the scripts report them."""

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path

from utils.system import interrupt


class UserError(Exception):
    """A user's mistake: reported as one line without a traceback, with exit code 2."""


def run_script(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call main(args); report a UserError, or an OSError such as a full disk, in one line with exit code 2.

    At the end, the process gets back what `interrupt.block` took.
    """
    interrupt.keep_output()
    try:
        main(args)
    except (UserError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free disk space; files written so far are complete, a training resumes with --resume"
        print(f"{Path(sys.argv[0]).name}: error: {error}{hint if full else ''}", file=sys.stderr)
        sys.exit(2)
    finally:
        interrupt.release()
