"""The one exception that is meant for the person who runs the program."""


class UserError(Exception):
    """Something the user can mend: a setting, a file, a folder.

    The message is one or a few lines that name the file or setting, what was
    found, what was expected and what to do. The command line prints it without a
    traceback and exits with code 2; from Python it is an ordinary exception.
    """


class Stopped(Exception):  # noqa: N818 (none)
    """A run that was asked to stop, and did as it should: no failure."""
