"""People in the loop: every cut hears and learns the same, a stop changes nothing, and a wrong reward model is turned
round by what people say."""

from __future__ import annotations

import json
import shutil
import sys
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from sqlalchemy import text

from nemo_rlhf.algorithms.model_source import ModelSource
from nemo_rlhf.algorithms.people import People, open_people
from nemo_rlhf.algorithms.ppo import PPOInputs
from nemo_rlhf.algorithms.preferences import OutOfReach, PreferenceStore, as_record
from nemo_rlhf.algorithms.reward_learner import Judged, RewardLearner
from nemo_rlhf.cli.people import open_store
from nemo_rlhf.config import load
from nemo_rlhf.config.optim import OptimConfig, SchedConfig
from nemo_rlhf.config.people import FeedbackConfig
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.config.sources import ModelSourceConfig
from nemo_rlhf.data.prompts import read_prompts
from nemo_rlhf.feedback.exchange import export_records, import_pairs
from nemo_rlhf.feedback.given import read_pair
from nemo_rlhf.feedback.records import MAX_TEXT, NewTask
from nemo_rlhf.feedback.store import Store, run_name
from nemo_rlhf.parallel import state
from nemo_rlhf.types import Pair, Prompt, Sample
from tests.conftest import Tiny
from tests.feedback import desks, say
from tests.jobs import FROM_OUTSIDE, metrics_of, rollouts_of
from tests.postgres import new_database
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
    return run_distributed("tests.workers.people_worker:runs_and_what_a_store_refuses", 2, payload)


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


def test_what_the_store_refuses_is_said_by_all_ranks(two_ranks: list[list[dict[str, Any]]]) -> None:
    assert [rank[-1]["heard"] for rank in two_ranks] == ["ValueError: of rank 0"] * 2


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
    optim = refreshes_of(alone)[0]["optim"]
    learner = open_learner(judge, OptimConfig(**{**optim, "sched": SchedConfig(**optim["sched"])}), steps=3)
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


def open_learner(
    judge: Path, optim: OptimConfig | None = None, steps: int = 4, residence: str = "resident"
) -> RewardLearner:
    state.set_environment_for_one_process()
    state.initialize(1, 1, 1)
    source = ModelSourceConfig(kind="model", name="judge", restore_from=str(judge), residence=residence)
    people = FeedbackConfig(optim=optim or OptimConfig(lr=1e-3), refresh_steps=steps)
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
    metadata: dict[str, Any] = field(default_factory=dict)


class FakeStore:
    """The far side of a network: answers that arrive in time, or late, or not at all. ``asked``: how many questions are
    new to it, each time; it is away after that."""

    def __init__(self, *rounds: Sequence[Said] | None, grows: bool = True, asked: Sequence[int] = ()) -> None:
        self.rounds, self.looks, self.said = list(rounds), 0, {}
        self.grows, self.asked, self.name, self.num_read = grows, list(asked), "this", 0

    def fingerprint(self) -> str:
        return self.name

    def may_grow(self) -> bool:
        return self.grows

    def settled(self) -> list[int]:
        self.looks += 1
        now = self.rounds.pop(0) if self.rounds else ()
        if now is None:
            raise OutOfReach("connection refused")
        self.said |= {one.id: one for one in now}
        return sorted(self.said)

    def read(self, numbers: Sequence[int]) -> list[Said]:
        self.num_read += len(numbers)
        return [self.said[number] for number in numbers]

    def ask(self, step: int, questions: Sequence[dict[str, Any]], most: int) -> int:
        if not self.asked:
            raise OutOfReach("connection refused")
        return self.asked.pop(0)

    def report(self, **refresh: Any) -> None:
        raise OutOfReach("connection refused")


def make_people(
    store: PreferenceStore, judge: Path, tmp_path: Path, stopping: Any = lambda: False, **keys: Any
) -> People:
    learner = open_learner(judge)
    prompts = [Prompt((2,), "a "), Prompt((3,), "b ")]
    config = FeedbackConfig(**keys)
    return People(config, 1, tmp_path, store, learner, prompts, learner.scorer.tokenizer, stopping)


def test_a_wait_ends_with_enough_answers_or_time_or_a_signal(judge: Path, tmp_path: Path) -> None:
    store = FakeStore([Said(1)], [Said(2, "tie")], [Said(3)])
    assert make_people(store, judge, tmp_path, wait_for=3)._look(wait=True) == [1, 2, 3] and store.looks == 3
    store = FakeStore([Said(1)])
    assert make_people(store, judge, tmp_path, wait_for=3, wait_timeout_s=0.2)._look(wait=True) == [1]
    store = FakeStore([Said(1)])
    assert make_people(store, judge, tmp_path, lambda: True, wait_for=3)._look(wait=True) == [1] and store.looks == 1
    store = FakeStore([Said(1)])
    assert make_people(store, judge, tmp_path, wait_for=3)._look(wait=False) == [1] and store.looks == 1
    store = FakeStore([Said(1)], grows=False)
    assert make_people(store, judge, tmp_path, wait_for=3)._look(wait=True) == [1] and store.looks == 1


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


def test_more_comparisons_than_a_refresh_takes_wait_for_the_next(judge: Path, tmp_path: Path) -> None:
    """Each is learned before it counts as learned, the oldest first."""
    said = [Said(number) for number in range(1, 11)]
    keys = {"batch_size": 2, "refresh_steps": 2, "replay": 0.5, "min_new": 2, "min_held_out": 0, "held_out": 1e-9}
    people = make_people(FakeStore(said), judge, tmp_path, **keys)
    with pytest.warns(UserWarning, match="does not answer"):  # when it is told of a refresh
        for step in range(1, 6):
            people.before(step, None, None)
    assert people.learned == list(range(1, 11)) and people.refreshes == 4
    learned: list[int] = []
    for record, num_new in zip(refreshes_of(tmp_path), (4, 2, 2, 2), strict=True):
        in_batches = {number for batch in record["batches"] for number in batch}
        assert in_batches - set(learned) == set(people.learned[len(learned) : len(learned) + num_new])
        learned += people.learned[len(learned) : len(learned) + num_new]


def test_the_scale_is_that_of_the_latest_comparisons(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out ones among them."""
    monkeypatch.setattr("nemo_rlhf.algorithms.people._SCALE_FROM", 8)
    said = [Said(number, prompt=chr(96 + number)) for number in range(1, 27)]
    people = make_people(FakeStore(said), judge, tmp_path, held_out=0.5, min_new=1, min_held_out=1)
    measured: list[Pair] = []
    monkeypatch.setattr(people.learner, "refresh", lambda *given: (Judged(0.5, 1.0), Judged(0.6, 1.0), True))
    monkeypatch.setattr(people.learner, "measure_scale", measured.extend)
    with pytest.warns(UserWarning, match="does not answer"):
        people.before(1, None, None)
    assert measured == people._pairs(range(19, 27)) and {*people.held_out} & {*range(19, 27)}


def test_a_run_that_continues_counts_every_answer_once(judge: Path, tmp_path: Path) -> None:
    said = [Said(1, "tie"), Said(2, "both_bad"), Said(3), Said(4)]
    people = make_people(FakeStore(said), judge, tmp_path, wait_for=5)
    people._look(wait=False)
    later = FakeStore(said, [Said(5)])
    again = make_people(later, judge, tmp_path, wait_for=5)
    again.load_loop_state(people.loop_state())
    assert again._look(wait=True) == [1, 2, 3, 4, 5], "the fifth is waited for, though four came"
    assert later.looks == 2 and later.num_read == 1


def test_another_store_is_refused(judge: Path, tmp_path: Path) -> None:
    people = make_people(FakeStore([Said(1)]), judge, tmp_path)
    people._look(wait=False)
    other = FakeStore([Said(1)])
    other.name = "other"
    again = make_people(other, judge, tmp_path)
    again.load_loop_state(people.loop_state())
    with pytest.raises(ValueError, match="has read 1 comparisons from another preference store than this one"):
        again._look(wait=False)
    fresh = make_people(other, judge, tmp_path)
    fresh.load_loop_state(make_people(FakeStore(), judge, tmp_path).loop_state())
    assert fresh._look(wait=False) == [1], "nothing was read from any"


def test_what_an_abandoned_run_recorded_goes(judge: Path, tmp_path: Path) -> None:
    (tmp_path / "feedback").mkdir()
    for number in (1, 2, 3, 10):
        (tmp_path / "feedback" / f"refresh_{number}.json").write_text("{}")
    people = make_people(FakeStore(), judge, tmp_path)
    people.refreshes = 2
    people.before(1, None, None)
    assert sorted(path.name for path in (tmp_path / "feedback").iterdir()) == ["refresh_1.json", "refresh_2.json"]


def asking(store: PreferenceStore, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> People:
    """Its policy answers each prompt in two words."""

    def sample(engine: Any, requests: Sequence[Any], sampling: Any) -> list[Sample]:
        words = ("bb", "cc")
        return [Sample(one.prompt, one.sample_index, (), words[i % 2], "eos") for i, one in enumerate(requests)]

    monkeypatch.setattr("nemo_rlhf.algorithms.people.sample", sample)
    return make_people(store, judge, tmp_path, every_n_steps=1, **keys)


def test_asked_are_those_that_the_store_has_taken(judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of answers since the last round goes on where a round did not come about."""
    store = FakeStore([Said(1, "tie")], asked=[0, 2])
    people = asking(store, judge, tmp_path, monkeypatch)
    assert people.before(0, None, None)["feedback/asked"] == 0 and people._since_asked == 1
    assert people.before(1, None, None)["feedback/asked"] == 2 and people._since_asked == 0
    store.rounds = [[Said(2, "tie")]]
    with pytest.warns(UserWarning, match="does not answer"):
        assert people.before(2, None, None)["feedback/asked"] == 0 and people._since_asked == 1


# ---- the real store


def settings(tmp_path: Path, *overrides: str) -> Any:
    required = ["model.restore_from=m", f"exp_manager.explicit_log_dir={tmp_path / 'run'}", "data.prompts=p", SOURCES]
    return load("ppo", overrides=[*required, *overrides])


def question(key: str, answer: str = "a", **more: Any) -> dict[str, Any]:
    plain = {"prompt": "p", "messages": None, "answers": (answer, "b"), "priority": 0.0, "metadata": {}}
    return {"key": key, **plain, **more}


def test_questions_that_cannot_be_stored_are_left_out(tmp_path: Path) -> None:
    store = open_store(settings(tmp_path, f"ppo.feedback.store={tmp_path / 'x.db'}"))
    assert store is not None
    questions = [question("long", "x" * (MAX_TEXT + 1)), question("nan", metadata={"scores": [float("nan")]})]
    questions += [question(f"{number}") for number in range(3)]
    with pytest.warns(UserWarning, match="an answer has 100001 characters, at most 100000 are stored. Nobody is asked"):
        assert store.ask(1, questions, 2) == 2
    assert store.ask(1, questions[2:], 2) == 0, "they are there already"


def test_more_may_come_until_all_is_answered_for_good(tmp_path: Path, store: Store) -> None:
    run_id = store.run("run", create=True, undo_s=60)
    assert not store.may_grow(run_id)
    store.add_tasks(run_id, 1, [NewTask("k", "p", ("a", "b")), NewTask("l", "p", ("a", "c"))])
    (ann,) = desks(store, run_id, "ann")
    for _ in range(2):
        assert store.may_grow(run_id)
        say(ann, "tie")
    assert store.queue_length(run_id) == 0 and store.may_grow(run_id), "she can take it back"
    with store.database.write() as connection:
        connection.execute(text("UPDATE comparisons SET settles_at = 0"))
    assert not store.may_grow(run_id)


def test_chats_go_out_and_come_back_as_what_the_reward_model_scores(judge: Path, tmp_path: Path) -> None:
    url = tmp_path / "x.db"
    store = open_store(settings(tmp_path, f"ppo.feedback.store={url}", "ppo.feedback.undo_s=0"))
    assert store is not None
    people = make_people(store, judge, tmp_path)
    template = "{% for m in messages %}{{ m.role[0] }}.{{ m.content }}. {% endfor %}"
    people.tokenizer.chat_template = template + "{% if add_generation_prompt %}a.{% endif %}"
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    (prompt,) = read_prompts([{"prompt": chat}], people.tokenizer, 64)
    assert prompt.text == "s.be brief. u.hello. a." and prompt.messages == tuple(chat)
    own = question("0/0", prompt=prompt.text, messages=prompt.messages)
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    assert store.ask(1, [own, question("0/1", prompt="u.x. a.", messages=parts)], 2) == 2
    there = Store.open(str(url))
    run_id = there.run(run_name(tmp_path / "run"))
    (ann,) = desks(there, run_id, "ann")
    lease = ann.next()
    assert lease is not None and lease.prompt == "system: be brief\n\nuser: hello"
    say(ann, "second")
    lease = ann.next()
    assert lease is not None and lease.prompt == "u.x. a."
    say(ann, "first")
    given = {"prompt": chat, "chosen": "hi", "rejected": "go", "margin": 0.5}
    import_pairs(there, run_id, [read_pair("line 1", given)])
    (_, plain, _) = records = list(export_records(there, run_id, "pairs"))
    assert [one["prompt"] for one in records] == [chat, "u.x. a.", chat] and plain["chosen"] == "a"
    assert next(export_records(there, run_id, "conversational"))["chosen"][:-1] == chat

    assert people._look(wait=False) == [1, 2, 3]
    texts = [people._texts[number] for number in (1, 2, 3)]
    assert [one["prompt"] for one in texts] == [prompt.text, "u.x. a.", prompt.text]
    assert [(one["chosen"], one["rejected"], one["margin"]) for one in texts] == [
        ("b", "a", 0.0),
        ("a", "b", 0.0),
        ("hi", "go", 0.5),
    ]
    (pair,) = people._pairs([3])
    assert pair.margin == 0.5 and pair.chosen == people.learner.scorer.encode(prompt.text, "hi", "")
    people.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    refused = replace(Said(4), prompt="system: x", metadata={"messages": chat})
    with pytest.warns(UserWarning, match=r"Comparison 4 .*no system.*It is left out"):
        assert as_record(refused, people.tokenizer)["chosen"] is None
    people.tokenizer.chat_template = None
    assert as_record(refused, people.tokenizer)["prompt"] == "system: x"
    there.close()


def test_margins_count(judge: Path) -> None:
    learner = open_learner(judge)
    plain = pairs(learner, ("bb", "cc"), ("bbb", "ac"), ("abb", "aa"), ("bab", "dd"))
    wide = [replace(pair, margin=2.0) for pair in plain]
    leads = learner.scorer.scores([text for pair in plain for text in (pair.chosen, pair.rejected)]).view(-1, 2)
    lead = leads[:, 0] - leads[:, 1]
    for given, margin in ((plain, 0.0), (wide, 2.0)):
        loss = -torch.nn.functional.logsigmoid(lead - margin).mean()
        assert learner.judge(given).loss == pytest.approx(float(loss), rel=1e-5)
    learned = []
    for given in (plain, wide):
        learner = open_learner(judge)
        assert learner.refresh([given] * 2, plain)[2]
        learned.append(weights(learner))
    assert not all(map(torch.equal, *learned))


def test_a_database_that_is_down(tmp_path: Path, postgres_server: str) -> None:
    """A first start is refused; a run that goes on does so without it, and finds it when it is back."""
    name = f"later_{uuid.uuid4().hex}"
    config = settings(tmp_path, f"ppo.feedback.store={postgres_server}/{name}")
    with pytest.raises(ValueError, match=rf"{name}.* cannot be opened"):
        open_store(config)
    (tmp_path / "run" / "checkpoints" / "step_3").mkdir(parents=True)
    store = open_store(config)
    assert store is not None
    for _ in range(2):
        with pytest.raises(OutOfReach, match="cannot be opened"):
            store.settled()
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    assert store.settled() == [] and store.ask(1, [question("k")], 1) == 1


def test_a_database_that_is_stuck(tmp_path: Path, postgres_server: str) -> None:
    """Statements and silent networks have their limits, which the URL can change."""
    url = new_database(postgres_server)
    there = Store.open(url)
    with there.database.read() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        given = driver.info.get_parameters()
        assert (given["tcp_user_timeout"], given["keepalives_idle"]) == ("30000", "10")
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "1min"
    store = open_store(settings(tmp_path, f"ppo.feedback.store='{url}?options=-c%20statement_timeout%3D200'"))
    assert store is not None
    with there.database.write(exclusive=True), pytest.raises(OutOfReach, match="statement timeout"):
        store.ask(1, [question("k")], 1)
    assert store.ask(1, [question("k")], 1) == 1
    there.close()


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
        (
            ["ppo.feedback.store=x.db", "ppo.feedback.replay=0.97"],
            "ppo.feedback.replay=0.97 leaves no new comparison in a batch of ppo.feedback.batch_size=16",
        ),
        (
            ["ppo.feedback.store=x.db", "ppo.feedback.wait_for=9", "ppo.feedback.num_pairs=8"],
            "ppo.feedback.wait_for=9 is more than a round can have answers",
        ),
        (["ppo.feedback.store=x.db", "ppo.feedback.select=best"], "ppo.feedback.select=best"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], sentence: str) -> None:
    required = ["model.restore_from=m", "exp_manager.explicit_log_dir=r", "data.prompts=p", SOURCES]
    with pytest.raises(ValueError) as error:
        load("ppo", overrides=[*required, *overrides])
    assert sentence in str(error.value)


def test_prompts_on_one_side_only_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, "ppo.feedback.store=x.db", "ppo.feedback.held_out=0.3")
    prompts = [Prompt((2,), f"{number} ") for number in range(20)]
    refused = set()
    for given in [[one] for one in prompts]:
        with pytest.raises(ValueError, match=r"ppo.feedback.held_out=0.3 splits prompts") as error:
            open_people(config, (), PPOInputs(None, tmp_path, given))
        refused.add(str(error.value).partition("of the 1 of data.prompts leaves ")[2].partition(":")[0])
    assert refused == {"none to learn from", "none that is held out"}
    with pytest.raises(StopIteration):  # it goes on to the reward models, of which it was given none
        open_people(config, (), PPOInputs(None, tmp_path, prompts))


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
    """With real processes; what people want is seen by nothing but them. Alone it ends at 0.03, so at 4.5. Every step
    waits for the one annotator: else the clock would say which wrong answers a refresh sees. There are enough held-out
    ones for a tenth of wrong answers not to decide what a refresh is worth."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in FROM_OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sys.modules.pop("people", None)
    import people

    keys = ("every_n_steps=1", "num_pairs=48", "wait_for=48", "min_held_out=16", "refresh_steps=20")
    more = [f"ppo.feedback.{key}" for key in keys]
    means = people.turn_round(tmp_path, 0, 20, 0.1, 1, False, *more)
    assert means[0] < 1 and sum(means[-2:]) / 2 > 1.8, means
    shutil.rmtree(tmp_path, ignore_errors=True)
