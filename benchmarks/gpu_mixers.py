"""benchmarks/mixers.py on the GPU, under the name that `make gpu-check` looks for."""

from __future__ import annotations

import sys

from mixers import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--device=cuda"]))
