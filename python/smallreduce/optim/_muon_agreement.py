"""That all ranks are about to take the same step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from smallreduce.collectives import Channel, Count, agree
from smallreduce.collectives._agreement import Agreement

__all__ = ["check_agreement"]

_HEADER = "smallreduce.optim.Muon"


def check_agreement(channel: Channel, lines: Sequence[str], count: Count) -> None:
    """Compares what is to be done over the group with one exchange of 8 bytes; a collective.

    Raises:
        RuntimeError: It is not the same on all ranks; the message says which rank has which of the lines.
    """
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
    problem = Agreement(channel, f"{_HEADER}, step {digest}").wait()
    count.collectives += 1
    count.bytes_sent += Agreement.nbytes(channel.world_size)
    if problem is not None:
        agree(channel, _HEADER, lines, count)
        raise RuntimeError(problem)
