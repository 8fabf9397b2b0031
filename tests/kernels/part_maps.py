"""The map that a part of a recurrence is, by `part_map`, beside autograd of the plain loop."""

from __future__ import annotations

import torch
from paralm_kernels.laws import Case, plain_loop
from paralm_kernels.newton import NewtonOptions
from paralm_kernels.solve import checked_call, problem_of, run
from paralm_kernels.time_shards_solve import part_map


def assert_part_map(case: Case, method: str, tile: int | None = None, tolerance: float = 1e-10) -> None:
    """M and d, with all cotangents and with none of the first component, relative to their largest elements."""
    state = tuple(s.clone().requires_grad_() for s in case.state)
    states, final = plain_loop(case.cell, case.inputs, case.params, state, case.reset)
    size = len(state)
    arguments = (case.cell, case.inputs, case.params, case.state, case.reset, method)
    call, tensors = checked_call(*arguments, NewtonOptions(tile, None, None), "raise", False)
    problem = problem_of(call, case.reset, tensors)
    solved, _, _ = run(call, problem)
    for cotangents in (case.grad_states, (None, *case.grad_states[1:])):
        product, entry = part_map(call, problem, solved, cotangents)
        assert product.shape == (size, size, *state[0].shape)
        for i in range(size):
            row = torch.autograd.grad(final[i].sum(), state, retain_graph=True, allow_unused=True)
            for j, expected in enumerate(row):
                assert_near(product[i, j], torch.zeros_like(state[j]) if expected is None else expected, tolerance)
        total = sum((h * g).sum() for h, g in zip(states, cotangents, strict=True) if g is not None)
        given = (
            torch.autograd.grad(total, state, retain_graph=True, allow_unused=True)
            if isinstance(total, torch.Tensor)
            else (None,) * size
        )
        for j, expected in enumerate(given):
            assert_near(entry[j], torch.zeros_like(state[j]) if expected is None else expected, tolerance)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    largest = max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= tolerance * largest
