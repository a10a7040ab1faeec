"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake that the user can fix, in one line: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2. Any other exception is a bug and keeps its
    traceback.
    """
