"""Deep Gradient Compression in NumPy, written down from the paper (arXiv:1712.01887) and the authors' program: N ranks
in one process, in the paper's units.

There a rank's gradient is its share of the mean: 1/N of the gradient of its own batch. So momentum and velocity are N
times smaller here than in the library, and what the ranks send is added up, not averaged; where N is a power of two
this rounds alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class DGCReference:
    """All ranks' state, and the weights that they share.

    Attributes:
        weights: By parameter.
        u, v: Momentum and velocity, by rank and parameter, in shares.
        sent: By rank and parameter, which elements the last step sent; None where it was dense.
    """

    def __init__(
        self,
        weights: Sequence[Array],
        ranks: int,
        *,
        lr: float,
        momentum: float,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        ratio: float = 0.001,
        warmup: Sequence[tuple[int, float]] = (),
        clip_norm: float | None = None,
        momentum_masking: bool = True,
    ) -> None:
        self.weights = [weight.astype(np.float32) for weight in weights]
        self.ranks = ranks
        self.lr, self.m, self.wd = (np.float32(value) for value in (lr, momentum, weight_decay))
        self.nesterov = nesterov
        self.ratio, self.warmup = ratio, warmup
        self.clip_norm = clip_norm
        self.momentum_masking = momentum_masking
        self.u = [[np.zeros_like(weight) for weight in self.weights] for _ in range(ranks)]
        self.v = [[np.zeros_like(weight) for weight in self.weights] for _ in range(ranks)]
        self.dense_momentum = [np.zeros_like(weight) for weight in self.weights]
        self.decay_momentum = [np.zeros_like(weight) for weight in self.weights]
        self.sent: list[list[Array | None]] = []
        self.steps = 0

    def step(self, gradients: Sequence[Sequence[Array]]) -> None:
        """One step with ``gradients[rank][parameter]``, each the gradient of that rank's batch."""
        shares = [[self._clip(g * np.float32(1 / self.ranks)) for g in of_rank] for of_rank in gradients]
        ratio = self._ratio()
        self.sent = [[None] * len(self.weights) for _ in range(self.ranks)]
        for p, weight in enumerate(self.weights):
            if weight.ndim < 2 or ratio >= 1:
                update = self._dense(p, [of_rank[p] for of_rank in shares])
            else:
                update = np.zeros_like(weight)
                for rank in range(self.ranks):
                    update = update + self._compressed(rank, p, shares[rank][p], ratio)
            self.weights[p] = weight - self.lr * (self._decay(p) + update)
        self.steps += 1

    def _ratio(self) -> float:
        end = 0
        for steps, ratio in self.warmup:
            end += steps
            if self.steps < end:
                return ratio
        return self.ratio

    def _clip(self, share: Array) -> Array:
        if self.clip_norm is None:
            return share
        limit = self.clip_norm * self.ranks**-0.5
        norm = math.sqrt(sum(float(x) ** 2 for x in share.flat))
        return share if norm <= limit else share * np.float32(limit / norm)

    def _dense(self, p: int, shares: Sequence[Array]) -> Array:
        mean = np.sum(shares, axis=0, dtype=np.float32)
        if self.nesterov:
            self.dense_momentum[p] = self.m * (self.dense_momentum[p] + mean)
            # If the next stage compresses this parameter, each rank goes on with its share of this momentum.
            update = self.dense_momentum[p] + mean
        else:
            self.dense_momentum[p] = self.m * self.dense_momentum[p] + mean
            update = self.dense_momentum[p]
        for rank in range(self.ranks):
            self.u[rank][p] = self.dense_momentum[p] * np.float32(1 / self.ranks)
        return update

    def _compressed(self, rank: int, p: int, share: Array, ratio: float) -> Array:
        if self.nesterov:
            self.u[rank][p] = self.m * (self.u[rank][p] + share)
            self.v[rank][p] = self.v[rank][p] + (self.u[rank][p] + share)
        else:
            self.u[rank][p] = self.m * self.u[rank][p] + share
            self.v[rank][p] = self.v[rank][p] + self.u[rank][p]
        velocity = self.v[rank][p].ravel()
        k = math.ceil(Fraction(str(ratio)) * velocity.size)
        mask = np.zeros(velocity.size, dtype=bool)
        mask[np.argsort(-np.abs(velocity), kind="stable")[:k]] = True  # of equal ones the first
        mask = mask.reshape(share.shape)
        sent = np.where(mask, self.v[rank][p], np.float32(0))
        self.v[rank][p] = np.where(mask, np.float32(0), self.v[rank][p])
        if self.momentum_masking:
            self.u[rank][p] = np.where(mask, np.float32(0), self.u[rank][p])
        self.sent[rank][p] = mask
        return sent

    def _decay(self, p: int) -> Array | np.float32:
        if not self.wd:
            return np.float32(0)
        decay = self.wd * self.weights[p]
        self.decay_momentum[p] = self.m * self.decay_momentum[p] + decay
        return decay + self.m * self.decay_momentum[p] if self.nesterov else self.decay_momentum[p]
