"""The one exception of this project that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake that the user can mend: the message is one line, without a traceback, and the exit code 2."""
