"""CSER and its relatives (arXiv:2007.13221) a second time: NumPy, as listed, sharing nothing with the optimizer.

All ranks live in one process: a row of an array is what a rank has, all parameters one after the other. Everything is
computed in float64 and must be a float32 all the same (:func:`exact`), so that the inputs of a test can be seen to be
such that no step of the optimizer rounds, whatever the order of its operations.

Packets are those of ``formats.reference``, the blocks of RandomBlocks those of docs/wire-formats.md, section 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from formats import reference as wire

F64 = npt.NDArray[np.float64]
Gradient = Callable[[int, int, F64], F64]
"""Of a rank, a step counted from 1, and the rank's parameters."""


def exact(values: F64) -> F64:
    assert np.array_equal(values, values.astype(np.float32)), "the inputs of this test are not exact in float32"
    return values


class Compressor(Protocol):
    """The sending half of PSync: of ``v`` [W, n] the mean of what the ranks send [n], and what they keep [W, n]."""

    def __call__(self, v: F64, step: int) -> tuple[F64, F64]: ...


def everything(v: F64, step: int) -> tuple[F64, F64]:
    return exact(v.mean(axis=0)), np.zeros_like(v)


def nothing(v: F64, step: int) -> tuple[F64, F64]:
    return np.zeros(v.shape[1]), v


class Packets:
    """A codec of ``formats.reference``. What encoding the mean again takes away is sent with the next.

    Args:
        gathered: Every rank gets all packets, each of everything, and adds them; otherwise rank r reduces packet r.
    """

    def __init__(self, codec: wire.Codec, sizes: Sequence[int], world: int, gathered: bool = False) -> None:
        self.codec = codec
        offsets = np.cumsum([0, *sizes])
        self.packets = wire.cut(
            list(zip(offsets[:-1].tolist(), sizes, strict=True)), codec.group, 1 if gathered else world
        )
        self.gathered = gathered
        # Where each element stands in the order of the blocks.
        first = np.cumsum([0, *(-(-size // 32) for size in sizes)])
        self.place = np.concatenate([32 * b + np.arange(size) for b, size in zip(first[:-1], sizes, strict=True)])
        self.blocks = int(first[-1])
        self.server = [np.zeros(32 * packet.block_count, np.float32) for packet in self.packets]

    def __call__(self, v: F64, step: int) -> tuple[F64, F64]:
        world, n = v.shape
        sent, kept = [], []
        for row in exact(v).astype(np.float32):
            nothing_before = np.zeros(32 * self.blocks, np.float32)
            data, left = wire.encode(row.view(np.uint32), self.packets, self.codec, wire.FP32, residual=nothing_before)
            assert left is not None
            sent.append(data)
            kept.append(left[self.place].astype(np.float64))
        mean = np.zeros(n, np.uint32)
        for number, packet in enumerate(self.packets):
            received = [data[number] for data in sent]
            if self.gathered:
                wire.reduce(received, 1 / world, packet, self.codec, wire.FP32, mean)
                continue
            reduced, left = wire.reduce_encode(
                received, 1 / world, packet, self.codec, wire.FP32, residual=self.server[number]
            )
            assert left is not None
            self.server[number] = left
            wire.decode([reduced], [packet], self.codec, wire.FP32, mean)
        return mean.view(np.float32).astype(np.float64), np.stack(kept)


@dataclass(frozen=True)
class Blocks:
    """GRBS: the same blocks of every parameter on all ranks."""

    ratio: Fraction
    block: int | None
    sizes: Sequence[int]
    bucket: int
    seed: int = 0

    def chosen(self, step: int) -> npt.NDArray[np.bool_]:
        masks = []
        for index, n in enumerate(self.sizes):
            key = wire.mix64(wire.mix64(wire.mix64(wire.mix64(self.seed) ^ self.bucket) ^ index) ^ wire.mix64(step))
            size = self.block or math.ceil(n * self.ratio)
            blocks = -(-n // size)
            count = 1 if self.block is None else math.ceil(blocks * self.ratio)
            first, stride = wire.mix64(key ^ 1) % blocks, 1 + wire.mix64(key ^ 2) % blocks
            while math.gcd(stride, blocks) != 1:
                stride = stride % blocks + 1
            numbers = [(first + j * stride) % blocks for j in range(count)]
            masks.append(np.isin(np.arange(n) // size, numbers))
        return np.concatenate(masks)

    def __call__(self, v: F64, step: int) -> tuple[F64, F64]:
        mask = self.chosen(step)
        return exact(np.where(mask, v.mean(axis=0), 0)), np.where(mask, 0, v)


class Options(NamedTuple):
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float


class State(NamedTuple):
    """After a step: every rank's parameters [W, n], and what it owes, where the listing has that by itself."""

    x: F64
    e: F64 | None


def psync(v: F64, compress: Compressor, step: int) -> tuple[F64, F64]:
    """PSync of the paper: ``(vbar + r_i, r_i)``."""
    mean, r = compress(v, step)
    return exact(mean + r), exact(r)


def direction(m: F64, g: F64, x: F64, o: Options, decayed: bool = True) -> tuple[F64, F64]:
    """The momentum and the update of a step before the learning rate, as torch's SGD has them."""
    g = exact(g + o.weight_decay * x) if decayed else g
    m = exact(o.momentum * m + g)
    return m, exact(g + o.momentum * m) if o.nesterov else m


def m_cser(x: F64, gradient: Gradient, c2: Compressor, c1: Compressor, interval: int, o: Options) -> Iterator[State]:
    """M-CSER with any compressors; with :func:`nothing` as C2 CSER-PL, and with an interval of 1 as well CSEA."""
    ranks, t = range(len(x)), 0
    e, m = np.zeros_like(x), np.zeros_like(x)
    while True:
        t += 1
        g = np.stack([gradient(i, t, x[i]) for i in ranks])
        m, d = direction(m, g, x, o)
        p = exact(o.lr * d)
        p_applied, r = psync(p, c2, t)
        x, e = exact(x - p_applied), exact(e - r)
        if t % interval == 0:
            e_applied, e_left = psync(e, c1, t)
            x, e = exact(x - e + e_applied), e_left
        yield State(x, e)


def implementation_2(
    x: F64, gradient: Gradient, c2: Blocks | None, c1: Blocks, interval: int, o: Options
) -> Iterator[State]:
    """What the released code does: it averages blocks of the parameters themselves, those of C1 in every
    ``interval``-th step and else those of C2."""
    ranks, t = range(len(x)), 0
    m = np.zeros_like(x)
    while True:
        t += 1
        g = np.stack([gradient(i, t, x[i]) for i in ranks])
        m, d = direction(m, g, x, o)
        x = exact(x - o.lr * d)
        blocks = c1 if t % interval == 0 else c2
        if blocks is not None:
            x = exact(np.where(blocks.chosen(t), x.mean(axis=0), x))
        yield State(x, None)


def ef_sgd(x: F64, gradient: Gradient, c: Compressor, o: Options) -> Iterator[State]:
    """As in the released code, for any compressor: what is owed is in the units and with the sign of an update."""
    ranks, t = range(len(x)), 0
    e, m, mwd = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    while True:
        t += 1
        g = np.stack([gradient(i, t, x[i]) for i in ranks])
        m, p = direction(m, g, x, o, decayed=False)
        mwd, decay = direction(mwd, o.weight_decay * x, x, o, decayed=False)
        x = exact(x - o.lr * decay)
        e = exact(e + o.lr * p)
        s, e = c(e, t)
        x = exact(x - s)
        yield State(x, e)


def qsparse_local_sgd(x: F64, gradient: Gradient, c: Compressor, interval: int, o: Options) -> Iterator[State]:
    """As in the released code, for any compressor: what is owed has the units and the sign of the parameters."""
    ranks, t = range(len(x)), 0
    e, m, xs = np.zeros_like(x), np.zeros_like(x), x
    while True:
        t += 1
        g = np.stack([gradient(i, t, x[i]) for i in ranks])
        m, d = direction(m, g, x, o)
        x = exact(x - o.lr * d)
        if t % interval == 0:
            e = exact(e + x - xs)
            s, e = c(e, t)
            x = xs = exact(xs + s)
        yield State(x, e)
