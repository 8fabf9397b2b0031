"""Time shards without processes: ranks run one after the other, again and again, each time with the answers that the
others would have given the time before. What a message holds depends on those before it only, so it soon stands."""

from __future__ import annotations

import torch
from paralm_kernels import TimeShards
from paralm_kernels.time_shards import Message


class Replayed(TimeShards):
    """One of ``size`` ranks; said: of every rank, what it told the others the time before, in its order."""

    def __init__(self, rank, size, said):
        self.group, self.rank, self.size = None, rank, size
        self.bytes_sent, self._under_way = {}, []
        self.said, self.own = said, []

    def gather(self, kind, *tensors):
        self.own.append([x.detach().clone() for x in tensors])
        index = len(self.own) - 1
        every = [said[index] if len(said) > index else self.own[index] for said in self.said]
        return Message([], lambda: [torch.stack(parts) for parts in zip(*every, strict=True)])

    def pass_on(self, kind, tensor, offset):
        told = self.gather(kind, tensor)
        there = 0 <= self.rank - offset < self.size
        return Message([], lambda: told.taken()[0][self.rank - offset] if there else None)


def over_shards(case, cuts, **options):
    """As ``Case.run`` of test_chunkwise.py, the time cut into parts of as many ranks."""
    size, said = len(cuts), [[] for _ in cuts]
    for _ in range(3):  # what is said forward, then backward with it, then all with both
        results, heard = [], []
        start = 0
        for rank, length in enumerate(cuts):
            shards, cut = Replayed(rank, size, said), slice(start, start + length)
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
            results.append([x.detach() for x in (y, *final, *grads)])
            heard.append(shards.own)
            start += length
        said = heard
    count = len(final)
    y = torch.cat([result[0] for result in results], 1)
    along = [torch.cat([result[1 + count + i] for result in results], 1) for i in range(5)]
    return [y, *results[-1][1 : 1 + count], *along, *results[0][6 + count :]]
