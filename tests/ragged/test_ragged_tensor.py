"""RaggedTensor: what it is, and what operators do with it, against the same operators on the whole tensor."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from ragged.layouts import SHAPES, sharded, uneven
from ranks import run
from smallreduce.ragged import _dispatch
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._tensor import RaggedTensor

aten = torch.ops.aten


def _whole(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _construction(rank: int, world: int) -> None:
    placement = RaggedShard((0,), (1, 3))
    memory = torch.arange(40.0)
    local = memory[5:11] if rank == 0 else memory[5:23]
    tensor = RaggedTensor(local, (8, 3), placement)
    assert isinstance(tensor, Tensor) and tensor.shape == (8, 3) and tensor.is_contiguous()
    assert tensor.placement is placement and tensor.group is dist.group.WORLD
    assert tensor.range == ((0, 6), (6, 24))[rank]
    assert tensor.to_local().data_ptr() == local.data_ptr() and tensor.to_local().shape == local.shape
    assert not tensor.requires_grad
    tensor.mul_(2)
    assert memory.tolist() == [i * (2 if 5 <= i < 5 + len(local) else 1) for i in range(40)]
    assert repr(nn.Parameter(tensor)) == (
        f"RaggedTensor(shape=(8, 3), torch.float32, cpu, elements {(0, 6)[rank]} to {(6, 24)[rank]} on rank "
        f"{rank} of 2, requires_grad=True)"
    )
    # A local that autograd knows is taken without its history.
    assert not RaggedTensor((local.clone().requires_grad_() * 2), (8, 3), placement).to_local().requires_grad

    whole = _whole((8, 3))
    of_whole = RaggedTensor.distribute(whole.t().contiguous().t(), placement)
    begin, end = of_whole.range
    assert torch.equal(of_whole.to_local(), whole.view(-1)[begin:end])
    assert of_whole.to_local().untyped_storage().nbytes() == 4 * (end - begin)
    assert torch.equal(of_whole.full_tensor(), whole)

    def refused(error: type[Exception], message: str, *args: Any) -> None:
        with pytest.raises(error, match=message):
            RaggedTensor(*args)

    refused(
        ValueError,
        rf"the {end - begin} elements of rank {rank}'s range, .* got shape \(5,\)",
        local[:5],
        (8, 3),
        placement,
    )
    refused(ValueError, r"1-D and contiguous, got shape \(2, ", local.view(2, -1), (8, 3), placement)
    refused(ValueError, r"strides \(2,\)", torch.zeros(2 * len(local))[::2], (8, 3), placement)
    refused(ValueError, "for 3 ranks, but the group has 2", local, (8, 3), RaggedShard((0,), (1, 1, 1)))
    refused(ValueError, "cuts a block", local, (8, 3), RaggedShard((), (1, 3)))
    refused(TypeError, "placement must be a RaggedShard, got Replicate", local, (8, 3), Replicate())
    refused(TypeError, "local must be a plain tensor, got RaggedTensor", tensor, (8, 3), placement)
    refused(TypeError, "local must be a plain tensor, got list", [1.0], (8, 3), placement)
    with pytest.raises(TypeError, match="full must be a plain tensor, got RaggedTensor"):
        RaggedTensor.distribute(tensor, placement)


def test_construction() -> None:
    run(_construction, 2)


def _placements(rank: int, world: int) -> None:
    rng = random.Random(world)
    for shape in SHAPES:
        whole = _whole(shape)
        tensor = sharded(whole, rng)
        full = tensor.full_tensor()
        assert type(full) is Tensor and torch.equal(full, whole)
        full.add_(1)
        assert torch.equal(tensor.full_tensor(), whole)
        target = uneven(rng, shape, world)
        moved = tensor.redistribute(target)
        assert isinstance(moved, RaggedTensor) and moved.placement == target and moved.group is tensor.group
        assert torch.equal(moved.full_tensor(), whole)
        assert type(tensor.redistribute(Replicate())) is Tensor


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_placements(world: int) -> None:
    run(_placements, world)


def _as_parameter(rank: int, world: int) -> None:
    rng = random.Random(1)
    parameter = nn.Parameter(sharded(_whole((7, 5)), rng))
    assert type(parameter) is RaggedTensor and isinstance(parameter, nn.Parameter) and parameter.requires_grad
    parameter.grad = parameter.detach().mul(2)
    assert isinstance(parameter.grad, RaggedTensor) and parameter.grad.placement == parameter.placement
    with pytest.raises(RuntimeError):
        parameter.grad = RaggedTensor.distribute(_whole((5, 7)), uneven(rng, (5, 7), world))
    parameter.mark = ["of the user"]  # type: ignore[attr-defined]

    module = nn.Linear(5, 7, bias=False)
    module.weight = parameter
    assert [type(each) for each in module.parameters()] == [RaggedTensor]
    other = copy.deepcopy(module)
    copied = other.weight
    assert isinstance(copied, nn.Parameter) and isinstance(copied, RaggedTensor) and copied.requires_grad
    assert copied.group is parameter.group and copied.placement == parameter.placement
    assert copied.mark == ["of the user"] and copied.mark is not parameter.mark  # type: ignore[attr-defined]
    with torch.no_grad():
        copied.zero_()
        copied.grad.zero_()
    assert torch.equal(parameter.full_tensor(), _whole((7, 5)))
    assert torch.equal(parameter.grad.full_tensor(), 2 * _whole((7, 5)))
    twice = copy.deepcopy([parameter, parameter])
    assert twice[0] is twice[1]

    for pickled in (pickle.dumps, lambda tensor: torch.save(tensor, io.BytesIO()), copy.copy):
        with pytest.raises(TypeError, match=r"save it with torch\.distributed\.checkpoint, or its full_tensor"):
            pickled(parameter)

    # Autograd reaches it through elementwise operators, whose gradients are RaggedTensors.
    parameter.grad = None
    (parameter * parameter.detach()).backward(torch.ones_like(parameter))
    assert isinstance(parameter.grad, RaggedTensor)
    assert torch.equal(parameter.grad.full_tensor(), _whole((7, 5)))
    (parameter * parameter.detach()).backward(torch.ones_like(parameter))
    assert torch.equal(parameter.grad.full_tensor(), 2 * _whole((7, 5)))
    with pytest.raises(RuntimeError, match="only leaves of the autograd graph"):
        copy.deepcopy(parameter * 2)


def test_as_a_parameter() -> None:
    run(_as_parameter, 2)


def _conversions(rank: int, world: int) -> None:
    """The module methods that go over parameters keep part and whole together."""
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        torch.manual_seed(0)
        module = nn.Linear(5, 7)
        whole = module.weight.detach().clone()
        rng = random.Random(2)
        module.weight = nn.Parameter(sharded(module.weight, rng))
        module.bias = nn.Parameter(sharded(module.bias, rng))
        module.weight.grad = torch.ones_like(module.weight)
        first = module.weight
        for dtype in (torch.float64, torch.bfloat16):
            module.to(dtype)
            assert module.weight is first
            for tensor in (module.weight, module.bias, module.weight.grad):
                assert tensor.dtype == tensor.to_local().dtype == dtype
        assert torch.equal(module.weight.full_tensor(), whole.to(torch.bfloat16))
        module.requires_grad_(False)
        assert not module.weight.requires_grad
        module.to("meta")
        assert module.weight.device == module.weight.to_local().device == torch.device("meta")
        module.to_empty(device="cpu")
        assert module.weight.device == module.weight.to_local().device == torch.device("cpu")
    torch.__future__.set_swap_module_params_on_conversion(False)

    tensor = sharded(_whole((7, 5)), random.Random(3))
    assert tensor.data.to_local().data_ptr() == tensor.to_local().data_ptr()
    other = torch.zeros_like(tensor)
    tensor.data = other
    assert tensor.to_local().data_ptr() == other.to_local().data_ptr()
    with pytest.raises(TypeError, match="the data of a RaggedTensor must be a RaggedTensor, got Tensor"):
        tensor.data = torch.zeros(7, 5)


def test_conversions() -> None:
    run(_conversions, 2)


# Each is rounded once or not at all, so that no vector loop can tell an element by its place.
ELEMENTWISE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub with alpha": lambda a, b: torch.sub(a, b, alpha=2),
    "rsub": lambda a, b: 1 - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "div by a tensor without dimensions": lambda a, b: a / torch.tensor(3.0),
    "of a tensor without dimensions": lambda a, b: torch.tensor(3.0) - a,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "sqrt": lambda a, b: a.abs().sqrt(),
    "square": lambda a, b: a.square(),
    "sign": lambda a, b: a.sign(),
    "copysign": lambda a, b: torch.copysign(a, b),
    "maximum": lambda a, b: torch.maximum(a, b),
    "max of two": lambda a, b: torch.max(a, b),
    "clamp": lambda a, b: a.clamp(-0.5, 0.5),
    "clamp by tensors": lambda a, b: a.clamp(min=b),
    "comparison": lambda a, b: (a > b).logical_not(),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "where with a number": lambda a, b: torch.where(a > 0, 0, b),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 2.5),
    "isnan": lambda a, b: (a / 0).isnan(),
    "nan_to_num": lambda a, b: (a / 0).nan_to_num(),
    "frexp": lambda a, b: torch.frexp(a)[1],
    "clone": lambda a, b: a.clone(memory_format=torch.preserve_format),
    "detach": lambda a, b: a.detach(),
    "double": lambda a, b: a.double() + 1,
    "half": lambda a, b: a.to(torch.float16),
    "int": lambda a, b: (8 * a).to(torch.int32) & 3,
    "promotion by a tensor": lambda a, b: a + b.double(),
    "promotion by one without dimensions": lambda a, b: a.half() * torch.tensor(2.0, dtype=torch.float64),
    "promotion by a number": lambda a, b: (8 * a).to(torch.int32) * 0.5,
    "zeros_like": lambda a, b: torch.zeros_like(a, dtype=torch.int64),
    "ones_like": lambda a, b: torch.ones_like(a),
    "full_like": lambda a, b: torch.full_like(a, 2.5),
    "empty_like": lambda a, b: torch.empty_like(a).fill_(1),
    "view of its shape": lambda a, b: a.view(a.shape).view_as(b).reshape(b.shape).expand_as(b),
    "in place": lambda a, b: a.clone().mul_(2).add_(b).neg_(),
    "zero_": lambda a, b: a.clone().zero_(),
    "fill_": lambda a, b: a.clone().fill_(torch.tensor(2.0)),
    "copy_": lambda a, b: a.half().copy_(b),
    "copy_ of one element": lambda a, b: a.clone().copy_(torch.tensor(2.0)),
    "masked_fill_": lambda a, b: a.clone().masked_fill_(b > 0, torch.tensor(2.5)),
    "out": lambda a, b: torch.mul(a, b, out=torch.empty_like(a)),
}


def _elementwise(rank: int, world: int) -> None:
    rng = random.Random(world)
    for shape in SHAPES:
        placement = uneven(rng, shape, world)
        whole = [_whole(shape, seed) for seed in (1, 2)]
        ragged = [RaggedTensor.distribute(each, placement) for each in whole]
        for name, function in ELEMENTWISE.items():
            expected, found = function(*whole), function(*ragged)
            assert isinstance(found, RaggedTensor) and found.placement == placement, name
            assert found.shape == expected.shape and found.dtype == expected.dtype == found.to_local().dtype, (
                name,
                shape,
            )
            assert torch.equal(found.full_tensor(), expected), (name, shape, placement)
        assert all(torch.equal(each.full_tensor(), own) for each, own in zip(ragged, whole, strict=True))


@pytest.mark.parametrize("world", [1, 3])
def test_elementwise(world: int) -> None:
    run(_elementwise, world)


def _in_place(rank: int, world: int) -> None:
    rng = random.Random(4)
    tensor = sharded(_whole((7, 5)), rng)
    like = torch.empty_like(tensor)
    memory = tensor.to_local()
    version = tensor._version
    assert tensor.add_(1) is tensor and tensor._version == version + 1
    assert torch.mul(tensor, 2, out=like) is like and like._version == 1
    torch._foreach_mul_([tensor], 2.0)
    assert tensor._version == version + 2
    tensor[tensor > 0] = 3.0
    assert tensor._version == version + 3
    assert memory.data_ptr() == tensor.to_local().data_ptr()
    expected = _whole((7, 5)).add(1).mul(2)
    expected[expected > 0] = 3.0
    assert torch.equal(tensor.full_tensor(), expected)

    # What autograd has saved and what has changed since, it notices.
    weight = nn.Parameter(tensor)
    loss = weight * weight
    with torch.no_grad():
        torch._foreach_add_([weight], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(torch.ones_like(weight))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        weight.add_(1)

    with torch.inference_mode():
        inferred = weight * 2
        inferred.add_(1)
        weight.mul_(2)
        torch._foreach_add_([inferred, weight], 1.0)
        assert torch.equal(inferred.full_tensor(), weight.full_tensor().sub(1).add(2))


def test_in_place() -> None:
    run(_in_place, 2)


def _rows(rank: int, world: int) -> None:
    """``x[i]`` is memory of the tensor, wherever it was cut."""
    rng = random.Random(world)
    for shape in SHAPES:
        if not shape:
            continue
        tensor, expected = sharded(_whole(shape), rng), _whole(shape)
        for index in range(-shape[0], shape[0]):
            row = tensor[index]
            assert row.shape == expected[index].shape and torch.equal(row.full_tensor(), expected[index])
            row.mul_(2)
            expected[index] *= 2
            assert torch.equal(tensor.full_tensor(), expected)
        with pytest.raises(IndexError, match=rf"index {shape[0]} is out of range for dimension 0 with size {shape[0]}"):
            tensor.select(0, shape[0])
        if shape[0]:
            with pytest.raises(NotImplementedError, match=r"aten\.select\.int is not elementwise"):
                nn.Parameter(tensor)[0]  # autograd could not go back
            with torch.no_grad():
                assert torch.equal(nn.Parameter(tensor)[0].full_tensor(), expected[0])


@pytest.mark.parametrize("world", [1, 3])
def test_rows(world: int) -> None:
    run(_rows, world)


def _arguments(name: str) -> list[tuple[Any, ...]]:
    """What a foreach operator takes after its first list, ``...`` for another list, of each of its forms."""
    if name in {"addcdiv", "addcmul"}:
        return [(..., ..., 2.0), (..., ..., [1.0, 2.0, 3.0]), (..., ..., torch.tensor([1.0, 2.0, 3.0]))]
    if name in {"add", "sub", "mul", "div", "clamp_max", "clamp_min", "maximum", "minimum", "pow"}:
        forms: list[tuple[Any, ...]] = [(...,), (2.0,), ([1.0, 2.0, 3.0],)]
        return forms + ([(torch.tensor(2.0),)] if name in {"add", "mul", "div"} else [])
    return {"lerp": [(..., 0.25), (..., ...), (..., [0.1, 0.2, 0.3])], "copy": [(...,)]}.get(name, [()])


def _foreach(rank: int, world: int) -> None:
    rng = random.Random(6)
    shapes: list[tuple[int, ...]] = [(7, 5), (13,), (0, 4)]
    placements = [uneven(rng, shape, world) for shape in shapes]

    def lists() -> tuple[list[list[RaggedTensor]], list[list[Tensor]]]:
        ragged = [
            [RaggedTensor.distribute(_whole(s, k).abs(), p) for s, p in zip(shapes, placements, strict=True)]
            for k in range(3)
        ]
        return ragged, [[each.to_local().clone() for each in tensors] for tensors in ragged]

    for name in sorted(_dispatch._FOREACH):
        for suffix in ("", "_"):
            function = getattr(torch, f"_foreach_{name}{suffix}", None)
            if function is None:  # there is no _foreach_zero or _foreach_clone_ in Python
                continue
            for form in _arguments(name):
                ragged, plain = lists()
                others = iter(range(1, 3))
                places = [next(others) if each is ... else None for each in form]
                given = [ragged[k] if k else each for k, each in zip(places, form, strict=True)]
                by_hand = [plain[k] if k else each for k, each in zip(places, form, strict=True)]
                found, expected = function(ragged[0], *given), function(plain[0], *by_hand)
                if suffix:
                    found, expected = ragged[0], plain[0]
                for one, other, placement in zip(found, expected, placements, strict=True):
                    assert isinstance(one, RaggedTensor) and one.placement == placement
                    assert torch.equal(one.to_local().nan_to_num(), other.nan_to_num()), (name, suffix, form)
    dist.barrier()  # nothing was sent: neither rank may leave while the other still connects


def test_foreach() -> None:
    run(_foreach, 2)


def test_foreach_operators_are_those_of_elementwise_ones() -> None:
    """Whatever torch adds, what is computed on parts has an elementwise namesake; what is not known is refused."""
    for name in _dispatch._FOREACH:
        packet = getattr(aten, name)
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        tagged = any(torch.Tag.pointwise in overload.tags for overload in overloads)
        assert tagged or packet in _dispatch._ELEMENTWISE or name in {"copy", "zero"}, name
        assert "dim" not in {argument.name for overload in overloads for argument in overload._schema.arguments}, name
    for name in ("_foreach_max", "_foreach_powsum", "_foreach_mm"):
        for overload in getattr(aten, name, aten.mm).overloads():
            assert _dispatch._classify(getattr(getattr(aten, name, aten.mm), overload)) is _dispatch._refuse


def test_pointwise_operators_that_are_computed_on_parts() -> None:
    """By torch's tag, which an operator has, too, that makes one truth value of all elements."""
    found = 0
    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("aten::"):
            continue
        overload = getattr(getattr(aten, schema.name[6:], None), schema.overload_name or "default", None)
        if overload is None or torch.Tag.pointwise not in overload.tags:
            continue
        rule = _dispatch._classify(overload)
        if isinstance(rule, _dispatch._Elementwise):
            found += 1
            assert all(str(each.type) == "Tensor" for each in overload._schema.returns), overload
            assert not any("List" in str(each.type) for each in overload._schema.arguments), overload
        else:
            assert rule is _dispatch._refuse and schema.name in ("aten::equal", "aten::rrelu"), overload
    assert found > 400


def _mixed_lists(rank: int, world: int) -> None:
    """Parameters that are sharded and such that are not, in one list."""
    rng = random.Random(7)
    ragged, plain = sharded(_whole((7, 5)), rng), _whole((3,))
    first, second = torch._foreach_mul([ragged, plain], 2.0)
    assert isinstance(first, RaggedTensor) and type(second) is Tensor
    assert torch.equal(first.full_tensor(), 2 * _whole((7, 5))) and torch.equal(second, 2 * plain)
    torch._foreach_add_([plain, ragged], [plain.clone(), ragged.clone()])
    assert torch.equal(plain, 2 * _whole((3,))) and torch.equal(ragged.full_tensor(), 2 * _whole((7, 5)))
    torch._foreach_div_([ragged, ragged], [torch.tensor(2.0), torch.tensor(4.0)])
    assert torch.equal(ragged.full_tensor(), _whole((7, 5)) / 4)

    with pytest.raises(
        TypeError, match=r"_foreach_add_.List takes RaggedTensors beside .* plain tensor of shape \(7, 5\)"
    ):
        torch._foreach_add_([ragged], [_whole((7, 5))])
    with pytest.raises(TypeError, match="writes to a RaggedTensor, not to a plain tensor"):
        torch._foreach_add_([torch.zeros(())], [ragged])
    with pytest.raises(TypeError, match="takes RaggedTensors in its lists only"):
        torch._foreach_mul_([ragged], ragged)
    with pytest.raises(ValueError, match="takes RaggedTensors of one placement"):
        torch._foreach_add_([ragged], [ragged.redistribute(RaggedShard.on_root(0, world))])
    with pytest.raises(RuntimeError):  # torch's own, of lists of other lengths
        torch._foreach_add_([ragged], [ragged, ragged])
    assert torch.equal(ragged.full_tensor(), _whole((7, 5)) / 4)


def test_lists_of_sharded_and_plain_tensors() -> None:
    run(_mixed_lists, 2)


def _refused(rank: int, world: int) -> None:
    group = dist.new_group([0, 1])
    whole = _whole((4, 4))
    placement = RaggedShard((0,), (1, 3))
    tensor = RaggedTensor.distribute(whole, placement)

    for name, function in {
        "aten.mm": lambda: tensor @ tensor,
        "aten.equal": lambda: torch.equal(tensor, tensor),
        "aten.select": lambda: tensor[:, 0],
        "aten.t": lambda: tensor.t(),
        "aten.view.dtype": lambda: tensor.view(torch.int32),
        "aten.rand_like": lambda: torch.rand_like(tensor),
        "aten.rrelu": lambda: aten.rrelu(tensor),
        "aten.amax": lambda: tensor.amax(),
        "aten.max": lambda: tensor.max(),
        "aten.cat": lambda: torch.cat([tensor]),
        "aten.index_put_": lambda: tensor.index_put_((torch.tensor([0]),), torch.tensor(1.0)),
        "aten._foreach_max": lambda: torch._foreach_max([tensor]),
        "aten.slice": lambda: tensor[1:],
    }.items():
        with pytest.raises(NotImplementedError, match=rf"^{name}[._a-zA-Z]* is not elementwise, .* full_tensor\(\)"):
            function()
    with pytest.raises(NotImplementedError, match=r"aten.view.default of a RaggedTensor of shape \(4, 4\) as \(-1,\)"):
        tensor.view(-1)
    with pytest.raises(NotImplementedError, match=r"aten.new_empty.default of shape \(3,\)"):
        tensor.new_empty(3)

    for function in (
        lambda: torch.add(tensor, whole),
        lambda: tensor.add_(whole),
        lambda: tensor.copy_(whole),
        lambda: torch.where(whole > 0, tensor, tensor),
        lambda: torch.mul(tensor, torch.ones(1)),
    ):
        with pytest.raises(TypeError, match=r"takes RaggedTensors beside numbers .* RaggedTensor\.distribute\(\)"):
            function()
    with pytest.raises(TypeError, match="unsupported operand"):  # which is what Python makes of a TypeError there
        tensor + whole
    for function in (
        lambda: whole.copy_(tensor),
        lambda: torch.zeros(()).add_(tensor),
        lambda: torch.mul(tensor, 2, out=torch.zeros(())),
    ):
        with pytest.raises(
            TypeError, match=r"writes to a RaggedTensor, not to a plain tensor: use its full_tensor\(\)"
        ):
            function()

    for message, other in {
        r"of one shape, got \(4, 4\) and \(4,\)": RaggedTensor.distribute(whole[0], RaggedShard((0,), (1, 3))),
        "of one placement, .* redistribute": RaggedTensor.distribute(whole, RaggedShard((0,), (1, 1))),
        "of one process group": RaggedTensor.distribute(whole, placement, group),
    }.items():
        with pytest.raises(ValueError, match=message):
            torch.add(tensor, other)
        with pytest.raises(ValueError, match=message):
            torch._foreach_add([tensor, tensor], [tensor, other])
    # Made apart, they are of one placement all the same.
    assert torch.equal((tensor + RaggedTensor.distribute(whole, RaggedShard((0,), (1, 3)))).full_tensor(), 2 * whole)


def test_what_is_refused() -> None:
    run(_refused, 2)
