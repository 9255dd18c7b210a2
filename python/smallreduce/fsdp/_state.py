"""The state behind a compressed sharded model: what was sent, the residuals, and how far each module has come."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from smallreduce._flat_shard import FlatShard
from smallreduce.codecs import as_int
from smallreduce.collectives import Channel
from smallreduce.fsdp._difference_gather import DifferenceGather
from smallreduce.fsdp._gather import WeightGather
from smallreduce.fsdp._memory import Memory
from smallreduce.fsdp._resharding import Place, overlaps
from smallreduce.fsdp._residual_layout import Divided
from smallreduce.fsdp._state_parts import Part, Reducer, Steps
from smallreduce.fsdp._stats import LegStats, Stats
from smallreduce.fsdp._together import together

__all__ = ["State"]

_FORMAT = 2

T = TypeVar("T")

Loading = tuple[Callable[[], None], Mapping[str, str]]
"""What loads a state that was checked, and of which steps that is, for each module."""


class State:
    """What :func:`smallreduce.fsdp.compress` and :func:`smallreduce.ragged.state` return, for as long as the model
    lives.

    It holds what the model needs to continue where it was: the residuals of error feedback and the weights that
    differences are taken from, if any, and how often each module has reduced its gradients, on which the random bits
    depend.
    """

    def __init__(
        self,
        place: Place,
        parts: Sequence[Part],
        steps: Mapping[str, Steps],
        reducers: Sequence[tuple[str, Reducer]],
        gathers: Sequence[WeightGather | DifferenceGather],
        channels: Callable[[], Mapping[Channel, Sequence[str]]],
    ) -> None:
        self._place = place
        self._parts = parts
        self._steps = dict(steps)
        self._reducers = reducers  # beside what the names of its parameters begin with in the model
        self._gathers = gathers
        self._channels = channels  # of the groups that this rank is in, with the names of their modules

    def __getstate__(self) -> dict[str, Any]:
        """A model's communication is neither pickled nor copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError("State cannot be pickled, since it belongs to process groups: save its state_dict()")

    @property
    def _memories(self) -> list[tuple[str, Memory]]:
        return [(prefix, memory) for prefix, reducer in self._reducers if (memory := reducer.memory) is not None]

    def _named(self) -> Iterator[tuple[str, Memory, Divided]]:
        """Each parameter that something is owed to, by its name in the model, and who keeps it."""
        for prefix, memory in self._memories:
            for slot in memory.slots:
                yield prefix + slot.name, memory, slot

    @property
    def _feedback(self) -> str | list[str | None] | None:
        return _one_or_all([part.feedback for part in self._parts])

    @property
    def _seed(self) -> int | list[int]:
        return _one_or_all([part.seed for part in self._parts])

    @property
    def _references(self) -> dict[str, DifferenceGather]:
        """By the name of the module, as its progress."""
        return {gather.bucket.name: gather for gather in self._gathers if isinstance(gather, DifferenceGather)}

    @property
    def _given(self) -> dict[str, Any]:
        """Of the arguments those that a state must not differ by."""
        by_differences = bool(self._references)
        return {"format": _FORMAT, "seed": self._seed, "feedback": self._feedback, "by_differences": by_differences}

    def _stored(self) -> dict[str, Tensor]:
        return {prefix + name: tensor for prefix, memory in self._memories for name, tensor in memory.stored().items()}

    def stats(self) -> Stats:
        """What this rank has sent so far. Call it between steps."""
        return Stats(
            world_size=self._place.world_size,
            replicas=self._place.replicas,
            weights=LegStats.total(part.weights.stats() for part in self._parts),
            gradients=LegStats.total(part.gradients.stats() for part in self._parts),
            between_replicas=LegStats.total(part.between.stats() for part in self._parts),
            partial_reductions=sum(reducer.partial for _, reducer in self._reducers),
            residual_nbytes=sum(memory.nbytes for _, memory in self._memories),
            kept_nbytes=sum(gather.nbytes for gather in self._gathers),
            setup_bytes_sent=sum(part.setup.bytes_sent for part in self._parts),
        )

    def adopt_weights(self) -> None:
        """With differences: the next forward pass gathers all weights exactly. To be called by all ranks together where
        what all have is no good, as after a weight that was not finite."""
        for each in self._references.values():
            each.forget()

    # ---- one rank's own ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be given back to the same rank of as many; the tensors are copies on the CPU.

        For torch.distributed.checkpoint, and for another number of ranks, see :meth:`sharded_state_dict`.

        Returns:
            A dict of plain types and tensors that ``torch.load(weights_only=True)`` takes.
        """
        return {
            "format": _FORMAT,
            "row": self._place.row,
            "ranks": [self._place.world_size, self._place.replicas],
            "seed": self._seed,
            "feedback": self._feedback,
            "steps": {name: steps.stored() for name, steps in self._steps.items()},
            "residuals": {name: tensor.to("cpu", copy=True) for name, tensor in self._stored().items()},
            "differences": {
                name: [each.number, each.step, each.is_current(each.bucket.part())]
                for name, each in self._references.items()
            },
            "references": {
                name: shard.cpu() for each in self._references.values() for name, shard in each.stored().items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; every rank calls it, between the same two steps. The next steps are
        then those that followed the saving, bit for bit.

        Load the model's weights before.

        Raises:
            TypeError, ValueError: The state is of another rank, number of ranks, seed, model or feedback, or is none at
                all. Nothing has changed then.
            RuntimeError: Another rank refused its state, or has one of another step.
        """
        self._together(lambda: self._loading(state_dict))

    def _loading(self, state_dict: Mapping[str, Any]) -> Loading:
        given = state_dict.get("format") if isinstance(state_dict, Mapping) else type(state_dict)
        if not isinstance(state_dict, Mapping) or given != _FORMAT:
            raise ValueError(f"not a state of a compressed model in format {_FORMAT}, got {given!r}")
        mine = (self._place.row, [self._place.world_size, self._place.replicas])
        theirs = (state_dict.get("row"), list(state_dict.get("ranks", ())))
        if mine != theirs:
            raise ValueError(
                f"this state belongs to rank {theirs[0]} of {_product(theirs[1])}, not to rank {mine[0]} of "
                f"{_product(mine[1])}: save and load one for each rank; sharded_state_dict() gives a form for others"
            )
        self._check(state_dict, {"seed": self._seed, "feedback": self._feedback})
        return self._parse(*(state_dict[key] for key in ("steps", "residuals", "differences", "references")))

    def _together(self, prepare: Callable[[], Loading]) -> None:
        """Loads what all ranks can load, and what is of the same steps on all."""
        channels = self._channels()

        def lines(loading: Loading, channel: Channel) -> list[str]:
            return [f"{name}: {loading[1][name]}" for name in channels[channel]]

        load, _ = together(channels, prepare, lambda loading: "load a state", lines, self._parts[0].setup)
        load()

    def _check(self, state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        for key, value in own.items():
            if state_dict.get(key) != value:
                raise ValueError(f"this state has {key} {state_dict.get(key)!r}, but this model has {value!r}")

    def _parse(
        self,
        steps: Mapping[str, Any],
        residuals: Mapping[str, Tensor],
        differences: Mapping[str, Any],
        references: Mapping[str, Tensor],
    ) -> Loading:
        shapes = self._shapes(self._place.world_size)
        own = {name: shape for each in self._references.values() for name, shape in each.shapes().items()}
        for what, given, expected in (
            ("modules", steps, self._steps),
            ("residuals", residuals, shapes),
            ("modules whose differences travel", differences, self._references),
            ("weights that all ranks have", references, own),
        ):
            if given.keys() != expected.keys():
                differ = sorted(given.keys() ^ expected.keys())
                raise ValueError(f"the state is of a model with other {what}: {', '.join(map(repr, differ[:5]))}")
        for name, (dtype, numel) in shapes.items():
            tensor = residuals[name]
            if tensor.dtype != dtype or tensor.shape != (numel,):
                raise ValueError(
                    f"the residual of {name} must be {numel} elements of {dtype}, got shape {tuple(tensor.shape)} of "
                    f"{tensor.dtype}"
                )
        for name, shape in own.items():
            if references[name].shape != shape:
                raise ValueError(
                    f"of the weights that all ranks have of {name} this rank's must be of shape {tuple(shape)}, got "
                    f"{tuple(references[name].shape)}"
                )
        numbers = {name: [_count(one, f"the steps of {name}") for one in given] for name, given in steps.items()}
        for name, found in numbers.items():
            if len(found) != len(self._steps[name].stored()):
                raise ValueError(
                    f"the steps of {name} must be {len(self._steps[name].stored())} numbers, got {found}: a state of "
                    "fsdp.compress and one of ragged.fully_shard are not the same"
                )
        counts = {
            name: (
                _count(number, f"the differences of {name}"),
                None if step is None or step == -1 else _count(step, f"the step of the weights of {name}"),
            )
            for name, (number, step, _) in differences.items()
        }

        def load() -> None:
            for name, found in numbers.items():
                self._steps[name].restore(found)
            for prefix, memory in self._memories:
                memory.restore({slot.name: residuals[prefix + slot.name] for slot in memory.slots})
            for name, (number, at) in counts.items():
                self._references[name].restore(references, number, at, bool(differences[name][2]))

        return load, {name: f"{found} steps, differences {counts.get(name)}" for name, found in numbers.items()}

    def _shapes(self, world_size: int) -> dict[str, tuple[torch.dtype, int]]:
        """dtype and elements of each stored residual, on each of ``world_size`` ranks of a shard group."""
        if world_size == 1:  # nothing is compressed there
            return {}
        return {name: memory.stored_shape(slot.name, world_size) for name, memory, slot in self._named()}

    # ---- all ranks together -----------------------------------------------------------------------------------------

    def sharded_state_dict(self, saved_on: int | tuple[int, int] | Tensor | None = None) -> dict[str, Any]:
        """The state as torch.distributed.checkpoint saves and loads it, all ranks together.

            dcp.save({"model": ..., "compression": state.sharded_state_dict()}, checkpoint_id=folder)

            header = {"compression": {"ranks": torch.zeros(2, dtype=torch.int64)}}
            dcp.load(header, checkpoint_id=folder)
            compression = state.sharded_state_dict(header["compression"]["ranks"])
            dcp.load({"model": ..., "compression": compression}, checkpoint_id=folder)
            state.load_sharded_state_dict(compression)

        Args:
            saved_on: For loading: the number of ranks that saved, and in how many replicas: what ``"ranks"`` was. None,
                or this number: this rank's own state. From one rank there are no residuals to be loaded.

        Returns:
            ``"ranks"``: int64, ranks of a shard group and replicas; ``"format"``; ``"by_differences"``, ``"seed"``,
            ``"feedback"``: what was given to :func:`~smallreduce.fsdp.compress`; of
            :func:`smallreduce.ragged.fully_shard` a list, where not all calls were given the same; ``"steps"``: int64,
            some for each module; ``"residuals"``: for each parameter the residuals of all ranks one after another, of
            which this rank holds its own, or, for loading what others saved, those that it takes over;
            ``"differences"`` and ``"references"``: how many differences of weights each module has sent, and of which
            weights, sharded as the parameters are.

        Raises:
            ValueError: ``saved_on`` is no number of ranks.
        """
        old = self._place if saved_on is None else Place.of(saved_on)
        if old.rows < 1:
            raise ValueError(f"saved_on must be positive numbers of ranks and replicas, got {saved_on}")
        rows = overlaps(self._place, old)
        stored = self._stored() if old.rows == self._place.rows and old.world_size == self._place.world_size else {}
        residuals = {}
        for name, (dtype, numel) in self._shapes(old.world_size).items():
            mine = stored[name].reshape(-1) if name in stored else torch.zeros(len(rows) * numel, dtype=dtype)
            residuals[name] = FlatShard(mine, min(rows) * numel, old.rows * numel)
        return {
            "ranks": torch.tensor([old.world_size, old.replicas]),
            **self._given,
            "steps": {name or ".": torch.tensor(steps.stored()) for name, steps in self._steps.items()},
            "residuals": residuals,
            "differences": {
                name or ".": torch.tensor(
                    [each.number, -1 if each.step is None else each.step, each.is_current_everywhere()]
                )
                for name, each in self._references.items()
            },
            "references": {
                slot.name: slot.sharded(shards[slot.name])
                for each in self._references.values()
                for shards in [each.stored()]
                for slot in each.bucket.slots
            },
        }

    def load_sharded_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`sharded_state_dict` gave, once torch.distributed.checkpoint has filled it. Every rank
        calls it.

        From as many ranks as there are now, the next steps are those that followed the saving, bit for bit. From
        another number each rank takes the mean of the old ranks' residuals, weighted by how far it overlaps theirs: the
        mean over all ranks, which is what is owed to the averaged gradient, stays what it was. One rank alone
        compresses nothing and owes nothing: from one all residuals begin at zero, and into one they are dropped, with a
        warning.

        Load the model's weights before.

        Raises:
            TypeError, ValueError: The state is of another model, seed, feedback or way for weights; or of another
                number of ranks, and gradients are reduced in fp16. Nothing has changed then.
            RuntimeError: Another rank refused its state, or has one of another step.
        """
        self._together(lambda: self._loading_sharded(state_dict))

    def _loading_sharded(self, state_dict: Mapping[str, Any]) -> Loading:
        self._check(state_dict, self._given)
        old = Place.of(state_dict["ranks"])
        weights = overlaps(self._place, old)
        same = old.rows == self._place.rows and old.world_size == self._place.world_size
        halves = [r.label for _, r in self._reducers if r.memory is not None and r.reduce_dtype == torch.float16]
        if any(part.feedback for part in self._parts) and self._place.world_size == 1 < old.world_size:
            warnings.warn(
                f"the residuals of {old.world_size} ranks are dropped: in a shard group of one rank nothing is "
                "compressed, and nothing is owed",
                UserWarning,
                stacklevel=2,
            )
        if halves and not same and old.world_size > 1:
            raise ValueError(
                f"{halves[0]} reduces in fp16, for which torch first divides by what depends on the number of "
                f"ranks, and residuals are in these units: load on {old.world_size} ranks and {old.replicas} replicas"
            )
        residuals = {}
        for name, memory, slot in self._named():
            if old.world_size == 1:
                residuals[name] = memory.store(slot.name, torch.zeros(slot.shape))
                continue
            rows: Tensor = state_dict["residuals"][name].local
            if same:
                residuals[name] = rows
                continue
            mean = torch.zeros(slot.shape, dtype=torch.float64)
            for row, weight in zip(rows.chunk(len(weights)), weights.values(), strict=True):
                mean += memory.owed(slot.name, row.cpu(), old.world_size).double() * weight
            residuals[name] = memory.store(slot.name, mean.float())
        steps, differences = (
            {"" if name == "." else name: numbers.tolist() for name, numbers in state_dict[key].items()}
            for key in ("steps", "differences")
        )
        references = {name: shard.to_local() for name, shard in state_dict["references"].items()}
        return self._parse(steps, residuals, differences, references)


def _one_or_all(values: list[T]) -> T | list[T]:
    """What was given everywhere, or what in each place."""
    return values[0] if all(value == values[0] for value in values) else values


def _count(number: object, name: str) -> int:
    count = as_int(number, name)
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    return count


def _product(ranks: list[int]) -> str:
    return " x ".join(map(str, ranks)) if len(ranks) == 2 and ranks[1] > 1 else str(ranks[0] if ranks else None)
