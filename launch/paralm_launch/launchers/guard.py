"""``python -m paralm_launch.launchers.guard COMMAND…``: become COMMAND, and end when the parent ends.

For programs that are not ours (mpirun); the wish outlives the exec.
"""

from __future__ import annotations

import os
import sys

from paralm_launch.launchers.worker import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
