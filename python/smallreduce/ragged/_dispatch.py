"""What an operator does with RaggedTensors: run on each rank's part, reduce over the ranks, or refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, repeat, zip_longest
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import increment_version

from smallreduce.ragged import _global_reduce
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._sharding import Sharding

if TYPE_CHECKING:
    from smallreduce.ragged._tensor import RaggedTensor

__all__ = ["dispatch"]

aten = torch.ops.aten

Kind = type["RaggedTensor"]
Rule = Callable[..., Any]
"""``(RaggedTensor, operator, *args, **kwargs)`` to what the operator returns. torch passes those arguments by name that
have to be, and no others."""

_rules: dict[OpOverload, Rule] = {}


def dispatch(kind: Kind, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rule = _rules.get(func)
    if rule is None:
        rule = _rules[func] = _classify(func)
    return rule(kind, func, *args, **kwargs)


def _classify(func: OpOverload) -> Rule:
    packet = func.overloadpacket
    if packet in _SPECIAL:
        return _SPECIAL[packet]
    name = func._schema.name.removeprefix("aten::")
    if name.startswith("_foreach_") and name.removeprefix("_foreach_").removesuffix("_") in _FOREACH:
        return _Lists(func)
    if name in _FUSED:
        return _Lists(func)
    # Of the operators that torch calls pointwise, one returns whether all elements are equal, and some draw random
    # numbers, which would be the same on all ranks.
    pointwise = torch.Tag.pointwise in func.tags and packet not in (aten.equal,)
    if (pointwise and torch.Tag.nondeterministic_seeded not in func.tags) or packet in _ELEMENTWISE:
        return _Elementwise(func)
    return _refuse


def _refuse(kind: Kind, func: Any, /, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"{func} is not elementwise, so it cannot be computed from this rank's part of a RaggedTensor: use the "
        "full_tensor(), or to_local() if this rank's elements are what is meant. (A module has whole parameters in its "
        "forward pass, and elsewhere after the unshard() of the module that was sharded.)"
    )


# Elementwise though torch has no tag for it.
_ELEMENTWISE = {
    aten._to_copy,
    aten.copy_,
    aten.empty_like,
    aten.fill,
    aten.fill_,
    aten.full_like,
    aten.masked_fill,
    aten.masked_fill_,
    aten.ones_like,
    aten.zero,
    aten.zero_,
    aten.zeros_like,
}

_FOREACH = frozenset({
    "abs", "acos", "add", "addcdiv", "addcmul", "asin", "atan", "ceil", "clamp_max", "clamp_min", "clone",
    "copy", "cos", "cosh", "div", "erf", "erfc", "exp", "expm1", "floor", "frac", "lerp", "lgamma", "log",
    "log10", "log1p", "log2", "maximum", "minimum", "mul", "neg", "pow", "reciprocal", "round", "rsqrt",
    "sigmoid", "sign", "sin", "sinh", "sqrt", "sub", "tan", "tanh", "trunc", "zero",
})  # fmt: skip

_FUSED = frozenset({"_fused_adam_", "_fused_adamw_", "_fused_adagrad_", "_fused_sgd_"})


def _written(func: OpOverload) -> list[tuple[int, str]]:
    """Place and name of the arguments that the operator writes to."""
    return [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _mismatch(func: Any, one: Sharding, other: Sharding) -> Exception:
    if one.shape != other.shape:
        return ValueError(f"{func} takes RaggedTensors of one shape, got {one.shape} and {other.shape}")
    if one.placement != other.placement:
        return ValueError(
            f"{func} takes RaggedTensors of one placement, got {one.placement} and {other.placement}: "
            "redistribute() one"
        )
    return ValueError(f"{func} takes RaggedTensors of one process group")


def _unwritable(func: Any) -> Exception:
    return TypeError(f"{func} of a RaggedTensor writes to a RaggedTensor, not to a plain tensor: use its full_tensor()")


def _operand(func: Any, given: Any, sharding: Sharding, promotes: bool) -> Any:
    """What is beside RaggedTensors of ``sharding``; ``promotes``: it may decide on the dtype of the result."""
    if not isinstance(given, Tensor):
        return given
    if given.dim() > 0 and given.shape == sharding.shape and given.numel() and not any(given.stride()):
        return given.as_strided((), ())  # one number for all, as autograd makes of the gradient of a sum
    if given.dim() > 0:
        raise TypeError(
            f"{func} takes RaggedTensors beside numbers and tensors without dimensions, got a plain tensor of shape "
            f"{tuple(given.shape)} too: shard it with RaggedTensor.distribute(), or use the full_tensor() of the other"
        )
    # Beside a tensor without dimensions, whose part has one, it takes part in type promotion as its equal.
    return given.view(1) if promotes and not sharding.shape else given


class _Elementwise:
    """An operator that computes each element from those at its place."""

    def __init__(self, func: OpOverload) -> None:
        self._written = _written(func)
        self._promotes = not self._written and func.overloadpacket not in _ELEMENTWISE

    def __call__(self, kind: Kind, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        shardings = [given._sharding for given in (*args, *kwargs.values()) if isinstance(given, kind)]
        sharding = shardings[0]
        for other in shardings:
            if other is not sharding and other != sharding:
                raise _mismatch(func, sharding, other)
        written = [args[place] if place < len(args) else kwargs[name] for place, name in self._written]
        for given in written:
            if not isinstance(given, kind):
                raise _unwritable(func)
        out = func(
            *[self._local(kind, func, given, sharding) for given in args],
            **{name: self._local(kind, func, given, sharding) for name, given in kwargs.items()},
        )
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        if isinstance(out, Tensor):
            return kind._wrap(out, sharding)
        return tuple(kind._wrap(each, sharding) for each in out)

    def _local(self, kind: Kind, func: Any, given: Any, sharding: Sharding) -> Any:
        return given._local if isinstance(given, kind) else _operand(func, given, sharding, self._promotes)


class _Lists:
    """An operator on lists of tensors, which for each place in them computes element by element.

    A place whose tensors are all plain ones is computed as ever.
    """

    def __init__(self, func: OpOverload) -> None:
        self._written = [place for place, _ in _written(func)]

    def __call__(self, kind: Kind, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        shardings: list[Sharding | None] = []
        for given in args:
            if isinstance(given, kind):
                raise TypeError(f"{func} takes RaggedTensors in its lists only")
            if isinstance(given, (list, tuple)):
                own = [each._sharding if isinstance(each, kind) else None for each in given]
                if own != shardings and any(own):
                    shardings = _merged(func, shardings, own)
        if self._written and any(own and not isinstance(each, kind) for each, own in zip_longest(args[0], shardings)):
            raise _unwritable(func)
        out = func(*[self._local(kind, func, given, shardings) for given in args], **kwargs)
        if not self._written:
            return [kind._wrap(each, own) if own else each for each, own in zip_longest(out, shardings)]
        # Of the tensors in a list autograd keeps no account before they come here.
        changed = [each for place in self._written for each in args[place] if isinstance(each, kind)]
        increment_version([each for each in changed if not each.is_inference()])
        return None

    def _local(self, kind: Kind, func: Any, given: Any, shardings: list[Sharding | None]) -> Any:
        if not isinstance(given, (list, tuple)):
            return given
        of_each = chain(shardings, repeat(None))  # of lists that are shorter, or empty, torch is to say what they mean
        return [
            each._local if isinstance(each, kind) else _operand(func, each, own, not self._written) if own else each
            for each, own in zip(given, of_each, strict=False)
        ]


def _merged(func: Any, one: list[Sharding | None], other: list[Sharding | None]) -> list[Sharding | None]:
    merged = []
    for first, second in zip_longest(one, other):
        if first is not None and second is not None and first != second:
            raise _mismatch(func, first, second)
        merged.append(second if first is None else first)
    return merged


def _alias(kind: Kind, func: Any, tensor: RaggedTensor) -> RaggedTensor:
    return kind._wrap(tensor._local, tensor._sharding)


def _detach_(kind: Kind, func: Any, tensor: RaggedTensor) -> RaggedTensor:
    return tensor


def _view(kind: Kind, func: Any, tensor: RaggedTensor, size: Any, implicit: bool = False) -> RaggedTensor:
    """A view of the shape that the tensor has."""
    shape = tensor._sharding.shape
    if not isinstance(size, (list, tuple)):  # of another dtype
        _refuse(kind, func)
    if len(size) != len(shape) or any(given not in (-1, own) for given, own in zip(size, shape, strict=True)):
        raise NotImplementedError(
            f"{func} of a RaggedTensor of shape {shape} as {tuple(size)}: its shape stays; view its full_tensor()"
        )
    return _alias(kind, func, tensor)


def _select(kind: Kind, func: Any, tensor: RaggedTensor, dim: int, index: int) -> RaggedTensor:
    """``x[index]``, as nn.Embedding has it for the row that it sets to zero: of the row, what each rank has of it."""
    sharding = tensor._sharding
    shape = sharding.shape
    is_recorded = tensor.requires_grad and torch.is_grad_enabled()  # autograd could not go back
    if not shape or dim not in (0, -len(shape)) or is_recorded:
        _refuse(kind, func)
    if not -shape[0] <= index < shape[0]:
        raise IndexError(f"index {index} is out of range for dimension 0 with size {shape[0]}")
    row = math.prod(shape[1:])
    first = row * (index % shape[0])
    cuts = [tuple(min(max(end, first), first + row) for end in ends) for ends in sharding.placement.ranges(shape)]
    placement = RaggedShard.from_lengths(shape[1:], [end - begin for begin, end in cuts])
    begin, end = (cut - sharding.range[0] for cut in cuts[sharding.rank])
    local = tensor._local[begin:end] if begin < end else tensor._local[:0]
    return kind._wrap(local, Sharding(shape[1:], placement, sharding.group))


def _is_same_size(kind: Kind, func: Any, one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape


def _index_put_(
    kind: Kind, func: Any, tensor: RaggedTensor, indices: Any, values: Tensor, accumulate: bool = False
) -> Any:
    """``x[mask] = value``, as torch.optim.Rprop has it: elementwise, unlike all other indexing."""
    if len(indices) != 1 or not isinstance(indices[0], kind) or indices[0].dtype != torch.bool or accumulate:
        _refuse(kind, func)
    return dispatch(kind, aten.masked_fill_.Tensor, (tensor, indices[0], values.to(tensor.dtype)), {})


def _new_empty(kind: Kind, func: Any, tensor: RaggedTensor, size: Any, **kwargs: Any) -> RaggedTensor:
    """Of the same shape, as async_save makes the copies that it stages."""
    if tuple(size) != tensor._sharding.shape:
        raise NotImplementedError(f"{func} of shape {tuple(size)} from a RaggedTensor: make a plain tensor instead")
    return kind._wrap(func(tensor._local, tensor._local.shape, **kwargs), tensor._sharding)


def _draw(kind: Kind, func: Any, tensor: RaggedTensor, *args: Any, **kwargs: Any) -> RaggedTensor:
    """Random numbers in place: of those that the whole tensor would have had, this rank's, so that an initialisation is
    the same on any number of ranks whose generators are in the same state. It takes the memory of the whole meanwhile.
    """
    local, sharding = tensor._local, tensor._sharding
    if not local.is_meta:
        whole = torch.empty(sharding.shape, dtype=local.dtype, device=local.device)
        begin, end = sharding.range
        local.copy_(func(whole, *args, **kwargs).view(-1)[begin:end])
    return tensor


_SPECIAL: dict[Any, Rule] = {
    aten._amp_foreach_non_finite_check_and_unscale_: _global_reduce.unscale_,
    aten._foreach_norm: _global_reduce.norms,
    aten._unsafe_view: _view,
    aten.alias: _alias,
    aten.all: _global_reduce.truth,
    aten.any: _global_reduce.truth,
    aten.detach: _alias,
    aten.detach_: _detach_,
    aten.expand: _view,
    aten.index_put_: _index_put_,
    aten.is_same_size: _is_same_size,
    aten.linalg_vector_norm: _global_reduce.norm,
    aten.new_empty: _new_empty,
    aten.select: _select,
    aten.sum: _global_reduce.total,
    aten.view: _view,
    **dict.fromkeys((aten.exponential_, aten.normal_, aten.random_, aten.uniform_), _draw),
}
