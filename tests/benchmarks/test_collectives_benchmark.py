"""collectives.py: right results count as right, wrong ones as wrong, and bytes are those of the packets."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from programs import collectives

import smallreduce as sr
from ranks import run
from smallreduce import metrics

BACKEND = metrics.register_counting_backend()
CODECS = (*collectives.CODECS, "int8-hadamard", "int4:group=32,rounding=nearest", "bf16", "fp8-e4m3", "fp8-e5m2")
NBYTES = 3 * 4 * collectives.BLOCK * 4 * 5


def codec_of(spelling: str) -> sr.Codec:
    codec = sr.codec(spelling)
    assert codec is not None
    return codec


def measure_all(rank: int, world_size: int) -> list[collectives.Row]:
    return [
        collectives.measure(collective, codec_of(spelling), NBYTES, feedback=feedback, repeats=2)
        for collective in collectives.COLLECTIVES
        for spelling in CODECS
        for feedback in (False, True)
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_nothing_is_wrong(world_size: int) -> None:
    rows = run(measure_all, world_size, backend=BACKEND)[0]
    assert [row for row in rows if row.wrong] == []
    for row in rows:
        if row.collective == "all_reduce":
            assert row.torch_wire_nbytes == 2 * (world_size - 1) * NBYTES // world_size
        assert row.wire_nbytes < row.torch_wire_nbytes
        assert row.interface_nbytes is None


def spoil(rank: int, world_size: int) -> int:
    right = sr.all_reduce

    def wrong(x: torch.Tensor, *args: object, **options: object) -> None:
        right(x, *args, **options)  # type: ignore[arg-type]
        if dist.get_rank() == 1:
            x[17] = -x[17] - 1

    sr.all_reduce = wrong  # type: ignore[assignment]
    try:
        case = collectives.Case("all_reduce", NBYTES // 4, sr.IntQuant(4), False)
        assert collectives.count_wrong_exact(case) == (rank == 1)
        _, differing = collectives.random_error(case)
        assert differing == (rank == 1)
        return collectives.measure("all_reduce", sr.IntQuant(4), NBYTES, False, 1).wrong
    finally:
        sr.all_reduce = right


def test_a_wrong_element_counts() -> None:
    # Once on exact inputs, once on random ones.
    assert run(spoil, 2, backend=BACKEND) == [2, 2]


@pytest.mark.parametrize("spelling", CODECS)
def test_the_pattern_is_exact(spelling: str) -> None:
    codec = codec_of(spelling)
    pattern = collectives.exact_pattern(codec, 4096)
    assert torch.equal(sr.decode(sr.encode(pattern, codec, seed=5), codec, 4096, torch.float32), pattern)


@pytest.mark.parametrize("text, nbytes", [("17", 17), ("64K", 65536), ("64M", 2**26), ("1G", 2**30)])
def test_sizes(text: str, nbytes: int) -> None:
    assert collectives.parse_bytes(text) == nbytes
