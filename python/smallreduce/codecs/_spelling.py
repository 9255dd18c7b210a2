"""The short spellings of codecs, as in command lines and configuration files."""

from __future__ import annotations

from smallreduce.codecs._cast import Cast
from smallreduce.codecs._codec import Codec
from smallreduce.codecs._int_quant import IntQuant
from smallreduce.codecs._random_blocks import RandomBlocks
from smallreduce.codecs._sign import Sign
from smallreduce.codecs._topk import TopK

__all__ = ["codec"]

_CASTS = {name: dtype for dtype, (_, _, name) in Cast._TYPES.items()}
_VALUES = {name: dtype for dtype, (_, _, name) in TopK._VALUES.items()}
_QUANTISED = ("int8", "int4", "int2", "int8-hadamard", "int4-hadamard", "int2-hadamard", "sign")
_SPARSE = ("topk", "random-blocks")
_NAMES = (*_QUANTISED, *_SPARSE, *_CASTS)


def codec(spelling: str | Codec | None) -> Codec | None:
    """The codec that a short spelling stands for, as in command lines and configuration files.

    ``int8``, ``int4``, ``int2``, each also with ``-hadamard`` and with options (``int4:group=64,rounding=nearest``);
    ``sign``, ``sign:group=512``; ``topk:0.001``, ``topk:0.001,values=bf16``; ``random-blocks:0.01``,
    ``random-blocks:0.01,block=4096``; ``fp32``, ``bf16``, ``fp16``, ``fp8-e4m3``, ``fp8-e5m2``.

    Args:
        spelling: The spelling; a codec and None (plain torch) are returned as they are.

    Raises:
        ValueError: An unknown name or option, or an impossible value.
        TypeError: Neither a string, a codec nor None.
    """
    if spelling is None or isinstance(spelling, Codec):
        return spelling
    if not isinstance(spelling, str):
        raise TypeError(f"a codec is a string such as 'int4', a Codec or None, got {type(spelling).__name__}")
    name, colon, rest = spelling.strip().partition(":")
    if name not in _NAMES:
        raise ValueError(f"unknown codec {spelling!r}; known are {', '.join(_NAMES)}")
    items = rest.split(",") if colon else []
    ratio = _ratio(spelling, items.pop(0) if items else "") if name in _SPARSE else 1.0
    options = _options(spelling, items)
    if name in _CASTS:
        _refuse_unknown(spelling, options, ())
        return Cast(_CASTS[name])
    if name == "sign":
        _refuse_unknown(spelling, options, ("group",))
        return Sign(**_whole(spelling, options, "group"))
    if name == "topk":
        _refuse_unknown(spelling, options, ("values",))
        values = options.get("values", "fp32")
        if values not in _VALUES:
            raise ValueError(f"values must be one of {', '.join(_VALUES)}, got {values!r} in {spelling!r}")
        return TopK(ratio, _VALUES[values])
    if name == "random-blocks":
        _refuse_unknown(spelling, options, ("block",))
        return RandomBlocks(ratio, **_whole(spelling, options, "block"))
    _refuse_unknown(spelling, options, ("group", "rounding"))
    return IntQuant(
        int(name[3]),  # type: ignore[arg-type]
        rounding=options.get("rounding"),  # type: ignore[arg-type]
        hadamard=name.endswith("-hadamard"),
        **_whole(spelling, options, "group"),
    )


def _options(spelling: str, items: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise ValueError(f"options are written key=value and separated by commas, got {item!r} in {spelling!r}")
        if key in options:
            raise ValueError(f"option {key!r} stands twice in {spelling!r}")
        options[key] = value
    return options


def _refuse_unknown(spelling: str, options: dict[str, str], accepted: tuple[str, ...]) -> None:
    for key in options:
        if key not in accepted:
            known = " and ".join(accepted) if accepted else "no options"
            raise ValueError(f"unknown option {key!r} in {spelling!r}; {spelling.split(':')[0]} takes {known}")


def _ratio(spelling: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        name = spelling.split(":")[0]
        raise ValueError(f"{spelling!r} must begin with its ratio, as in '{name}:0.001', got {text!r}") from None


def _whole(spelling: str, options: dict[str, str], key: str) -> dict[str, int]:
    if key not in options:
        return {}
    if not options[key].isdecimal():
        raise ValueError(f"{key} must be a whole number, got {options[key]!r} in {spelling!r}")
    return {key: int(options[key])}
