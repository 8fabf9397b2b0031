"""The ``paralm`` command, and the ways to start a run."""
