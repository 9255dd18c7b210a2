"""torch.ops.smallreduce: opcheck, torch.compile, the step as a tensor, and that the checks hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import smallreduce as sr
from smallreduce import ops
from smallreduce._layout import ELEMENT_TYPES, Layout

LAYOUT = Layout.build([(3, 500), (600, 41)], sr.IntQuant(4).format, torch.float32, packets=2)
SPARSE = Layout.build([(3, 500), (600, 41)], sr.TopK(0.1).format, torch.float32, packets=2)
SHARD = LAYOUT.select([1])
STRIDE = LAYOUT.stride

# Of packets that are summed into one of another format.
READ = Layout.build([(3, 500), (600, 41)], sr.codec("int8-hadamard").format, torch.float32)


def _arguments(name: str, layout: Layout = LAYOUT) -> tuple[Any, ...]:
    x = torch.randn(700, generator=torch.Generator().manual_seed(0))
    stride, shard = layout.stride, layout.select([1])
    packets = torch.zeros(2 * stride, dtype=torch.uint8)
    ops.encode(x, layout, packets)
    both = packets[stride:].repeat(2)
    step = torch.tensor(3)
    kind, group, hadamard, stochastic, _ = layout.format
    whole = (layout.segments, layout.packets, kind, group, hadamard)
    one = (shard.segments, shard.packets, kind, group, hadamard)
    worker = torch.zeros(32 * layout.origin_end)
    server = torch.zeros(32 * shard.blocks)
    scratch = torch.zeros(layout.scratch_nbytes(x.device, 2), dtype=torch.uint8) if layout.format.is_sparse else None
    return {
        "encode": (
            x, worker, *whole, stochastic, 700, layout.origin_end, 5, step, torch.zeros_like(packets), stride, scratch,
        ),
        "decode": (packets, stride, *whole, layout.extent, torch.zeros(700), None, scratch),
        "encode_rounded": (
            x, *whole, stochastic, 700, 5, step, torch.zeros_like(packets), stride, ELEMENT_TYPES[layout.dtype],
        ),
        "encode_difference": (
            x, x.roll(1), *whole, stochastic, 700, 5, step, torch.zeros_like(packets), stride,
        ),
        "decode_add": (packets, stride, *whole, layout.extent, torch.ones(700), None),
        "clear": (packets, stride, *whole, 0, layout.extent, torch.ones(700), None, scratch),
        "reduce": (both, stride, 2, 0.5, *one, shard.extent, torch.zeros(700), None, scratch),
        "reduce_encode": (
            both, stride, 2, 0.5, *one, *one, stochastic, server, shard.blocks, 5, step,
            torch.zeros(shard.stride, dtype=torch.uint8), shard.stride, 0, None, scratch,
        ),
    }[name]  # fmt: skip


NAMES = ["encode", "decode", "reduce", "reduce_encode"]
DENSE_NAMES = [*NAMES, "encode_rounded", "encode_difference", "decode_add"]
EACH_OPERATOR = pytest.mark.parametrize(
    ("name", "layout"),
    [(name, LAYOUT) for name in DENSE_NAMES] + [(name, SPARSE) for name in [*NAMES, "clear"]],
    ids=lambda value: value if isinstance(value, str) else "sparse" if value.format.is_sparse else "dense",
)


@EACH_OPERATOR
def test_opcheck(name: str, layout: Layout) -> None:
    torch.library.opcheck(getattr(torch.ops.smallreduce, name).default, _arguments(name, layout))


@EACH_OPERATOR
def test_compiles_whole(name: str, layout: Layout) -> None:
    operator = getattr(torch.ops.smallreduce, name).default
    eager, compiled = _arguments(name, layout), _arguments(name, layout)
    operator(*eager)

    def around(*args: Any) -> Tensor:
        operator(*args)
        return sum(arg.sum() for arg in args if isinstance(arg, Tensor))  # what was written is seen afterwards

    torch.compiler.reset()  # one function, compiled for each operator: more often than the limit allows
    total = torch.compile(around, fullgraph=True, backend="aot_eager")(*compiled)
    tensors = [(a, b) for a, b in zip(eager, compiled, strict=True) if isinstance(a, Tensor)]
    assert all(torch.equal(a, b) for a, b in tensors)
    assert torch.equal(total, sum(a.sum() for a, _ in tensors))


def test_step_is_read_from_the_tensor() -> None:
    x = torch.randn(700)
    step = torch.tensor(0)
    first, second, third = (torch.zeros(2 * STRIDE, dtype=torch.uint8) for _ in range(3))
    ops.encode(x, LAYOUT, first, seed=1, step=step)
    step += 1
    ops.encode(x, LAYOUT, second, seed=1, step=step)
    assert not torch.equal(first, second)
    ops.encode(x, LAYOUT, third, seed=1)
    assert torch.equal(first, third)


@pytest.mark.parametrize("codec", [sr.IntQuant(4, group=64), sr.TopK(0.1)], ids=str)
def test_a_selection_is_part_of_the_whole(codec: sr.PacketCodec) -> None:
    x = torch.randn(700)
    layout = Layout.build([(3, 500), (600, 41)], codec.format, torch.float32, packets=6)
    packets = torch.zeros(6, layout.stride, dtype=torch.uint8)
    ops.encode(x, layout, packets, seed=2)
    for chosen in ([0], [5], [2, 3], [4, 1], range(6), []):
        part = layout.select(list(chosen)) if chosen else None
        if part is None:
            continue
        own = torch.zeros(len(chosen), part.stride, dtype=torch.uint8)
        ops.encode(x, part, own, seed=2)
        for row, packet in enumerate(chosen):
            assert torch.equal(own[row, : part.nbytes[row]], packets[packet, : layout.nbytes[packet]])
        assert part.numel <= layout.numel
    assert layout.block_origins().tolist() == list(range(layout.blocks))
    assert layout.select([4, 1]).block_origins().tolist() == (
        layout.select([4]).block_origins().tolist() + layout.select([1]).block_origins().tolist()
    )


def _call(**changes: Any) -> None:
    names = {
        "encode": "input residual segments table kind group hadamard stochastic extent blocks seed step packets stride "
        "scratch",
        "decode": "packets stride segments table kind group hadamard extent output error scratch",
        "encode_rounded": "input segments table kind group hadamard stochastic extent seed step packets stride "
        "element_type",
        "encode_difference": "minuend subtrahend segments table kind group hadamard stochastic extent seed step "
        "packets stride",
        "decode_add": "packets stride segments table kind group hadamard extent output error",
        "clear": "packets stride segments table kind group hadamard packet_type extent output error scratch",
        "reduce": "packets stride ranks factor segments table kind group hadamard extent output error scratch",
        "reduce_encode": "packets stride ranks factor segments table kind group hadamard into_segments into_table "
        "into_kind into_group into_hadamard stochastic residual blocks seed step packet nbytes element_type error "
        "scratch",
    }
    operator, layout = changes.pop("operator"), changes.pop("layout", LAYOUT)
    arguments = dict(zip(names[operator].split(), _arguments(operator, layout), strict=True))
    assert changes.keys() <= arguments.keys()
    getattr(torch.ops.smallreduce, operator)(*{**arguments, **changes}.values())


BYTES = torch.zeros(4 * STRIDE, dtype=torch.uint8)
OTHER_SHARD = Layout.build([(0, 100), (100, 200)], sr.IntQuant(4).format, torch.float32)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "torch.float64", {"operator": "encode", "input": torch.zeros(700, dtype=torch.float64)}),
    (TypeError, "torch.int32", {"operator": "encode", "input": torch.zeros(700, dtype=torch.int32)}),
    (ValueError, "at least 700", {"operator": "encode", "input": torch.zeros(699)}),
    (ValueError, "contiguous", {"operator": "encode", "input": torch.zeros(1400)[::2]}),
    (TypeError, "residual must be torch.float32", {"operator": "encode", "residual": torch.zeros(700).half()}),
    (ValueError, "residual must have at least", {"operator": "encode", "residual": torch.zeros(100)}),
    (TypeError, "packets must be torch.uint8", {"operator": "encode", "packets": BYTES.view(torch.int8)}),
    (ValueError, "packets must have at least", {"operator": "encode", "packets": BYTES[:100]}),
    (TypeError, "step must be torch.int64", {"operator": "encode", "step": torch.tensor(1.0)}),
    (ValueError, "10 columns", {"operator": "encode", "segments": LAYOUT.packets}),
    (ValueError, "5 columns", {"operator": "encode", "table": LAYOUT.segments}),
    (ValueError, "sentinel", {"operator": "encode", "segments": LAYOUT.segments[:0]}),
    (TypeError, "segments must be torch.int64", {"operator": "encode", "segments": LAYOUT.segments.int()}),
    (
        ValueError,
        "on cpu",
        {"operator": "encode", "packets": torch.zeros(2 * STRIDE, dtype=torch.uint8, device="meta")},
    ),
    (ValueError, "stride must be positive", {"operator": "encode", "stride": -STRIDE}),
    (ValueError, "stride must be positive", {"operator": "decode", "stride": 0}),
    (ValueError, "kind", {"operator": "encode", "kind": 7}),
    (ValueError, "group", {"operator": "encode", "group": 33}),
    (ValueError, "output must have at least", {"operator": "decode", "output": torch.zeros(10)}),
    (TypeError, "output must be one of", {"operator": "decode", "output": torch.zeros(700, dtype=torch.float64)}),
    (ValueError, "packet", {"operator": "decode", "packets": BYTES}),
    (ValueError, "packet", {"operator": "decode", "output": torch.zeros(700, dtype=torch.float16)}),
    (ValueError, "packets must have at least", {"operator": "reduce", "ranks": 3}),
    (ValueError, "one packet", {"operator": "reduce", "table": LAYOUT.packets}),
    (ValueError, "packet", {"operator": "reduce", "packets": BYTES}),
    (ValueError, "one packet", {"operator": "reduce_encode", "table": LAYOUT.packets}),
    (ValueError, "packet must have at least", {"operator": "reduce_encode", "packet": BYTES[:32]}),
    (ValueError, "residual must have", {"operator": "reduce_encode", "residual": torch.zeros(31)}),
    (ValueError, "packet", {"operator": "reduce_encode", "packets": BYTES}),
    (ValueError, "one packet", {"operator": "reduce_encode", "into_table": LAYOUT.packets}),
    (ValueError, "must have the 2 segments", {"operator": "reduce_encode", "into_segments": LAYOUT.segments}),
    (ValueError, "other|different segments", {"operator": "reduce_encode", "into_segments": OTHER_SHARD.segments}),
    (ValueError, "32 bytes apart", {"operator": "reduce_encode", "nbytes": 32}),
    (ValueError, "must both have a Hadamard", {"operator": "reduce_encode", "into_hadamard": True}),
    (ValueError, "of their own format only", {"operator": "reduce_encode", "into_kind": 32, "into_group": 32}),
    (TypeError, "input must be torch.float32", {"operator": "encode_rounded", "input": torch.zeros(700).bfloat16()}),
    (ValueError, "input must have at least", {"operator": "encode_rounded", "input": torch.zeros(699)}),
    (ValueError, "input must be contiguous", {"operator": "encode_rounded", "input": torch.zeros(1400)[::2]}),
    (ValueError, "packets must have at least", {"operator": "encode_rounded", "packets": BYTES[:100]}),
    (TypeError, "step must be torch.int64", {"operator": "encode_rounded", "step": torch.tensor(1.0)}),
    (ValueError, "element type is 3, expected 0 to 2", {"operator": "encode_rounded", "element_type": 3}),
    (ValueError, "of top-k cannot be made of", {"operator": "encode_rounded", "kind": 32, "group": 32}),
    (TypeError, "minuend must be torch.float32", {"operator": "encode_difference", "minuend": torch.zeros(700).half()}),
    (ValueError, "minuend must have at least", {"operator": "encode_difference", "minuend": torch.zeros(699)}),
    (TypeError, "subtrahend must be one of", {"operator": "encode_difference", "subtrahend": torch.zeros(700).int()}),
    (ValueError, "subtrahend must have at least", {"operator": "encode_difference", "subtrahend": torch.zeros(699)}),
    (ValueError, "packets must have at least", {"operator": "encode_difference", "packets": BYTES[:100]}),
    (ValueError, "of top-k cannot encode", {"operator": "encode_difference", "kind": 32, "group": 32}),
    (ValueError, "of top-k cannot be added", {"operator": "decode_add", "kind": 32, "group": 32}),
    (ValueError, "output must have at least", {"operator": "decode_add", "output": torch.zeros(10)}),
    (ValueError, "packet", {"operator": "decode_add", "packets": BYTES}),
    *((ValueError, "scratch memory has 0 bytes", {"operator": n, "layout": SPARSE, "scratch": None}) for n in NAMES),
    (ValueError, "scratch memory has 16 bytes", {"operator": "clear", "layout": SPARSE, "scratch": BYTES[:16]}),
    (TypeError, "scratch must be torch.uint8", {"operator": "clear", "layout": SPARSE, "scratch": torch.zeros(9999)}),
    (ValueError, "packet", {"operator": "clear", "layout": SPARSE, "packets": torch.zeros_like(BYTES)}),
    (ValueError, "packet", {"operator": "clear", "layout": SPARSE, "packet_type": 1}),
    (TypeError, "output must be one of", {"operator": "clear", "layout": SPARSE, "output": torch.zeros(700).double()}),
]


@pytest.mark.parametrize(
    ("error", "message", "changes"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_wrong_arguments(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        _call(**changes)


@EACH_OPERATOR
def test_right_arguments(name: str, layout: Layout) -> None:
    _call(operator=name, layout=layout)


def test_stride_shorter_than_the_packet() -> None:
    # Refused before the kernel: on CUDA that could not see it.
    packets = torch.zeros(2 * STRIDE, dtype=torch.uint8)
    short = SHARD.stride - 16
    with pytest.raises(ValueError, match=f"at least the packet's {SHARD.stride} bytes, got {short}"):
        ops.reduce(packets, short, 2, 0.5, SHARD, torch.zeros(700))
    with pytest.raises(ValueError, match=f"at least the packet's {SHARD.stride} bytes, got {short}"):
        ops.reduce_encode(packets, short, 2, 0.5, SHARD, torch.zeros(STRIDE, dtype=torch.uint8))


@pytest.mark.parametrize("codec", ["int4:group=96", "int8:group=2048", "sign", "fp8-e4m3"])
def test_a_sum_is_written_in_another_format(codec: str) -> None:
    """Without a transform to be undone in between, as encoding the fp32 sum writes it."""
    read, into = (Layout.build([(3, 500), (600, 41)], sr.codec(c).format, torch.float32) for c in ("int8", codec))
    x = torch.randn(2, 700, generator=torch.Generator().manual_seed(2))
    packets = torch.zeros(2, read.stride, dtype=torch.uint8)
    for rank in range(2):
        ops.encode(x[rank], read, packets[rank], seed=rank)
    made, expected, mean = (*torch.zeros(2, into.stride, dtype=torch.uint8), torch.zeros(700))
    ops.reduce_encode(packets.view(-1), read.stride, 2, 0.5, read, made, seed=5, into=into)
    ops.reduce(packets.view(-1), read.stride, 2, 0.5, read, mean)
    ops.encode(mean, into, expected, seed=5)
    assert torch.equal(made, expected)


def test_the_same_format_under_another_name_changes_nothing() -> None:
    x = torch.randn(2, 700, generator=torch.Generator().manual_seed(2))
    packets = torch.zeros(2, SHARD.stride, dtype=torch.uint8)
    for rank in range(2):
        ops.encode(x[rank], SHARD, packets[rank], seed=rank)
    made = [torch.zeros(SHARD.stride, dtype=torch.uint8) for _ in range(2)]
    for packet, into in zip(made, (None, LAYOUT.select([1])), strict=True):
        ops.reduce_encode(packets.view(-1), SHARD.stride, 2, 0.5, SHARD, packet, seed=7, into=into)
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("codec", "dtype", "segments", "error", "message"),
    [
        (
            "int4",
            torch.float32,
            [(3, 500), (600, 41)],
            ValueError,
            "int8-hadamard:group=128 .* of int4:group=128 .* both",
        ),
        ("topk:0.1", torch.float32, [(3, 500), (600, 41)], ValueError, "must send every element"),
        ("int4-hadamard", torch.float16, [(3, 500), (600, 41)], TypeError, "the dtypes differ"),
        ("int4-hadamard", torch.float32, [(3, 541)], ValueError, "different segments"),
        ("int4-hadamard", torch.float32, [(3, 500), (601, 41)], ValueError, "different segments"),
    ],
)
def test_formats_that_do_not_go_together(
    codec: str, dtype: torch.dtype, segments: list[tuple[int, int]], error: type[Exception], message: str
) -> None:
    into = Layout.build(segments, sr.codec(codec).format, dtype)
    for _ in range(2):  # whether the segments are the same is remembered
        with pytest.raises(error, match=message):
            ops.reduce_encode(BYTES, READ.stride, 2, 0.5, READ, BYTES, into=into)


# What bf16 and fp16 round to Inf, to a denormal and to zero; NaN and Inf themselves; and, beside them, ordinary values.
EXTREMES = [3.4e38, -3.3962e38, 65519.99, -65520.0, 1e6, 1e-39, -3e-8, 2e-8, float("nan"), float("inf"), -0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "codec",
    [
        "int8", "int8:rounding=nearest", "int4:group=64", "int4:group=2048,rounding=nearest", "int2", "int8-hadamard",
        "int4-hadamard:rounding=nearest", "sign", "fp32", "bf16", "fp16", "fp8-e4m3", "fp8-e5m2",
    ],
)  # fmt: skip
def test_rounded_packets_are_those_of_a_cast(codec: str, dtype: torch.dtype) -> None:
    """Of segments with gaps between them and out of order; in some groups there are values beyond the dtype."""
    packet_codec = sr.codec(codec)
    assert isinstance(packet_codec, sr.PacketCodec)
    layout = Layout.build([(5000, 1000), (3, 2500), (2600, 0), (2601, 2301)], packet_codec.format, dtype, packets=3)
    x = torch.randn(6100, generator=torch.Generator().manual_seed(4))
    x[torch.arange(len(EXTREMES)) * 97 + 1700] = torch.tensor(EXTREMES)
    rounded, of_cast = torch.full((2, 3 * layout.stride), 0xA5, dtype=torch.uint8)
    step = torch.tensor(8)
    ops.encode_rounded(x, layout, rounded, seed=6, step=step)
    ops.encode(x.to(dtype), layout, of_cast, seed=6, step=step)
    assert torch.equal(rounded, of_cast)
    decoded, expected = torch.zeros(2, 6100, dtype=dtype)
    ops.decode(rounded, layout, decoded)
    ops.decode(of_cast, layout, expected)
    assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))


def test_sparse_packets_are_not_made_of_rounded_elements() -> None:
    sparse = Layout.build([(3, 500)], sr.TopK(0.1).format, torch.bfloat16)
    with pytest.raises(ValueError, match=r"topk of fp32 values .* cannot be made of rounded elements; use one that"):
        ops.encode_rounded(torch.zeros(700), sparse, torch.zeros(sparse.stride, dtype=torch.uint8))


def test_a_difference_is_encoded_and_added() -> None:
    new = torch.randn(700, generator=torch.Generator().manual_seed(3))
    old = new.bfloat16().float() + 0.01
    packets, plain = (torch.zeros(2 * STRIDE, dtype=torch.uint8) for _ in range(2))
    ops.encode_difference(new, old, LAYOUT, packets, seed=4, step=torch.tensor(9))
    ops.encode(new - old, LAYOUT, plain, seed=4, step=torch.tensor(9))
    assert torch.equal(packets, plain)
    decoded, output = torch.zeros(700), old.clone()
    ops.decode(packets, LAYOUT, decoded)
    ops.decode_add(packets, LAYOUT, output)
    assert torch.equal(output, old + decoded)


def test_sparse_packets_hold_no_difference() -> None:
    x, packets = torch.zeros(700), torch.zeros(2 * SPARSE.stride, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"topk of fp32 values .* cannot hold a difference"):
        ops.encode_difference(x, x, SPARSE, packets)
    with pytest.raises(ValueError, match=r"topk of fp32 values .* cannot be added"):
        ops.decode_add(packets, SPARSE, x)


@EACH_OPERATOR
def test_what_is_written_has_a_new_version(name: str, layout: Layout) -> None:
    operator = getattr(torch.ops.smallreduce, name).default
    arguments = _arguments(name, layout)
    before = [arg._version if isinstance(arg, Tensor) else None for arg in arguments]
    operator(*arguments)
    after = [arg._version if isinstance(arg, Tensor) else None for arg in arguments]
    for declared, old, new in zip(operator._schema.arguments, before, after, strict=True):
        if old is not None:
            assert (new != old) == (declared.alias_info is not None), declared.name


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16])
def test_clear(output: torch.dtype) -> None:
    """What the packets hold, in a buffer of any type; nothing beside the segments."""
    x = torch.randn(700, generator=torch.Generator().manual_seed(1))
    packets = torch.zeros(2 * SPARSE.stride, dtype=torch.uint8)
    ops.encode(x, SPARSE, packets)
    decoded, cleared = torch.zeros(700), torch.full((700,), 3.0, dtype=output)
    ops.decode(packets, SPARSE, decoded)
    ops.clear(packets, SPARSE, cleared)
    assert torch.equal(cleared == 0, decoded != 0)
    assert torch.equal(cleared == 3, decoded == 0)
    assert (decoded != 0).sum() == 29 + 22 + 5  # a tenth of 288, 212 and 41 elements


def test_only_sparse_packets_are_cleared() -> None:
    with pytest.raises(ValueError, match="only sparse packets"):
        ops.clear(torch.zeros(2 * STRIDE, dtype=torch.uint8), LAYOUT, torch.zeros(700))


@pytest.mark.parametrize("codec", [sr.IntQuant(4), sr.TopK(0.1)], ids=str)
def test_meta_tensors(codec: sr.PacketCodec) -> None:
    packet = sr.encode(torch.empty(100, device="meta"), codec)
    assert packet.numel() == codec.packet_nbytes(100)
    assert sr.decode(packet, codec, 100, torch.float32).shape == (100,)


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(100)
        packet = sr.encode(x, "int8")
    sr.decode(packet, "int8", 100, torch.float32, out=x)


def test_layout_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"layout is for torch\.float32, got a tensor of torch\.float16"):
        ops.encode(torch.zeros(700).half(), LAYOUT, torch.zeros(2 * STRIDE, dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
def test_cuda_gives_the_same_bytes() -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    for codec in ("int8", "int4", "int2", "int4-hadamard", "sign", "bf16", "fp8-e4m3", "topk:0.01,values=bf16"):
        packet = sr.encode(x, codec, seed=4)
        on_device = sr.encode(x.cuda(), codec, seed=4)
        assert torch.equal(on_device.cpu(), packet)
        decoded = sr.decode(on_device, codec, x.numel(), x.dtype)
        assert torch.equal(decoded.cpu(), sr.decode(packet, codec, x.numel(), x.dtype))
        with pytest.raises(ValueError, match="not one of"):
            sr.decode(on_device.flip(0), codec, x.numel(), x.dtype)
