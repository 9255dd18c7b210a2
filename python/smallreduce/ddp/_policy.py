"""Which codec a parameter's gradient takes, and why some take none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from smallreduce._layout import ELEMENT_TYPES
from smallreduce.codecs import Cast, Codec, codec

CodecFor = Callable[[str | None, torch.Tensor], "Codec | str | None"]
"""A rule for single parameters: of its name (None where a hook was registered without the module) and the parameter."""


@dataclass(frozen=True)
class Choice:
    """How one parameter is reduced: by ``codec``, or exactly for ``reason``."""

    codec: Codec | None
    reason: str = ""


def choose(
    name: str | None, parameter: torch.Tensor, default: Codec | None, codec_for: CodecFor | None, feedback: bool
) -> Choice:
    """Applies the rule, or, without one, the default to parameters of two and more dimensions.

    Args:
        feedback: Error feedback makes up for what the codec loses.

    Raises:
        TypeError: The rule asks for a codec for a dtype that codecs do not take, or gives something that is no codec.
        ValueError: The rule gives an unknown spelling.
    """
    if codec_for is not None:
        chosen, reason = codec(codec_for(name, parameter)), "codec_for gives None"
    elif default is None:
        chosen, reason = None, "the codec is None"
    elif parameter.dim() < 2:
        chosen, reason = None, "fewer than two dimensions"
    elif parameter.dtype not in ELEMENT_TYPES:
        chosen, reason = None, f"no codec takes {parameter.dtype}"
    else:
        chosen, reason = default, ""
    if chosen is None:
        return Choice(None, reason)
    if parameter.dtype not in ELEMENT_TYPES:
        accepted = ", ".join(str(dtype) for dtype in ELEMENT_TYPES)
        raise TypeError(
            f"codec_for gives {chosen} for {name or 'a parameter'} of {parameter.dtype}; codecs take {accepted}: "
            "give None for it"
        )
    if chosen == Cast(torch.float32) and parameter.dtype == torch.float32:
        return Choice(None, "a cast to its own type")
    return Choice(chosen.with_feedback() if feedback else chosen)
