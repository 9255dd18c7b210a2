"""Where :class:`SDP4Bit` is called from: the backward pass, and the modules of the model before they use weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smallreduce.optim._sdp4bit_exchange import Exchange

__all__ = ["register_hooks"]


def register_hooks(
    model: nn.Module,
    exchanges: Sequence[Exchange],
    take: Callable[[Exchange, int], None],
    wait: Callable[[Sequence[Exchange] | None], None],
    loaded: Callable[[Sequence[nn.Parameter]], None],
    overlap: bool,
) -> None:
    """Registers hooks on the parameters of the buckets and on the modules that have such.

    Args:
        take: Called when the gradient of a member, by its number in the bucket, stands in its parameter's ``grad``.
        wait: Called before the weights of these buckets, or of all (None), are used.
        loaded: Called after ``load_state_dict()`` with the parameters that it may have changed.
        overlap: Whether there is anything to wait for.
    """
    bucket_of: dict[int, Exchange] = {}
    for exchange in exchanges:
        for index, member in enumerate(exchange.bucket.members):
            bucket_of[id(member.parameter)] = exchange
            member.parameter.register_post_accumulate_grad_hook(_gradient_hook(exchange, index, take))
    for module in model.modules():
        if any(id(parameter) in bucket_of for parameter in module.parameters()):
            # Its attention uses the weights of its out_proj, whose forward is never called.
            own = module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
            members = [parameter for parameter in own if id(parameter) in bucket_of]
            buckets = list({id(bucket_of[id(p)]): bucket_of[id(p)] for p in members}.values())
            _register_on_module(module, members, buckets, wait, loaded, overlap)


# Plain functions, which a copy.deepcopy of the model shares, where a bound method would have the optimizer copied. They
# do nothing for the copy.


def _gradient_hook(exchange: Exchange, index: int, take: Callable[[Exchange, int], None]) -> Callable[[Tensor], None]:
    def ready(parameter: Tensor) -> None:
        take(exchange, index)

    return ready


def _register_on_module(
    module: nn.Module,
    members: Sequence[nn.Parameter],
    exchanges: Sequence[Exchange],
    wait: Callable[[Sequence[Exchange] | None], None],
    loaded: Callable[[Sequence[nn.Parameter]], None],
    overlap: bool,
) -> None:
    owner = weakref.ref(module)

    def before_forward(called: nn.Module, args: Any) -> None:
        # Outside of training torch's own modules may compute with the weights of those inside them.
        if called is owner():
            wait(exchanges if called.training and torch.is_grad_enabled() else None)

    def before_state(called: nn.Module, *args: Any) -> None:
        if called is owner():
            wait(exchanges)

    def after_load(called: nn.Module, incompatible_keys: Any) -> None:
        if called is owner():
            loaded(members)

    if overlap:
        module.register_forward_pre_hook(before_forward)
        module.register_state_dict_pre_hook(before_state)
        module.register_load_state_dict_pre_hook(before_state)
    if members:
        module.register_load_state_dict_post_hook(after_load)
