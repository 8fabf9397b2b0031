"""Triton's interpreter with all programs of a launch at the same time, a thread each: kernels whose programs wait for
each other run, and a missing or wrong barrier shows."""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton.runtime.interpreter as interpreter

LIMIT = 20
"""Seconds after which programs that still wait are given up."""


@contextmanager
def at_the_same_time() -> Iterator[None]:
    """Inside, with the interpreter as interpreter.py makes it, launches start their programs together, and return when
    all have ended. TimeoutError where they do not; the threads are then left behind."""
    here, call, interval = threading.local(), interpreter.GridExecutor.__call__, sys.getswitchinterval()
    patch, one = interpreter._patch_lang, threading.Lock()

    def patched(function: Any) -> Any:
        with one:  # a module's language is patched at the first call of a function there: by one thread, whole
            return patch(function)

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        function, threads, errors = self.fn, [], []

        def program(**given: Any) -> None:
            at = here.at

            def body() -> None:
                here.at = at
                try:
                    function(**given)
                except Exception as error:
                    errors.append(error)

            threads.append(threading.Thread(target=body, daemon=True))
            if len(threads) == math.prod(interpreter.interpreter_builder.grid_dim):
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(LIMIT)
                if errors:
                    raise errors[0]
                if any(thread.is_alive() for thread in threads):
                    raise TimeoutError(f"programs still wait for each other after {LIMIT} s")

        program.__signature__ = inspect.signature(function)
        patched(function)
        self.fn = program
        try:
            return call(self, *arguments, **options)
        finally:
            self.fn = function

    interpreter.InterpreterBuilder.grid_idx = property(
        lambda builder: here.at, lambda builder, at: setattr(here, "at", at)
    )
    interpreter.GridExecutor.__call__, interpreter._patch_lang = run, patched
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        del interpreter.InterpreterBuilder.grid_idx
        interpreter.GridExecutor.__call__, interpreter._patch_lang = call, patch
        sys.setswitchinterval(interval)
