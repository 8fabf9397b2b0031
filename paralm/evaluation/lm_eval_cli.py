"""``python -m paralm.evaluation.lm_eval_cli`` is lm_eval's own command line, with the model ``paralm`` registered.

python -m paralm.evaluation.lm_eval_cli run --model paralm --model_args run=runs/NAME --tasks TASKS
python -m paralm.evaluation.lm_eval_cli ls tasks
"""

from __future__ import annotations

import sys

from paralm.errors import EXIT_USER, UserError


def main() -> int:
    """Exit codes as paralm's: 0, or 2 and one line for what the user can mend."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import paralm.evaluation.harness  # noqa: F401  (registers the model)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; pip install 'paralm[eval]'", file=sys.stderr)
        return EXIT_USER
    from paralm_data import DataError

    try:
        cli_evaluate()
    except (UserError, DataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", EXIT_USER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
