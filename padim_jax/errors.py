"""Exceptions and warnings that are meant for the person who runs the program."""


class UserError(Exception):
    """Something the user can mend: a setting, a file, a folder.

    The message is one or a few lines that name the file or setting, what was
    found, what was expected and what to do. The command line prints it without a
    traceback and exits with code 2; from Python it is an ordinary exception.
    """


class DataWarning(UserError, UserWarning):  # noqa: N818 (a warning, and an error if strict)
    """Data or a promise that is implausible, where the run can go on.

    Issue it with `warnings.warn(DataWarning("..."), stacklevel=2)`: one line that names what
    was found and what to do. The command line prints it to stderr as ``warning: ...``; with
    ``--strict`` it is an error like any other `UserError`. From Python, the filters of
    `warnings` decide.
    """


class Stopped(Exception):  # noqa: N818 (none)
    """A run that was asked to stop, and did as it should: no failure."""
