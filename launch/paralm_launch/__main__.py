"""``python -m paralm_launch`` is ``paralm``."""

from paralm_launch.cli import main

main()
