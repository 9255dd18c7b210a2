"""The beginning of training with DGC, in which it sends more: stages of falling ratios (section 3.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from smallreduce.codecs import as_int, fraction_of

__all__ = ["Warmup", "check_warmup", "dgc_geometric_warmup", "dgc_warmup", "ratio_at"]

Warmup = tuple[tuple[int, float], ...]
"""Stages ``(steps, ratio)``, in their order."""

_PAPER = (0.25, 0.0625, 0.015625, 0.004)


def dgc_warmup(steps: int) -> Warmup:
    """The paper's warm-up: sparsities of 75, 93.75, 98.4375 and 99.6 %, before the 99.9 % that ``ratio=0.001`` is.

    Args:
        steps: Of each of the four stages; in the paper an epoch, for models that train for 90 epochs and more, and a
            quarter or less of one for those that train for few.

    Returns:
        Stages ``(steps, ratio)`` for ``DGC(warmup=...)``.

    Source: Lin, Han, Mao, Wang, Dally, *Deep Gradient Compression*, arXiv:1712.01887, section 3.3.
    """
    return tuple((_positive(steps, "steps"), ratio) for ratio in _PAPER)


def dgc_geometric_warmup(steps: int, ratio: float = 0.001, stages: int = 5) -> Warmup:
    """The warm-up of the authors' program: stage e of E sends ``ratio ** ((e + 1) / (E + 1))``, e from 0.

    For 0.001 in 5 stages these are 0.316, 0.1, 0.0316, 0.01 and 0.00316.

    Args:
        steps: Of each stage; there, an epoch.
        ratio: That of the training after it.
        stages: How many.

    Returns:
        Stages ``(steps, ratio)`` for ``DGC(warmup=...)``.

    Source: github.com/synxlin/deep-gradient-compression, with arXiv:1712.01887, section 3.3.
    """
    fraction_of(ratio)
    count = _positive(stages, "stages")
    return tuple((_positive(steps, "steps"), ratio ** ((stage + 1) / (count + 1))) for stage in range(count))


def check_warmup(warmup: Sequence[tuple[int, float]]) -> Warmup:
    """The stages as a tuple.

    Raises:
        TypeError: They are no pairs of an int and a number.
        ValueError: A stage has no steps, an impossible ratio, or a larger one than that before it: what a rank has kept
            back so far can only be sent by a codec.
    """
    if not isinstance(warmup, Sequence) or isinstance(warmup, str):
        raise TypeError(
            f"warmup must be a sequence of pairs (steps, ratio), as dgc_warmup(steps) makes it, got {warmup!r}"
        )
    stages: list[tuple[int, float]] = []
    for stage in warmup:
        if not isinstance(stage, (tuple, list)) or len(stage) != 2:
            raise TypeError(f"warmup must be a sequence of pairs (steps, ratio), got {stage!r} in it")
        steps, ratio = stage
        fraction_of(ratio)
        if stages and ratio > stages[-1][1]:
            raise ValueError(f"the ratios of warmup must not grow, got {ratio} after {stages[-1][1]}")
        stages.append((_positive(steps, "the steps of a stage of warmup"), float(ratio)))
    return tuple(stages)


def ratio_at(warmup: Warmup, step: int) -> float:
    """The ratio that ``warmup`` asks for in a step, counted from 0; 0.0 when it is over."""
    for steps, ratio in warmup:
        if step < steps:
            return ratio
        step -= steps
    return 0.0


def _positive(value: object, name: str) -> int:
    count = as_int(value, name)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count
