"""Where :class:`SDP4Bit` is called from: the backward pass, and the modules of the model before they use weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from smallreduce.collectives._channel import is_waited_for
from smallreduce.optim._sdp4bit_exchange import Exchange

__all__ = ["check_free", "register_hooks"]

_Exchanges = Sequence[Exchange]
_Wait = Callable[[_Exchanges | None], None]
_Loaded = Callable[[Sequence[nn.Parameter]], None]
_P = ParamSpec("_P")

_owners: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()
"""The living optimizer of each parameter, by the id of the parameter, which it keeps alive."""


def check_free(name: str, parameter: nn.Parameter) -> None:
    """Raises ValueError if the parameter is that of another SDP4Bit."""
    if id(parameter) in _owners:
        raise ValueError(
            f"{name} is trained by another SDP4Bit: let go of that (and of what refers to it, as a learning rate "
            "schedule does) before the next is made"
        )


def register_hooks(
    optimizer: Optimizer,
    model: nn.Module,
    exchanges: _Exchanges,
    take: Callable[[Exchange, int], None],
    wait: _Wait,
    loaded: _Loaded,
    overlap: bool,
) -> None:
    """Registers hooks on the parameters of the buckets and on the modules that have such, for as long as the optimizer
    lives and its last weights are on their way. They do not keep it alive.

    Args:
        take: Called when the gradient of a member, by its number in the bucket, stands in its parameter's ``grad``.
        wait: A method of the optimizer: called before the weights of these buckets, or of all (None), are used.
        loaded: A method of the optimizer: called after ``load_state_dict()`` with the parameters that it has changed.
        overlap: Whether there is anything to wait for.
    """
    take, wait, loaded = _weak(take), _weak(wait, partial(_settle, exchanges)), _weak(loaded)
    handles: list[RemovableHandle] = []
    bucket_of: dict[int, Exchange] = {}
    for exchange in exchanges:
        for index, member in enumerate(exchange.bucket.members):
            bucket_of[id(member.parameter)] = exchange
            _owners[id(member.parameter)] = optimizer
            ready = _Ready(exchange, index, take)
            handles.append(member.parameter.register_post_accumulate_grad_hook(ready))
    for module in model.modules():
        if overlap and any(id(parameter) in bucket_of for parameter in module.parameters()):
            used = {id(bucket_of[id(p)]): bucket_of[id(p)] for p in _used_by(module) if id(p) in bucket_of}
            buckets = list(used.values())
            state = _BeforeState(buckets, wait)
            # Before all others, which may compute with the weights, as that of weight_norm does.
            handles.append(module.register_forward_pre_hook(_BeforeForward(buckets, wait), prepend=True))
            handles.append(module.register_state_dict_pre_hook(state))
            handles.append(module.register_load_state_dict_pre_hook(state))
        members = [parameter for parameter in module.parameters(recurse=False) if id(parameter) in bucket_of]
        if members:
            versions: dict[int, int] = {}
            handles.append(module.register_load_state_dict_pre_hook(_BeforeLoad(members, versions)))
            handles.append(module.register_load_state_dict_post_hook(_AfterLoad(members, versions, loaded)))
    weakref.finalize(optimizer, _end, handles, exchanges).atexit = False


def _end(handles: Sequence[RemovableHandle], exchanges: _Exchanges) -> None:
    """The optimizer is gone: nobody else would wait for its last step."""
    if is_waited_for():
        # The garbage collector runs on any thread: the hooks stay, and wait when the weights are used.
        return
    _settle(exchanges)  # what fails stays in the hooks, too
    for handle in handles:
        handle.remove()


def _settle(exchanges: _Exchanges, *args: object) -> None:
    """Waits until the weights of all have arrived. If one failed, this raises each time."""
    failed: Exception | None = None
    for exchange in exchanges:
        try:
            exchange.end_gather()
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _weak(method: Callable[_P, None], otherwise: Callable[..., None] = lambda *args: None) -> Callable[_P, None]:
    """The bound method as long as its object lives; ``otherwise`` after that."""
    reference = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        alive = reference()
        (otherwise if alive is None else alive)(*args, **kwargs)

    return call


def _used_by(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that the forward of the module itself uses: its own, and those of modules inside it that are
    never called."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        # A ParameterList has no forward. Attention uses the weights of its out_proj.
        if type(child).forward is nn.Module.forward or isinstance(module, nn.MultiheadAttention):
            yield from _used_by(child)


class _Hook:
    """A hook that does nothing in a copy of its module, whether by ``copy.deepcopy`` or by ``torch.save``."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _NoHook, ()


class _NoHook:
    def __call__(self, *args: Any) -> None:
        pass


@dataclass(eq=False)
class _Ready(_Hook):
    exchange: Exchange
    index: int
    take: Callable[[Exchange, int], None]

    def __call__(self, parameter: Tensor) -> None:
        self.take(self.exchange, self.index)


@dataclass(eq=False)
class _BeforeForward(_Hook):
    exchanges: _Exchanges
    wait: _Wait

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Outside of training torch's own modules may compute with the weights of those inside them.
        self.wait(self.exchanges if module.training and torch.is_grad_enabled() else None)


@dataclass(eq=False)
class _BeforeState(_Hook):
    exchanges: _Exchanges
    wait: _Wait

    def __call__(self, *args: Any) -> None:
        self.wait(self.exchanges)


@dataclass(eq=False)
class _BeforeLoad(_Hook):
    members: Sequence[nn.Parameter]
    versions: dict[int, int]

    def __call__(self, *args: Any) -> None:
        self.versions.update({id(member): member._version for member in self.members})


@dataclass(eq=False)
class _AfterLoad(_Hook):
    members: Sequence[nn.Parameter]
    versions: dict[int, int]
    loaded: _Loaded

    def __call__(self, *args: Any) -> None:
        # With strict=False some may be as they were.
        self.loaded([member for member in self.members if member._version != self.versions.get(id(member))])
