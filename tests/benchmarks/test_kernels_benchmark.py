"""kernels.py: it runs, and its checks are able to fail."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from programs import error_bounds, kernel_operations, kernels

import smallreduce as sr

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_it_writes_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernels.json"
    monkeypatch.chdir(Path(kernels.__file__).parents[1])
    monkeypatch.setattr(
        sys, "argv", ["benchmarks/kernels.py", "--megabytes", "0.2", "--repeats", "2", "--codecs", "int4", "sign"]
    )
    sys.argv += ["--dtypes", "fp32", "--json", str(path)]
    kernels.main()
    document = json.loads(path.read_text())
    assert document["command"] == "benchmarks/kernels.py --megabytes 0.2 --repeats 2 --codecs int4 sign --dtypes fp32"
    ours = [row for row in document["rows"] if row["moved_nbytes"] is not None]
    assert len(ours) == 2 * 5 + 4
    assert {row["codec"] for row in document["rows"]} > {"int4", "sign", "torch dequantize"}
    for row in document["rows"]:
        assert row["fraction"] == pytest.approx(row["gb_per_s"] / row["reference_gb_per_s"])
        assert row["gb_per_s"] == pytest.approx(row["uncompressed_nbytes"] / row["seconds"]["median"] / 1e9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", [name for name in kernels.CODECS if not name.startswith("topk")])
def test_an_element_further_off_than_the_format_allows_is_noticed(spelling: str, dtype: torch.dtype) -> None:
    codec = sr.codec(spelling)
    assert isinstance(codec, sr.PacketCodec)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    decoded = sr.decode(sr.encode(x, codec), codec, x.numel(), dtype)
    kernel_operations.check_distance(codec, x, decoded)
    bound = error_bounds.error_bound(codec, x)
    # One unit in the last place of dtype, at most 2^-7 of the number, may be lost in writing the wrong value down.
    wrong = x.double() + 1.1 * bound + (x.double().abs() + bound) * 2.0**-6
    decoded[4321] = wrong[4321]
    with pytest.raises(AssertionError, match="further off than the format allows"):
        kernel_operations.check_distance(codec, x, decoded)


def test_a_selection_that_is_not_the_largest_is_noticed() -> None:
    codec, x = sr.TopK(0.01), torch.randn(5000, generator=torch.Generator().manual_seed(0))
    decoded = sr.decode(sr.encode(x, codec), codec, x.numel(), x.dtype)
    kernel_operations.check_decoded(codec, x, decoded)
    largest, other = int(x.abs().argmax()), int(x.abs().argmin())
    decoded[largest], decoded[other] = 0, x[other]
    with pytest.raises(AssertionError, match="not the largest"):
        kernel_operations.check_decoded(codec, x, decoded)


@pytest.mark.parametrize("buffer", ["difference", "new", "reduced"])
def test_wrong_results_of_sharded_training_are_noticed(buffer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet of another difference, a difference of other weights, and a sum that is another packet's."""
    operations = kernel_operations.ShardedBuffers(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    for call in operations.calls().values():
        call()
    operations.check()
    if buffer == "reduced":
        operations.of_ranks[0].copy_(operations.of_ranks[1])
        reduce_encode = operations.calls()["reduce+encode of 2"]  # of two, not four
        monkeypatch.setattr(operations, "calls", lambda: {"reduce+encode of 4": reduce_encode})
    else:
        getattr(operations, buffer)[100] += 1
    with pytest.raises(AssertionError, match=r"not the packet|further off"):
        operations.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_packet_than_that_of_the_cast_buffer_is_noticed(dtype: torch.dtype) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    operations = kernel_operations.RoundedBuffers(sr.IntQuant(4), x)
    for call in operations.calls().values():
        call()
    operations.check()
    operations.packet[1000] ^= 1
    with pytest.raises(AssertionError, match="not the packet of the buffer after the cast"):
        operations.check()


def test_other_bits_on_one_instruction_set_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(kernels.native.cpu_isas()) < 2:
        pytest.skip("this machine has one instruction set only")
    make, x = functools.partial(kernel_operations.Buffers, sr.IntQuant(4)), torch.randn(1000)
    kernels.check_bits(make, x)
    results = kernel_operations.Buffers.results

    def with_one_wrong_bit(self: kernel_operations.Buffers) -> dict[str, torch.Tensor]:
        made = results(self)
        if kernels.native.cpu_isa() != kernels.native.cpu_isas()[0]:
            made["decode"][-1] ^= 1
        return made

    monkeypatch.setattr(kernel_operations.Buffers, "results", with_one_wrong_bit)
    with pytest.raises(AssertionError, match=r"decode: .* give different bits"):
        kernels.check_bits(make, x)
