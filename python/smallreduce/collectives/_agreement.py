"""Ranks tell each other what they are about to do before any data move, so that a mistake on one is an error on all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from smallreduce.collectives._channel import Channel, Disagreement
from smallreduce.collectives._count import Count

__all__ = ["Agreement", "agree", "prepare_or_refuse", "refuse"]

T = TypeVar("T")

_REFUSED = 0
_TEXT_NBYTES = 512


def _digest(text: str) -> int:
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    return value if value != _REFUSED else 1


class Agreement:
    """An exchange of 8-byte digests in flight. Every rank of the group makes one, in program order.

    Args:
        channel: The channel of the group.
        text: What this rank is about to do, in words for the user: equal on all ranks, or it is an error. Where it
            differs, its first 512 bytes are shown.
        refused: This rank cannot take part; ``text`` says why.
    """

    def __init__(self, channel: Channel, text: str, refused: bool = False) -> None:
        self._channel = channel
        self._text = text
        mine = torch.tensor([_REFUSED if refused else _digest(text)], device=channel.device)
        self._digests = torch.empty(channel.world_size, dtype=torch.int64, device=channel.device)
        with channel.in_step():
            self._work = channel.links.all_gather(self._digests, mine, channel.next_tag("agreement"))

    @staticmethod
    def nbytes(world_size: int) -> int:
        """Bytes that a rank sends when all agree."""
        return 8 * (world_size - 1)

    def check(self) -> None:
        """Waits for the other ranks.

        Raises:
            Disagreement: They do not agree, or one refused; the message says which rank had what.
        """
        if problem := self.wait():
            raise Disagreement(problem)

    def wait(self) -> str | None:
        """Waits for the other ranks. Returns what is wrong, the same on all ranks, or None."""
        with self._channel.in_step():
            return self._compare()

    def _compare(self) -> str | None:
        self._work.wait()
        digests = self._digests.tolist()
        if len(set(digests)) == 1:
            return None
        texts = self._exchange_texts()
        refusals = [f"rank {rank} refused: {texts[rank]}" for rank, d in enumerate(digests) if d == _REFUSED]
        if refusals:
            return "; ".join(refusals)
        ranks_of: dict[str, list[str]] = {}
        for rank, text in enumerate(texts):
            ranks_of.setdefault(text, []).append(str(rank))
        parts = [f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: {text}" for text, ranks in ranks_of.items()]
        return f"the ranks do not agree on the collective. {'; '.join(parts)}"

    def _exchange_texts(self) -> list[str]:
        size = _TEXT_NBYTES
        mine = bytearray(self._text.encode()[:size].ljust(size, b"\0"))
        device = self._channel.device
        texts = torch.empty(self._channel.world_size * size, dtype=torch.uint8, device=device)
        text = torch.frombuffer(mine, dtype=torch.uint8).to(device)
        self._channel.links.all_gather(texts, text, self._channel.next_tag("agreement")).wait()
        rows = texts.cpu().view(-1, size)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]


def agree(channel: Channel, header: str, lines: Sequence[str], count: Count) -> None:
    """Compares a configuration over the group: the header, then all lines at once, and only if they differ one by one,
    to show which.

    Raises:
        RuntimeError: It is not the same on all ranks; the message says which rank had what.
    """
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


def refuse(channel: Channel, error: Exception) -> None:
    """Takes part in the others' agreement as the rank that cannot go on; the caller then raises ``error``."""
    Agreement(channel, f"{type(error).__name__}: {error}", refused=True).wait()


def prepare_or_refuse(channel: Channel | None, prepare: Callable[[], T]) -> T:
    """Runs what may fail on this rank alone; if it does, tells the others, which wait for this rank to agree."""
    try:
        return prepare()
    except Exception as error:
        if channel is not None:
            refuse(channel, error)
        raise
