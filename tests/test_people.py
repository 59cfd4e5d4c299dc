"""People in the loop: every cut hears and learns the same, a stop changes nothing, and a wrong reward model is turned
round by what people say."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.algorithms.model_source import ModelSource
from nemo_rlhf.algorithms.people import OutOfReach, People
from nemo_rlhf.algorithms.reward_learner import RewardLearner
from nemo_rlhf.cli.people import open_store
from nemo_rlhf.config import load
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.config.people import FeedbackConfig
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.config.sources import ModelSourceConfig
from nemo_rlhf.feedback.store import Store, run_name
from nemo_rlhf.parallel import state
from nemo_rlhf.types import Pair
from tests.conftest import Tiny
from tests.jobs import FROM_OUTSIDE, metrics_of, rollouts_of
from tests.spawn import run_distributed
from tests.workers import people_worker

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 5
CUTS = {"tp2": ["model.tensor_model_parallel_size=2"], "pp2": ["model.pipeline_model_parallel_size=2"], "dp2": []}


# ---- whole runs


def arguments(tiny: Tiny, judge: Path, run_dir: Path, *more: str, residence: str = "resident") -> list[str]:
    source = {"kind": "model", "name": "judge", "restore_from": str(judge), "residence": residence}
    file = run_dir.with_suffix(".yaml")
    file.write_text(json.dumps({"reward": {"sources": [source]}}))
    return tiny.ppo(
        run_dir,
        "--config",
        str(file),
        "reward.function=null",
        "generation.temperature=1.0",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS}",
        "trainer.enable_progress_bar=false",
        f"ppo.feedback.store={run_dir.with_suffix('.db')}",
        "ppo.feedback.every_n_steps=1",
        "ppo.feedback.num_pairs=5",
        "ppo.feedback.candidates=2",
        "ppo.feedback.undo_s=0",
        "ppo.feedback.min_new=2",
        "ppo.feedback.min_held_out=1",
        "ppo.feedback.held_out=0.5",
        "ppo.feedback.refresh_steps=3",
        "ppo.feedback.batch_size=4",
        "ppo.feedback.answers_wanted=2",
        "ppo.feedback.optim.lr=3e-3",
        *more,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


@pytest.fixture(scope="module")
def alone(tiny: Tiny, judge: Path, place: Path) -> Path:
    """A run on one rank, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_rlhf.cli.launch_if_needed", lambda *sizes: None)
        for name in FROM_OUTSIDE:
            patch.delenv(name, raising=False)
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        (result,) = people_worker.runs([{"arguments": arguments(tiny, judge, place / "alone")}])
    assert result["code"] == 0, result
    return place / "alone"


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, judge: Path, place: Path, alone: Path) -> list[list[dict[str, Any]]]:
    def run(name: str, *more: str, **how: Any) -> dict[str, Any]:
        residence = "swap" if name == "tp2" else "resident"
        return {"arguments": arguments(tiny, judge, place / name, *more, residence=residence), **how}

    payload = [run(name, *overrides) for name, overrides in CUTS.items()]
    payload += [run("stopped", *CUTS["tp2"], stop_in_step=2), run("stopped", *CUTS["tp2"])]
    without = [each for each in arguments(tiny, judge, place / "stopped", *CUTS["tp2"]) if "feedback" not in each]
    payload += [{"arguments": [*without, "trainer.max_steps=9"]}]
    return run_distributed("tests.workers.people_worker:runs", 2, payload)


def test_every_cut_hears_and_learns_the_same(two_ranks: list[list[dict[str, Any]]], place: Path, alone: Path) -> None:
    wanted = metrics_of(alone)
    refreshes = [row for row in wanted if "feedback/accepted" in row]
    assert len(refreshes) >= 2 and {row["feedback/accepted"] for row in refreshes} == {0.0, 1.0}, "both must happen"
    for name in CUTS:
        assert [rank[list(CUTS).index(name)]["code"] for rank in two_ranks] == [0, 0], two_ranks
        rows = metrics_of(place / name)
        assert [row.keys() for row in rows] == [row.keys() for row in wanted]
        for row, other in zip(rows, wanted, strict=True):
            for key, value in other.items():
                close = value if value is None else pytest.approx(value, rel=1e-3, abs=2e-5)
                assert row[key] == close, (name, key)
        texts = {s: [one["response"] for one in rows] for s, rows in rollouts_of(place / name).items()}
        assert texts == {s: [one["response"] for one in rows] for s, rows in rollouts_of(alone).items()}


def test_a_stop_changes_nothing(two_ranks: list[list[dict[str, Any]]], place: Path) -> None:
    assert [rank[3]["code"] for rank in two_ranks] == [75, 75] and [rank[4]["code"] for rank in two_ranks] == [0, 0]
    # resident here and swapped there: the same weights, the same kernels
    assert metrics_of(place / "stopped") == metrics_of(place / "tp2")
    assert refreshes_of(place / "stopped") == refreshes_of(place / "tp2")
    assert [rank[5]["code"] for rank in two_ranks] == [2, 2]
    said = "".join(rank[5]["stderr"] for rank in two_ranks)
    assert "has a reward model that learned from people, and ppo.feedback.store is null" in said


def refreshes_of(run_dir: Path) -> list[dict[str, Any]]:
    files = sorted((run_dir / "feedback").glob("refresh_*.json"), key=lambda file: int(file.stem.split("_")[1]))
    return [json.loads(file.read_text()) for file in files]


def test_the_store_says_what_the_run_did(alone: Path) -> None:
    store = Store.open(str(alone.with_suffix(".db")))
    run_id = store.run(run_name(alone))
    records = refreshes_of(alone)
    assert [one.number for one in store.refreshes(run_id)] == [one["number"] for one in records]
    assert [one.accepted for one in store.refreshes(run_id)] == [one["accepted"] for one in records]
    known = {one.id: one for one in store.comparisons(store.comparison_ids(run_id))}
    rows = metrics_of(alone)
    asked = sum(row.get("feedback/asked", 0) for row in rows)
    assert asked == len({one.task_id for one in known.values()}) + store.queue_length(run_id)
    assert rows[-1]["feedback/simulated"] == 1.0
    for record in records:
        for one in record["comparisons"]:
            first = known[one["id"]].verdict == "first"
            assert (one["chosen"], one["rejected"]) == known[one["id"]].answers[:: 1 if first else -1]
        learned = {number for batch in record["batches"] for number in batch}
        prompts = [{known[number].prompt for number in side} for side in (learned, record["held_out"])]
        assert learned and record["held_out"] and not prompts[0] & prompts[1]
        assert all(one.verdict in ("first", "second") for one in (known[number] for number in learned))


def test_a_reward_of_any_step_comes_again(alone: Path, judge: Path) -> None:
    """From the first weights and the records alone."""
    learner = open_learner(judge, lr=3e-3, steps=3)
    texts: dict[int, dict[str, Any]] = {}
    for record in refreshes_of(alone):
        texts |= {one["id"]: one for one in record["comparisons"]}
        pairs = {n: learner.encode(t["prompt"], t["chosen"], t["rejected"], "") for n, t in texts.items()}
        batches = [[pairs[number] for number in batch] for batch in record["batches"]]
        before, after, accepted = learner.refresh(batches, [pairs[number] for number in record["held_out"]])
        assert (vars(before), vars(after), accepted) == (record["before"], record["after"], record["accepted"])
    saved = open_learner(alone / "checkpoints" / f"step_{STEPS}" / "reward")
    for ours, theirs in zip(weights(learner), weights(saved), strict=True):
        assert torch.equal(ours, theirs)


# ---- one refresh


def open_learner(judge: Path, lr: float = 1e-3, steps: int = 4, residence: str = "resident") -> RewardLearner:
    state.set_environment_for_one_process()
    state.initialize(1, 1, 1)
    source = ModelSourceConfig(kind="model", name="judge", restore_from=str(judge), residence=residence)
    people = FeedbackConfig(optim=OptimConfig(lr=lr), refresh_steps=steps)
    return RewardLearner(ModelSource(source, ModelConfig(micro_batch_size=2), "32", people))


def weights(learner: RewardLearner) -> list[torch.Tensor]:
    with learner.source.on_device():
        return [parameter.detach().clone() for parameter in learner.scorer.model.gpt.parameters()]


def pairs(learner: RewardLearner, *words: tuple[str, str]) -> list[Pair]:
    return [learner.encode("a ", chosen, rejected, "") for chosen, rejected in words]


@pytest.mark.parametrize("residence", ["resident", "swap"])
def test_weights_that_are_no_better_do_not_stay(judge: Path, residence: str) -> None:
    learner = open_learner(judge, residence=residence)
    right = pairs(learner, ("bb", "cc"), ("bbb", "ac"), ("abb", "aa"), ("bab", "dd"))
    wrong = [Pair(pair.rejected, pair.chosen) for pair in right]
    first = weights(learner)
    before, after, accepted = learner.refresh([right] * 4, wrong)
    assert not accepted and not after.is_better_than(before) and after.loss > before.loss
    assert all(map(torch.equal, weights(learner), first))
    before, after, accepted = learner.refresh([right] * 4, right)
    assert accepted and after.loss < before.loss and learner.judge(right) == after
    once = weights(learner)
    other = open_learner(judge, residence=residence)
    other.refresh([right] * 4, right)
    assert all(map(torch.equal, weights(other), once)), "what was refused has left nothing behind, moments included"


def test_scores_keep_the_scale_that_was_measured(judge: Path) -> None:
    learner = open_learner(judge)
    learner.measure_scale(pairs(learner, ("bb", "cc"), ("bbb", "ac"), ("abb", "aa")))
    texts = [
        text
        for pair in pairs(learner, ("bb", "cc"), ("bbb", "ac"), ("abb", "aa"))
        for text in (pair.chosen, pair.rejected)
    ]
    scores = learner.scorer.scores(texts)
    scale = learner.scorer.model.architecture
    assert scale.score_mean == pytest.approx(float(scores.mean()), rel=1e-4)
    assert scale.score_std == pytest.approx(float(scores.std(correction=0)), rel=1e-4)


# ---- what the store may do


@dataclass(frozen=True)
class Said:
    id: int
    verdict: str = "first"
    prompt: str = "a "
    answers: tuple[str, str] = ("bb", "cc")
    step: int = 0
    annotator: str = "ann"
    simulated: bool = False


class FakeStore:
    """The far side of a network: answers that arrive in time, or late, or not at all."""

    def __init__(self, *rounds: Sequence[Said] | None) -> None:
        self.rounds, self.looks, self.said = list(rounds), 0, {}

    def settled(self) -> list[int]:
        self.looks += 1
        now = self.rounds.pop(0) if self.rounds else ()
        if now is None:
            raise OutOfReach("connection refused")
        self.said |= {one.id: one for one in now}
        return sorted(self.said)

    def read(self, numbers: Sequence[int]) -> list[Said]:
        return [self.said[number] for number in numbers]

    def ask(self, step: int, questions: Sequence[dict[str, Any]]) -> int:
        raise OutOfReach("connection refused")

    def report(self, **refresh: Any) -> None:
        raise OutOfReach("connection refused")


def make_people(store: FakeStore, judge: Path, tmp_path: Path, stopping: Any = lambda: False, **keys: Any) -> People:
    return People(FeedbackConfig(**keys), 1, tmp_path, store, open_learner(judge), stopping)


def test_a_wait_ends_with_enough_answers_or_time_or_a_signal(judge: Path, tmp_path: Path) -> None:
    store = FakeStore([Said(1)], [Said(2, "tie")], [Said(3)])
    assert make_people(store, judge, tmp_path, wait_for=3)._look(wait=True) == [1, 2, 3] and store.looks == 3
    store = FakeStore([Said(1)])
    assert make_people(store, judge, tmp_path, wait_for=3, wait_timeout_s=0.2)._look(wait=True) == [1]
    store = FakeStore([Said(1)])
    assert make_people(store, judge, tmp_path, lambda: True, wait_for=3)._look(wait=True) == [1] and store.looks == 1
    store = FakeStore([Said(1)])
    assert make_people(store, judge, tmp_path, wait_for=3)._look(wait=False) == [1] and store.looks == 1


def test_a_store_that_is_away_does_not_end_the_run(judge: Path, tmp_path: Path) -> None:
    people = make_people(FakeStore(None, [Said(1)]), judge, tmp_path)
    with pytest.warns(UserWarning, match="does not answer, and training goes on without it: connection refused"):
        assert people._look(wait=False) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert people._look(wait=False) == [1]


def test_nobody_is_preferred(judge: Path, tmp_path: Path) -> None:
    said = [Said(1, "tie"), Said(2, "both_bad"), Said(3, answers=("b", "b" * 90)), Said(4), Said(5, answers=("b", "b"))]
    people = make_people(FakeStore(said), judge, tmp_path, held_out=1e-9)
    with pytest.warns(UserWarning, match=r"Comparison 3 of the preference store has \d+ tokens.*It is left out"):
        assert people._look(wait=False) == [1, 2, 3, 4, 5]
    assert [people._side(number) for number in range(1, 6)] == ["leave", "leave", "leave", "learn", "leave"]


def test_a_prompt_is_held_out_or_learned(judge: Path, tmp_path: Path) -> None:
    said = [Said(number, prompt=f"{number % 200} ") for number in range(1, 401)]
    people = make_people(FakeStore(said), judge, tmp_path, held_out=0.25)
    people._look(wait=False)
    held_out = {number for number in range(1, 401) if people._side(number) == "hold out"}
    assert 30 <= len(held_out) / 2 <= 70
    assert all((number % 200 in {one % 200 for one in held_out}) == (number in held_out) for number in range(1, 401))


def test_new_comparisons_come_before_any_comes_again(judge: Path, tmp_path: Path) -> None:
    people = make_people(FakeStore(), judge, tmp_path, batch_size=6, refresh_steps=4, replay=0.5)
    first = [number for batch in people._batches(1, list(range(24))) for number in batch]
    assert sorted(first) == list(range(24)), "there is nothing to replay yet"
    people.learned = [100, 101, 102]
    batches = people._batches(2, [1, 2, 3, 4, 5])
    new = [number for batch in batches for number in batch[:3]]
    assert sorted(new[:5]) == [1, 2, 3, 4, 5] == sorted(new[5:10]) and len(new) == 12
    assert {number for batch in batches for number in batch[3:]} <= {100, 101, 102}
    assert people._batches(2, [1, 2, 3, 4, 5]) == batches


# ---- wrong input


SOURCES = "reward.sources=[{kind: model, name: judge, restore_from: x}]"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["ppo.feedback.num_pairs=5"], "ppo.feedback is set without ppo.feedback.store"),
        (
            ["ppo.feedback.store=x.db", "reward.function=a.b:c", "reward.sources=[]"],
            "reward.sources must hold the model that learns from people: its models are none",
        ),
        (["ppo.feedback.store=x.db", "ppo.feedback.source=y"], "ppo.feedback.source=y is no model of reward.sources"),
        (
            ["ppo.feedback.store=x.db", "ppo.feedback.wait_for=3", "trainer.timeout_s=500"],
            "ppo.feedback.wait_timeout_s=600 must be below trainer.timeout_s=500",
        ),
        (
            ["ppo.feedback.store=x.db", "ppo.feedback.batch_size=3", "trainer.devices=2"],
            "ppo.feedback.batch_size=3 cannot be shared evenly by 2 data-parallel ranks",
        ),
        (["ppo.feedback.store=x.db", "ppo.feedback.held_out=1"], "ppo.feedback.held_out=1"),
        (["ppo.feedback.store=x.db", "ppo.feedback.select=best"], "ppo.feedback.select=best"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], sentence: str) -> None:
    required = ["model.restore_from=m", "exp_manager.explicit_log_dir=r", "data.prompts=p", SOURCES]
    with pytest.raises(ValueError) as error:
        load("ppo", overrides=[*required, *overrides])
    assert sentence in str(error.value)


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    required = ["model.restore_from=m", f"exp_manager.explicit_log_dir={tmp_path}", "data.prompts=p", SOURCES]

    def config(*overrides: str) -> Any:
        return load("ppo", overrides=[*required, *overrides])

    assert open_store(config()) is None
    with pytest.raises(ValueError, match="nowhere"):
        open_store(config(f"ppo.feedback.store={tmp_path / 'nowhere' / 'x.db'}"))
    with pytest.raises(ValueError, match=r"ppo.feedback.guidelines=\S+ is no file"):
        open_store(config(f"ppo.feedback.store={tmp_path / 'x.db'}", f"ppo.feedback.guidelines={tmp_path / 'no'}"))


# ---- the loop


def test_people_turn_a_wrong_reward_model_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real processes; what people want is seen by nothing but them. Alone it ends at 0.03, without noise in the
    clock at 4 and more."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in FROM_OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sys.modules.pop("people", None)
    import people

    means = people.turn_round(tmp_path, seed=0, steps=20, noise=0.1, annotators=3, alone=False)
    assert means[0] < 1 and sum(means[-2:]) / 2 > 1.8, means
    shutil.rmtree(tmp_path, ignore_errors=True)
