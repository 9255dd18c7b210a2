"""What all ranks of some groups do together, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from smallreduce.collectives import Channel, Count, agree
from smallreduce.collectives._agreement import refuse

__all__ = ["together"]

T = TypeVar("T")


def together(
    channels: Iterable[Channel],
    prepare: Callable[[], T],
    text: Callable[[T], str],
    lines: Callable[[T, Channel], Sequence[str]],
    setup: Count,
    call: str = "smallreduce.fsdp",
) -> T:
    """What ``prepare`` gives, if it does on all ranks and the text is the same there, and so are the lines of each
    channel. Whatever is wrong, this rank takes its place wherever others wait for it."""
    error: Exception | None = None
    try:
        prepared = prepare()
    except Exception as refused:
        error = refused
    for channel in channels:
        try:
            if error is not None:
                refuse(channel, error)
            else:
                agree(channel, f"{call}: {text(prepared)}", lines(prepared, channel), setup)
        except Exception as disagreement:
            error = error or disagreement
    if error is not None:
        raise error
    return prepared
