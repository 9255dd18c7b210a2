"""The same configuration on all ranks, or an error on all of them that shows the line that differs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from smallreduce.collectives._agreement import Agreement, refuse
from smallreduce.collectives._channel import Channel
from smallreduce.ddp._bucket import Count

T = TypeVar("T")


def refusing(channel: Channel | None, prepare: Callable[[], T]) -> T:
    """Runs what may fail on this rank alone; if it does, tells the others, which wait for this rank to agree."""
    try:
        return prepare()
    except Exception as error:
        if channel is not None:
            refuse(channel, error)
        raise


def agree(channel: Channel, header: str, lines: Sequence[str], count: Count) -> None:
    """Compares a header over the group, then all lines at once, and only if they differ one by one, to show which."""
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
    for text in (f"{header}; {len(lines)} lines", f"digest of the lines {digest}"):
        problem = Agreement(channel, text).wait()
        count.collectives += 1
        count.bytes_sent += Agreement.nbytes(channel.world_size)
        if problem is not None:
            break
    else:
        return
    # What is wrong is the same on all ranks, so all go the same way from here.
    if text.startswith("digest"):
        for agreement in [Agreement(channel, line) for line in lines]:
            agreement.check()
    raise RuntimeError(problem)
