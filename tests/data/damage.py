"""What the tests of damaged input share: named cases of damage, and records to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Case = Callable[[Any], tuple[Callable[[], object], str]]
RECORDS = b"".join(json.dumps({"text": f"record {i} " * 30}).encode() + b"\n" for i in range(200))


def register(cases: dict[str, Case]) -> Callable[[Case], Case]:
    """A decorator that puts a function into ``cases`` under its name, with blanks."""

    def case(function: Case) -> Case:
        cases[function.__name__.replace("_", " ")] = function
        return function

    return case
