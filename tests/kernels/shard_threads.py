"""Time shards without processes: a rank is a thread, and only one runs at a time, until it waits for what others say.
So Triton's interpreter, which is one for the process, may be used in all of them."""

from __future__ import annotations

import threading

import torch
from paralm_kernels import TimeShards
from paralm_kernels.laws import Outcome
from paralm_kernels.time_shards import Message

PATIENCE = 300  # seconds


class _Meeting:
    def __init__(self, size):
        self.size, self.turn, self.said = size, threading.Condition(), {}


class ThreadShards(TimeShards):
    """One of the ranks of a meeting."""

    def __init__(self, meeting, rank):
        self.group, self.rank, self.size = None, rank, meeting.size
        self.bytes_sent, self._under_way = {}, []
        self.meeting, self.count_of_messages = meeting, 0

    def gather(self, kind, *tensors):
        said = self.meeting.said.setdefault(self.count_of_messages, {})
        said[self.rank] = (kind, [x.detach().clone() for x in tensors])
        self.count_of_messages += 1
        self.meeting.turn.notify_all()

        def taken():
            assert self.meeting.turn.wait_for(lambda: len(said) == self.size, PATIENCE), f"{kind}: somebody is missing"
            assert {one for one, _ in said.values()} == {kind}, "all ranks say the same kinds of things in one order"
            return [torch.stack(parts) for parts in zip(*(said[rank][1] for rank in range(self.size)), strict=True)]

        return Message([], taken)

    def pass_on(self, kind, tensor, offset):
        told = self.gather(kind, tensor)
        there = 0 <= self.rank - offset < self.size
        return Message([], lambda: told.taken()[0][self.rank - offset] if there else None)

    def largest(self, x):
        return float(x), float(self.gather("agreement", x).taken()[0].max())


def on_shards(size, function):
    """function(shards) of every rank, in their order."""
    meeting, results, errors = _Meeting(size), [None] * size, []

    def run(rank):
        try:
            with meeting.turn:
                results[rank] = function(ThreadShards(meeting, rank))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def chunkwise_on_shards(case, cuts, **options):
    """As ``Case.run`` of test_chunkwise.py, the time cut into parts of as many ranks."""

    def one(shards):
        start = sum(cuts[: shards.rank])
        cut = slice(start, start + cuts[shards.rank])
        inputs = [x[:, cut].clone().requires_grad_() for x in case.inputs]
        state = [x.clone().requires_grad_() for x in case.state]
        given = (tuple(state) if case.normalized else state[0]) if state else None
        reset = None if case.reset is None else case.reset[:, cut]
        y, end = shards.chunkwise(*inputs, given, reset, normalized=case.normalized, **options)
        final = list(end) if case.normalized else [end]
        loss = (y * case.weights[0][:, cut]).sum()
        if shards.last:
            loss = loss + sum((a * w).sum() for a, w in zip(final, case.weights[1:], strict=False))
        grads = torch.autograd.grad(loss, [*inputs, *state], allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, (*inputs, *state), strict=True)]
        return y.detach(), [x.detach() for x in final], grads[:5], grads[5:]

    results = on_shards(len(cuts), one)
    along = [torch.cat(parts, 1) for parts in zip(*(result[2] for result in results), strict=True)]
    return [torch.cat([result[0] for result in results], 1), *results[-1][1], *along, *results[0][3]]


def solve_on_shards(case, cuts, method, **options):
    """The outcome of a case of paralm_kernels.laws, the time cut into parts of as many ranks; how it went on each."""

    def one(shards):
        start = sum(cuts[: shards.rank])
        cut = slice(start, start + cuts[shards.rank])
        inputs = [x[:, cut].clone().requires_grad_() for x in case.inputs]
        params, state = ([x.clone().requires_grad_() for x in part] for part in (case.params, case.state))
        reset = None if case.reset is None else case.reset[:, cut]
        solved = shards.solve(case.cell, inputs, params, state, reset, method, **options)
        loss = sum((h * g[:, cut]).sum() for h, g in zip(solved.states, case.grad_states, strict=True))
        if shards.last:
            loss = loss + sum((h * g).sum() for h, g in zip(solved.final, case.grad_final, strict=True))
        grads = torch.autograd.grad(loss, [*inputs, *params, *state], allow_unused=True)
        zeros = [torch.zeros_like(x) for x in (*inputs, *params, *state)]
        grads = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
        split = len(inputs), len(inputs) + len(params)
        states, final = ([h.detach() for h in part] for part in (solved.states, solved.final))
        return states, final, grads[: split[0]], grads[split[0] : split[1]], grads[split[1] :], solved.info

    results = on_shards(len(cuts), one)
    states, inputs = ([torch.cat(parts, 1) for parts in zip(*(r[i] for r in results), strict=True)] for i in (0, 2))
    params = [sum(parts) for parts in zip(*(result[3] for result in results), strict=True)]
    cell = case.cell
    values = {f"states[{n}]": h for n, h in zip(cell.state, states, strict=True)}
    values |= {f"final[{n}]": h for n, h in zip(cell.state, results[-1][1], strict=True)}
    grads = {f"inputs[{n}]": g for n, g in zip(cell.inputs, inputs, strict=True)}
    grads |= {f"params[{n}]": g for n, g in zip(cell.params, params, strict=True)}
    grads |= {f"state[{n}]": g for n, g in zip(cell.state, results[0][4], strict=True)}
    return Outcome(values, grads), [result[5] for result in results]
