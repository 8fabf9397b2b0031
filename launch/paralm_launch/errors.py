"""From an exception to what the terminal and the shell see: one line and an exit code, or a traceback for a bug."""

from __future__ import annotations

import errno
import sys
import traceback

from paralm.errors import EXIT_UNEXPECTED, EXIT_USER, UserError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_PIPE = 141  # 128 + SIGPIPE

# Errors of the lower floors that a user's input causes. Looked up by name: importing them would import torch.
_LOWER = {
    "paralm_data": ("DataError",),
    "paralm_kernels.errors": ("CellError", "ArgumentError", "NotConverged"),
}
# Of the operating system's errors, those that a user and not a programmer can mend.
_SYSTEM = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENAMETOOLONG}


def user_error(error: BaseException) -> tuple[str, int] | None:
    """(one line, exit code) for an error that the user can mend; None for anything else."""
    if isinstance(error, UserError):
        return _one_line(error), error.exit_code
    for module, names in _LOWER.items():
        known = tuple(c for n in names if (c := getattr(sys.modules.get(module), n, None)) is not None)
        if isinstance(error, known):
            return _one_line(error), EXIT_USER
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", EXIT_USER
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer: the command line itself
        context = getattr(error, "ctx", None)
        message = " ".join(error.format_message().split()).rstrip(".")
        hint = f"; see '{context.command_path} --help'" if context is not None and message else ""
        return f"{message}{hint}", EXIT_USER
    return None


def report(error: BaseException, verbose: bool = False) -> int:
    """Say what went wrong on stderr and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    known = user_error(error)
    if known is None:
        traceback.print_exception(error)
        print(
            "error: this is a bug in paralm; please report it with the lines above, the command, and what "
            "'paralm --version' prints",
            file=sys.stderr,
        )
        return EXIT_UNEXPECTED
    line, code = known
    if not line:
        return code  # a group without a command: its help is on the screen already
    if verbose:
        traceback.print_exception(error)
    print(f"error: {line}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
