"""plans.py: its models are the public ones, what it writes is what it found, and its checks are able to fail."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import FOLDER

from smallreduce.ragged._plan import Plan

sys.path.append(FOLDER)  # while it is imported: folders of tests have the names of some of its programs
try:
    from benchmarks import model_shapes, plans
finally:
    sys.path.remove(FOLDER)


@pytest.mark.parametrize(
    "name, billions",
    [("Llama-3-70B", 70.6), ("DeepSeek-V3-671B", 671), ("GPT-OSS-120B", 116.83)],  # as their model cards round them
)
def test_models_are_as_large_as_published(name: str, billions: float) -> None:
    (model,) = (model for model in model_shapes.MODELS if model.name == name)
    digits = len(f"{billions:g}".partition(".")[2])
    assert round(model.numel / 1e9, digits) == billions


def test_buckets_are_layers_and_the_rest() -> None:
    layers = {model.name: sum(bucket.count for bucket in model.buckets) - 1 for model in model_shapes.MODELS}
    assert layers == {"Llama-3-70B": 80, "DeepSeek-V3-671B": 61, "GPT-OSS-120B": 36}
    _, mixture, root = model_shapes.deepseek_v3().buckets
    experts = [parameter for parameter in mixture.parameters if parameter.is_expert]
    assert len(experts) == 3 * 256 and {parameter.numel for parameter in experts} == {2048 * 7168}
    assert [parameter.shape for parameter in root.parameters] == [(129280, 7168), (7168,), (129280, 7168)]


def test_blocks_are_rows_of_matrices() -> None:
    gpt_oss = model_shapes.gpt_oss_120b().buckets[0]
    of = {
        parameter.shape: plans.tensors_of(gpt_oss, 16, "matrices")[i] for i, parameter in enumerate(gpt_oss.parameters)
    }
    assert of[128, 2880, 5760] == (128 * 2880 * 5760, 16 * 5760)
    assert of[2880, 4096] == (2880 * 4096, 16 * 4096)
    assert of[2880,] == (2880, 1)
    blocks = [block for _, block in plans.tensors_of(gpt_oss, 16, "experts")]
    assert sorted(blocks) == [1] * (len(blocks) - 2) + [16 * 2880, 16 * 5760]


def test_it_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plans.json"
    monkeypatch.chdir(Path(plans.__file__).parents[1])
    arguments = "--models Llama-3-70B GPT-OSS-120B --ranks 64 1024 --block-rows 128 --repeats 1 --cases 200"
    monkeypatch.setattr(sys, "argv", f"benchmarks/plans.py {arguments} --larger-cases 0 --json {path}".split())
    plans.main()
    document = json.loads(path.read_text())
    assert document["command"] == f"benchmarks/plans.py {arguments} --larger-cases 0"
    (compared,) = document["compared_with_brute_force"]
    assert (compared["cases"], compared["smallest"], compared["worst_ratio"], compared["wrong"]) == (200, 200, 1, 0)
    assert [(row["model"], row["blocked"], row["world_size"]) for row in document["rows"]] == [
        ("Llama-3-70B", "matrices", 64),
        ("Llama-3-70B", "matrices", 1024),
        ("GPT-OSS-120B", "matrices", 64),
        ("GPT-OSS-120B", "matrices", 1024),
        ("GPT-OSS-120B", "experts", 64),
        ("GPT-OSS-120B", "experts", 1024),
    ]
    for row in document["rows"]:
        assert row["wrong"] == 0
        assert 0 <= row["bound_numel"] <= row["padding_numel"]
        assert row["slowest_seconds"]["median"] <= row["seconds"]
    # All experts are two tensors that contain shards, of which the block of one divides that of the other: the layer's
    # shard is the least multiple of 128 rows of 5760 elements that has room, and the root has none in blocks.
    layer, root = model_shapes.gpt_oss_120b().buckets
    grid, align = 128 * 5760, 8
    shard, rest = -(-layer.numel // (1024 * grid)) * grid, -(-root.numel // (1024 * align)) * align
    (experts,) = (row for row in document["rows"] if (row["blocked"], row["world_size"]) == ("experts", 1024))
    assert experts["padding_numel"] == 1024 * (36 * shard + rest) - experts["parameters"]
    printed = capsys.readouterr().out
    assert f"{100 * experts['padding_numel'] / experts['parameters']:.2f} (" in printed and "up to 18" in printed
    assert "200 random cases" in printed


def test_a_plan_that_cuts_a_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plans.plan

    def one_element_later(*arguments: Any) -> Plan:
        made = planned(*arguments)
        object.__setattr__(made, "offsets", tuple(offset + 1 for offset in made.offsets))
        return made

    monkeypatch.setattr(plans, "plan", one_element_later)
    (llama, _, _) = model_shapes.MODELS
    assert plans.measure(llama, 1, "matrices", world_size=64, align=8, repeats=1).wrong > 0
    assert plans.compare(10, tensors=(1, 5), ranks=(1, 5)).wrong > 0


def test_shards_that_could_be_smaller_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_on_one_rank(tensors: Any, world_size: int, align: int) -> Plan:
        ends = [0, *itertools.accumulate(numel for numel, _ in tensors)]
        return Plan(world_size, -(-ends[-1] // align) * align, align, tensors, tuple(ends[:-1]))

    monkeypatch.setattr(plans, "plan", all_on_one_rank)
    compared = plans.compare(100, tensors=(1, 5), ranks=(2, 5))
    assert compared.wrong == 0 and compared.smallest < 50 and compared.worst_ratio > 2
