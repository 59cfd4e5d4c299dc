"""Transformer Engine's true classes on a CPU: the same numbers as local ones, checkpoints and optimizers that move.

What computes here is Transformer Engine's Python over small bodies for its C extension (tests/transformer_engine), each
version in processes of its own. It is no statement about kernels on a GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_rlhf.convert.transfer import import_hf
from nemo_rlhf.launch.activations import Passage, update_bytes
from nemo_rlhf.launch.parameters import Cut
from tests import test_experts, test_families
from tests.conftest import Tiny
from tests.spawn import ROOT, rank_environment, turn
from tests.test_plan import CASES, _itemsize
from tests.transformer_engine import on_cpu
from tests.workers.plan_worker import LENGTH, MICROBATCHES, RESPONSE, ROWS, Case

VERSIONS = on_cpu.versions()
pytestmark = pytest.mark.skipif(not VERSIONS, reason="no wheels of Transformer Engine: scripts/test.sh fetches them")
EXPERTS = test_experts.FAMILIES
DENSE = [name for name in test_families.CASES if name not in ("qwen3_tied", "gpt2_untied")]
FAMILIES = ["llama", *DENSE, *EXPERTS]
TP1, TP2, TP2_SP = (1, False), (2, False), (2, True)
PIN = "2.11.0"  # the newest that megatron-core supports: what takes long is done with it alone
ROLES = ("policy", "critic", "reward", "ilql")
WRITERS, SPECS = ("import", "local", "transformer_engine"), ("local", "transformer_engine")
MOMENTS = ("before the first step", "after two steps", "after a new start")
KINDS = ("torch", "transformer_engine", "apex")
MOVED = ("llama", "qwen3", "gpt2", "mixtral")


def run(version: str, world_size: int, payload: Any, directory: Path) -> list[dict[str, Any]]:
    """What each rank says."""
    given = directory / f"payload-{world_size}"
    torch.save(payload, given)
    env = rank_environment(world_size) | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.workers.transformer_engine_worker", version, str(given)]
    results = [directory / f"result-{world_size}-{rank}" for rank in range(world_size)]
    with turn():
        ranks = [
            subprocess.Popen(
                [*command, str(result)],
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, result in enumerate(results)
        ]
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-4000:]
    return [torch.load(result, weights_only=False) for result in results]


def plan_cases() -> list[Case]:
    """Models of the planner's tests, of Transformer Engine's layers."""
    cases = [case for case in CASES[1] if not case.generate]
    return [replace(case, layer_spec="transformer_engine") for case in cases]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("engine")
    for name in DENSE:
        test_families.make_model(name).save_pretrained(root / name)
    for name in EXPERTS:
        test_experts._make(root / name, name)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**test_families.COMMON, initializer_range=0.3))
    llama.save_pretrained(root / "llama")
    return {name: str(root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def ranks(directories: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """What the ranks of a version say, asked once: all that can be asked at once, as an import takes longer."""
    said: dict[Any, Any] = {}
    root = tmp_path_factory.mktemp("moved")
    for family in MOVED:
        import_hf(directories[family], root / family)
    sources = {family: (directories[family], str(root / family)) for family in MOVED}
    numbers = {
        "directories": directories,
        "one_group": test_families.ONE_GROUP,
        "experts": EXPERTS,
        "tokens": test_families.TOKENS % test_experts.VOCAB,
        "prompts": [[token % test_experts.VOCAB for token in prompt] for prompt in test_families.PROMPTS],
    }

    def of(version: str, world_size: int = 1) -> list[dict[str, Any]]:
        if (version, world_size) not in said:
            directory = tmp_path_factory.mktemp("ranks")
            cuts = [TP1] if world_size == 1 else [TP2, TP2_SP]
            asked: dict[str, Any] = {"numbers": numbers | {"cuts": cuts}}
            if version == PIN:
                asked["checkpoints"] = {"tp": world_size, "sources": sources, "root": str(root)}
                asked["kept"] = plan_cases() if world_size == 1 else []
            if world_size == 1:
                asked["optimizers"] = {"path": directories["llama"], "root": str(directory / "saved")}
                asked["spoken"] = None
            try:
                said[version, world_size] = run(version, world_size, asked, directory)
            except AssertionError as error:  # once, not for every test
                said[version, world_size] = error
        if isinstance(said[version, world_size], AssertionError):
            raise said[version, world_size]
        return said[version, world_size]  # type: ignore[no-any-return]

    return of


# ---- the same numbers


def _cuts(version: str) -> list[tuple[int, bool]]:
    return [TP1, TP2, TP2_SP] if version == PIN else [TP1]


LAYERS = [
    (version, cut, family)
    for version in VERSIONS
    for cut in _cuts(version)
    for family in FAMILIES
    if cut == TP1 or (family not in test_families.ONE_GROUP and (cut == TP2_SP or family not in EXPERTS))
]


@pytest.mark.parametrize(("version", "cut", "family"), LAYERS)
def test_layers_of_transformer_engine_compute_what_local_ones_do(
    ranks: Callable[..., Any], version: str, cut: tuple[int, bool], family: str
) -> None:
    """Hidden states, those of packed texts, greedy tokens and gradients over two microbatches."""
    for rank in ranks(version, cut[0]):
        local, engine = (rank["numbers"][(*cut, family, spec)] for spec in SPECS)
        assert "transformer_engine.FlashAttention" in engine["classes"]
        assert not any(name.startswith("transformer_engine.") for name in local["classes"])
        for name in ("hidden", "packed"):
            largest = float(local[name].abs().max())
            assert largest > 1
            torch.testing.assert_close(engine[name], local[name], rtol=0, atol=1e-5 * largest)
        assert engine["greedy"] == local["greedy"]
        assert engine["gradients"].keys() == local["gradients"].keys()
        for name, gradient in local["gradients"].items():
            tolerance = 2e-5 * float(gradient.nan_to_num().abs().max())
            torch.testing.assert_close(
                engine["gradients"][name], gradient, rtol=0, atol=tolerance, equal_nan=True, msg=name
            )


@pytest.mark.parametrize("version", VERSIONS)
def test_weights_gradients_are_added_up_inside_their_products(ranks: Callable[..., Any], version: str) -> None:
    """Also where every microbatch passes for the first one, of which Transformer Engine would forget the rest."""
    engine = ranks(version)[0]["numbers"][(*TP1, "llama", "transformer_engine")]
    assert len(engine["fused"]) == 8 and all(engine["fused"])  # four projections of each of two layers
    for name, gradient in engine["gradients"].items():
        torch.testing.assert_close(engine["gradients, always the first"][name], gradient, rtol=0, atol=0)


# ---- checkpoints


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("reader", SPECS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("family", MOVED)
def test_checkpoints_load_whatever_wrote_them(
    ranks: Callable[..., Any], family: str, role: str, writer: str, reader: str, tp: int
) -> None:
    """No parameter differs from what was written, and none is left out."""
    for rank in ranks(PIN, tp):
        assert rank["checkpoints"][family, role, writer, reader] == []


# ---- optimizers


@pytest.mark.parametrize("reader", KINDS)
@pytest.mark.parametrize("writer", KINDS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_optimizer_goes_on_where_another_one_stopped(
    ranks: Callable[..., Any], version: str, moment: str, writer: str, reader: str
) -> None:
    """bf16 weights: fp32 ones are loaded as they were, and two steps later are those of a run that went on."""
    (loaded, before), (after, expected) = ranks(version)[0]["optimizers"][moment, writer, reader]
    assert torch.equal(loaded, before)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, rtol=0, atol=0 if reader == writer else 1e-6)


# ---- the plan


@pytest.mark.parametrize("case", plan_cases(), ids=lambda case: case.name)
def test_the_plan_counts_what_its_layers_keep(ranks: Callable[..., Any], case: Case) -> None:
    """For the backward pass, within a tenth."""
    found = ranks(PIN)[0]["kept"][case.name]
    passage = Passage(ROWS, LENGTH, ROWS * RESPONSE, case.recompute, case.layer_spec)
    said = update_bytes(case.architecture, case.role, Cut(), 0, passage, MICROBATCHES, _itemsize(case))
    assert said == pytest.approx(found, rel=0.1)


# ---- a whole run


def test_import_then_ppo_as_in_a_container(tiny: Tiny, tmp_path: Path) -> None:
    """What docs/cluster.md tells people to do, with Transformer Engine's layers and its Adam: convert, warm the critic
    up, save before the policy's first step, go on. The metrics are those of local layers."""
    hf, imported = tmp_path / "hf", tmp_path / "imported"
    config = LlamaConfig.from_pretrained(tiny.hf)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(hf)
    for file in tiny.hf.glob("token*"):
        shutil.copy(file, hf)
    import_hf(hf, imported)

    def ppo(run_dir: Path, steps: int, spec: str) -> list[dict[str, float]]:
        overrides = tiny.ppo(
            run_dir,
            f"model.restore_from={imported}",
            "model.init=pretrained",
            f"model.layer_spec={spec}",
            f"trainer.max_steps={steps}",
            "trainer.val_check_interval=0",
            "ppo.critic_warmup_steps=1",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
            "model.optim.sched.name=constant",
            "trainer.enable_progress_bar=false",
        )
        command = [sys.executable, "-m", "tests.workers.transformer_engine_cli", PIN, *overrides]
        env = rank_environment(1) | {
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "RANK": "0",
            "LOCAL_RANK": "0",
        }
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        used = f"Transformer Engine {PIN}" if spec != "local" else f"local, torch {torch.__version__}"
        assert f"nemo-rlhf: layers: {used};" in done.stderr and "transformer_engine FusedAdam" in done.stderr
        assert (run_dir / "config.yaml").read_text().startswith(f"# layers: {used};")
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    with turn():
        first = ppo(tmp_path / "engine", 1, "transformer_engine")
        engine = ppo(tmp_path / "engine", 3, "transformer_engine")
        local = ppo(tmp_path / "local", 3, "local")
    assert len(first) == 1 and len(engine) == len(local) == 3
    for step, (ours, theirs) in enumerate(zip(engine, local, strict=True)):
        assert ours["check/kl_step0"] == 0 and (step or ours["check/ratio_step0"] == 1)
        for name in ("reward/mean", "kl/mean", "loss/policy", "loss/value"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (step, name)
