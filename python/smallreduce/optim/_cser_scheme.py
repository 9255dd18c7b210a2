"""Which member of the family: what is sent in each step, what every H steps, and what becomes of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from smallreduce.codecs import Cast, Codec, RandomBlocks, as_int, codec

__all__ = ["NOTHING", "Scheme"]

NOTHING: Literal["nothing"] = "nothing"
"""In place of a codec: no update is sent."""


@dataclass(frozen=True)
class Scheme:
    """CSER and its relatives, as configurations.

    Attributes:
        gradient: C2, which compresses every step's update; None: exact.
        model: C1, which compresses what the ranks differ by, every ``interval`` steps; None: exact.
        interval: H, in steps.
        apply_residual: What a rank could not send stays applied to its own parameters, so that ranks differ. Otherwise
            it is kept apart, and all ranks have the same parameters after a reset.
        average_blocks: C2 and C1 choose blocks of the parameters, which are averaged where they stand.
    """

    gradient: Codec | Literal["nothing"] | None
    model: Codec | None
    interval: int
    apply_residual: bool
    average_blocks: bool

    @staticmethod
    def parse(
        gradient: str | Codec | None,
        model: str | Codec | None,
        interval: int,
        apply_residual: bool,
        blocks: bool | None,
    ) -> Scheme:
        """The scheme that these arguments of :class:`CSER` ask for.

        Raises:
            TypeError, ValueError: There is none.
        """
        if model == NOTHING:
            raise ValueError("model_codec cannot be 'nothing': what is never sent is never made up for")
        interval = as_int(interval, "reset_interval")
        if interval < 1:
            raise ValueError(f"reset_interval must be at least 1, got {interval}")
        for name, flag in (("apply_residual", apply_residual), ("average_blocks", blocks)):
            if not isinstance(flag, bool) and (flag is not None or name == "apply_residual"):
                raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
        first = NOTHING if gradient == NOTHING else _codec(gradient)
        second = _codec(model)
        if not apply_residual and first != NOTHING:
            raise ValueError(
                f"apply_residual=False is for gradient_codec='nothing' (EF-SGD, QSparse-local-SGD), got {gradient}"
            )
        possible = apply_residual and isinstance(second, RandomBlocks)
        possible = possible and (first == NOTHING or isinstance(first, RandomBlocks))
        if blocks and not possible:
            raise ValueError(
                "average_blocks=True needs apply_residual, a model_codec of RandomBlocks and a gradient_codec of "
                f"RandomBlocks or 'nothing', got {model} and {gradient}"
            )
        return Scheme(first, second, interval, apply_residual, possible if blocks is None else blocks)

    @property
    def sends_updates(self) -> bool:
        """Whether each step's update itself is compressed and sent."""
        return not self.average_blocks and (self.gradient != NOTHING or self.is_error_feedback)

    @property
    def is_error_feedback(self) -> bool:
        """Whether all ranks have the same parameters after every step, since no residual is applied: EF-SGD."""
        return not self.apply_residual and self.interval == 1

    @property
    def is_exact(self) -> bool:
        """Whether no update is compressed, so that there is nothing to make up for."""
        return self.gradient is None

    @property
    def update_codec(self) -> Codec | None:
        """What compresses the updates, where they are sent."""
        return self.model if isinstance(self.gradient, str) else self.gradient

    @property
    def ranks_agree(self) -> bool:
        """Whether all ranks have the same parameters after every step."""
        return self.is_exact or self.is_error_feedback

    def resets(self, step: int) -> bool:
        """Whether what the ranks differ by is exchanged in a step, counted from 1."""
        return not self.ranks_agree and step % self.interval == 0

    def blocks(self, step: int) -> RandomBlocks | None:
        """What chooses the blocks to be averaged in a step; None: nothing is sent."""
        chosen = self.model if self.resets(step) else self.gradient
        assert chosen == NOTHING or isinstance(chosen, RandomBlocks)
        return chosen if isinstance(chosen, RandomBlocks) else None

    @property
    def keeps_shared(self) -> bool:
        """Whether the model that all ranks share is held beside the parameters."""
        return not (self.ranks_agree or self.average_blocks)

    @property
    def keeps_residual(self) -> bool:
        """Whether what could not be sent is kept apart from the parameters."""
        return not self.apply_residual and self.model is not None

    @property
    def leaves_residual(self) -> bool:
        """Whether an exchange leaves something that is applied at once."""
        codecs = [self.model, *([self.update_codec] if self.sends_updates else [])]
        return self.keeps_shared and self.apply_residual and any(codec is not None for codec in codecs)

    @property
    def compression_ratio(self) -> float:
        """R_C of 1/R_C = 1/R_C2 + 1/(H R_C1)."""
        gradient = 0.0 if isinstance(self.gradient, str) else _bits(self.gradient)
        model = 0.0 if self.is_exact else _bits(self.model) / self.interval
        return 32 / (gradient + model)

    def __str__(self) -> str:
        return (
            f"gradient_codec {self.gradient}, model_codec {self.model}, reset_interval {self.interval}, "
            f"apply_residual {self.apply_residual}, average_blocks {self.average_blocks}"
        )


def _codec(spelling: str | Codec | None) -> Codec | None:
    chosen = codec(spelling)
    # What is left goes into a residual, which makes up for a rounding that is biased.
    return None if chosen is None or chosen == Cast(torch.float32) else chosen.with_feedback()


def _bits(codec: Codec | None) -> float:
    return 32.0 if codec is None else codec.bits_per_element
