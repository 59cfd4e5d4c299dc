"""scripts/simulate_70b.py: it holds for small models of every kind, and it finds what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_rlhf.config.architecture import Architecture
from tests.spawn import run_distributed
from tests.workers.simulate_worker import load_script

LLAMA = Architecture(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=88,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=131,
    max_position_embeddings=96,
    layernorm_epsilon=1e-5,
    rope={"rope_type": "default", "rope_theta": 1e4},
    tie_embeddings=False,
)
MODELS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_embeddings=True, qk_norm=True),
    "mixed": replace(LLAMA, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=40, dense_layers=(0, 3)),
}
CUT = ["--tp", "2", "--pp", "2", "--dp", "2"]
CASES = {  # fault, model, further arguments
    "every role": ("none", "llama", ["--roles", "policy", "critic", "ilql"]),
    "tied": ("none", "tied", ["--roles", "policy"]),
    "experts": ("none", "mixed", ["--ep", "2", "--roles", "policy"]),
    "wrong tile": ("tile", "llama", ["--roles", "policy"]),
    "wrong bytes": ("bytes", "llama", ["--roles", "critic"]),
    "wrong layers": ("layers", "llama", ["--roles", "policy"]),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of every case; one process runs them all."""
    directory = tmp_path_factory.mktemp("models")
    for name, architecture in MODELS.items():
        (directory / name).mkdir()
        architecture.save(directory / name)
    payload = [(fault, ["--model", str(directory / model), *CUT, *more]) for fault, model, more in CASES.values()]
    (found,) = run_distributed("tests.workers.simulate_worker:run", 1, payload)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", ["every role", "tied", "experts"])
def test_small_models_are_cut_as_planned(reports, case: str) -> None:
    code, text = reports[case]
    assert code == 0, text
    roles = text.count("each tensor tiled once, bytes and layers as planned")
    assert roles == (3 if case == "every role" else 1)
    assert "|     0 |     0-1 |     4 |" in text and "|     1 |     2-3 |     4 |" in text


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong tile", "\ndecoder.layers.self_attention.linear_proj.weight: two ranks write the same elements.\n"),
        ("wrong bytes", "rank 5: optimizer take "),
        ("wrong layers", "rank 4: stage 1 has the layers 2-3."),
    ],
)
def test_what_is_wrong_is_found(reports, case: str, words: str) -> None:
    code, text = reports[case]
    assert code == 1
    assert words in text


def _quarters(script: Any) -> list[Any]:
    """A 4 x 6 tensor in four parts, each held twice."""
    places = [(0, 0), (0, 3), (2, 0), (2, 3)]
    return [
        script.Shard("weight", (4, 6), place, (2, 3), torch.float32, main) for place in places for main in (True, False)
    ]


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, {}, None),
        (6, {"offset": (2, 2)}, "that no rank writes"),
        (7, {"offset": (1, 3)}, "that no rank writes"),
        (7, {"main": True}, "two ranks write the same"),
        (6, {"main": False}, "that no rank writes"),
        (0, {"dtype": torch.bfloat16}, "disagree"),
        (0, {"global_shape": (4, 8)}, "disagree"),
    ],
)
def test_tiles_are_counted(place: int, change: dict[str, Any], words: str | None) -> None:
    script = load_script()
    shards = _quarters(script)
    shards[place] = replace(shards[place], **change)
    said = script.untiled(shards)
    assert said == [] if words is None else words in said[0]


def test_gaps_and_overhangs_are_faults() -> None:
    script = load_script()
    shards = _quarters(script)
    assert "6 of its elements are written by no rank" in script.untiled(shards[:6])[0]
    moved = [replace(shard, offset=(3, 3)) if shard.offset == (2, 3) else shard for shard in shards]
    assert "lies outside of (4, 6)" in script.untiled(moved)[0]
    moved = [replace(shard, offset=(2, 2)) if shard.offset == (2, 3) else shard for shard in shards]
    assert "two ranks write the same elements" in script.untiled(moved)[0]


def test_a_checkpoint_of_another_size_is_a_fault() -> None:
    script = load_script()
    (said,) = script.wrong_size(LLAMA, "policy", script.Cut(), _quarters(script))
    assert "has 24 parameters" in said
