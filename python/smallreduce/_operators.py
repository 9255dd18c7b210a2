"""The definitions of ``torch.ops.smallreduce``: schemas, checks, and how the native kernels are called.

A layout is passed as its two tables on the device of the data, and as the sizes that they imply (``extent``,
``blocks``), since tables on a GPU cannot be looked into without waiting for it. Each operator writes into tensors that
the caller owns and returns nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smallreduce._layout import BLOCK, COLUMNS, ELEMENT_TYPES
from smallreduce._native import native

__all__ = ["SEED_MASK", "require_cuda"]

SEED_MASK = (1 << 64) - 1

_LAYOUT = "Tensor segments, Tensor table, int kind, int group, bool hadamard"
_SCHEMAS = (
    f"encode(Tensor input, Tensor(a!)? residual, {_LAYOUT}, bool stochastic, int extent, int blocks, int seed, "
    "Tensor? step, Tensor(b!) packets, int stride, Tensor(c!)? scratch) -> ()",
    f"encode_rounded(Tensor input, {_LAYOUT}, bool stochastic, int extent, int seed, Tensor? step, "
    "Tensor(a!) packets, int stride, int element_type) -> ()",
    f"encode_difference(Tensor minuend, Tensor subtrahend, {_LAYOUT}, bool stochastic, int extent, int seed, "
    "Tensor? step, Tensor(a!) packets, int stride) -> ()",
    f"decode(Tensor packets, int stride, {_LAYOUT}, int extent, Tensor(a!) output, Tensor(b!)? error, "
    "Tensor(c!)? scratch) -> ()",
    f"decode_add(Tensor packets, int stride, {_LAYOUT}, int extent, Tensor(a!) output, Tensor(b!)? error) -> ()",
    f"clear(Tensor packets, int stride, {_LAYOUT}, int packet_type, int extent, Tensor(a!) output, Tensor(b!)? error, "
    "Tensor(c!)? scratch) -> ()",
    f"reduce(Tensor packets, int stride, int ranks, float factor, {_LAYOUT}, int extent, Tensor(a!) output, "
    "Tensor(b!)? error, Tensor(c!)? scratch) -> ()",
    f"reduce_encode(Tensor packets, int stride, int ranks, float factor, {_LAYOUT}, Tensor into_segments, "
    "Tensor into_table, int into_kind, int into_group, bool into_hadamard, bool stochastic, Tensor(a!)? residual, "
    "int blocks, int seed, Tensor? step, Tensor(b!) packet, int nbytes, int element_type, Tensor(c!)? error, "
    "Tensor(d!)? scratch) -> ()",
)

_library = torch.library.Library("smallreduce", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


# ---- checks, the same for real and for fake tensors ----------------------------------------------------------------


def _check_packets(packets: Tensor, name: str, stride: int, count: int, device: torch.device) -> None:
    if stride <= 0:
        raise ValueError(f"stride must be positive, got {stride}")
    _check(packets, name, torch.uint8, count * stride, device)


def _check(tensor: Tensor, name: str, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the data are, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    if tensor.numel() < numel:
        raise ValueError(f"{name} must have at least {numel} elements, got {tensor.numel()}")


def _check_elements(tensor: Tensor, name: str, extent: int, device: torch.device) -> None:
    if tensor.dtype not in ELEMENT_TYPES:
        accepted = ", ".join(str(dtype) for dtype in ELEMENT_TYPES)
        raise TypeError(f"{name} must be one of {accepted}, got {tensor.dtype}")
    _check(tensor, name, tensor.dtype, extent, device)


def _check_layout(segments: Tensor, table: Tensor, device: torch.device) -> None:
    for tensor, name, columns in zip((segments, table), ("segments", "table"), COLUMNS, strict=True):
        _check(tensor, name, torch.int64, 0, device)
        if tensor.dim() != 2 or tensor.shape[1] != columns:
            raise ValueError(f"{name} must have {columns} columns, got shape {tuple(tensor.shape)}")
    if segments.shape[0] < 1:
        raise ValueError("segments must end with a sentinel row, got none")


def _check_optional(
    residual: Tensor | None,
    blocks: int,
    step: Tensor | None,
    error: Tensor | None,
    scratch: Tensor | None,
    device: torch.device,
) -> None:
    if residual is not None:
        _check(residual, "residual", torch.float32, BLOCK * blocks, device)
    if step is not None:
        _check(step, "step", torch.int64, 1, device)
    if error is not None:
        _check(error, "error", torch.int32, 1, device)
    if scratch is not None:
        _check(scratch, "scratch", torch.uint8, 0, device)


def _check_one_packet(table: Tensor) -> None:
    if table.shape[0] != 1:
        raise ValueError(f"reducing takes the layout of one packet, got {table.shape[0]}")


# ---- calls of the kernels ------------------------------------------------------------------------------------------


@functools.cache
def require_cuda() -> None:
    version = native.cuda_runtime_version()
    if version == 0:
        raise RuntimeError(
            "smallreduce was built without CUDA, so it cannot take CUDA tensors; install the CUDA toolkit (nvcc) "
            "and reinstall with SMALLREDUCE_CUDA=ON, or move the tensors to the CPU"
        )
    torch_major = int((torch.version.cuda or "0").split(".")[0])
    if version // 1000 != torch_major:
        raise RuntimeError(
            f"smallreduce was built for CUDA {version // 1000}, but this PyTorch is built for CUDA "
            f"{torch.version.cuda}; reinstall smallreduce with the CUDA {torch_major} toolkit first on the PATH"
        )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tables(segments: Tensor, table: Tensor) -> tuple[int, int, int, int]:
    return segments.data_ptr(), segments.shape[0] - 1, table.data_ptr(), table.shape[0]


def _step(step: Tensor | None) -> int:
    # The CUDA kernels read the step themselves, so that a captured graph sees it advance.
    if step is None or step.is_cuda:
        return _pointer(step)
    return int(step.item()) & SEED_MASK


def _scratch(scratch: Tensor | None) -> tuple[int, int]:
    return _pointer(scratch), 0 if scratch is None else scratch.numel()


def _error(device: torch.device, error: Tensor | None) -> tuple[int, ...]:
    # The CPU kernels raise instead.
    return (_pointer(error),) if device.type == "cuda" else ()


def _launch(name: str, device: torch.device, *args: Any) -> None:
    if device.type == "cpu":
        getattr(native, f"cpu_{name}")(*args, torch.get_num_threads())
        return
    require_cuda()
    with torch.cuda.device(device):
        getattr(native, f"cuda_{name}")(*args, torch.cuda.current_stream(device).cuda_stream)


# ---- the operators -------------------------------------------------------------------------------------------------


def _operator(prepare: Callable[..., Callable[[], None]]) -> Callable[..., Callable[[], None]]:
    """Registers an operator under the name of ``prepare``, which checks its arguments, real or fake, and returns what
    calls the kernel."""
    name = prepare.__name__
    schema = getattr(torch.ops.smallreduce, name).default._schema
    writes = [a.name if a.alias_info is not None and a.alias_info.is_write else None for a in schema.arguments]

    def fake(*args: Any) -> None:
        prepare(*args)

    def kernel(*args: Any) -> None:
        launch = prepare(*args)
        written = [(arg, of) for arg, of in zip(args, writes, strict=True) if of is not None and arg is not None]
        for tensor, of in written:
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{of} requires grad, but cannot be differentiated; pass {of}.detach()")
        launch()
        # So that autograd notices where it has saved what is now overwritten. Inference tensors have no version.
        torch.autograd.graph.increment_version([tensor for tensor, _ in written if not tensor.is_inference()])

    torch.library.register_fake(f"smallreduce::{name}", fake, lib=_library)
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    return prepare


@_operator
def encode(
    input: Tensor,
    residual: Tensor | None,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    stochastic: bool,
    extent: int,
    blocks: int,
    seed: int,
    step: Tensor | None,
    packets: Tensor,
    stride: int,
    scratch: Tensor | None,
) -> Callable[[], None]:
    device = input.device
    _check_elements(input, "input", extent, device)
    _check_layout(segments, table, device)
    _check_optional(residual, blocks, step, None, scratch, device)
    _check_packets(packets, "packets", stride, table.shape[0], device)
    return lambda: _launch(
        "encode", device, input.data_ptr(), ELEMENT_TYPES[input.dtype], _pointer(residual),
        *_tables(segments, table), kind, group, hadamard, stochastic, seed & SEED_MASK, _step(step), packets.data_ptr(),
        stride, *_scratch(scratch),
    )  # fmt: skip


@_operator
def encode_rounded(
    input: Tensor,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    stochastic: bool,
    extent: int,
    seed: int,
    step: Tensor | None,
    packets: Tensor,
    stride: int,
    element_type: int,
) -> Callable[[], None]:
    device = input.device
    _check(input, "input", torch.float32, extent, device)
    _check_layout(segments, table, device)
    _check_optional(None, 0, step, None, None, device)
    _check_packets(packets, "packets", stride, table.shape[0], device)
    return lambda: _launch(
        "encode_rounded", device, input.data_ptr(), element_type, *_tables(segments, table), kind, group, hadamard,
        stochastic, seed & SEED_MASK, _step(step), packets.data_ptr(), stride,
    )  # fmt: skip


@_operator
def encode_difference(
    minuend: Tensor,
    subtrahend: Tensor,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    stochastic: bool,
    extent: int,
    seed: int,
    step: Tensor | None,
    packets: Tensor,
    stride: int,
) -> Callable[[], None]:
    device = subtrahend.device
    _check_elements(subtrahend, "subtrahend", extent, device)
    _check(minuend, "minuend", torch.float32, extent, device)
    _check_layout(segments, table, device)
    _check_optional(None, 0, step, None, None, device)
    _check_packets(packets, "packets", stride, table.shape[0], device)
    return lambda: _launch(
        "encode_difference", device, minuend.data_ptr(), subtrahend.data_ptr(),
        ELEMENT_TYPES[subtrahend.dtype], *_tables(segments, table), kind, group, hadamard, stochastic, seed & SEED_MASK,
        _step(step), packets.data_ptr(), stride,
    )  # fmt: skip


@_operator
def decode(
    packets: Tensor,
    stride: int,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    extent: int,
    output: Tensor,
    error: Tensor | None,
    scratch: Tensor | None,
) -> Callable[[], None]:
    device = packets.device
    _check_packets(packets, "packets", stride, table.shape[0], device)
    _check_layout(segments, table, device)
    _check_elements(output, "output", extent, device)
    _check_optional(None, 0, None, error, scratch, device)
    return lambda: _launch(
        "decode", device, packets.data_ptr(), stride, *_tables(segments, table), kind, group, hadamard,
        output.data_ptr(), ELEMENT_TYPES[output.dtype], *_scratch(scratch), *_error(device, error),
    )  # fmt: skip


@_operator
def decode_add(
    packets: Tensor,
    stride: int,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    extent: int,
    output: Tensor,
    error: Tensor | None,
) -> Callable[[], None]:
    device = packets.device
    _check_packets(packets, "packets", stride, table.shape[0], device)
    _check_layout(segments, table, device)
    _check_elements(output, "output", extent, device)
    _check_optional(None, 0, None, error, None, device)
    return lambda: _launch(
        "decode_add", device, packets.data_ptr(), stride, *_tables(segments, table), kind, group, hadamard,
        output.data_ptr(), ELEMENT_TYPES[output.dtype], *_error(device, error),
    )  # fmt: skip


@_operator
def clear(
    packets: Tensor,
    stride: int,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    packet_type: int,
    extent: int,
    output: Tensor,
    error: Tensor | None,
    scratch: Tensor | None,
) -> Callable[[], None]:
    device = packets.device
    _check_packets(packets, "packets", stride, table.shape[0], device)
    _check_layout(segments, table, device)
    _check_elements(output, "output", extent, device)
    _check_optional(None, 0, None, error, scratch, device)
    return lambda: _launch(
        "clear", device, packets.data_ptr(), stride, *_tables(segments, table), kind, group, hadamard,
        packet_type, output.data_ptr(), ELEMENT_TYPES[output.dtype], *_scratch(scratch),
        *_error(device, error),
    )  # fmt: skip


@_operator
def reduce(
    packets: Tensor,
    stride: int,
    ranks: int,
    factor: float,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    extent: int,
    output: Tensor,
    error: Tensor | None,
    scratch: Tensor | None,
) -> Callable[[], None]:
    device = packets.device
    _check_packets(packets, "packets", stride, ranks, device)
    _check_layout(segments, table, device)
    _check_one_packet(table)
    _check_elements(output, "output", extent, device)
    _check_optional(None, 0, None, error, scratch, device)
    return lambda: _launch(
        "reduce", device, packets.data_ptr(), stride, ranks, factor, *_tables(segments, table), kind, group,
        hadamard, output.data_ptr(), ELEMENT_TYPES[output.dtype], *_scratch(scratch),
        *_error(device, error),
    )  # fmt: skip


@_operator
def reduce_encode(
    packets: Tensor,
    stride: int,
    ranks: int,
    factor: float,
    segments: Tensor,
    table: Tensor,
    kind: int,
    group: int,
    hadamard: bool,
    into_segments: Tensor,
    into_table: Tensor,
    into_kind: int,
    into_group: int,
    into_hadamard: bool,
    stochastic: bool,
    residual: Tensor | None,
    blocks: int,
    seed: int,
    step: Tensor | None,
    packet: Tensor,
    nbytes: int,
    element_type: int,
    error: Tensor | None,
    scratch: Tensor | None,
) -> Callable[[], None]:
    device = packets.device
    _check_packets(packets, "packets", stride, ranks, device)
    _check_layout(segments, table, device)
    _check_one_packet(table)
    _check_layout(into_segments, into_table, device)
    _check_one_packet(into_table)
    if into_segments.shape != segments.shape:
        raise ValueError(
            f"the packet written must have the {segments.shape[0] - 1} segments of those read, "
            f"got {into_segments.shape[0] - 1}"
        )
    _check_optional(residual, blocks, step, error, scratch, device)
    _check(packet, "packet", torch.uint8, nbytes, device)
    return lambda: _launch(
        "reduce_encode", device, packets.data_ptr(), stride, ranks, factor, *_tables(segments, table), kind,
        group, hadamard, *_tables(into_segments, into_table), into_kind, into_group, into_hadamard, stochastic,
        _pointer(residual), seed & SEED_MASK, _step(step), packet.data_ptr(), nbytes, element_type, *_scratch(scratch),
        *_error(device, error),
    )  # fmt: skip
