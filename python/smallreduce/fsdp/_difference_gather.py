"""The all-gather of one FSDP2 module by differences: what its weights have changed by since all ranks last had them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.collectives import Work, channel_of, ring_bytes
from smallreduce.fsdp._gather import borrow_engine, check_numel
from smallreduce.fsdp._leg import Gathering, Leg, Progress
from smallreduce.fsdp._torch_groups import Bucket, Version

__all__ = ["DifferenceGather"]


class DifferenceGather:
    """What ``FSDPModule.set_custom_all_gather`` takes, in the place of :class:`WeightGather`.

    All ranks keep the weights as they were last decoded, the *reference*; the first are gathered exactly. In a forward
    pass each rank sends by how much its own differ from the reference, to which all add what they decode; so what a
    difference loses is in the next one (SDP4Bit, arXiv:2410.15526, Algorithm 2). A backward pass is given the
    reference. So is a forward pass before the gradients have been reduced again, about which the ranks then ask each
    other: if the weights of any have changed meanwhile, all are gathered exactly.

    Args:
        bucket: The module's.
        leg: The codec, without the Hadamard transform, so that padding stays zero; and what counts.
        progress: The module's.
        node_size: Ranks of a node, to gather on two levels; None: on one.

    Attributes:
        bucket: As given.
        number: Differences that were sent, those before a state was loaded too; random bits depend on it.
        step: The module's, when the reference was last brought up to date; None where there is none.
    """

    def __init__(self, bucket: Bucket, leg: Leg, progress: Progress, node_size: int | None) -> None:
        self.bucket = bucket
        self.number = 0
        self.step: int | None = None
        self._leg = leg
        self._progress = progress
        self._node_size = node_size
        self._stock = bucket.all_gather
        self._segments = bucket.segments()
        self._reference: Tensor | None = None
        self._gathered: Tensor | None = None  # this rank's own weights at that step
        self._restored: Tensor | None = None  # this rank's part of it, before it is gathered
        self._version: Version | None = None  # that the latest forward pass saw
        self._work: Work | None = None

    @property
    def nbytes(self) -> int:
        """Of the reference, and of what tells whether it is of the weights as they are."""
        return sum(tensor.nbytes for tensor in (self._reference, self._gathered) if tensor is not None)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor: Tensor = self._stock.allocate(size, dtype=dtype, device=device)
        return tensor

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        """Brings ``output_tensor`` up to the weights of all ranks, of which ``input_tensor`` is this rank's part.

        Raises:
            RuntimeError: In a backward pass, where weights have changed since the latest forward pass; or the sizes are
                not those of the module.
        """
        leg, bucket = self._leg, self.bucket
        uncompressed = (group.size() - 1) * input_tensor.nbytes
        if leg.is_exact(input_tensor.dtype):
            leg.count(uncompressed)
            return self._stock(output_tensor, input_tensor, group, async_op)
        check_numel(bucket, self._segments, input_tensor.numel())
        channel = channel_of(group, output_tensor.device)
        channel.check()
        self._settle()
        version, sent = bucket.version, 0
        if not bucket.in_backward:
            self._version = version
            sent = self._bring_up(input_tensor, group)
        elif self._reference is None or version != self._version:
            raise RuntimeError(
                f"the weights of {bucket.label} have changed since the latest forward pass, and differences do not go "
                "back: run the backward pass before they change, or compress without differences"
            )
        assert self._reference is not None
        if bucket.in_backward or self.step == self._progress.step:
            output_tensor.copy_(self._reference)
            leg.count(uncompressed, sent)
            return None
        self._note(input_tensor)
        engine, give_back = borrow_engine(
            leg, self._segments, input_tensor.numel(), input_tensor.dtype, channel, self._node_size
        )
        channel.use(output_tensor)
        self._work = engine.launch(
            self._reference, input_tensor.float(), leg.seed, 3 * bucket.number, self.number,
            after=_then(output_tensor, self._reference, give_back), base=self._part(self._reference),
        )  # fmt: skip
        self.number += 1
        leg.count(uncompressed, sent + engine.bytes_sent)
        if not async_op and output_tensor.is_cuda:
            # For the stream of torch that this is called on; the host waits for nothing.
            self._work.wait()
            return None
        return Gathering(self._work)

    def _settle(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _part(self, whole: Tensor) -> Tensor:
        """This rank's."""
        group = self.bucket.shard_group
        return whole.chunk(group.size())[group.rank()]

    def _bring_up(self, part: Tensor, group: dist.ProcessGroup) -> int:
        """Sees to it that there is a reference, and that it is of the weights as they are where its step is the
        module's. Returns what was sent for it."""
        sent = 0
        if self._reference is None:
            if self._restored is None:
                return self._gather_exactly(part, group)
            self._reference = self._gathered_exactly(self._restored, group)
            self._restored = None
            sent = (group.size() - 1) * part.nbytes
        if self.step == self._progress.step:
            unchanged, asked = self._ask(part, group)
            sent += asked
            if not unchanged:  # out of turn, as by load_state_dict() or an average's: by how much, nobody knows
                sent += self._gather_exactly(part, group)
        return sent

    def _gather_exactly(self, part: Tensor, group: dist.ProcessGroup) -> int:
        self._reference = self._gathered_exactly(part, group)
        self._note(part)
        return (group.size() - 1) * part.nbytes

    def _gathered_exactly(self, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        with torch.inference_mode(False):  # it outlives this pass
            whole = torch.empty(group.size() * part.numel(), dtype=part.dtype, device=part.device)
        if part.is_cuda:  # what was restored was allocated on another stream
            part.record_stream(torch.cuda.current_stream(part.device))
        self._stock(whole, part, group, False)
        self._leg.exact_calls += 1
        return whole

    def _note(self, part: Tensor) -> None:
        """Remembers of which weights the reference is."""
        if self._gathered is None:
            with torch.inference_mode(False):
                self._gathered = torch.empty_like(part)
        self._gathered.copy_(part)
        self.step = self._progress.step

    def _ask(self, part: Tensor, group: dist.ProcessGroup) -> tuple[bool, int]:
        """Whether no rank's weights have changed, and what asking has sent."""
        changed = torch.tensor([float(not self.is_current(part))], device=part.device)
        dist.all_reduce(changed, dist.ReduceOp.MAX, group=group)
        return not changed.item(), ring_bytes(changed.nbytes, group.size())

    def is_current(self, part: Tensor) -> bool:
        """Whether the reference was brought up to date with ``part``, this rank's weights as they are gathered."""
        # Bits, of which those of a NaN equal themselves.
        return self._gathered is not None and torch.equal(self._gathered.view(torch.uint8), part.view(torch.uint8))

    def forget(self) -> None:
        """Lets go of the reference: the next forward pass gathers it exactly."""
        self._settle()
        self.step = self._reference = self._gathered = self._restored = None

    # ---- state ------------------------------------------------------------------------------------------------------

    def is_current_everywhere(self) -> bool:
        """:meth:`is_current` of the weights as they are, on all ranks, which call this together."""
        group = self.bucket.shard_group
        if self.step is None or group.size() == 1:
            return False
        unchanged, asked = self._ask(self.bucket.part(), group)
        self._leg.bytes_sent += asked
        return unchanged

    def shapes(self) -> dict[str, torch.Size]:
        """Those of this rank's shard of each parameter."""
        return {slot.name: slot.own_shape for slot in self.bucket.slots}

    def stored(self) -> dict[str, Tensor]:
        """This rank's shard of the reference, by parameter, in memory of its own; zeros where there is none yet."""
        self._settle()
        if self._reference is not None:
            part = self._part(self._reference)
        elif self._restored is not None:
            part = self._restored
        else:
            part = torch.zeros_like(self.bucket.part())
        return {
            slot.name: slot.shard(part[offset : offset + length]).clone()
            for slot, (offset, length) in zip(self.bucket.slots, self._segments, strict=True)
        }

    def restore(self, stored: Mapping[str, Tensor], number: int, step: int | None, is_current: bool) -> None:
        """Takes over what :meth:`stored` gave; the other ranks' shards are gathered in the next pass. One rank alone,
        whose weights are nobody else's, takes over nothing but the number.

        Args:
            number, step, is_current: Those of when it was stored; if it was current, it is of the weights as they are
                now, which were loaded before.
        """
        self.forget()
        self.number = number
        if step is None or self.bucket.shard_group.size() == 1:
            return
        self.step = step
        own = self.bucket.part()
        self._restored = torch.zeros_like(own)
        for slot, (offset, length) in zip(self.bucket.slots, self._segments, strict=True):
            slot.shard(self._restored[offset : offset + length]).copy_(stored[slot.name])
        if is_current:
            self._gathered = own


def _then(output: Tensor, reference: Tensor, give_back: Callable[[], None]) -> Callable[[], None]:
    def after() -> None:
        with torch.inference_mode(output.is_inference()):  # which is a thread's own
            output.copy_(reference)
        give_back()

    return after
