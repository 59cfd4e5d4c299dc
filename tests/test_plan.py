"""The planner: its bytes against what megatron-core really allocates, its choices, its words."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_rlhf.cli import main
from nemo_rlhf.cli.plan import run_plan
from nemo_rlhf.config import config_directory, data_parallel_size, load
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.commands import REQUIRED
from nemo_rlhf.config.plan import PlanConfig
from nemo_rlhf.launch.activations import (
    Passage,
    cache_bytes,
    evaluation_bytes,
    prefill_bytes,
    prefill_tokens,
    sampling_bytes,
    update_bytes,
    update_peak,
)
from nemo_rlhf.launch.memory import host_bytes, peak, phases
from nemo_rlhf.launch.models import ARCHITECTURES
from nemo_rlhf.launch.parameters import Cut, buffer_elements, num_parameters, role_bytes, stage_parameters
from nemo_rlhf.launch.search import best_plans, budget, plans
from nemo_rlhf.launch.time import forward_flops, samples_per_hour, seconds
from nemo_rlhf.launch.work import Model, Plan, Work, make_work
from nemo_rlhf.parallel import state
from tests.spawn import run_distributed
from tests.workers.plan_worker import (
    LENGTH,
    MICROBATCHES,
    NEW_TOKENS,
    RESPONSE,
    ROWS,
    SLOTS,
    Case,
    Measured,
    measure,
    peaks,
)

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
TIED = replace(LLAMA, tie_embeddings=True, qk_norm=True)
GPT2 = replace(
    LLAMA,
    num_query_groups=4,
    rope={},
    tie_embeddings=True,
    normalization="layernorm",
    activation="gelu_tanh",
    gated=False,
    linear_bias=True,
    position_embedding="learned",
)
GEMMA = replace(
    LLAMA, tie_embeddings=True, activation="gelu_tanh", zero_centered_norm=True, embedding_scale=48**0.5, qkv_bias=True
)
ILQL = replace(LLAMA, ilql_num_q=2, ilql_head_width=72)
TWO_TRUNKS = replace(ILQL, ilql_value_trunk=True)
LARGE = replace(LLAMA, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, kv_channels=32)
EXPERTS = replace(LLAMA, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=40)
MIXED = replace(EXPERTS, dense_layers=(0, 3))

CASES = {
    1: [
        Case("llama", LLAMA, generate=True),
        Case("bf16", LLAMA, precision="bf16", generate=True),
        Case("tied, full recomputation", TIED, precision="bf16", recompute="full"),
        Case("selective recomputation", LLAMA, recompute="selective"),
        Case("experts, selective recomputation", MIXED, recompute="selective"),
        Case("tied, normed heads", TIED),
        Case("gpt2", GPT2),
        Case("gemma with biases", GEMMA, precision="bf16"),
        Case("critic", LLAMA, role="critic", precision="bf16"),
        Case("ilql", ILQL, role="ilql", precision="bf16"),
        Case("ilql, two trunks", TWO_TRUNKS, role="ilql", generate=True),
        Case("experts", MIXED),
    ],
    4: [
        Case("tp2 dp2", LLAMA, tp=2, precision="bf16", generate=True),
        Case("tp2 dp2 sp critic", LLAMA, role="critic", tp=2, sequence_parallel=True),
        Case("tp2 dp2 ilql", ILQL, role="ilql", tp=2, precision="bf16"),
        Case("tp2 dp2 ep2 sp", EXPERTS, tp=2, ep=2, sequence_parallel=True),
        Case("pp2 dp2", LLAMA, pp=2, precision="bf16", generate=True),
        Case("pp2 dp2 tied", TIED, pp=2, precision="bf16"),
        Case("pp2 dp2, full recomputation", LLAMA, pp=2, recompute="full"),
        Case("pp2 dp2 ilql, two trunks", TWO_TRUNKS, role="ilql", pp=2),
        Case("pp2 dp2 tied, buckets", TIED, pp=2, bucket_size=9000),
        Case("dp4", LLAMA, precision="bf16"),
        Case("dp4 ilql", ILQL, role="ilql", precision="bf16"),
        Case("dp4 ep2", EXPERTS, ep=2, precision="bf16"),
        Case("dp4, buckets", TIED, bucket_size=9000),
        Case("tp2 pp2 tied, sp", TIED, tp=2, pp=2, sequence_parallel=True, precision="bf16"),
    ],
}


@pytest.fixture(scope="module", params=sorted(CASES))
def measured(request: pytest.FixtureRequest) -> list[tuple[Case, Cut, Measured]]:
    """Every case of a world size, as each of its ranks measured it."""
    world = request.param
    cases = CASES[world]
    if world == 1:
        state.set_environment_for_one_process()
        ranks = [measure(cases)]
    else:
        ranks = run_distributed("tests.workers.plan_worker:measure", world, cases)
    return [
        (case, Cut(case.tp, case.pp, world // case.tp // case.pp, case.ep, case.sequence_parallel), rank[case.name])
        for case in cases
        for rank in ranks
    ]


def _trained(measured):
    return [row for row in measured if not row[0].bucket_size]


def _itemsize(case: Case) -> int:
    return {"32": 4, "bf16": 2}[case.precision]


def test_bytes_of_parameters_are_exact(measured) -> None:
    for case, cut, found in _trained(measured):
        args = case.architecture, case.role, cut, found.stage, _itemsize(case)
        assert role_bytes(*args, trainable=False).weights == found.frozen, case.name
        said = role_bytes(*args, trainable=True, rank=found.dp_rank, overlap=False)
        assert (said.weights, said.gradients, said.optimizer) == (
            found.weights,
            found.gradients,
            found.optimizer,
        ), case.name


def test_activations_within_a_tenth(measured) -> None:
    passage = Passage(ROWS, LENGTH, ROWS * RESPONSE)
    for case, cut, found in _trained(measured):
        said = update_bytes(
            case.architecture,
            case.role,
            cut,
            found.stage,
            replace(passage, recompute=case.recompute, layer_spec=case.layer_spec),
            MICROBATCHES,
            _itemsize(case),
        )
        assert said == pytest.approx(found.activations, rel=0.1), case.name


def test_buckets_are_exact(measured) -> None:
    for case, cut, found in measured:
        if case.bucket_size:
            parameters = list(stage_parameters(case.architecture, case.role, cut, found.stage, 4))
            bucket = case.bucket_size if found.stage == 0 else None
            assert buffer_elements(parameters, cut.dp, found.dp_rank, bucket) == found.buckets, case.name


def test_the_cache_is_exact(measured) -> None:
    for case, cut, found in measured:
        if case.generate:
            said = cache_bytes(case.architecture, case.role, cut, SLOTS, LENGTH + NEW_TOKENS, _itemsize(case))
            assert sum(found.cache) == said, case.name


@pytest.mark.parametrize(
    "case",
    [
        Case("head", replace(LLAMA, vocab_size=5000), precision="bf16"),
        Case("head after recomputation", replace(LLAMA, vocab_size=5000), recompute="full"),
        Case("layer", LARGE, precision="bf16"),
        Case("recomputed layer", LARGE, recompute="full"),
        Case("recomputed feed-forward part", LARGE, recompute="selective"),
        Case("critic", LARGE, role="critic", precision="bf16", recompute="full"),
        Case("ilql", replace(LARGE, vocab_size=2000, ilql_num_q=2, ilql_head_width=400), role="ilql"),
    ],
    ids=lambda case: case.name,
)
def test_whole_peaks_within_a_tenth(case: Case) -> None:
    """All that is allocated on top of what the models hold between steps, temporaries included."""
    state.set_environment_for_one_process()
    update, evaluation, rollout = peaks(case)
    args, size = (case.architecture, case.role, Cut()), _itemsize(case)
    passage = Passage(ROWS, LENGTH, ROWS * RESPONSE, case.recompute)
    assert sum(update_peak(*args, 0, passage, MICROBATCHES, size)) == pytest.approx(update, rel=0.1)
    if case.role == "policy":
        assert evaluation_bytes(*args, 0, passage, size) == pytest.approx(evaluation, rel=0.1)
        cache = cache_bytes(*args, SLOTS, LENGTH + NEW_TOKENS, size)
        tokens = prefill_tokens(Cut(), SLOTS, LENGTH, LENGTH + NEW_TOKENS)
        prefill = prefill_bytes(case.architecture, Cut(), tokens, size)
        drawing = sampling_bytes(*args, SLOTS, tokens, size)
        assert cache + max(prefill, drawing) == pytest.approx(rollout, rel=0.1)


# ---- what is proposed


def config(*overrides: str) -> PlanConfig:
    return load("plan", [f"plan.model={overrides[0]}", *overrides[1:]])


def work(*overrides: str, **models: Architecture) -> Work:
    cfg = config(*overrides)
    return make_work(
        cfg, models.get("model", ARCHITECTURES.get(cfg.plan.model)), models.get("critic"), models.get("reward_model")
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of the models' own safetensors files
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_shipped_architectures_have_the_parameters_of_their_models(name: str, parameters: int) -> None:
    assert num_parameters(ARCHITECTURES[name]) == parameters


def test_the_parts_of_a_model_are_the_whole() -> None:
    """Over all ranks of a replica: what is cut sums up, what is replicated is there once a rank."""
    what = ARCHITECTURES["llama3-70b"]
    whole = sum(p.numel for p in stage_parameters(what, "policy", Cut(), 0, 2))
    cut = Cut(tp=8, pp=16)
    parts = [p.numel for stage in range(16) for p in stage_parameters(what, "policy", cut, stage, 2)]
    norms = (2 * what.num_layers + 1) * what.hidden_size
    assert 8 * (sum(parts) - norms) + norms == whole


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("ppo", ()),
        ("ppo", ("plan.advantage=grpo", "plan.samples_per_prompt=2")),
        ("rft", ()),
        ("ilql", ("plan.value_trunk=true",)),
        ("sft", ()),
        ("reward", ()),
    ],
)
def test_a_written_plan_is_accepted_by_its_command(
    algorithm: str, more: tuple[str, ...], tmp_path: Path, capsys
) -> None:
    path = tmp_path / "planned.yaml"
    nodes = 4 if algorithm == "ilql" else 1
    arguments = [f"plan.algorithm={algorithm}", f"cluster.nodes={nodes}", "plan.num_prompts=256", *more]
    assert main(["plan", "plan.model=llama3-8b", *arguments, "--write", str(path), "--top", "1"]) == 0
    assert str(path) in capsys.readouterr().out
    required = [f"{key}={value}" for key, value in REQUIRED[algorithm].items()]
    loaded: Any = load(algorithm, required, config_file=path)
    (proposal,) = best_plans(work("llama3-8b", *arguments), 1)
    cut = proposal.plan.cut
    assert loaded.model.tensor_model_parallel_size == cut.tp
    assert loaded.model.micro_batch_size == proposal.plan.micro_batch_size
    assert loaded.trainer.num_nodes == nodes and data_parallel_size(loaded) == cut.dp
    if algorithm == "ppo":
        assert loaded.ppo.num_prompts == 256 and set(loaded.ppo.offload) >= set(proposal.plan.offload)


def test_fastest_first_and_all_fit() -> None:
    job = work("llama3-70b", "cluster.nodes=8", "plan.num_prompts=1024")
    proposals = best_plans(job, 5)
    speeds = [proposal.samples_per_hour for proposal in proposals]
    assert len(proposals) == 5 and speeds == sorted(speeds, reverse=True)
    assert all(proposal.peak <= budget(job) for proposal in proposals)
    assert len({proposal.plan.cut for proposal in proposals}) == 5
    # and of the best cut, nothing that fits is faster
    cut = proposals[0].plan.cut
    fitting = [plan for plan in plans(job, cut) if peak(job, plan)[0] <= budget(job)]
    assert max(samples_per_hour(job, plan) for plan in fitting) == speeds[0]


def test_given_sizes_are_kept() -> None:
    sizes = ("plan.tensor_model_parallel_size=8", "plan.pipeline_model_parallel_size=2", "plan.micro_batch_size=2")
    (proposal,) = best_plans(work("llama3-8b", "cluster.nodes=2", *sizes), 3)
    assert (proposal.plan.cut.tp, proposal.plan.cut.pp, proposal.plan.micro_batch_size) == (8, 2, 2)


def test_offloading_makes_room_where_there_is_none() -> None:
    tight = work("llama3-8b", "cluster.gpus_per_node=4", "plan.num_prompts=256")
    plan = best_plans(tight, 1)[0].plan
    assert plan.offload or plan.reference != "resident"
    everything = replace(plan, offload=(), reference="resident")
    assert peak(tight, everything)[0] > budget(tight)
    assert host_bytes(tight, everything) == 0 < host_bytes(tight, plan)


def test_every_pipeline_stage_is_looked_at() -> None:
    job = work("llama3-8b", "cluster.nodes=2")
    for plan in (Plan(Cut(2, 8, 1, 1, True), 1, None, 64, "resident"), Plan(Cut(1, 4, 4), 2, "full", 32, "swap")):
        every = [max(sum(rows.values()) for rows in phases(job, plan, stage).values()) for stage in range(plan.cut.pp)]
        assert peak(job, plan) == (max(every), max(s for s, size in enumerate(every) if size == max(every)))


def test_critic_and_reward_model_count() -> None:
    plan = Plan(Cut(8, 1, 1, 1, True), 1, "full", 32, "resident", (), "resident")
    small = work("llama3-70b", critic=ARCHITECTURES["llama3-8b"], reward_model=ARCHITECTURES["llama3-8b"])
    rows = phases(small, plan, 0)["score"]
    critic = ARCHITECTURES["llama3-8b"]
    assert rows["critic weights"] == role_bytes(critic, "critic", plan.cut, 0, 2, trainable=True).weights
    assert rows["reward model"] == role_bytes(critic, "critic", plan.cut, 0, 2, trainable=False).weights
    away = replace(plan, reward_model="swap")
    assert "reward model" not in phases(small, away, 0)["update"] and "reward model" in phases(small, away, 0)["score"]
    alone = work("llama3-70b", "plan.advantage=rloo", "plan.samples_per_prompt=4")
    assert not any("critic" in name for rows in phases(alone, plan, 0).values() for name in rows)


SHIPPED = sorted(path.stem for path in (config_directory() / "examples").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_examples_fit(name: str) -> None:
    family, size, command = name.split("_")
    required = [f"{key}={value}" for key, value in REQUIRED[command].items()]
    cfg: Any = load(command, required, config_file=f"examples/{name}")
    cut = Cut(
        cfg.model.tensor_model_parallel_size,
        cfg.model.pipeline_model_parallel_size,
        data_parallel_size(cfg),
        sequence_parallel=cfg.model.sequence_parallel,
    )
    model = f"llama3-{size.replace('7b', '8b')}"  # larger than any 7B
    asked = [f"plan.algorithm={command}", f"cluster.nodes={cfg.trainer.num_nodes}"]
    plan = Plan(cut, cfg.model.micro_batch_size, cfg.model.activations_checkpoint_granularity)
    if command == "ppo":
        offload, slots = tuple(cfg.ppo.offload), cfg.generation.num_slots
        plan = replace(plan, slots=slots, reference=cfg.ppo.reference, offload=offload)
        asked += [f"plan.num_prompts={cfg.ppo.num_prompts}", f"plan.response_tokens={cfg.generation.max_new_tokens}"]
        asked += [f"plan.prompt_tokens={cfg.data.max_prompt_length}"]
        if family == "tldr":  # which names its reward model on the command line
            asked, plan = [*asked, f"plan.reward_model={model}"], replace(plan, reward_model="swap")
    else:
        asked += [f"plan.{part}_tokens={cfg.data.max_sequence_length // 2}" for part in ("prompt", "response")]
    job = work(model, *asked)
    assert peak(job, plan)[0] <= budget(job)
    assert host_bytes(job, plan) <= job.cluster.host_memory_gib * 2**30


NODES = {"llama3-8b": (1, 1), "llama3-70b": (4, 8), "qwen3-8b": (1, 1), "qwen3-32b": (2, 4), "mixtral-8x7b": (2, 4)}


@pytest.mark.parametrize("name", sorted(NODES))
def test_models_of_the_group_fit(name: str) -> None:
    """On as many nodes as their files say: of PPO, and of everything else."""
    assert sorted(NODES) == sorted(path.stem for path in (config_directory() / "model").glob("*.yaml"))
    for command in ("sft", "reward", "rft", "ilql", "ppo"):
        nodes = NODES[name][command == "ppo"]
        overrides = [f"{key}={value}" for key, value in REQUIRED[command].items()]
        overrides += [f"model={name}", "trainer.devices=8", f"trainer.num_nodes={nodes}", "trainer.precision=bf16"]
        cfg: Any = load(command, overrides)
        cut = Cut(
            cfg.model.tensor_model_parallel_size,
            cfg.model.pipeline_model_parallel_size,
            data_parallel_size(cfg),
            cfg.model.expert_model_parallel_size,
            cfg.model.sequence_parallel,
        )
        plan = Plan(cut, cfg.model.micro_batch_size, cfg.model.activations_checkpoint_granularity)
        if command in ("ppo", "rft"):
            plan = replace(plan, slots=cfg.generation.num_slots)
        if command == "ppo":
            plan = replace(plan, reference="swap", offload=("optimizer", "critic"))
        if command == "ilql":
            plan = replace(plan, slots=32)
        job = work(name, f"plan.algorithm={command}", f"cluster.nodes={nodes}")
        assert peak(job, plan)[0] <= budget(job), command
        assert host_bytes(job, plan) <= job.cluster.host_memory_gib * 2**30


# ---- time


def test_operations_of_a_forward_pass_against_a_sum_over_matrices() -> None:
    what, length = ARCHITECTURES["llama3-8b"], 512
    matrices = 32 * [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)]
    matrices += 32 * [(4096, 14336), (4096, 14336), (14336, 4096)]
    multiplications = length * sum(rows * columns for rows, columns in matrices) + 10 * 4096 * 128256
    pairs = sum(query + 1 for query in range(length))  # of a query and the keys up to it
    multiplications += 32 * 2 * 4096 * pairs
    assert forward_flops(Model(what, "policy", 2), length, 10) == pytest.approx(2 * multiplications, rel=1e-3)
    # 2 of 8 experts: the dense model of the same width and one more feed-forward part
    sparse = forward_flops(Model(ARCHITECTURES["mixtral-8x7b"], "critic", 2), length, 0)
    dense = forward_flops(Model(what, "critic", 2), length, 0)
    assert sparse - dense == 2 * length * 32 * 3 * 4096 * 14336


def test_what_makes_a_step_longer() -> None:
    job, plan = work("llama3-8b"), Plan(Cut(2, 2, 2, 1, True), 1, None, 64, "resident")
    usual = seconds(job, plan)

    def slower(phase: str, *overrides: str, **changes: Any) -> float:
        return seconds(work("llama3-8b", *overrides), replace(plan, **changes))[phase] / usual[phase]

    assert slower("update", "plan.epochs=2") == pytest.approx(2)
    assert slower("update", recompute="full") == pytest.approx(4 / 3, rel=0.05)  # 4 forward passes' work for 3
    assert slower("rollout", slots=32) == pytest.approx(2, rel=0.1)  # launching kernels is what decoding waits for
    assert slower("rollout", "cluster.layer_us=800") == pytest.approx(2, rel=0.1)
    assert slower("experience", "cluster.utilisation=0.2") == pytest.approx(2, rel=0.1)
    assert slower("update", "cluster.nvlink_gb_per_s=45") > 1.05
    assert seconds(job, replace(plan, offload=("optimizer",)))["offloading"] > 0 and "offloading" not in usual
    # a pipeline of p stages with m microbatches takes (m + p - 1) / m times as long
    lone, quick = replace(plan, cut=Cut(2, 4, 1, 1, True)), "cluster.memory_gb_per_s=1e9"  # nothing else a step
    few, many = (
        seconds(work("llama3-8b", quick, f"plan.global_batch_size={size}"), lone)["update"] for size in (4, 128)
    )
    assert few / many == pytest.approx((4 + 3) / 4 * 128 / (128 + 3), rel=1e-3)


# ---- words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["llama3-70b", "cluster.nodes=4"], ["does not fit", "4 x 8 GPUs", "TP8 x PP4", "GiB", "5 nodes would do"]),
        (["llama3-8b", "plan.tensor_model_parallel_size=3"], ["cannot be cut", "divisible"]),
        (
            ["llama3-8b", "cluster.gpus_per_node=4", "cluster.memory_gib=76", "cluster.host_memory_gib=10"],
            ["does not fit", "cluster.host_memory_gib=10 of a node", "2 nodes would do"],
        ),
        (["llama3-80b"], ["llama3-80b", "llama3-8b", "mixtral-8x7b"]),
        (["llama3-8b", "plan.response_tokens=9000"], ["8192 tokens", "lower"]),
        (["llama3-8b", "plan.critic=mixtral-8x7b"], ["plan.critic=mixtral-8x7b", "32000", "128256"]),
        (["llama3-8b", "plan.algorithm=dpo"], ["plan.algorithm=dpo", "ppo"]),
        (["llama3-8b", "plan.algorithm=sft", "plan.critic=llama3-8b"], ["plan.critic=llama3-8b", "ppo only"]),
        (["llama3-8b", "plan.advantage=grpo"], ["plan.samples_per_prompt=1", "2 or more"]),
        (["llama3-8b", "plan.num_prompts=100"], ["plan.num_prompts=100", "does not divide"]),
        (["llama3-8b", "cluster.nodes=0"], ["cluster.nodes=0", "1 or more"]),
        (["llama3-8b", "cluster.reserve_gib=90"], ["cluster.reserve_gib=90", "lower it"]),
        (["llama3-8b", "cluster.gpus=8"], ["cluster.gpus ", "did you mean"]),
    ],
)
def test_one_sentence_says_what_is_wrong(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        run_plan(config(*overrides), 1, None)
    said = str(error.value)
    assert "\n" not in said and said.endswith((".", "?"))
    assert all(word in said for word in words), said


def test_a_checkpoint_is_planned_as_its_architecture(tmp_path: Path, capsys) -> None:
    replace(LLAMA, num_query_groups=4).save(tmp_path)
    arguments = ["plan.prompt_tokens=32", "plan.response_tokens=32", "cluster.gpus_per_node=2"]
    assert main(["plan", f"plan.model={tmp_path}", *arguments]) == 0
    assert "TP" in capsys.readouterr().out


def test_documented_tables_are_what_the_command_prints() -> None:
    text = (Path(__file__).parent.parent / "docs" / "planning.md").read_text()
    blocks = re.findall(r"```console\n\$ nemo-rlhf plan ([^\n]*?)(?: --top (\d))?\n([^`]*)```", text)
    assert len(blocks) > 10
    for overrides, count, printed in blocks:
        try:
            found = run_plan(load("plan", overrides.split()), int(count or 3), None)
        except ValueError as error:
            found = f"nemo-rlhf: error: {error}\n"
        assert found == printed, overrides
