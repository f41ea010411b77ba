"""Mamba's selective scan.

The recurrence in about the square root of L steps: all segments of the sequence side by side from a state of 0 for what
each adds, one pass over the segments, and all of them again from the right state.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aten, masked, upcast, upcast_optional


class _Segments:
    """A sequence of tokens [N, L, C] as segments of as many steps each; what is appended to the last are zeros."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.steps = max(1, isqrt(length))
        self.count = -(-length // self.steps)

    def split(self, t: Tensor) -> tuple[Tensor, ...]:
        """For every step [N, segments, C]."""
        n, _length, channels = t.shape
        padded = F.pad(t, (0, 0, 0, self.count * self.steps - self.length))
        return padded.view(n, self.count, self.steps, channels).unbind(2)

    def join(self, parts: list[Tensor]) -> Tensor:
        n, _segments, channels = parts[0].shape
        return torch.stack(parts, 2).view(n, self.count * self.steps, channels)[:, : self.length]


class _Scan:
    """The states h = exp(step a) h + added b; a step of 0, as behind the last token, keeps them."""

    def __init__(self, step: Tensor, added: Tensor, a: Tensor, b: Tensor) -> None:
        self.segments = _Segments(step.shape[1])
        self.a = a
        self.step, self.added, self.b = map(self.segments.split, (step, added, b))
        self.kept = torch.exp(sum(self.step).unsqueeze(-1) * a)  # type: ignore[union-attr, arg-type]

    def decay(self, t: int) -> Tensor:
        return torch.exp(self.step[t].unsqueeze(-1) * self.a)

    def _advance(self, state: Tensor, t: int) -> Tensor:
        return torch.addcmul(self.added[t].unsqueeze(-1) * self.b[t].unsqueeze(-2), self.decay(t), state)

    def states(self) -> Iterator[Tensor]:
        """[N, segments, D, S] before the first step of every segment, then after each step."""
        n, count, channels = self.step[0].shape
        state = self.a.new_zeros(n, count, channels, self.a.shape[1])
        for t in range(self.segments.steps):
            state = self._advance(state, t)
        starts = [torch.zeros_like(state[:, 0])]
        for i in range(count - 1):
            starts.append(torch.addcmul(state[:, i], self.kept[:, i], starts[-1]))
        state = torch.stack(starts, 1)
        yield state
        for t in range(self.segments.steps):
            state = self._advance(state, t)
            yield state

    def gradients(self, grads: tuple[Tensor, ...], c: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor]]:
        """The last step first: a step and the gradient to the states after it, where `grads` is that to y."""

        def through(outer: Tensor, t: int) -> Tensor:
            return torch.addcmul(outer, grads[t].unsqueeze(-1), c[t].unsqueeze(-2))

        outer = torch.zeros_like(self.kept)
        for t in reversed(range(self.segments.steps)):
            outer = self.decay(t) * through(outer, t)
        ends = [torch.zeros_like(outer[:, 0])]
        for i in range(self.segments.count - 1, 0, -1):
            ends.append(torch.addcmul(outer[:, i], self.kept[:, i], ends[-1]))
        outer = torch.stack(ends[::-1], 1)
        for t in reversed(range(self.segments.steps)):
            g = through(outer, t)
            yield t, g
            outer = self.decay(t) * g


def _steps(delta: Tensor, delta_bias: Tensor | None) -> Tensor:
    return delta if delta_bias is None else delta + delta_bias


def _scanned(states: Iterator[Tensor], scan: _Scan, u: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """The sum of c h over the states, and d u."""
    next(states)
    parts = [(state * of_c.unsqueeze(-2)).sum(-1) for state, of_c in zip(states, scan.segments.split(c), strict=True)]
    y = scan.segments.join(parts)
    return y if d is None else torch.addcmul(y, u, d)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    if u.numel() == 0:
        return u.new_empty(u.shape)
    dtype = u.dtype
    u, delta, a, b, c = map(upcast, (u, delta, a, b, c))
    d, z, delta_bias = map(upcast_optional, (d, z, delta_bias))
    step = _steps(delta, delta_bias)
    step = F.softplus(step) if delta_softplus else step
    scan = _Scan(step, step * u, a, b)
    y = _scanned(scan.states(), scan, u, c, d)
    return (y if z is None else y * F.silu(z)).to(dtype).contiguous()


def selective_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients to the eight tensors, empty where there is none; the states are computed again and kept."""
    given = (u, delta, a, b, c, d, z, delta_bias)
    found: list[Tensor | None] = [None] * len(given)
    if u.numel() == 0:
        found = [None if t is None else torch.zeros_like(t) for t in given]
    elif any(output_mask):
        grad, u, delta, a, b, c = map(upcast, (grad, u, delta, a, b, c))
        d, z, delta_bias = map(upcast_optional, (d, z, delta_bias))
        found = list(_gradients(grad, u, delta, a, b, c, d, z, delta_bias, delta_softplus))
    return [
        u.new_empty(0) if t is None else masked(g if wanted else None, t)
        for t, g, wanted in zip(given, found, output_mask, strict=True)
    ]


def _gradients(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    before = _steps(delta, delta_bias)
    step = F.softplus(before) if delta_softplus else before
    scan = _Scan(step, step * u, a, b)
    states = list(scan.states())
    gd = gz = None
    if z is not None:
        gz = aten.silu_backward(grad * _scanned(iter(states), scan, u, c, d), z)
        grad = grad * F.silu(z)
    split, join = scan.segments.split, scan.segments.join
    grads = split(grad)
    # The gradients to b, c, step u and, through the decay, to step; a part for every step.
    parts: list[list[Tensor]] = [[], [], [], []]
    ga = torch.zeros_like(a)
    for t, g in scan.gradients(grads, split(c)):
        through_decay = g * scan.decay(t) * states[t]
        ga += torch.einsum("nkds,nkd->ds", through_decay, scan.step[t])
        parts[0].append((g * scan.added[t].unsqueeze(-1)).sum(-2))
        parts[1].append((grads[t].unsqueeze(-1) * states[t + 1]).sum(-2))
        parts[2].append((g * scan.b[t].unsqueeze(-2)).sum(-1))
        parts[3].append((through_decay * a).sum(-1))
    gb, gc, gadded, gstep = (join(part[::-1]) for part in parts)
    gu, gstep = gadded * step, torch.addcmul(gstep, gadded, u)
    if d is not None:
        gu, gd = torch.addcmul(gu, grad, d), (grad * u).sum((0, 1))
    gdelta = aten.softplus_backward(gstep, before, 1, 20) if delta_softplus else gstep
    return gu, gdelta, ga, gb, gc, gd, gz, gdelta.sum((0, 1))
