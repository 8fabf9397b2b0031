"""Dense recurrences: when does the quasi-Newton solve beat the loop, and how do we stand beside torch's modules?

    .venv/bin/python benchmarks/dense_rnn.py [--seconds 1] [--out FILE]

Two tables, float32, medians over runs that take turns, one thread on a CPU; a GPU is used where there is one.

solve   forward without gradients: the loop ("torch"; on a GPU the fused kernel too) and "newton", for every kind, head
        size, number of channels and size of R (the standard deviation of its elements times √d_head), whose result must
        be the loop's to 1e-5
layer   forward and backward of torch.nn.LSTM, GRU and RNN beside ours with the same weights: one head, the input
        projection included, outputs equal to 1e-4

Writes benchmarks/results/dense_rnn.json with every sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paralm_kernels import dense_rnn, dense_state
from paralm_kernels.dense_cells import KINDS
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from support.timing import ROOT, environment, failure, sample, summary

RESULT = ROOT / "benchmarks" / "results" / "dense_rnn.json"
SHAPES = [(1, 1, 16), (1, 4, 16), (1, 1, 64), (4, 4, 64)]
"""(batch, heads, d_head)."""
STEPS = (1024,)
SCALES = (0.1, 1.0)
MODULES: dict[str, Any] = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}


def take_turns(cases: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each case, one run of each after the other, at least three rounds."""
    for run in cases.values():
        run()
    values: dict[str, list[float]] = {name: [] for name in cases}
    while len(values[next(iter(cases))]) < 3 or sum(map(sum, values.values())) < seconds:
        for name, run in cases.items():
            values[name].append(sample(run, device))
    return values


def row_of(values: dict[str, list[float]], **what: Any) -> dict[str, Any]:
    """A row: what was run, the summary of each case, every sample."""
    return {**what, "seconds": {name: summary(v) for name, v in values.items()}, "samples": values}


@torch.no_grad()
def solve_row(
    kind: str, shape: tuple[int, int, int], steps: int, scale: float, device: str, seconds: float
) -> dict[str, Any]:
    """The loop and the parallel solve on the same arguments."""
    batch, heads, d_head = shape
    gates = len(KINDS[kind].gates)
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, steps, gates, heads, d_head, generator=draws).to(device)
    weight = (torch.randn(gates, heads, d_head, d_head, generator=draws) * scale / d_head**0.5).to(device)
    methods = ["torch", "newton", *(["triton"] if device == "cuda" else [])]

    def run(method: str) -> Tensor:
        return dense_rnn(kind, inputs, weight, method=method)[0]

    expected = run("torch")
    for method in methods[1:]:
        torch.testing.assert_close(run(method), expected, rtol=1e-5, atol=1e-5)
    values = take_turns({method: (lambda method=method: run(method)) for method in methods}, device, seconds)
    return row_of(values, kind=kind, batch=batch, heads=heads, d_head=d_head, steps=steps, scale=scale)


def layer_row(kind: str, batch: int, steps: int, width: int, device: str, seconds: float) -> dict[str, Any]:
    """A torch module, and the same by dense_rnn."""
    torch.manual_seed(0)
    module = MODULES[kind](width, width, batch_first=True).to(device)
    gates = len(KINDS[kind].gates)
    x = torch.randn(batch, steps, width, device=device, requires_grad=True)
    grad = torch.randn(batch, steps, width, device=device)
    bias = (module.bias_ih_l0 + module.bias_hh_l0).detach().view(gates, 1, width)
    if kind == "gru":
        own = (module.bias_ih_l0[-width:], module.bias_hh_l0[-width:])
        bias = torch.cat((bias[:2], *(part.detach().view(1, 1, width) for part in own)))
    parameters = [module.weight_ih_l0, module.weight_hh_l0, bias.requires_grad_()]

    def ours() -> Tensor:
        inputs = torch.nn.functional.linear(x, parameters[0]).unflatten(-1, (gates, 1, width))
        weight = parameters[1].view(gates, 1, width, width)
        state = dense_state(kind, batch, 1, width, device)
        return dense_rnn(kind, inputs, weight, parameters[2], state)[0].squeeze(2)

    def theirs() -> Tensor:
        y: Tensor = module(x)[0]
        return y

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    cases = {
        "ours": lambda: torch.autograd.grad(ours(), [x, *parameters], grad),
        "torch": lambda: torch.autograd.grad(theirs(), [x, *module.parameters()], grad),
    }
    return row_of(take_turns(cases, device, seconds), kind=kind, batch=batch, steps=steps, d_head=width)


def show(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Medians in milliseconds."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("seconds", ())))
    print("  ".join(f"{key:>6}" for key in keys), *(f"{name:>10} ms" for name in names))
    for row in rows:
        head = "  ".join(f"{row[key]!s:>6}" for key in keys)
        if "error" in row:
            print(head, row["error"])
            continue
        medians = {name: row["seconds"][name]["median"] * 1e3 for name in row["seconds"]}
        fastest = min(medians, key=lambda name: medians[name])
        print(head, *(f"{medians[name]:13.2f}" for name in names), f"  {fastest}")


def main() -> None:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long for each row")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables: dict[str, list[dict[str, Any]]] = {"solve": [], "layer": []}
    for kind, shape, steps, scale in itertools.product(KINDS, SHAPES, STEPS, SCALES):
        what = {"kind": kind, "batch": shape[0], "heads": shape[1], "d_head": shape[2], "steps": steps, "scale": scale}
        try:
            tables["solve"].append(solve_row(kind, shape, steps, scale, device, options.seconds))
        except Exception as error:  # a failed row is a result
            tables["solve"].append({**what, "error": failure(error)})
    show(tables["solve"], ("kind", "batch", "heads", "d_head", "steps", "scale"))
    for kind, (batch, width) in itertools.product(MODULES, [(1, 64), (16, 256)]):
        try:
            tables["layer"].append(layer_row(kind, batch, 256, width, device, options.seconds))
        except Exception as error:
            tables["layer"].append(
                {"kind": kind, "batch": batch, "steps": 256, "d_head": width, "error": failure(error)}
            )
    show(tables["layer"], ("kind", "batch", "steps", "d_head"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"environment": environment(device), **tables}, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
