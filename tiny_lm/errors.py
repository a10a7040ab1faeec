"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A user's mistake, told in one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2. Everything else that is raised is a
    defect of ours and keeps its traceback.
    """
