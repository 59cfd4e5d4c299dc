"""Every cut of a model learns the same, and what transformers and torch's AdamW learn on the same weights.

Jobs of ``parallel_worker`` run here (a world of one) and once in each world of two and of four; the tests compare what
they return.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rlhf.config.optim import SchedConfig
from nemo_rlhf.parallel import state
from tests.spawn import run_distributed
from tests.workers import parallel_worker as worker
from tests.workers.parallel_worker import OPTIM, SEED, VOCAB, Cut, Job

KINDS = ("policy", "sft", "critic")
TIED = {"tied": True, "untied": False}
CASES = [(kind, tied) for kind in KINDS for tied in TIED]
ONE = Cut()
TP2, TP2_SP, PP2, DP2 = Cut(tp=2), Cut(tp=2, sequence_parallel=True), Cut(pp=2), Cut()
CUTS = {
    2: {"TP2": TP2, "TP2+SP": TP2_SP, "PP2": PP2, "DP2": DP2},
    4: {"TP2xPP2": Cut(2, 2), "TP2xPP2+SP": Cut(2, 2, True)},
}
# these run fewer jobs
MORE_CUTS = {"TP2xDP2": Cut(tp=2), "PP2xDP2": Cut(pp=2), "PP4": Cut(pp=4)}
FEW_CASES = [("policy", "tied"), ("critic", "untied")]
RESHARDED = [("policy", "tied"), ("policy", "untied"), ("critic", "untied")]
SAVED = {"TP2": ("policy",), "TP2+SP": ("critic",), "PP2": ("policy", "critic"), "DP2": ("policy", "critic")}
RECOMPUTE = ("full", "selective")
# steps of fp32 from the same weights: sums in another order, amplified by Adam's division
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two Llamas, written by transformers, with weights large enough that every detail shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directories = {}
    for name, tied in TIED.items():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms that are all one would hide a norm that is left out
                    parameter.add_(0.2 * torch.randn_like(parameter))
        directories[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(directories[name])
    return directories


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worlds leave checkpoints for each other."""
    return tmp_path_factory.mktemp("checkpoints")


def learning_jobs(cuts: dict[str, Cut], cases: list[tuple[str, str]], llamas: dict[str, Path]) -> list[Job]:
    return [
        Job(f"{label}/{kind}/{tied}/2", cut, "train", {"kind": kind, "directory": llamas[tied]})
        for label, cut in cuts.items()
        for kind, tied in cases
    ]


def training_jobs(cuts: dict[str, Cut], llamas: dict[str, Path]) -> list[Job]:
    jobs = learning_jobs(cuts, CASES, llamas)
    for label, cut in cuts.items():
        for size in (1, 4):
            arguments = {"kind": "policy", "directory": llamas["untied"], "micro_batch": size}
            jobs.append(Job(f"{label}/policy/untied/{size}", cut, "train", arguments))
        for kind in ("policy", "critic"):
            jobs.append(
                Job(f"{label}/random/{kind}", cut, "random_start", {"kind": kind, "directory": llamas["untied"]})
            )
    return jobs


def recompute_jobs(label: str, cut: Cut, llamas: dict[str, Path]) -> list[Job]:
    return [
        Job(f"{label}/{how}", cut, "train", {"kind": "policy", "directory": llamas["untied"], "recompute": how})
        for how in RECOMPUTE
    ]


def save_job(name: str, cut: Cut, kind: str, llamas: dict[str, Path], shelf: Path, precision: str = "32") -> Job:
    arguments = {"kind": kind, "directory": llamas["tied"], "target": shelf / name, "precision": precision}
    return Job(f"save/{name}", cut, "train_and_save", arguments)


def resume_job(name: str, label: str, cut: Cut, kind: str, shelf: Path, precision: str = "32") -> Job:
    return Job(f"{name}->{label}", cut, "resume", {"kind": kind, "target": shelf / name, "precision": precision})


@pytest.fixture(scope="module")
def one(llamas: dict[str, Path], shelf: Path) -> dict[str, Any]:
    state.set_environment_for_one_process()
    jobs = training_jobs({"TP1": ONE}, llamas) + recompute_jobs("TP1", ONE, llamas)
    jobs += [save_job("one", ONE, "policy", llamas, shelf), resume_job("one", "TP1", ONE, "policy", shelf)]
    for precision in ("32", "bf16"):
        arguments = {"kind": "critic", "directory": llamas["untied"], "precision": precision}
        jobs.append(Job(f"offload/{precision}", ONE, "train_offloaded", arguments))
    jobs.append(Job("references", ONE, "references", {"directory": llamas["tied"]}))
    return worker.run_jobs(jobs)


def offload_jobs(llamas: dict[str, Path]) -> list[Job]:
    jobs = []
    for label, cut in (("TP2", TP2), ("DP2", DP2)):
        arguments = {"kind": "critic", "directory": llamas["tied"], "precision": "bf16"}
        jobs.append(Job(f"offload/{label}", cut, "train_offloaded", arguments))
        jobs.append(Job(f"references/{label}", cut, "references", {"directory": llamas["tied"]}))
    return jobs


def reshard_jobs(llamas: dict[str, Path], shelf: Path) -> list[Job]:
    """Hugging Face -> TP2 -> PP2 -> DP2, each from the checkpoint of the one before."""
    jobs = []
    for kind, tied in RESHARDED:
        name = f"{kind}-{tied}"
        sources = {"TP2": llamas[tied], "PP2": shelf / f"{name}-TP2", "DP2": shelf / f"{name}-PP2"}
        for label, source in sources.items():
            arguments = {"kind": kind, "source": source, "target": shelf / f"{name}-{label}"}
            jobs.append(Job(f"store/{name}/{label}", CUTS[2][label], "store", arguments))
        for label, source in (("start", llamas[tied]), ("end", shelf / f"{name}-DP2")):
            jobs.append(Job(f"weights/{name}/{label}", DP2, "weights_of", {"kind": kind, "source": source}))
    return jobs


def resume_jobs(llamas: dict[str, Path], shelf: Path) -> list[Job]:
    jobs = []
    for label, cut in CUTS[2].items():
        for kind in SAVED[label]:
            name = f"{kind}-{label}"
            jobs += [save_job(name, cut, kind, llamas, shelf), resume_job(name, label, cut, kind, shelf)]
    for kind in ("policy", "critic"):
        name = f"{kind}-DP2-bf16"
        jobs.append(save_job(name, DP2, kind, llamas, shelf, "bf16"))
        jobs.append(resume_job(name, "DP2", DP2, kind, shelf, "bf16"))
    arguments = {"kind": "critic", "directory": llamas["tied"], "target": shelf / "unused"}
    return [
        *jobs,
        resume_job("critic-DP2-bf16", "TP2", TP2, "critic", shelf, "bf16"),
        resume_job("policy-DP2", "TP2", TP2, "policy", shelf),
        resume_job("critic-DP2", "TP2", TP2, "critic", shelf),
        resume_job("policy-TP2", "PP2", PP2, "policy", shelf),
        resume_job("policy-PP2", "DP2", DP2, "policy", shelf),
        resume_job("one", "PP2", PP2, "policy", shelf),
        resume_job("one", "TP2+SP", TP2_SP, "policy", shelf),
        Job("unused", DP2, "save_unused", arguments),
    ]


def refusal_jobs(llamas: dict[str, Path], shelf: Path) -> list[Job]:
    changes = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 128,
        "num_query_groups": 4,
        "vocab_size": 500,
        "tie_embeddings": False,
    }
    arguments = {"directory": llamas["tied"], "changes": changes, "target": shelf / "policy-TP2"}
    return [
        Job("refusals", TP2, "refusals", arguments),
        Job("damage", TP2, "damage", {"whole": shelf / "policy-TP2", "work": shelf / "damaged"}),
    ]


@pytest.fixture(scope="module")
def two(llamas: dict[str, Path], shelf: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = training_jobs(CUTS[2], llamas)
    jobs += recompute_jobs("TP2+SP", TP2_SP, llamas) + recompute_jobs("PP2", PP2, llamas)
    jobs.append(Job("norms", TP2_SP, "norm_gradients", {"directory": llamas["untied"]}))
    jobs += (
        offload_jobs(llamas) + reshard_jobs(llamas, shelf) + resume_jobs(llamas, shelf) + refusal_jobs(llamas, shelf)
    )
    return run_distributed("tests.workers.parallel_worker:run_jobs", 2, jobs)


@pytest.fixture(scope="module")
def four(llamas: dict[str, Path]) -> list[dict[str, Any]]:
    jobs = training_jobs(CUTS[4], llamas) + learning_jobs(MORE_CUTS, FEW_CASES, llamas)
    return run_distributed("tests.workers.parallel_worker:run_jobs", 4, jobs)


@pytest.fixture(scope="module")
def resumed_by_one(shelf: Path, two: list[dict[str, Any]]) -> dict[str, Any]:
    """What the world of one makes of checkpoints of the world of two."""
    jobs = [resume_job(f"policy-{label}", "TP1", ONE, "policy", shelf) for label in ("TP2", "PP2")]
    jobs.append(resume_job("critic-DP2", "TP1", ONE, "critic", shelf))
    return worker.run_jobs(jobs)


# ---- the slow reference


def reference_objective(model: Any, head: Tensor, kind: str) -> tuple[Tensor, dict[str, float]]:
    """Loss of the whole batch, row by row without padding, from logits and formulas written out."""
    batch = worker.make_batch()
    total, sums = torch.zeros(()), dict.fromkeys(("loss", "entropy", "clipped", "ratio", "kl"), 0.0)
    for row, length in enumerate(batch.lengths.tolist()):
        tokens, mask = batch.tokens[row, :length], batch.mask[row, 1:length]
        old = {name: field[row, 1:length][mask] for name, field in batch.fields.items()}
        if kind == "critic":
            hidden = model.model(tokens[None]).last_hidden_state[0, :-1]
            values = (hidden @ head.t()).squeeze(-1)[mask]
            near = old["values"] + (values - old["values"]).clamp(-worker.VALUE_CLIP, worker.VALUE_CLIP)
            plain, limited = (values - old["returns"]) ** 2 / 2, (near - old["returns"]) ** 2 / 2
            losses = torch.maximum(plain, limited)
            sums["clipped"] += float((limited > plain).sum())
        else:
            logits = model(tokens[None]).logits[0, :-1] / (1.0 if kind == "sft" else worker.TEMPERATURE)
            log_probs = logits.log_softmax(-1)
            chosen = log_probs.gather(-1, tokens[1:, None]).squeeze(-1)[mask]
            losses = -chosen
            if kind == "policy":
                ratio, advantages = (chosen - old["logprobs"]).exp(), old["advantages"]
                bounded = ratio.clamp(1 - worker.CLIP_LOW, 1 + worker.CLIP_HIGH) * advantages
                surrogate = torch.minimum(ratio * advantages, bounded)
                floored = torch.where(
                    advantages < 0, torch.maximum(surrogate, worker.DUAL_CLIP * advantages), surrogate
                )
                entropy = -(log_probs.exp() * log_probs).sum(-1)[mask]
                losses = -floored
                total = total - worker.ENTROPY_COEF * entropy.sum() / batch.selected
                sums["entropy"] += float(entropy.sum())
                sums["ratio"] += float(ratio.sum())
        total = total + losses.sum() / batch.selected
        sums["loss"] += float(losses.sum())
    return total, {name: value / batch.selected for name, value in sums.items()}


def reference_rate(step: int) -> float:
    """Two steps of linear warm-up, then a cosine from the peak at step 2 to the minimum at step 4."""
    if step <= 2:
        return OPTIM.lr * step / 2
    low = OPTIM.sched.min_lr
    return low + (OPTIM.lr - low) * 0.5 * (1 + math.cos(math.pi * (step - 2) / (worker.TOTAL_STEPS - 2)))


def reference_training(directory: Path, kind: str, steps: int = 3) -> dict[str, Any]:
    """transformers' Llama under torch's AdamW, with the norms' gradients of the first step."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory)
    head = torch.nn.Parameter(worker.head_weight())
    trunk = model.model.parameters() if kind == "critic" else model.parameters()
    parameters = [*trunk, *([head] if kind == "critic" else [])]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=tuple(OPTIM.betas), eps=OPTIM.eps)
    logged, norms = [], {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss, sums = reference_objective(model, head, kind)
        loss.backward()
        if step == 1:
            norms = {name: p.grad.clone() for name, p in model.named_parameters() if "norm" in name}
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(step)
        optimizer.step()
        logged.append({**sums, "norm": norm, "lr": reference_rate(step)})
    return {"steps": logged, "norms": norms}


# ---- learning


def series(steps: list[dict[str, float]], name: str) -> Tensor:
    return torch.tensor([step[name] for step in steps], dtype=torch.float64)


def assert_same_steps(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(actual) == len(expected) and actual[0].keys() == expected[0].keys()
    for name in actual[0]:
        torch.testing.assert_close(
            series(actual, name), series(expected, name), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_learns_what_transformers_and_adamw_learn(
    one: dict[str, Any], llamas: dict[str, Path], kind: str, tied: str
) -> None:
    steps = one[f"TP1/{kind}/{tied}/2"]["steps"]
    expected = reference_training(llamas[tied], kind)["steps"]
    names = {
        "policy": {"loss/policy": "loss", "entropy/mean": "entropy", "ratio/mean": "ratio"},
        "sft": {"loss": "loss"},
        "critic": {"loss/value": "loss", "clipfrac/value": "clipped"},
    }[kind]
    for ours, theirs in {**names, "norm": "norm", "lr": "lr"}.items():
        torch.testing.assert_close(
            series(steps, ours), series(expected, theirs), **TOLERANCE, msg=lambda m, n=ours: f"{n}: {m}"
        )
    assert float(series(steps, "norm")[0]) > OPTIM.clip_grad, "no gradient was clipped"
    losses = series(steps, next(iter(names)))
    assert float((losses[1:] - losses[:-1]).abs().min()) > 1e-3, "the steps changed nothing"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_every_cut_learns_the_same(
    one: dict[str, Any], request: pytest.FixtureRequest, world: int, kind: str, tied: str
) -> None:
    ranks = request.getfixturevalue({2: "two", 4: "four"}[world])
    expected = one[f"TP1/{kind}/{tied}/2"]
    more = list(MORE_CUTS) if world == 4 and (kind, tied) in FEW_CASES else []
    for label in [*CUTS[world], *more]:
        results = [rank[f"{label}/{kind}/{tied}/2"] for rank in ranks]
        for result in results:
            assert result["steps"] == results[0]["steps"], f"{label}: ranks log different numbers"
            assert torch.equal(result["after"], results[0]["after"]), f"{label}: ranks hold different results"
        assert_same_steps(results[0]["steps"], expected["steps"])
        torch.testing.assert_close(results[0]["before"], expected["before"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(results[0]["after"], expected["after"], rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_size_of_a_microbatch_changes_nothing(
    one: dict[str, Any], request: pytest.FixtureRequest, world: int
) -> None:
    ranks = [one] if world == 1 else request.getfixturevalue({2: "two", 4: "four"}[world])
    for label in CUTS[world] if world > 1 else ["TP1"]:
        for size in (1, 4):
            assert_same_steps(ranks[0][f"{label}/policy/untied/{size}"]["steps"], one["TP1/policy/untied/2"]["steps"])


def test_recomputation_changes_nothing(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for label, results in (("TP1", one), ("TP2+SP", two[0]), ("PP2", two[0])):
        for how in RECOMPUTE:
            plain = results[f"{label}/policy/untied/2"]
            assert results[f"{label}/{how}"]["steps"] == plain["steps"], f"{label}, {how}"
            assert torch.equal(results[f"{label}/{how}"]["after"], plain["after"])


def test_norms_get_their_whole_gradient_under_sequence_parallelism(
    two: list[dict[str, Any]], llamas: dict[str, Path]
) -> None:
    expected = reference_training(llamas["untied"], "sft", steps=1)["norms"]
    ours = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    names = {
        f"decoder.layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for i in range(4) for a, b in ours.items()
    } | {"decoder.final_layernorm.weight": "model.norm.weight"}
    for rank in two:
        assert rank["norms"].keys() == names.keys()
        for name, theirs in names.items():
            torch.testing.assert_close(rank["norms"][name], expected[theirs], rtol=1e-4, atol=1e-6)


def test_random_weights_are_the_same_under_every_cut(
    one: dict[str, Any], two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    for kind in ("policy", "critic"):
        expected = one[f"TP1/random/{kind}"]
        assert float(expected[0].std()) > 1e-2, "random weights that say the same of everything"
        for ranks, world in ((two, 2), (four, 4)):
            for label in CUTS[world]:
                torch.testing.assert_close(ranks[0][f"{label}/random/{kind}"], expected, rtol=1e-5, atol=1e-5)


# ---- what leaves the device


def test_training_goes_on_bit_equal_after_everything_was_offloaded(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    results = {name: one[f"offload/{name}"] for name in ("32", "bf16")}
    results |= {
        f"{label}, rank {i}": rank[f"offload/{label}"] for label in ("TP2", "DP2") for i, rank in enumerate(two)
    }
    for name, result in results.items():
        assert result["offloaded"][0] == result["resident"][0], name
        assert torch.equal(result["offloaded"][1], result["resident"][1]), name
        assert all(result["freed"].values()), f"{name}: {result['freed']}"


def test_references_never_move(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    plain = one["TP1/policy/tied/2"]["steps"]
    for name, result in {
        "TP1": one["references"],
        "TP2": two[0]["references/TP2"],
        "DP2": two[1]["references/DP2"],
    }.items():
        assert result["policy_moved"] > 0.01, "the policy has to move for its reference to stay behind"
        for updates, said in zip((0, 2, 3), result["said"], strict=True):
            for kind, logprobs in said.items():
                moved = (logprobs - result["policy"]).abs()
                assert not moved.any(), f"{name}: {kind} moved by {moved.max():.1e} in {updates} updates"
        assert result["policy_kept"], f"{name}: asking the reference changed the policy"
        assert_same_steps(result["steps"], plain)


# ---- checkpoints


@pytest.mark.parametrize(("kind", "tied"), RESHARDED)
def test_weights_survive_every_cut_bit_for_bit(two: list[dict[str, Any]], kind: str, tied: str) -> None:
    name = f"{kind}-{tied}"
    start, end = two[0][f"weights/{name}/start"], two[0][f"weights/{name}/end"]
    assert start.keys() == end.keys()
    for parameter, value in start.items():
        assert torch.equal(end[parameter], value), parameter
    said = [two[0][f"store/{name}/{label}"] for label in ("TP2", "PP2", "DP2")]
    torch.testing.assert_close(said[1], said[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said[2], said[0], rtol=1e-5, atol=1e-5)


def test_training_goes_on_bit_equal_from_a_checkpoint(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert one["one->TP1"] == one["save/one"]
    for rank in two:
        for label in CUTS[2]:
            for kind in SAVED[label]:
                name = f"{kind}-{label}"
                assert rank[f"{name}->{label}"] == rank[f"save/{name}"], name
        for kind in ("policy", "critic"):
            assert rank[f"{kind}-DP2-bf16->DP2"] == rank[f"save/{kind}-DP2-bf16"], f"{kind} in bf16"


def test_training_goes_on_under_another_cut(
    one: dict[str, Any], two: list[dict[str, Any]], resumed_by_one: dict[str, Any]
) -> None:
    moves = ("policy-DP2->TP2", "critic-DP2->TP2", "policy-TP2->PP2", "policy-PP2->DP2")
    for move in moves:
        assert_same_steps(two[0][move], two[0][f"save/{move.split('->')[0]}"])
    for move in ("one->PP2", "one->TP2+SP"):
        assert_same_steps(two[0][move], one["save/one"])
    for move in ("policy-TP2->TP1", "policy-PP2->TP1", "critic-DP2->TP1"):
        assert_same_steps(resumed_by_one[move], two[0][f"save/{move.split('->')[0]}"])


def test_a_bf16_critic_goes_on_under_another_cut(two: list[dict[str, Any]]) -> None:
    """Its fp32 head stands beside bf16 weights in the optimizer: neither may get the other's state."""
    resumed, saved = two[0]["critic-DP2-bf16->TP2"], two[0]["save/critic-DP2-bf16"]
    for name in ("loss/value", "norm"):
        torch.testing.assert_close(series(resumed, name), series(saved, name), rtol=0.02, atol=0.0)


def test_an_optimizer_can_be_saved_before_its_first_step(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["unused"]["loaded"] == rank["unused"]["saved"]


def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(two: list[dict[str, Any]]) -> None:
    for rank in two:
        for name, said in rank["refusals"].items():
            assert "policy-TP2" in said and said.endswith(".") and "\n" not in said, f"{name}: {said}"
            words = "does not fit" if name.startswith("a critic") else f"belongs to another architecture: its {name} "
            assert words in said, f"{name}: {said}"


def test_damage_is_named(two: list[dict[str, Any]]) -> None:
    for rank in two:
        said = rank["damage"]
        for kind in ("flipped", "truncated", "missing"):
            assert said["file"] in said[kind] and f"damaged/{kind}" in said[kind], said[kind]
        assert "manifest.json" in said["without manifest"]


# ---- the value head


def test_the_value_head_is_fp32_in_a_bf16_model(one: dict[str, Any], llamas: dict[str, Path]) -> None:
    state.initialize(1, 1, SEED)
    model = worker.open_model("critic", ONE, llamas["untied"], precision="bf16")
    dtypes = {name: parameter.dtype for name, parameter in model.gpt.named_parameters()}
    head = {name for name in dtypes if name.startswith("value_head")}
    assert head == {"value_head.weight"}
    assert all(dtype == (torch.float32 if name in head else torch.bfloat16) for name, dtype in dtypes.items())
    seen: list[torch.dtype] = []
    model.gpt.value_head.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0].dtype, out.dtype)))
    values = worker.evaluate(model, "critic")
    assert set(seen) == {torch.bfloat16, torch.float32} and values.dtype == torch.float32
    exact = one["TP1/critic/untied/2"]["before"]
    torch.testing.assert_close(values, exact, rtol=0.05, atol=0.1)
    # fp32 values are not multiples of bf16's steps
    assert not torch.equal(values, values.bfloat16().float())


def test_a_bf16_critic_learns_in_fp32(llamas: dict[str, Path]) -> None:
    """A rate far below a bf16 weight's own step still moves the fp32 weights that the optimizer keeps, and the head."""
    state.initialize(1, 1, SEED)
    model = worker.open_model("critic", ONE, llamas["untied"], precision="bf16")
    rate = 1e-6
    model.make_trainable(replace(OPTIM, lr=rate, weight_decay=0.0, sched=SchedConfig()), worker.TOTAL_STEPS)
    (part,) = model.learner.optimizer.chained_optimizers
    main = [p for group in part.optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in main} == {torch.float32}
    assert sum(p.numel() for p in main) == sum(p.numel() for p in model.gpt.parameters())
    before = [p.detach().clone() for p in main]
    head = model.gpt.value_head.weight.detach().clone()
    worker.learn(model, "critic", 3)
    largest = max(float((now.detach() - then).abs().max()) for now, then in zip(main, before, strict=True))
    assert 0.5 * rate < largest < 4 * rate
    assert 0.5 * rate < float((model.gpt.value_head.weight - head).abs().max()) < 4 * rate
