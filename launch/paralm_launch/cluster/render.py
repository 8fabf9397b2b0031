"""From a template of ``slurm/`` to a script: its ``#SBATCH`` lines, settings, setup and arguments are put in, and
nothing else of it changes. So what is submitted is what a person reads there and can submit by hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from paralm import resources

_SETUP = "# source /path/to/paralm/.venv/bin/activate"


def render(
    template: str,
    options: Sequence[str],
    settings: Mapping[str, str],
    setup: Sequence[str],
    arguments: Sequence[str],
) -> str:
    """The script of a template.

    ``options``: of sbatch, one a line. ``settings``: values of the template's own variables, as the shell reads them.
    ``setup``: lines. ``arguments``: what a person would give behind the script's name.
    """
    lines = resources.find(f"slurm/{template}.sbatch").read_text(encoding="utf-8").splitlines()
    header = [index for index, line in enumerate(lines) if line.startswith("#SBATCH ")]
    lines[header[0] : header[-1] + 1] = [f"#SBATCH {option}" for option in options]
    for name, value in settings.items():
        places = [index for index, line in enumerate(lines) if re.match(rf"{name}=.* # EDIT", line)]
        if len(places) != 1:
            raise LookupError(f"slurm/{template}.sbatch has {len(places)} settings {name}")
        lines[places[0]] = f"{name}={value}"
    place = lines.index(_SETUP)
    lines[place : place + 1] = [*setup, f"set -- {' '.join(map(shlex.quote, arguments))}"]
    return "\n".join(lines) + "\n"


def option(name: str, value: object) -> str:
    """``--name=value``, quoted where sbatch would split it."""
    text = f"--{name}={value}"
    return text if re.fullmatch(r"[^\s'\"#\\]+", text) else '--{}="{}"'.format(name, str(value).replace('"', r"\""))
