"""Errors a user can cause, each one clear line, and the exit codes a script can act on."""

from __future__ import annotations

EXIT_OK = 0
EXIT_UNEXPECTED = 1  # a bug: a traceback was printed
EXIT_USER = 2  # bad input: config, data, checkpoint; nothing was started or overwritten
EXIT_DIVERGED = 3  # training stopped after too many bad steps; the last good checkpoint stands
EXIT_STOPPED = 75  # stopped by a signal after saving; the same command continues (sysexits EX_TEMPFAIL)


class UserError(Exception):
    """Something the user gave cannot work. The message is one line: what was given, what to change."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A key, value or combination in the configuration."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class RunError(UserError):
    """A run folder that cannot be used as asked."""


class DivergedError(UserError):
    """Training met too many bad steps in a row."""

    exit_code = EXIT_DIVERGED


class StoppedError(UserError):
    """A signal asked the run to stop; everything is saved and the same command continues it."""

    exit_code = EXIT_STOPPED
