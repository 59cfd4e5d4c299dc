"""Mixtures of experts: transformers' numbers under every cut, in logits, gradients, checkpoints and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_rlhf.config import load
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.families import architecture_of, weight_map
from nemo_rlhf.convert.keys import Place, candidates, written
from nemo_rlhf.convert.transfer import export_hf, import_hf
from nemo_rlhf.parallel import checkpoint, state
from nemo_rlhf.parallel.gpt import build_gpt
from tests.spawn import run_distributed
from tests.workers import experts_worker
from tests.workers.experts_worker import NEW_TOKENS, OPTIM, Cut, Job

VOCAB, LENGTH = 61, 18
FAMILIES = ("mixtral", "qwen3_moe")
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
TWO = {"TP2": Cut(tp=2), "PP2": Cut(pp=2), "EP2": Cut(ep=2), "TP2xEP2 in one replica": Cut(tp=2, ep=2)}
FOUR = {"TP2xEP2": Cut(tp=2, ep=2), "TP2xEP4": Cut(tp=2, ep=4), "PP2xEP2": Cut(pp=2, ep=2), "TP2xPP2": Cut(2, 2)}

CUTS = ("alone", *TWO, *FOUR)
GENERATED = (
    *((family, cut) for family in FAMILIES for cut in ("alone", "EP2")),
    ("mixtral", "TP2"),
    ("mixtral", "TP2xEP2 in one replica"),
    ("mixtral", "TP2xEP4"),
    ("qwen3_moe", "PP2"),
    ("qwen3_moe", "PP2xEP2"),
)


def _tokens(seed: int, rows: int = 4) -> Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


TOKENS, BATCHES = _tokens(1), [_tokens(2), _tokens(3)]
PROMPTS = [[number + 1, 7, 3, 9, 11][: 2 + number % 4] for number in range(7)]


def _make(directory: Path, family: str) -> Path:
    """Weights large enough that a wrong route, weight or order shows, written by transformers itself."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    if family == "mixtral":
        config = MixtralConfig(**_COMMON, intermediate_size=20, num_local_experts=4, sliding_window=12)
        model: Any = MixtralForCausalLM(config)
    else:
        config = Qwen3MoeConfig(
            **_COMMON,
            intermediate_size=36,
            head_dim=10,
            num_experts=4,
            num_experts_per_tok=3,
            moe_intermediate_size=14,
            mlp_only_layers=[1],
            norm_topk_prob=False,
        )
        model = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {family: _make(root / family, family) for family in FAMILIES}


def _reference(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    # the plainest way of several that transformers has for experts
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What transformers and torch's own optimizer say, by family."""
    return {family: _expected(directory) for family, directory in models.items()}


def _expected(directory: Path) -> dict[str, Any]:
    model = _reference(directory)
    with torch.no_grad():
        logits = model(TOKENS).logits
        generated = [
            tuple(model.generate(torch.tensor([p]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(p) :].tolist())
            for p in PROMPTS
        ]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=tuple(OPTIM.betas), eps=OPTIM.eps)
    losses, norms = [], []
    for tokens in BATCHES:
        optimizer.zero_grad()
        shifted = model(tokens).logits[:, :-1].reshape(-1, VOCAB)
        loss = torch.nn.functional.cross_entropy(shifted, tokens[:, 1:].reshape(-1))
        loss.backward()
        losses.append(float(loss))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad)))
        optimizer.step()
    with torch.no_grad():
        learned, relearned = model(BATCHES[0]).logits, model(BATCHES[1]).logits
    return {
        "logits": logits,
        "generated": generated,
        "losses": losses,
        "norms": norms,
        "learned": learned,
        "relearned": relearned,
    }


@pytest.fixture(scope="module")
def results(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Every job's results by rank. A job is named "action family cut"."""
    saved = tmp_path_factory.mktemp("saved")
    worlds: dict[int, list[Job]] = {2: [], 4: [], 1: []}  # those of two save what the others go on with

    def add(world: int, action: str, family: str, cut: str, chosen: Cut, **arguments: Any) -> None:
        worlds[world].append(Job(f"{action} {family} {cut}", chosen, action, models[family], arguments))

    for family in FAMILIES:
        for world, cuts in ((1, {"alone": Cut()}), (2, TWO), (4, FOUR)):
            for name, cut in cuts.items():
                add(world, "logits", family, name, cut, tokens=TOKENS)
                add(world, "learn", family, name, cut, batches=BATCHES)
                if (family, name) in GENERATED:
                    add(world, "generate", family, name, cut, prompts=PROMPTS)
        state_of_two = saved / f"{family} optimizer"
        first, second = BATCHES[:1], BATCHES[1:]
        weights = saved / f"{family} learned"
        add(2, "learn", family, "first EP2", TWO["EP2"], batches=first, save_to=state_of_two, weights_to=weights)
        for world, name, cut in ((1, "alone", Cut()), (4, "TP2xEP2", FOUR["TP2xEP2"])):
            arguments = {"batches": second, "load_from": state_of_two}
            worlds[world].append(Job(f"resume {family} {name}", cut, "learn", weights, arguments))
        add(2, "score", family, "EP2", TWO["EP2"], tokens=TOKENS)
        add(1, "score", family, "alone", Cut(), tokens=TOKENS)
        add(2, "save", family, "EP2", TWO["EP2"], target=saved / f"{family} EP2")
        add(4, "save", family, "TP2xPP2", FOUR["TP2xPP2"], target=saved / f"{family} TP2xPP2")
    add(2, "refuse", "mixtral", "EP2", TWO["EP2"])
    add(2, "fail_in_one_replica", "mixtral", "EP2", TWO["EP2"], prompts=PROMPTS)
    found: dict[str, list[Any]] = {"saved": [saved]}
    for world, jobs in worlds.items():
        jobs.sort(key=lambda job: (job.cut.tp, job.cut.pp, job.cut.ep))  # groups of processes are made once a cut
        if world == 1:
            state.set_environment_for_one_process()
            ranks = [experts_worker.run(jobs)]
        else:
            ranks = run_distributed("tests.workers.experts_worker:run", world, jobs)
        found |= {job.name: [rank[job.name] for rank in ranks] for job in jobs}
    return found


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(results: Any, expected: Any, family: str, cut: str) -> None:
    found = [logits for logits in results[f"logits {family} {cut}"] if logits is not None]
    assert found
    for logits in found:
        torch.testing.assert_close(logits, expected[family]["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_are_those_of_torch(results: Any, expected: Any, family: str, cut: str) -> None:
    want = expected[family]
    assert min(want["norms"]) > 2 * OPTIM.clip_grad, "clipping must matter"
    for rank in results[f"learn {family} {cut}"]:
        assert rank["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(want["norms"], rel=1e-5)
        if rank["logits"] is not None:
            torch.testing.assert_close(rank["logits"], want["learned"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "cut"), GENERATED)
def test_greedy_generation_is_that_of_transformers(results: Any, expected: Any, family: str, cut: str) -> None:
    """With EP over replicas one of them has no prompt, and the others have different numbers of them."""
    found: dict[int, tuple[int, ...]] = {}
    for rank in results[f"generate {family} {cut}"]:
        found |= rank
    assert [found[number] for number in range(len(PROMPTS))] == expected[family]["generated"]


@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_may_have_different_numbers_of_rows(results: Any, expected: Any, family: str) -> None:
    (alone,) = results[f"score {family} alone"]
    want = expected[family]["logits"].log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(alone[:, 1:], want, rtol=0, atol=1e-4)
    for rank in results[f"score {family} EP2"]:
        torch.testing.assert_close(rank, alone, rtol=0, atol=1e-5)


def test_a_replica_that_fails_does_not_leave_the_others_waiting(results: Any) -> None:
    own, other = results["fail_in_one_replica mixtral EP2"]
    assert "60 tokens" in own
    assert "another replica" in other


@pytest.mark.parametrize("cut", ["EP2", "TP2xPP2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_gives_the_same_bits(
    results: Any, models: dict[str, Path], tmp_path: Path, family: str, cut: str
) -> None:
    export_hf(results["saved"][0] / f"{family} {cut}", tmp_path / "hf")
    back, original = load_file(tmp_path / "hf/model.safetensors"), load_file(models[family] / "model.safetensors")
    assert sorted(back) == sorted(original)
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_loads_what_was_imported(models: dict[str, Path], expected: Any, tmp_path: Path, family: str) -> None:
    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    import_hf(models[family], tmp_path / "checkpoint")
    model = build_gpt(architecture_of(_config(models[family])))
    checkpoint.load_model(model, tmp_path / "checkpoint")
    logits = experts_worker.logits(model, TOKENS)
    torch.testing.assert_close(logits, expected[family]["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_optimizer_saved_by_other_ranks_goes_on(results: Any, expected: Any, family: str) -> None:
    """One step under EP2, the next alone and under TP2xEP2: as two steps of torch's."""
    for rank in (*results[f"resume {family} alone"], *results[f"resume {family} TP2xEP2"]):
        assert rank["losses"] == pytest.approx(expected[family]["losses"][1:], rel=1e-5)
        torch.testing.assert_close(rank["logits"], expected[family]["relearned"], rtol=0, atol=1e-4)


def _config(directory: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((directory / "config.json").read_text()), **changes}


def test_every_parameter_has_the_key_that_megatron_writes(models: dict[str, Path]) -> None:
    """``written`` against megatron's own sharded state dict, stacked layers (Mixtral) and single ones."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    for family, directory in models.items():
        architecture = architecture_of(_config(directory))
        sharded = build_gpt(architecture).sharded_state_dict(metadata={"dp_cp_group": state.dp_group()})
        entries = weight_map(architecture).entries
        assert {name for name in sharded if not name.endswith("_extra_state")} == set(entries), family
        for name in entries:
            whole = sharded[name]
            tensor = whole.build()[0] if isinstance(whole, ShardedTensorFactory) else whole
            place = written(architecture, name)
            axes = tensor.prepend_axis_num
            assert place == (tensor.key, tensor.global_offset[:axes], tensor.global_shape[:axes]), name


def test_keys_are_also_found_where_other_programs_put_them(models: dict[str, Path]) -> None:
    architecture = architecture_of(_config(models["mixtral"]))
    expert = candidates(architecture, "decoder.layers.3.mlp.experts.local_experts.2.linear_fc1.weight")
    assert expert == (
        Place("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 2), (4, 4)),
        Place("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", (2,), (4,)),
        Place("decoder.layers.3.mlp.experts.experts.2.linear_fc1.weight"),
    )
    norms = [place.key for place in candidates(architecture, "decoder.layers.0.pre_mlp_layernorm.weight")]
    assert norms[0] == "decoder.layers.pre_mlp_layernorm.weight"
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in norms


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 of 4"),
        ("mixtral", {"num_experts_per_tok": 1}, "one expert"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer with experts"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=true"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    models: dict[str, Path], family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        architecture_of(_config(models[family], **changes))


def test_dense_layers_follow_the_sparse_step(models: dict[str, Path]) -> None:
    config = _config(models["qwen3_moe"], mlp_only_layers=[3], decoder_sparse_step=2)
    found: Architecture = architecture_of(config)
    assert found.dense_layers == (0, 2, 3)
    del config["num_local_experts"]
    assert architecture_of({**config, "num_experts": 8}).num_experts == 8  # as earlier versions named it


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("trainer.devices=4", "model.expert_model_parallel_size=3"), "must divide the 4"),
        (
            ("trainer.devices=12", "model.tensor_model_parallel_size=2", "model.expert_model_parallel_size=3"),
            "or be a multiple of it",
        ),
        (("model.expert_model_parallel_size=0",), "1 or more"),
    ],
)
def test_expert_parallel_sizes_are_checked_first(overrides: tuple[str, ...], words: str) -> None:
    required = ("model.restore_from=x", "data.prompts=x", "out=x")
    with pytest.raises(ValueError, match=words):
        load("generate", [*required, *overrides])


def test_sizes_that_the_model_does_not_allow_are_refused(results: Any) -> None:
    odd, dense, unsplit = results["refuse mixtral EP2"][0]
    assert "does not divide the model's num_experts=3" in odd
    assert "the model has no experts" in dense
    assert "sequence_parallel=true" in unsplit
