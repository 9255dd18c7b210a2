"""How fast the kernels are, as fractions of a copy measured in the same run; and whether they are right.

    python benchmarks/kernels.py                    # CPU, one core, 64 MB of fp32
    python benchmarks/kernels.py --device cuda      # 512 MB

On the CPU a kernel's speed is the bytes of the *uncompressed* side over its time, and the reference is ``memcpy`` of
that buffer (bytes copied over time). On CUDA it is all bytes read and written over time, and the reference is a
device-to-device copy counted the same way. The operations of one codec and the reference are timed in turn, call by
call, on outputs made beforehand; the time is the median, the spread from the tenth to the ninetieth percentile.

Results are checked in the same run: every instruction set must give the same bits, CUDA those of the CPU, and what was
decoded must lie as close to the input as the format promises. 1 GB is 1e9 bytes.

Beside the codecs' operations, those of sharded training (SDP4Bit): packets of int8 summed into one of int4, a weight
difference encoded, where the uncompressed side is both buffers that are read, and added. Of the narrower dtypes also an
fp32 buffer, the uncompressed side, encoded as it is once cast: in one pass, and as a cast and an encoding.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import peers
import smallreduce as sr
from kernel_operations import Buffers, Operations, RoundedBuffers, ShardedBuffers
from measurement import Spread, interleaved_seconds, save, table
from smallreduce._native import native

CODECS = (
    "int8:rounding=nearest", "int8", "int4:rounding=nearest", "int4", "int4-hadamard:rounding=nearest", "int4-hadamard",
    "int2:rounding=nearest", "int2", "sign", "topk:0.001", "topk:0.01", "bf16", "fp16", "fp8-e4m3", "fp8-e5m2",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_BITS_NUMEL = 1_000_003  # odd: the bits of the tails are checked too
FLUSH_BYTES = 256_000_000  # more than the second-level cache of any GPU


def target(device: str, dtype: str, codec: str, operation: str) -> float | None:
    """The fraction of a copy that the design asks for (docs/benchmarks.md), or None."""
    if device == "cpu":
        if dtype != "fp32":
            return None
        return {
            ("int4:rounding=nearest", "encode"): 1.5,
            ("int4", "encode"): 1.1,
            ("int4-hadamard", "encode"): 0.7,
            ("int4-hadamard:rounding=nearest", "encode"): 0.7,
            ("sign", "encode"): 1.4,
            ("int4", "decode"): 1.5,
            (str(ShardedBuffers.DIFFERENCE), "encode difference"): 1.5,
            (str(ShardedBuffers.DIFFERENCE), "decode+add"): 1.5,
        }.get((codec, operation))
    if codec.startswith("topk"):
        # 2.5 times as long as one read of the input; a copy's bytes are read and written.
        return 0.4 if (codec, operation) == ("topk:0.001", "encode") else None
    if operation in ("encode", "encode rounded", "decode", "encode difference", "decode+add"):
        return 0.80 if "hadamard" in codec else 0.88
    return 0.80 if operation == "reduce" else None


@dataclass(frozen=True)
class Row:
    """One kernel, or one peer's call.

    ``gb_per_s`` and ``fraction`` (of ``reference_gb_per_s``, the copy timed in the same rounds) count what the module's
    text says. ``uncompressed_nbytes`` is the input of an encoder and the output of a decoder; ``moved_nbytes`` is all
    that is read and written, None where unknown.
    """

    device: str
    codec: str
    dtype: str
    operation: str
    bits: float
    uncompressed_nbytes: int
    moved_nbytes: int | None
    seconds: Spread
    gb_per_s: float
    reference_gb_per_s: float
    fraction: float
    target: float | None


def check_bits(make: Callable[[Tensor], Operations], x: Tensor) -> None:
    """Raises AssertionError unless all instruction sets, and CUDA for an ``x`` on a GPU, give the same bits."""
    made: dict[str, dict[str, Tensor]] = {}
    on_cpu = make(x.cpu())
    chosen = native.cpu_isa()
    try:
        for isa in native.cpu_isas():
            native.set_cpu_isa(isa)
            made[isa] = on_cpu.results()
    finally:
        native.set_cpu_isa(chosen)
    if x.device.type == "cuda":
        made["cuda"] = make(x).results()
    (first, expected), *others = made.items()
    for name, results in others:
        for operation, result in results.items():
            if not torch.equal(result, expected[operation]):
                codec = on_cpu.codec_of(operation)
                raise AssertionError(f"{codec} of {x.dtype}, {operation}: {name} and {first} give different bits")


def cuda_seconds(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Spread]:
    """``interleaved_seconds`` on the GPU's clock. The cache is flushed before each call, which also gives the host time
    to launch ahead."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    events = {name: [pair() for _ in range(repeats)] for name in calls}
    for call in calls.values():
        call()
    for repeat in range(repeats):
        for name, call in calls.items():
            flush.zero_()
            start, end = events[name][repeat]
            start.record()
            call()
            end.record()
    torch.cuda.synchronize()
    return {name: Spread.of([start.elapsed_time(end) / 1e3 for start, end in events[name]]) for name in calls}


def copy_call(x: Tensor, threads: int) -> Callable[[], object]:
    """The reference. With one thread ``memcpy`` itself, which has streaming stores; torch's copy with more."""
    output = torch.empty_like(x)
    if x.device.type == "cpu" and threads == 1:
        source, destination, nbytes = x.data_ptr(), output.data_ptr(), x.nbytes
        # memcpy takes `output` along, so that its memory lives as long as the call.
        return lambda: (ctypes.memmove(destination, source, nbytes), output)
    return lambda: output.copy_(x)


def measure(make: Callable[[Tensor], Operations], x: Tensor, dtype: str, threads: int, repeats: int) -> list[Row]:
    """Checks and times the operations that ``make`` has for a tensor."""
    check_bits(make, x[:CHECK_BITS_NUMEL])
    operations = make(x)
    calls = operations.calls()
    on_cuda = x.device.type == "cuda"
    timed = cuda_seconds if on_cuda else interleaved_seconds
    seconds = timed({"copy": copy_call(x, threads), **calls}, repeats)
    operations.check()
    operations.check_error()

    copied_nbytes = 2 * x.nbytes if on_cuda else x.nbytes
    reference = copied_nbytes / seconds["copy"].median / 1e9
    rows = []
    for operation in calls:
        moved, uncompressed = operations.moved_nbytes(operation), operations.uncompressed_nbytes(operation)
        gb_per_s = (moved if on_cuda else uncompressed) / seconds[operation].median / 1e9
        codec = operations.codec_of(operation)
        rows.append(
            Row(
                device=x.device.type,
                codec=codec,
                dtype=dtype,
                operation=operation,
                bits=operations.bits_of(operation),
                uncompressed_nbytes=uncompressed,
                moved_nbytes=moved,
                seconds=seconds[operation],
                gb_per_s=gb_per_s,
                reference_gb_per_s=reference,
                fraction=gb_per_s / reference,
                target=target(x.device.type, dtype, codec, operation),
            )
        )
    return rows


def measure_peers(x: Tensor, threads: int, repeats: int) -> list[Row]:
    """Times the peers of ``peers.py``. Their results are not checked: they are not ours."""
    calls = peers.all_calls(x, threads)
    seconds = interleaved_seconds(
        {"copy": copy_call(x, threads), **{f"{peer.name} {peer.operation}": peer.call for peer in calls}}, repeats
    )
    reference = x.nbytes / seconds["copy"].median / 1e9
    rows = []
    for peer in calls:
        time = seconds[f"{peer.name} {peer.operation}"]
        gb_per_s = x.nbytes / time.median / 1e9
        rows.append(
            Row(
                device="cpu",
                codec=peer.name,
                dtype="fp32",
                operation=peer.operation,
                bits=peer.bits,
                uncompressed_nbytes=x.nbytes,
                moved_nbytes=None,
                seconds=time,
                gb_per_s=gb_per_s,
                reference_gb_per_s=reference,
                fraction=gb_per_s / reference,
                target=None,
            )
        )
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    header = ["codec", "dtype", "operation", "ms", "spread", "GB/s", "copy GB/s", "fraction", "target"]
    cells = []
    for row in rows:
        spread = f"{1e3 * row.seconds.low:.2f}-{1e3 * row.seconds.high:.2f}"
        wanted = "" if row.target is None else f"{row.target:.2f}" + ("" if row.fraction >= row.target else " missed")
        cells.append(
            [
                row.codec, row.dtype, row.operation, f"{1e3 * row.seconds.median:.2f}", spread, f"{row.gb_per_s:.2f}",
                f"{row.reference_gb_per_s:.2f}", f"{row.fraction:.2f}", wanted,
            ]
        )  # fmt: skip
    return table(header, cells)


def packet_codec(spelling: str) -> sr.PacketCodec:
    codec = sr.codec(spelling)
    assert isinstance(codec, sr.PacketCodec), f"{spelling} makes no packets"
    return codec


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--megabytes", type=float, help="of uncompressed data (default: 64 on the CPU, 512 on CUDA)")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--codecs", nargs="+", default=CODECS, metavar="CODEC")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--no-peers", action="store_true", help="do not time other libraries")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    nbytes = int(1e6 * (args.megabytes or {"cpu": 64, "cuda": 512}[args.device]))
    rows: list[Row] = []

    def report(new_rows: list[Row]) -> None:
        if not rows:
            print(f"{args.device}, {nbytes / 1e6:g} MB, {args.threads} thread(s), {sr.build_info()}", file=sys.stderr)
        rows.extend(new_rows)
        print(format_rows(new_rows), end="\n\n", flush=True)

    for name in args.dtypes:
        dtype = DTYPES[name]
        generator = torch.Generator(args.device).manual_seed(0)
        # A whole number of the largest groups, so that no part of what is timed is a special case.
        numel = nbytes // dtype.itemsize // 2048 * 2048
        x = torch.randn(numel, generator=generator, device=args.device).to(dtype)
        makers: list[Callable[[Tensor], Operations]] = [
            *(functools.partial(Buffers, packet_codec(spelling)) for spelling in args.codecs),
            ShardedBuffers,
        ]
        if name != "fp32":
            makers += [functools.partial(RoundedBuffers, packet_codec(spelling)) for spelling in ("int8", name)]
        for make in makers:
            report(measure(make, x, name, args.threads, args.repeats))
        if name == "fp32" and args.device == "cpu" and not args.no_peers:
            report(measure_peers(x, args.threads, args.repeats))
    save(args.json, "kernels", rows)


if __name__ == "__main__":
    main()
