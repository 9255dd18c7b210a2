"""One bucket of CSER and what it exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from smallreduce.codecs import Codec
from smallreduce.collectives._channel import Channel
from smallreduce.collectives._count import Count
from smallreduce.optim._cser_bucket import Bucket
from smallreduce.optim._cser_exchange import BlockAverage, InFlight, PartialSync
from smallreduce.optim._cser_scheme import Scheme

__all__ = ["Part", "exchange"]


@dataclass(frozen=True)
class Part:
    """A bucket and its exchanges, None where the scheme has none.

    Attributes:
        update: Of each step's update.
        reset: Of what the ranks differ by.
        blocks: Of blocks of the parameters.
    """

    bucket: Bucket
    update: PartialSync | None
    reset: PartialSync | None
    blocks: BlockAverage | None

    @staticmethod
    def build(
        number: int, group: int, parameters: Sequence[Tensor], scheme: Scheme, seed: int, channel: Channel | None
    ) -> Part:
        """The part of these parameters.

        Args:
            number: Of the part.
            group: Number of the parameter group.
            channel: None at world size 1, where nothing is exchanged.
        """
        bucket = Bucket(number, group, parameters, scheme, alone=channel is None)
        if channel is None:
            return Part(bucket, None, None, None)

        def sync(needed: bool, codec: Codec | None, which: int) -> PartialSync | None:
            return PartialSync(bucket.segments, codec, 2 * number + which, seed, channel) if needed else None

        return Part(
            bucket,
            sync(scheme.sends_updates, scheme.update_codec, 0),
            sync(scheme.keeps_shared, scheme.model, 1),
            BlockAverage(bucket.parameters, number, seed, channel) if scheme.average_blocks else None,
        )

    @property
    def syncs(self) -> dict[str, PartialSync | None]:
        return {"update": self.update, "reset": self.reset}


def exchange(parts: Sequence[Part], syncs: Sequence[PartialSync | None], step: int, count: Count) -> None:
    """Takes ``update`` of all buckets through an exchange, all in flight at once."""
    in_flight: list[InFlight] = []
    for part, sync in zip(parts, syncs, strict=True):
        assert sync is not None
        in_flight.append(sync.start(part.bucket.update, part.bucket.residual(), step, len(parts) > 1, count))
    for work in in_flight:
        work.wait()
