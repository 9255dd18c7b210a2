"""Mistakes: each gives an error that says what was given and what is accepted, on every rank, and nothing hangs."""

from __future__ import annotations

import functools
import os
import signal
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import smallreduce as sr
from ddp.training import loss_of, mlp, wrap
from ranks import outcomes, run
from smallreduce.collectives import AllReduce, _call, channel_of
from smallreduce.collectives._agreement import Agreement

# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "tensor, got list"),
        (torch.zeros(3, dtype=torch.float64), TypeError, "torch.float32, .* got torch.float64"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(3, 3).to_sparse(), TypeError, "dense"),
    ],
)
def test_encode_refuses(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sr.encode(x, "int4")


def test_encode_refuses_an_out() -> None:
    x = torch.zeros(100)
    nbytes = sr.IntQuant(4).packet_nbytes(100)
    for out, error, message in (
        (torch.empty(nbytes - 1, dtype=torch.uint8), ValueError, f"{nbytes} bytes"),
        (torch.empty(nbytes), TypeError, "torch.uint8, got torch.float32"),
        (torch.empty(2 * nbytes, dtype=torch.uint8)[::2], ValueError, "contiguous"),
        (torch.empty(nbytes, dtype=torch.uint8, device="meta"), ValueError, "on cpu"),
    ):
        with pytest.raises(error, match=message):
            sr.encode(x, "int4", out=out)


def test_wrong_types() -> None:
    x = torch.zeros(100)
    packet = sr.encode(x, "int4")
    with pytest.raises(TypeError, match="out must be a tensor, got list"):
        sr.encode(x, "int4", out=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"seed must be an int, got float"):
        sr.encode(x, "int4", seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out must be a tensor, got list"):
        sr.decode(packet, "int4", 100, torch.float32, out=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="numel must be an int, got float"):
        sr.decode(packet, "int4", 100.0, torch.float32)  # type: ignore[arg-type]


def test_what_autograd_needs_is_not_overwritten() -> None:
    packet = sr.encode(torch.ones(64), "int8")
    leaf = torch.zeros(64, requires_grad=True)
    with pytest.raises(ValueError, match="output requires grad"):
        sr.decode(packet, "int8", 64, torch.float32, out=leaf)
    with torch.no_grad():
        sr.decode(packet, "int8", 64, torch.float32, out=leaf)
    saved = leaf.detach().clone()
    (leaf * saved).sum().backward()
    loss = (leaf * saved).sum()
    sr.decode(packet, "int8", 64, torch.float32, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _guarded(numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.full((numel + 128,), 7.0)
    return whole, whole[64:-64]


def test_decode_refuses_and_writes_nothing() -> None:
    packet = sr.encode(torch.randn(1000), "int4")
    flipped = packet.clone()
    flipped[3] ^= 1
    other_tag = packet.clone()
    other_tag[12] = 24
    wrong: list[tuple[torch.Tensor, str, int, torch.dtype, type[Exception], str]] = [
        (packet[:-1], "int4", 1000, torch.float32, ValueError, f"has {len(packet)} bytes, got {len(packet) - 1}"),
        (packet[:0], "int4", 1000, torch.float32, ValueError, "bytes, got 0"),
        (packet, "int4", 2000, torch.float32, ValueError, "bytes, got"),
        (packet, "int4", 999, torch.float32, ValueError, "packet"),  # as many bytes, another digest
        (packet, "int8", 1000, torch.float32, ValueError, "bytes, got"),
        (packet, "int4-hadamard", 1000, torch.float32, ValueError, "packet"),
        (packet, "int4", 1000, torch.float16, ValueError, "packet"),
        (flipped, "int4", 1000, torch.float32, ValueError, "packet"),
        (other_tag, "int4", 1000, torch.float32, ValueError, "packet"),
        (packet.view(torch.int8), "int4", 1000, torch.float32, TypeError, "torch.uint8"),
        (packet, "int4", -1, torch.float32, ValueError, "negative"),
        (packet, "int4", 1000, torch.int32, TypeError, "got torch.int32"),
        (packet, "int4:group=100", 1000, torch.float32, ValueError, "multiple of 32"),
    ]
    for given, codec, numel, dtype, error, message in wrong:
        whole, out = _guarded(max(numel, 0))
        with pytest.raises(error, match=message):
            sr.decode(given, codec, numel, dtype, out=out if dtype == torch.float32 else None)
        assert (whole == 7.0).all()
    sparse = sr.encode(torch.randn(1000), "topk:0.1")  # its words begin at byte 416
    a_value_less = sparse.clone()
    a_value_less[416:418] = 0xFF
    past_the_end = sparse.clone()
    past_the_end[416:418] = torch.tensor([0xFE, 0xFF])
    for given, codec, numel, dtype, message in (
        (a_value_less, "topk:0.1", 1000, torch.float32, "packet 0 names other elements"),
        (past_the_end, "topk:0.1", 1000, torch.float32, "packet 0 names other elements"),
        (sparse, "topk:0.1", 999, torch.float32, "packet"),
        (sparse, "topk:0.1,values=bf16", 1000, torch.float32, "bytes, got"),
        (sparse, "topk:0.1", 1000, torch.float16, "packet"),
        (sparse, "topk:0.2", 1000, torch.float32, "bytes, got"),
        (sparse[:-1], "topk:0.1", 1000, torch.float32, "bytes, got"),
    ):
        whole, out = _guarded(numel)
        with pytest.raises(ValueError, match=message):
            sr.decode(given, codec, numel, dtype, out=out if dtype == torch.float32 else None)
        assert (whole == 7.0).all()
    with pytest.raises(ValueError, match="1000 elements, got 999"):
        sr.decode(packet, "int4", 1000, torch.float32, out=torch.empty(999))
    whole, out = _guarded(1000)
    sr.decode(packet, "int4", 1000, torch.float32, out=out)
    assert (whole[:64] == 7.0).all()
    assert (whole[-64:] == 7.0).all()


def test_random_packets_are_decoded_or_refused() -> None:
    """Whatever stands behind a right header, nothing is written out of bounds, and values are those of the format."""
    for codec in ("int8", "int4", "int2", "int4-hadamard", "sign", "fp16", "fp8-e4m3"):
        packet = sr.encode(torch.randn(1000), codec)
        packet[16:] = torch.randint(0, 256, (len(packet) - 16,), generator=torch.Generator().manual_seed(1))
        whole, out = _guarded(1000)
        sr.decode(packet, codec, 1000, torch.float32, out=out)
        assert (whole[:64] == 7.0).all()
        assert (whole[-64:] == 7.0).all()
    # Of TopK the values may be anything, but not the words.
    packet = sr.encode(torch.randn(1000), "topk:0.1")
    values = packet.clone()
    values[16:416] = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(1))
    values[416:618] = 0
    values[616:618] = 0xFF
    whole, out = _guarded(1000)
    sr.decode(values, "topk:0.1", 1000, torch.float32, out=out)
    sent = values[16:416].view(torch.float32)
    assert torch.equal(out[:100].nan_to_num(nan=9.0), sent.nan_to_num(nan=9.0))
    assert not out[100:].any()
    assert (whole[:64] == 7.0).all()
    assert (whole[-64:] == 7.0).all()
    packet[416:] = torch.randint(0, 256, (len(packet) - 416,), generator=torch.Generator().manual_seed(1))
    whole, out = _guarded(1000)
    with pytest.raises(ValueError, match="names other elements"):
        sr.decode(packet, "topk:0.1", 1000, torch.float32, out=out)
    assert (whole == 7.0).all()


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        sr.all_reduce(torch.zeros(3), "int4")


# ---- one rank's mistake is an error on every rank -------------------------------------------------------------------


def _ten() -> torch.Tensor:
    return torch.ones(10)


MISTAKES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sr.all_reduce([1.0], "int4"), TypeError, "x must be a tensor, got list"),  # type: ignore[arg-type]
    (lambda: sr.all_reduce(_ten().double(), "int4"), TypeError, "torch.float64"),
    (lambda: sr.all_reduce(_ten().long(), None), TypeError, "floating-point"),
    (lambda: sr.all_reduce(_ten().to("meta"), "int4"), ValueError, "on cpu, got meta"),
    (lambda: sr.all_reduce(_ten(), "int5"), ValueError, "known are"),
    (lambda: sr.all_reduce(_ten(), "int4:group=33"), ValueError, "multiple of 32"),
    (lambda: sr.all_reduce(_ten(), "topk"), ValueError, "must begin with its ratio"),
    (lambda: sr.all_reduce(_ten(), "topk:2"), ValueError, "from 1e-9 to 1, got 2.0"),
    (lambda: sr.all_reduce(_ten(), "random-blocks:0.1,block=0"), ValueError, "block must be at least 1"),
    (lambda: sr.all_reduce(_ten(), 4), TypeError, "a codec is"),  # type: ignore[arg-type]
    (lambda: sr.all_reduce(_ten(), "int4", op=dist.ReduceOp.MAX), ValueError, "SUM or ReduceOp.AVG"),
    (lambda: sr.all_reduce(_ten(), "int4", op="sum"), TypeError, "got str"),  # type: ignore[arg-type]
    (lambda: sr.all_reduce(_ten(), "int4", seed=1.5), TypeError, "got float"),  # type: ignore[arg-type]
    (lambda: sr.all_reduce(_ten(), "int4", feedback={}), TypeError, "got dict"),  # type: ignore[arg-type]
    (lambda: sr.all_reduce(torch.ones(1).expand(10), "int4"), ValueError, "x has elements that share memory"),
    (lambda: sr.all_reduce(torch.ones(1).expand(10), None), ValueError, "x has elements that share memory"),
    (lambda: sr.all_gather(torch.ones(1).expand(20), _ten(), "int4"), ValueError, "out has elements that share memory"),
    (lambda: sr.reduce_scatter(torch.empty(5), torch.ones(11), "int4"), ValueError, "multiple of 2 elements"),
    (lambda: sr.reduce_scatter(torch.empty(6), _ten(), "int4"), ValueError, "out must have 5 elements"),
    (lambda: sr.reduce_scatter(torch.empty(5).half(), _ten(), "int4"), TypeError, "out must be of torch.float32"),
    (lambda: sr.reduce_scatter(None, _ten(), "int4"), TypeError, "out must be a tensor"),  # type: ignore[arg-type]
    (lambda: sr.all_gather(torch.empty(19), _ten(), "int4"), ValueError, "out must have 20 elements"),
    (lambda: sr.all_gather(torch.empty(20), _ten().int(), "int4"), TypeError, "torch.int32"),
]

DIFFERENCES: list[tuple[Callable[[], Any], str]] = [
    (lambda: sr.all_reduce(_ten(), "int8"), "codec int8"),
    (lambda: sr.all_reduce(_ten(), None), "codec None"),
    (lambda: sr.all_reduce(torch.ones(11), "int4"), "11 elements"),
    (lambda: sr.all_reduce(_ten().half(), "int4"), "torch.float16"),
    (lambda: sr.all_reduce(_ten(), "int4", op=dist.ReduceOp.SUM), "SUM"),
    (lambda: sr.all_reduce(_ten(), "int4", feedback=sr.ErrorFeedback()), "with feedback"),
    (lambda: sr.all_gather(torch.empty(30), _ten(), "int4"), "all_gather"),
    (lambda: sr.reduce_scatter(torch.empty(4), torch.ones(12), "int4"), "reduce_scatter"),
]


def _one_mistake(rank: int, world: int) -> None:
    for number, (mistake, error, message) in enumerate(MISTAKES):
        culprit = number % world
        if rank == culprit:
            with pytest.raises(error, match=message):
                mistake()
        else:
            x = _ten()
            with pytest.raises(RuntimeError, match=f"rank {culprit} refused: {error.__name__}: .*{message}"):
                sr.all_reduce(x, "int4")
            assert torch.equal(x, _ten())
    # The group is as good as before.
    x = _ten()
    sr.all_reduce(x, "fp16")
    assert torch.equal(x, _ten())


def test_one_ranks_mistake_is_an_error_on_every_rank() -> None:
    run(_one_mistake, 2, group_timeout=10)


def _differences(rank: int, world: int) -> None:
    for other, message in DIFFERENCES:
        x = _ten()
        call = other if rank == 1 else functools.partial(sr.all_reduce, x, "int4")
        with pytest.raises(RuntimeError, match="do not agree") as raised:
            call()
        text = str(raised.value)
        assert message in text.split("rank 1: ")[1].split(";")[0]
        assert "ranks 0, 2: all_reduce of 10 elements of torch.float32, AVG, codec int4" in text
        assert torch.equal(x, _ten())
    # What would take the result is as it was, also where it is not contiguous.
    out = torch.full((world * 10, 2), 7.0)
    with pytest.raises(RuntimeError, match="do not agree"):
        sr.all_gather(out[:, 0], _ten(), "int4" if rank else "int8")
    with pytest.raises(RuntimeError, match="do not agree"):
        sr.reduce_scatter(out[:10, 1], torch.ones(10 * world), "int4" if rank else "int8")
    assert (out == 7.0).all()
    feedback = sr.ErrorFeedback()
    with pytest.raises(RuntimeError, match="do not agree"):
        sr.all_reduce(torch.randn(10 + rank), "int4", feedback=feedback)
    assert feedback.step == 0
    assert feedback.worker is not None
    assert not feedback.worker.any()
    x = _ten()
    sr.all_reduce(x, "fp16")
    assert torch.equal(x, _ten())


def test_ranks_that_disagree_are_told_who_had_what() -> None:
    run(_differences, 3, group_timeout=10)


def _fails_to_prepare(rank: int, world: int) -> None:
    x = _ten()
    if rank == 1:
        with (
            unittest.mock.patch.object(AllReduce, "__init__", side_effect=MemoryError("no memory")),
            pytest.raises(MemoryError, match="no memory"),
        ):
            sr.all_reduce(x, "int4")
    else:
        with pytest.raises(RuntimeError, match="rank 1 refused: MemoryError: no memory"):
            sr.all_reduce(x, "int4")
    sr.all_reduce(x, "fp16")
    assert torch.equal(x, _ten())


def test_whatever_fails_before_the_call_is_told() -> None:
    run(_fails_to_prepare, 2, group_timeout=10)


def _fails_after_the_agreement(rank: int, world: int, where: type, method: str) -> None:
    # The other ranks wait for what this one does not send: from here on, nothing may follow it.
    x = _ten()
    if rank == 1:
        with (
            unittest.mock.patch.object(where, method, side_effect=KeyboardInterrupt("Ctrl-C")),
            pytest.raises(KeyboardInterrupt),
        ):
            sr.all_reduce(x, "int4")
        with pytest.raises(RuntimeError, match=r"failed \(Ctrl-C\).*out of step"):
            sr.all_reduce(x, "int4")
        dist.destroy_process_group()
    elif method == "finish":  # by then all has been sent
        sr.all_reduce(x, "int4")
    else:
        with pytest.raises(RuntimeError):
            sr.all_reduce(x, "int4")


@pytest.mark.parametrize(
    ("where", "method"),
    [(Agreement, "_compare"), *((AllReduce, stage) for stage in ("encode", "send", "turn", "finish"))],
)
def test_a_failure_after_the_agreement_closes_the_channel(where: type, method: str) -> None:
    run(_fails_after_the_agreement, 2, where, method, group_timeout=3)


def test_on_cuda_a_mistake_is_not_told() -> None:
    # There the others do not wait for it: they are in the collective itself.
    channel = unittest.mock.Mock(world_size=2, device=torch.device("cuda", 0))
    with (
        unittest.mock.patch.object(_call, "refuse", side_effect=AssertionError("told")),
        pytest.raises(ValueError, match="mine"),
        _call.refusing(channel),
    ):
        raise ValueError("mine")


def _captured(rank: int, world: int) -> None:
    with (
        unittest.mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
    ):
        channel_of(None, torch.device("cuda", 0))


def test_no_collective_in_a_cuda_graph() -> None:
    run(_captured, 1)


# ---- a rank that dies ----------------------------------------------------------------------------------------------

_GROUP_TIMEOUT = 8.0


def _dies_between(rank: int, world: int) -> float:
    x = torch.ones(100_000)
    sr.all_reduce(x, "int4")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection|closed|timed out"):
        sr.all_reduce(x, "int4")
    return time.monotonic() - begin


def _dies_in_the_middle(rank: int, world: int, async_op: bool = True) -> float:
    from smallreduce.collectives import AllReduce

    if rank == 1:
        # After the first of several chunks has been reduced: the others are somewhere in between.
        turn = AllReduce.turn

        def fatal(engine: AllReduce, chunk: int, tag: int) -> Any:
            if chunk == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return turn(engine, chunk, tag)

        AllReduce.turn = fatal  # type: ignore[method-assign]
    begin = time.monotonic()
    x = torch.ones(8_000_000)
    failed = r"smallreduce.all_reduce failed \(chunk \d of \d, rank \d of \d\)"
    if not async_op:
        with pytest.raises(RuntimeError, match=failed):
            sr.all_reduce(x, "int4")
    else:
        work = sr.all_reduce(x, "int4", async_op=True)
        assert work is not None
        with pytest.raises(RuntimeError, match=failed):
            work.wait()
        with pytest.raises(RuntimeError, match="all_reduce failed"):
            work.get_future().wait()
        assert work.is_completed()
    with pytest.raises(RuntimeError, match="out of step"):
        sr.all_reduce(x, "int4")
    return time.monotonic() - begin


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "function", [_dies_between, _dies_in_the_middle, functools.partial(_dies_in_the_middle, async_op=False)]
)
def test_a_rank_that_dies(function: Callable[[int, int], float], world: int) -> None:
    results = outcomes(function, world, timeout=40, group_timeout=_GROUP_TIMEOUT, keep=False)
    assert results[1].exitcode == -signal.SIGKILL
    for rank in range(0, world, 2):
        assert results[rank].ended, "it hung"
        assert results[rank].error is None, results[rank].traceback
        assert results[rank].value < _GROUP_TIMEOUT + 5
        assert results[rank].exitcode == 0, "it did not exit by itself"


def _out_of_order(rank: int, world: int) -> None:
    """One rank compares its arguments with the others while these are in a step: not an abort, but an error on all."""
    ddp = wrap(mlp())
    sr.ddp.register(ddp, "int4")
    for step in range(3):
        loss_of(ddp, rank, step).backward()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed out|connection|closed"):
            sr.all_reduce(torch.ones(100_000), "int4")
    else:
        loss = loss_of(ddp, rank, 3)
        with pytest.raises(RuntimeError, match=r"(?i)all_reduce failed|timed out|connection|closed"):
            loss.backward()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_out_of_order(world: int) -> None:
    results = outcomes(_out_of_order, world, timeout=40, group_timeout=_GROUP_TIMEOUT, keep=False)
    for result in results:
        assert result.ended, "it hung"
        assert result.error is None, result.traceback
        assert result.exitcode == 0


def _hangs_at_nothing(rank: int, world: int) -> None:
    # In flight when the function, and then the process, ends: never waited for.
    for _ in range(3):
        sr.all_reduce(torch.ones(1_000_000), "int4", async_op=True)


def test_exit_with_collectives_in_flight() -> None:
    results = outcomes(_hangs_at_nothing, 2, timeout=40, group_timeout=_GROUP_TIMEOUT, keep=False)
    assert [result.exitcode for result in results] == [0, 0]
    assert all(result.ended and result.error is None for result in results), [result.traceback for result in results]
