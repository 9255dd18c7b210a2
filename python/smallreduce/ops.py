"""``torch.ops.smallreduce``: the kernels as PyTorch operators, on CPU and CUDA.

Each writes into tensors that the caller owns and returns nothing. A layout is passed as its two tables on the device
of the data, and as the sizes that they imply (``extent``, ``blocks``), since tables on a GPU cannot be looked into
without waiting for it. The functions of this module take a :class:`~smallreduce._layout.Layout` instead, bring the
scratch memory that sparse formats need, and are what the layers above call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smallreduce._layout import BLOCK, COLUMNS, ELEMENT_TYPES, Layout
from smallreduce._native import native

__all__ = ["clear", "decode", "decode_add", "encode", "encode_difference", "reduce", "reduce_encode"]

_MASK = (1 << 64) - 1

_LAYOUT = "Tensor segments, Tensor table, int kind, int group, bool hadamard"
_SCHEMAS = (
    f"encode(Tensor input, Tensor(a!)? residual, {_LAYOUT}, bool stochastic, int extent, int blocks, int seed, "
    "Tensor? step, Tensor(b!) packets, int stride, Tensor(c!)? scratch) -> ()",
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


def _check_encode(
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
) -> None:
    device = input.device
    _check_elements(input, "input", extent, device)
    _check_layout(segments, table, device)
    _check_optional(residual, blocks, step, None, scratch, device)
    _check_packets(packets, "packets", stride, table.shape[0], device)


def _check_encode_difference(
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
) -> None:
    device = subtrahend.device
    _check_elements(subtrahend, "subtrahend", extent, device)
    _check(minuend, "minuend", torch.float32, extent, device)
    _check_layout(segments, table, device)
    _check_optional(None, 0, step, None, None, device)
    _check_packets(packets, "packets", stride, table.shape[0], device)


def _check_decode(
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
) -> None:
    device = packets.device
    _check_packets(packets, "packets", stride, table.shape[0], device)
    _check_layout(segments, table, device)
    _check_elements(output, "output", extent, device)
    _check_optional(None, 0, None, error, scratch, device)


def _check_decode_add(
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
) -> None:
    _check_decode(packets, stride, segments, table, kind, group, hadamard, extent, output, error, None)


def _check_clear(
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
) -> None:
    _check_decode(packets, stride, segments, table, kind, group, hadamard, extent, output, error, scratch)


def _check_reduce(
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
) -> None:
    device = packets.device
    _check_packets(packets, "packets", stride, ranks, device)
    _check_layout(segments, table, device)
    _check_one_packet(table)
    _check_elements(output, "output", extent, device)
    _check_optional(None, 0, None, error, scratch, device)


def _check_reduce_encode(
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
) -> None:
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


def _check_one_packet(table: Tensor) -> None:
    if table.shape[0] != 1:
        raise ValueError(f"reducing takes the layout of one packet, got {table.shape[0]}")


# ---- kernels -------------------------------------------------------------------------------------------------------


@functools.cache
def _require_cuda() -> None:
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
    return int(step.item()) & _MASK


def _scratch(scratch: Tensor | None) -> tuple[int, int]:
    return _pointer(scratch), 0 if scratch is None else scratch.numel()


def _error(device: torch.device, error: Tensor | None) -> tuple[int, ...]:
    # The CPU kernels raise instead.
    return (_pointer(error),) if device.type == "cuda" else ()


def _launch(name: str, device: torch.device, *args: Any) -> None:
    if device.type == "cpu":
        getattr(native, f"cpu_{name}")(*args, torch.get_num_threads())
        return
    _require_cuda()
    with torch.cuda.device(device):
        getattr(native, f"cuda_{name}")(*args, torch.cuda.current_stream(device).cuda_stream)


def _encode(
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
) -> None:
    _launch(
        "encode", input.device, input.data_ptr(), ELEMENT_TYPES[input.dtype], _pointer(residual),
        *_tables(segments, table), kind, group, hadamard, stochastic, seed & _MASK, _step(step), packets.data_ptr(),
        stride, *_scratch(scratch),
    )  # fmt: skip


def _encode_difference(
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
) -> None:
    _launch(
        "encode_difference", subtrahend.device, minuend.data_ptr(), subtrahend.data_ptr(),
        ELEMENT_TYPES[subtrahend.dtype], *_tables(segments, table), kind, group, hadamard, stochastic, seed & _MASK,
        _step(step), packets.data_ptr(), stride,
    )  # fmt: skip


def _decode(
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
) -> None:
    _launch(
        "decode", packets.device, packets.data_ptr(), stride, *_tables(segments, table), kind, group, hadamard,
        output.data_ptr(), ELEMENT_TYPES[output.dtype], *_scratch(scratch), *_error(packets.device, error),
    )  # fmt: skip


def _decode_add(
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
) -> None:
    _launch(
        "decode_add", packets.device, packets.data_ptr(), stride, *_tables(segments, table), kind, group, hadamard,
        output.data_ptr(), ELEMENT_TYPES[output.dtype], *_error(packets.device, error),
    )  # fmt: skip


def _clear(
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
) -> None:
    _launch(
        "clear", packets.device, packets.data_ptr(), stride, *_tables(segments, table), kind, group, hadamard,
        packet_type, output.data_ptr(), ELEMENT_TYPES[output.dtype], *_scratch(scratch),
        *_error(packets.device, error),
    )  # fmt: skip


def _reduce(
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
) -> None:
    _launch(
        "reduce", packets.device, packets.data_ptr(), stride, ranks, factor, *_tables(segments, table), kind, group,
        hadamard, output.data_ptr(), ELEMENT_TYPES[output.dtype], *_scratch(scratch),
        *_error(packets.device, error),
    )  # fmt: skip


def _reduce_encode(
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
) -> None:
    _launch(
        "reduce_encode", packets.device, packets.data_ptr(), stride, ranks, factor, *_tables(segments, table), kind,
        group, hadamard, *_tables(into_segments, into_table), into_kind, into_group, into_hadamard, stochastic,
        _pointer(residual), seed & _MASK, _step(step), packet.data_ptr(), nbytes, element_type, *_scratch(scratch),
        *_error(packets.device, error),
    )  # fmt: skip


def _register(name: str, check: Callable[..., None], launch: Callable[..., None]) -> None:
    schema = getattr(torch.ops.smallreduce, name).default._schema
    writes = [a.name if a.alias_info is not None and a.alias_info.is_write else None for a in schema.arguments]

    def kernel(*args: Any) -> None:
        check(*args)
        written = [(arg, of) for arg, of in zip(args, writes, strict=True) if of is not None and arg is not None]
        for tensor, of in written:
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{of} requires grad, but cannot be differentiated; pass {of}.detach()")
        launch(*args)
        # So that autograd notices where it has saved what is now overwritten. Inference tensors have no version.
        torch.autograd.graph.increment_version([tensor for tensor, _ in written if not tensor.is_inference()])

    torch.library.register_fake(f"smallreduce::{name}", check, lib=_library)
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)


_register("encode", _check_encode, _encode)
_register("encode_difference", _check_encode_difference, _encode_difference)
_register("decode", _check_decode, _decode)
_register("decode_add", _check_decode_add, _decode_add)
_register("clear", _check_clear, _clear)
_register("reduce", _check_reduce, _reduce)
_register("reduce_encode", _check_reduce_encode, _reduce_encode)


# ---- the operators on a Layout -------------------------------------------------------------------------------------


def _signed(seed: int) -> int:
    # Operators take signed 64-bit integers; a seed is any 64 bits.
    seed &= _MASK
    return seed - (1 << 64) if seed >> 63 else seed


def _check_stride(stride: int, layout: Layout) -> None:
    # The CUDA kernels cannot: the tables are on the device.
    if stride < layout.stride:
        raise ValueError(f"stride must be at least the packet's {layout.stride} bytes, got {stride}")


def _scratch_for(layout: Layout, device: torch.device, ranks: int = 1) -> Tensor | None:
    if device.type == "cuda":
        _require_cuda()
    nbytes = layout.scratch_nbytes(device, ranks)
    return torch.empty(nbytes, dtype=torch.uint8, device=device) if nbytes else None


def _check_dtype(tensor: Tensor, layout: Layout) -> None:
    if tensor.dtype != layout.dtype:
        raise TypeError(f"the layout is for {layout.dtype}, got a tensor of {tensor.dtype}")


def _check_dense(layout: Layout, what: str) -> None:
    if layout.format.is_sparse:
        raise ValueError(f"{_describe(layout)}: packets of a sparse codec {what}; use one that sends every element")


def _describe(layout: Layout) -> str:
    kind, group, hadamard, _, _ = layout.format
    return native.describe_format(kind, group, hadamard, ELEMENT_TYPES[layout.dtype])


def _check_into(layout: Layout, into: Layout) -> None:
    """That packets of ``layout`` can be summed into one of ``into``."""
    if into is layout:
        return
    both = f"packets of {_describe(layout)} cannot be summed into one of {_describe(into)}"
    if layout.format.is_sparse or into.format.is_sparse:
        raise ValueError(f"{both}: where the formats differ, both must send every element")
    if layout.format.hadamard != into.format.hadamard:
        raise ValueError(f"{both}: both must have the Hadamard transform, or neither")
    if layout.dtype != into.dtype:
        raise TypeError(f"{both}: the dtypes differ")
    if not into.has_blocks_of(layout):
        raise ValueError(f"{both}: the layouts have different segments, or cut them elsewhere")


def encode(
    input: Tensor,
    layout: Layout,
    packets: Tensor,
    residual: Tensor | None = None,
    seed: int = 0,
    step: Tensor | None = None,
) -> None:
    """Encodes the segments of ``input`` into ``packets``, ``layout.stride`` bytes apart.

    Args:
        input: Contiguous, of ``layout.dtype``.
        packets: Contiguous uint8, at least ``layout.packet_count * layout.stride``.
        residual: fp32 in block order by origin (``32 * layout.origin_end`` at least): added first, and replaced by
            what the packets lose.
        seed: Any 64-bit integer.
        step: int64, one element, on the device of the data (read by the kernel, so that a captured graph sees it
            advance); None is step 0.
    """
    _check_dtype(input, layout)
    segments, table = layout.on(input.device)
    kind, group, hadamard, stochastic, _ = layout.format
    torch.ops.smallreduce.encode(
        input, residual, segments, table, kind, group, hadamard, stochastic, layout.extent, layout.origin_end,
        _signed(seed), step, packets, layout.stride, _scratch_for(layout, input.device),
    )  # fmt: skip


def encode_difference(
    minuend: Tensor,
    subtrahend: Tensor,
    layout: Layout,
    packets: Tensor,
    seed: int = 0,
    step: Tensor | None = None,
) -> None:
    """Encodes ``minuend - subtrahend``, subtracted in fp32, into ``packets``, ``layout.stride`` bytes apart.

    Every code and scale is what :func:`encode` would make of the fp32 buffer of the differences. What the packets say
    of their buffer is ``layout.dtype``: they are for :func:`decode_add` to one of that type. Weight differences, as
    SDP4Bit sends them (arXiv:2410.15526, Algorithm 2).

    Args:
        minuend: Contiguous, fp32.
        subtrahend: Contiguous, of ``layout.dtype``. Both are indexed by the segments of ``layout``.
        layout: Of a codec that sends every element.
        packets, seed, step: As for :func:`encode`.
    """
    _check_dense(layout, "cannot hold a difference")
    _check_dtype(subtrahend, layout)
    segments, table = layout.on(subtrahend.device)
    kind, group, hadamard, stochastic, _ = layout.format
    torch.ops.smallreduce.encode_difference(
        minuend, subtrahend, segments, table, kind, group, hadamard, stochastic, layout.extent, _signed(seed), step,
        packets, layout.stride,
    )  # fmt: skip


def decode(packets: Tensor, layout: Layout, output: Tensor, error: Tensor | None = None) -> None:
    """Decodes ``packets``, ``layout.stride`` bytes apart, into the segments of ``output``.

    On the CPU a packet whose tag or digest is not the layout's raises ValueError before anything is written. On CUDA
    ``error`` (int32, one element) receives one more than the number of the first such packet.
    """
    _check_dtype(output, layout)
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.decode(
        packets, layout.stride, segments, table, kind, group, hadamard, layout.extent, output, error,
        _scratch_for(layout, packets.device),
    )  # fmt: skip


def decode_add(packets: Tensor, layout: Layout, output: Tensor, error: Tensor | None = None) -> None:
    """As :func:`decode`, but adds what it decodes, in fp32, to what the segments of ``output`` hold.

    The sum is rounded to ``layout.dtype`` once; that of two finite values saturates. A codec that sends every element.
    """
    _check_dense(layout, "cannot be added")
    _check_dtype(output, layout)
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.decode_add(
        packets, layout.stride, segments, table, kind, group, hadamard, layout.extent, output, error
    )


def clear(packets: Tensor, layout: Layout, output: Tensor, error: Tensor | None = None) -> None:
    """Sets to zero the elements of ``output`` that sparse ``packets``, ``layout.stride`` bytes apart, hold.

    ``output`` may be of any dtype that codecs take. Packets are refused as by :func:`decode`.
    """
    if not layout.format.is_sparse:
        raise ValueError("only sparse packets name elements")
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.clear(
        packets, layout.stride, segments, table, kind, group, hadamard, ELEMENT_TYPES[layout.dtype], layout.extent,
        output, error, _scratch_for(layout, packets.device),
    )  # fmt: skip


def reduce(
    packets: Tensor,
    stride: int,
    ranks: int,
    factor: float,
    layout: Layout,
    output: Tensor,
    error: Tensor | None = None,
) -> None:
    """Decodes the packets of ``ranks`` ranks, ``stride`` bytes apart, all of the one packet of ``layout``; writes their
    sum in rank order times ``factor`` into the segments of ``output``."""
    _check_dtype(output, layout)
    _check_stride(stride, layout)
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.reduce(
        packets, stride, ranks, factor, segments, table, kind, group, hadamard, layout.extent, output, error,
        _scratch_for(layout, packets.device, ranks),
    )  # fmt: skip


def reduce_encode(
    packets: Tensor,
    stride: int,
    ranks: int,
    factor: float,
    layout: Layout,
    packet: Tensor,
    residual: Tensor | None = None,
    seed: int = 0,
    step: Tensor | None = None,
    error: Tensor | None = None,
    into: Layout | None = None,
) -> None:
    """As :func:`reduce`, but encodes the sum again into ``packet`` (``into.nbytes[0]`` bytes at least).

    ``into`` is the layout of the packet written, None for that of the packets read. They may differ in kind, among the
    codecs that send every element, in group and in rounding; the segments are the same, and either both have the
    Hadamard transform, in whose domain the sum stays, or neither. ``residual`` is fp32 in the order of the packet's
    blocks (``32 * layout.blocks``), in the codec's domain.
    """
    _check_stride(stride, layout)
    into = layout if into is None else into
    _check_into(layout, into)
    segments, table = layout.on(packets.device)
    into_segments, into_table = into.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.reduce_encode(
        packets, stride, ranks, factor, segments, table, kind, group, hadamard, into_segments, into_table,
        into.format.kind, into.format.group, into.format.hadamard, into.format.stochastic, residual, into.blocks,
        _signed(seed), step, packet, into.stride, ELEMENT_TYPES[layout.dtype], error,
        _scratch_for(layout, packets.device, ranks),
    )  # fmt: skip
