"""Which codecs a sharded model takes for what it sends."""

from __future__ import annotations

from smallreduce.codecs import Cast, Codec, IntQuant, PacketCodec, Sign, TopK
from smallreduce.codecs import codec as parse_codec
from smallreduce.collectives._levels import grain_of
from smallreduce.fsdp._leg import Codecs

__all__ = ["Spelling", "parse_gradients", "parse_unbiased", "parse_weights"]

Spelling = str | Codec | None
_FEEDBACK = (None, "int8", "full")


def parse_gradients(
    given: Spelling | tuple[str | Codec, str | Codec], feedback: str | None, node_size: int | None
) -> Codecs | None:
    """The codec, or the pair for two levels, of gradients that are reduced with or without error feedback.

    Raises:
        TypeError, ValueError: There is none such, or it cannot be used so.
    """
    if feedback not in _FEEDBACK:
        raise ValueError(f"feedback must be None, 'int8' or 'full', got {feedback!r}")
    if isinstance(given, tuple):
        if len(given) != 2 or None in given:
            raise ValueError(f"gradients must be a codec or a pair of codecs, got {given}")
        intra, inter = (_parse(one, "gradients") for one in given)
        assert intra is not None
        assert inter is not None
        grain_of((intra, inter))
        for one in (intra, inter):
            _check_unbiased(one, "gradients")
        if feedback is not None:
            raise ValueError(f"feedback={feedback!r} takes one codec for gradients: on two levels no rank knows what "
                             "was lost between the nodes; give one codec, or feedback=None")  # fmt: skip
        return intra, inter
    if node_size is not None:
        raise ValueError(f"node_size is for a pair of codecs, inside a node and between nodes, got {given}")
    if feedback is None:
        return parse_unbiased(given, "gradients")
    codec = _parse(given, "gradients")
    if codec is None:
        raise ValueError(f"feedback={feedback!r} needs a codec for gradients, got None")
    return codec.with_feedback()


def parse_weights(given: Spelling) -> PacketCodec | None:
    """The codec of weights.

    Raises:
        TypeError, ValueError: There is none such, or it drops some.
    """
    codec = _parse(given, "weights")
    if codec is not None and not isinstance(codec, (IntQuant, Cast)):
        raise ValueError(f"weights must be in IntQuant or Cast, which keep all of them, got {codec}")
    return codec


def parse_unbiased(given: Spelling, name: str) -> PacketCodec | None:
    """A codec that is of use without error feedback.

    Raises:
        TypeError, ValueError: There is none such, or it is biased.
    """
    codec = _parse(given, name)
    _check_unbiased(codec, name)
    return codec


def _check_unbiased(codec: PacketCodec | None, name: str) -> None:
    if isinstance(codec, (Sign, TopK)):
        raise ValueError(f"{name}: {codec} is biased, and needs error feedback to train with; there is none here")


def _parse(given: object, name: str) -> PacketCodec | None:
    codec = parse_codec(given)  # type: ignore[arg-type]
    if codec is not None and not isinstance(codec, PacketCodec):
        raise TypeError(f"{name}: {codec} makes no packets; it is for all_reduce, the DDP hook and the optimizers")
    return codec
