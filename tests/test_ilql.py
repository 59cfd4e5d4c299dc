"""ILQL on megatron: equal to a slow reference on transformers' Llama, for every cut; frozen layers; guided sampling."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rlhf.convert import export_hf, inspect
from nemo_rlhf.convert.source import normal
from nemo_rlhf.parallel import state
from tests.spawn import run_distributed
from tests.test_models import assert_same_steps, llamas, reference_rate  # noqa: F401
from tests.workers import ilql_worker as worker
from tests.workers.parallel_worker import OPTIM, SEED, VOCAB, Cut, make_batch

ROOT = Path(__file__).resolve().parent.parent
ONE = Cut()
CUTS = {
    2: {"TP2": Cut(tp=2), "TP2+SP": Cut(tp=2, sequence_parallel=True), "PP2": Cut(pp=2), "DP2": ONE},
    4: {"TP2xPP2": Cut(2, 2)},
}
TIED = ("tied", "untied")
KINDS = (*TIED, "apart")  # the last: untied, V and Q on a trunk of their own
KINDS_OF = {"TP2": ("untied", "apart"), "DP2": ("untied",), "TP2xPP2": ("apart",)}  # elsewhere all


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ilql")


def train_job(cut: Cut, llamas: dict[str, Path], kind: str, shelf: Path, name: str, micro_batch: int = 2) -> Any:  # noqa: F811
    arguments = {"directory": model_of(llamas, kind), "shelf": shelf, "name": name.replace("/", "-")}
    return cut, "train", arguments | {"micro_batch": micro_batch, "value_trunk": kind == "apart"}


def model_of(llamas: dict[str, Path], kind: str) -> Path:  # noqa: F811
    return llamas["tied" if kind == "tied" else "untied"]


@pytest.fixture(scope="module")
def one(llamas: dict[str, Path], shelf: Path) -> dict[str, Any]:  # noqa: F811
    state.set_environment_for_one_process()
    jobs = {f"TP1/{kind}": train_job(ONE, llamas, kind, shelf, f"TP1/{kind}") for kind in KINDS}
    jobs |= {f"mb{size}": train_job(ONE, llamas, "untied", shelf, f"mb{size}", size) for size in (1, 4)}
    jobs["detach"] = (ONE, "detach", {"directory": llamas["untied"]})
    return worker.run(jobs)


@pytest.fixture(scope="module")
def two(llamas: dict[str, Path], shelf: Path, one: dict[str, Any]) -> list[dict[str, Any]]:  # noqa: F811
    jobs = {
        f"{label}/{kind}": train_job(cut, llamas, kind, shelf, f"{label}/{kind}")
        for label, cut in CUTS[2].items()
        for kind in KINDS_OF.get(label, KINDS)
    }
    apart = {"directory": llamas["untied"], "num_layers_unfrozen": 0, "value_trunk": True}
    jobs["freeze/PP2/apart/0"] = (CUTS[2]["PP2"], "freeze", apart)
    jobs["TP1->PP2"] = (CUTS[2]["PP2"], "resume", {"directory": None, "shelf": shelf, "name": "TP1-apart"})
    jobs["TP1->TP2"] = (CUTS[2]["TP2"], "resume", {"directory": None, "shelf": shelf, "name": "TP1-untied"})
    jobs["TP2->PP2"] = (CUTS[2]["PP2"], "resume", {"directory": None, "shelf": shelf, "name": "TP2-untied"})
    for label in ("TP2+SP", "PP2"):
        for tied in TIED:
            for unfrozen in (0, 1):
                arguments = {"directory": llamas[tied], "num_layers_unfrozen": unfrozen}
                jobs[f"freeze/{label}/{tied}/{unfrozen}"] = (CUTS[2][label], "freeze", arguments)
    return run_distributed("tests.workers.ilql_worker:run", 2, jobs)


@pytest.fixture(scope="module")
def four(llamas: dict[str, Path], shelf: Path) -> list[dict[str, Any]]:  # noqa: F811
    jobs = {
        f"{label}/{kind}": train_job(cut, llamas, kind, shelf, f"{label}/{kind}")
        for label, cut in CUTS[4].items()
        for kind in KINDS_OF.get(label, KINDS)
    }
    return run_distributed("tests.workers.ilql_worker:run", 4, jobs)


# ---- the reference


class Reference:
    """transformers' Llama with heads in plain torch, and the paper's sums, a dialogue at a time."""

    def __init__(self, directory: Path, apart: bool) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(directory)
        self.value_trunk = LlamaForCausalLM.from_pretrained(directory).model if apart else self.model.model
        hidden, width = self.model.config.hidden_size, worker.WIDTH
        zeros = torch.zeros

        def head(name: str, outputs: int | None) -> dict[str, Tensor]:
            fc = normal(f"ilql_heads.{name}.fc.weight", SEED, (width, hidden)) / (3 * hidden) ** 0.5
            made = {"fc": fc, "bias": zeros(width)}
            if outputs is None:
                return made | {"out": zeros(1, width), "out_bias": zeros(1)}
            weight = normal(f"ilql_heads.{name}.weight", SEED, (outputs, width)) / (3 * width) ** 0.5
            return made | {"out": weight, "out_bias": zeros(1)}

        self.v = head("v", None)
        self.q = [head(f"q.{i}", VOCAB) for i in range(2)]
        self.target_q = [{name: tensor.clone() for name, tensor in q.items()} for q in self.q]
        self.trained = [self.v[name] for name in self.v] + [q[n] for q in self.q for n in ("fc", "bias", "out")]
        for tensor in self.trained:
            tensor.requires_grad_()
        self.trained += list(self.value_trunk.parameters()) if apart else []

    @staticmethod
    def apply(head: dict[str, Tensor], states: Tensor) -> Tensor:
        return torch.relu(states @ head["fc"].T + head["bias"]) @ head["out"].T + head["out_bias"]

    def objective(self) -> tuple[Tensor, dict[str, float]]:
        batch, ilql = make_batch(), worker.ILQL
        rewards = worker.batch_fields(batch.mask)["rewards"]
        total = torch.zeros(())
        sums = dict.fromkeys(("loss/q", "loss/v", "loss/cql", "loss/awac"), 0.0)
        for row, length in enumerate(batch.lengths.tolist()):
            tokens = batch.tokens[row, :length]
            states = self.value_trunk(tokens[None]).last_hidden_state[0]
            policy_states = self.model.model(tokens[None]).last_hidden_state[0]
            places = [t for t in range(length) if batch.mask[row, t]]
            for i, t in enumerate(places):
                state_, action = states[t - 1], int(tokens[t])
                q = [self.apply(head, state_) for head in self.q]
                q_hat = min(float(self.apply(head, state_)[action]) for head in self.target_q)
                v = self.apply(self.v, state_)[0]
                following = float(self.apply(self.v, states[places[i + 1] - 1])[0]) if i + 1 < len(places) else 0.0
                target = float(rewards[row, t]) + ilql.gamma * following
                weight = ilql.tau if q_hat >= float(v) else 1 - ilql.tau
                logprob = torch.log_softmax(self.model.lm_head(policy_states[t - 1]), -1)[action]
                parts = {
                    "loss/q": sum((head[action] - target) ** 2 for head in q),
                    "loss/v": weight * (q_hat - v) ** 2,
                    "loss/cql": sum(-torch.log_softmax(head, -1)[action] for head in q),
                    "loss/awac": -logprob * torch.tensor(ilql.beta * (q_hat - float(v))).exp(),
                }
                total = total + parts["loss/q"] + parts["loss/v"]
                total = total + ilql.cql_scale * parts["loss/cql"] + ilql.awac_scale * parts["loss/awac"]
                for name, part in parts.items():
                    sums[name] += float(part) / batch.selected
        return total / batch.selected, sums

    def train(self) -> list[dict[str, float]]:
        parameters = [*self.model.parameters(), *self.trained]
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": OPTIM.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=tuple(OPTIM.betas), eps=OPTIM.eps)
        logged = []
        for step in range(1, worker.STEPS + 1):
            optimizer.zero_grad()
            loss, sums = self.objective()
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip_grad))
            for group in optimizer.param_groups:
                group["lr"] = reference_rate(step)
            optimizer.step()
            if step % worker.SYNC_EVERY == 0:
                for target, source in zip(self.target_q, self.q, strict=True):
                    for name in ("fc", "bias", "out"):
                        alpha = worker.ILQL.alpha
                        target[name] = alpha * source[name].detach() + (1 - alpha) * target[name]
            logged.append({**sums, "norm": norm})
        return logged

    @torch.no_grad()
    def guided(self, prompt: tuple[int, ...], num_tokens: int, clip: float = float("inf")) -> tuple[int, ...]:
        """Greedy decoding by log-probability plus advantage, the whole sequence anew for every token."""
        ids = list(prompt)
        for _ in range(num_tokens):
            state_ = self.value_trunk(torch.tensor([ids])).last_hidden_state[0, -1]
            policy_state = self.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            q = torch.minimum(*(self.apply(head, state_) for head in self.target_q))
            advantages = (q - self.apply(self.v, state_)).clamp(-clip, clip)
            scores = torch.log_softmax(self.model.lm_head(policy_state), -1) + worker.BETA * advantages
            ids.append(int(scores.argmax()))
        return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("kind", KINDS)
def test_learns_and_generates_what_the_reference_does(one: dict[str, Any], llamas: dict[str, Path], kind: str) -> None:  # noqa: F811
    reference, result = Reference(model_of(llamas, kind), kind == "apart"), one[f"TP1/{kind}"]
    expected = reference.train()
    for ours, theirs in zip(result["steps"], expected, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    prompts = [(5, 9, 3), (7,), (100, 2, 2, 50, 8)]
    assert result["greedy"] == [reference.guided(prompt, 8) for prompt in prompts]
    assert result["clipped"] == [reference.guided(prompt, 8, clip=0.05) for prompt in prompts]
    assert result["clipped"] != result["greedy"], "the clip changes nothing, so nothing is tested"


# ---- cuts, interruption


@pytest.mark.parametrize(
    ("world", "label", "kind"),
    [(world, label, kind) for world, cuts in CUTS.items() for label in cuts for kind in KINDS_OF.get(label, KINDS)],
)
def test_every_cut_learns_and_samples_the_same(
    request: pytest.FixtureRequest, one: dict[str, Any], world: int, label: str, kind: str
) -> None:
    expected = one[f"TP1/{kind}"]
    for rank in request.getfixturevalue({2: "two", 4: "four"}[world]):
        result = rank[f"{label}/{kind}"]
        assert_same_steps(result["steps"], expected["steps"])
        for name in ("before", "after"):
            assert_same_steps([result[name]], [expected[name]])
        for name in ("greedy", "clipped", "sampled"):
            assert result[name] == expected[name], name


@pytest.mark.parametrize("size", [1, 4])
def test_every_microbatch_learns_the_same(one: dict[str, Any], size: int) -> None:
    assert_same_steps(one[f"mb{size}"]["steps"], one["TP1/untied"]["steps"])


def test_it_goes_on_bit_equal_and_under_other_cuts(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for name in ("TP1/tied", "TP1/untied"):
        assert one[name]["resumed"] == one[name]["steps"][2:]
    for rank in two:
        for label in CUTS[2]:
            assert rank[f"{label}/untied"]["resumed"] == rank[f"{label}/untied"]["steps"][2:], label
        for move in ("TP1->TP2", "TP2->PP2"):
            assert_same_steps(rank[move], one["TP1/untied"]["steps"][2:])
        assert_same_steps(rank["TP1->PP2"], one["TP1/apart"]["steps"][2:])


# ---- what learns


@pytest.mark.parametrize("unfrozen", [0, 1])
@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("label", ["TP2+SP", "PP2"])
def test_frozen_layers_do_not_move(two: list[dict[str, Any]], label: str, tied: str, unfrozen: int) -> None:
    moved: dict[str, bool] = {}
    for rank in two:
        moved |= rank[f"freeze/{label}/{tied}/{unfrozen}"]
    learning = {name for name, has_moved in moved.items() if has_moved}
    heads = {name for name in moved if name.startswith("ilql_heads.")}
    top = {name for name in moved if name.startswith(("decoder.layers.3.", "decoder.final_layernorm."))}
    top |= {"output_layer.weight"} if tied == "untied" else set()
    expected = heads | (top if unfrozen else set())
    # a bias of V that no step moved, or targets before their turn, are no matter: but these were synced at step 2
    assert learning == expected


def test_values_can_learn_beside_a_policy_that_does_not(two: list[dict[str, Any]]) -> None:
    moved: dict[str, bool] = {}
    for rank in two:
        moved |= rank["freeze/PP2/apart/0"]
    learning = {name for name, has_moved in moved.items() if has_moved}
    assert learning == {name for name in moved if name.startswith(("ilql_heads.", "value_trunk."))}


def test_detached_heads_teach_the_trunk_nothing(one: dict[str, Any]) -> None:
    assert one["detach"]["detached"] < one["detach"]["attached"]


# ---- export


@pytest.mark.parametrize("kind", ["untied", "apart"])
def test_the_page_decodes_an_exported_model_as_the_engine_does(
    two: list[dict[str, Any]], shelf: Path, tmp_path: Path, kind: str
) -> None:
    page = (ROOT / "docs" / "ilql.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 40
    decode: dict[str, Any] = {}
    exec(code, decode)
    directory = shelf / f"TP2-{kind}"  # of two ranks, whose padding is larger
    policy, trunk, heads = decode["load"](export_hf(directory, tmp_path / "hf"))
    assert (policy is trunk) == (kind == "untied")
    described = re.findall(r"`((?:v|target_q)\.[\w.]+)`", page)
    assert set(heads) == {name.replace("N", n) for name in described for n in "01"}
    assert heads["target_q.1.weight"].shape == (VOCAB, worker.WIDTH)
    state.initialize(1, 1, SEED)
    ours = worker.open_model(ONE, directory, value_trunk=kind == "apart")
    prompts = [(5, 9, 3), (7,), (100, 2, 2, 50, 8)]
    for beta, options in ((worker.BETA, {}), (worker.BETA, {"adv_clip": 0.05}), (0.0, {})):
        expected = worker.samples(ours, temperature=0.0, beta=beta, **options)
        assert [tuple(decode["generate"](policy, trunk, heads, p, 8, beta, **options)) for p in prompts] == expected


def test_a_checkpoint_says_its_heads_and_misses_none(two: list[dict[str, Any]], shelf: Path, tmp_path: Path) -> None:
    described = inspect(shelf / "TP2-untied")
    assert described["heads"] == ["language model", "ilql"]
    assert (described["ilql_num_q"], described["ilql_head_width"]) == (2, worker.WIDTH)
    exported = inspect(export_hf(shelf / "TP2-untied", tmp_path / "hf"))
    for name in ("fingerprint", "parameters"):
        assert exported[name] == described[name]
    shutil.copytree(shelf / "TP2-untied", tmp_path / "copy")
    config = tmp_path / "copy" / "model_config.yaml"
    config.write_text(config.read_text().replace("ilql_num_q: 2", "ilql_num_q: 3"))
    with pytest.raises(ValueError, match=r"lacks ilql_heads\.q\.2\.fc\.weight"):
        inspect(tmp_path / "copy")
    config.write_text(config.read_text().replace("ilql_num_q: 3", "ilql_num_q: 1"))
    with pytest.raises(ValueError, match=r"has ilql_heads\.q\.1\..*has no place for"):
        inspect(tmp_path / "copy")
