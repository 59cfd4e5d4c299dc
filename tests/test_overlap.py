"""``model.overlap_param_gather`` changes when weights are gathered, and nothing that anybody sees of them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spawn import run_distributed
from tests.test_models import llamas  # noqa: F401
from tests.workers.overlap_worker import Case
from tests.workers.parallel_worker import VOCAB, Cut

WORKER = "tests.workers.overlap_worker:run"
NAMES = {
    2: ("policy", "sft", "critic, bf16", "ilql", "ilql, frozen", "recompute", "experts apart"),
    4: ("policy, PP2", "critic, PP2", "ilql, PP2", "experts"),
}
CASES = [(world, name) for world, names in NAMES.items() for name in names]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    directory = tmp_path_factory.mktemp("mixtral")
    MixtralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ranks(
    llamas: dict[str, Path],  # noqa: F811
    experts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, list[dict[str, Any]]]:
    """Results of every rank, by the size of the world. Two replicas each: of more, sums depend on the buckets."""
    tied, untied, dp, pp = llamas["tied"], llamas["untied"], Cut(), Cut(pp=2)
    cases = {
        2: [
            Case("policy", dp, "policy", tied),
            Case("sft", dp, "sft", untied),
            Case("critic, bf16", dp, "critic", untied, precision="bf16"),
            Case("ilql", dp, "ilql", untied),
            Case("ilql, frozen", dp, "ilql", untied, frozen=1),
            Case("recompute", dp, "policy", untied, recompute="full"),
            Case("experts apart", dp, "policy", experts, experts=2),
        ],
        4: [
            Case("policy, PP2", pp, "policy", tied),
            Case("critic, PP2", pp, "critic", untied),
            Case("ilql, PP2", pp, "ilql", tied),
            Case("experts", Cut(tp=2, sequence_parallel=True), "policy", experts, experts=2),
        ],
    }
    shelf = tmp_path_factory.mktemp("overlap")
    return {world: run_distributed(WORKER, world, (some, shelf), timeout_s=400) for world, some in cases.items()}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places in which two results are not the same bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_nobody_sees_a_difference(ranks: dict[int, list[dict[str, Any]]], world: int, name: str) -> None:
    for rank in ranks[world]:
        assert differences(rank[name]["plain"], rank[name]["overlapped"]) == []


@pytest.mark.parametrize("name", [name for name in NAMES[2] if name != "experts apart"])
def test_ranks_have_the_same_weights(ranks: dict[int, list[dict[str, Any]]], name: str) -> None:
    first, second = (rank[name]["overlapped"] for rank in ranks[2])
    assert differences(first["last"], second["last"]) == []
    moved = differences(first["weights"], first["last"])
    assert any("decoder.layers.3" in where for where in moved), "nothing was learned in between"


def test_gathers_go_on_while_layers_run(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for rank in ranks[2]:
        first, second, third, rest = _by_pass(rank["events"]["overlapped"])
        assert not {"async", "sync", "layer"} & set(first), "nothing is stale before the first step"
        for one in (second, third):
            kinds = [kind for kind, _ in groupby(one)]
            # all are dispatched, those outside of layers are waited for, and then each of four layers for its own
            assert kinds[:2] == ["async", "wait"] and "sync" not in kinds
            assert kinds[2:10] == ["layer", "wait"] * 4
            assert one.count("async") == one.count("wait") > 10
        gathers = second.count("async")
        assert rest == ["sync"] * gathers, "an evaluation gathers the weights once"


def test_without_the_key_every_step_gathers(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for rank in ranks[2]:
        events = rank["events"]["plain"]
        assert events == ["step", "sync"] * 3 + ["settle"]


def _by_pass(events: list[str]) -> list[list[str]]:
    """What happened in each of three passes, and after the last step."""
    assert [event for event in events if event in ("pass", "step", "settle")] == ["pass", "step"] * 3 + ["settle"]
    parts: list[list[str]] = []
    for event in events:
        if event in ("pass", "step", "settle"):
            parts.append([])
        else:
            parts[-1].append(event)
    assert parts[1] == parts[3] == parts[5] == [], "a step gathers nothing itself"
    return [parts[0], parts[2], parts[4], parts[6]]
