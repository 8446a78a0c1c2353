"""Exceptions and warnings that are meant for the person who runs the program."""

NO_MEMORY = (
    "not enough memory: it ran out on the way. Make room, raise the limit of this process "
    "(ulimit -v, a container's, a job's), or take a smaller config.batch_size or "
    "config.image.resize"
)


class UserError(Exception):
    """Something the user can mend: a setting, a file, a folder.

    The message is one or a few lines that name the file or setting, what was
    found, what was expected and what to do. The command line prints it without a
    traceback and exits with code 2; from Python it is an ordinary exception.
    """


class MachineError(UserError):
    """A file that the machine could not read: nothing is known of what is in it.

    Permissions, too many open files, a disk or a network share that does not answer. Trying
    again later may work, so that the file must be neither skipped nor recorded as bad.
    """


class RemovedError(UserError):
    """A folder that the program writes to was removed meanwhile."""


class DataWarning(UserError, UserWarning):  # noqa: N818 (a warning, and an error if strict)
    """Data or a promise that is implausible, where the run can go on.

    Issue it with `warnings.warn(DataWarning("..."), stacklevel=2)`: one line that names what
    was found and what to do. The command line prints it to stderr as ``warning: ...``; with
    ``--strict`` it is an error like any other `UserError`. From Python, the filters of
    `warnings` decide.
    """


class Stopped(Exception):  # noqa: N818 (none)
    """A run that was asked to stop, and did as it should: no failure."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python's, or that of an XLA computation."""
    # By its name, as importing JAX takes long.
    xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (xla and "RESOURCE_EXHAUSTED" in str(error))
