"""People in the loop (Christiano et al. 2017): ask them about the policy's answers, learn from what they said.

Every ``ppo.feedback.every_n_steps`` steps pairs of fresh answers go into the preference store; whatever people have
said of them by a later step refreshes the reward model. The store alone connects the two: nobody waits for anybody,
unless told to.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemo_rlhf.algorithms.base import Metrics
from nemo_rlhf.algorithms.evaluate import sample
from nemo_rlhf.algorithms.model_source import ModelSource
from nemo_rlhf.algorithms.reward_learner import Judged, RewardLearner
from nemo_rlhf.config.people import FeedbackConfig
from nemo_rlhf.config.schema import PPOConfig
from nemo_rlhf.config.validate_people import learning_source
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import checkpoint, state
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.types import Pair, Prompt

_FIRST_INDEX = 2**41  # of samples for people: noise of their own, apart from rollouts and validation
_CHOICE, _ORDER = 0x5851F42D4C957F2D, 0x14057B7EF767814F  # keep these draws apart from others of the same seed
_SCALE_FROM = 512  # comparisons, the latest, that the scale of scores is measured on
_POLL_S = 0.5


class OutOfReach(Exception):
    """The store does not answer; training goes on without it."""


class Comparison(Protocol):
    """What one annotator said: ``verdict`` is "first", "second", "tie" or "both_bad", of ``answers``."""

    id: int
    step: int
    prompt: str
    answers: tuple[str, str]
    verdict: str
    annotator: str
    simulated: bool


class PreferenceStore(Protocol):
    """This run's part of the store, on rank 0. Everything raises OutOfReach."""

    def ask(self, step: int, questions: Sequence[dict[str, Any]]) -> int:
        """Add pairs to compare ("key", "prompt", "answers", "priority", "metadata"); how many were not there yet."""
        ...

    def settled(self) -> list[int]:
        """Numbers of all comparisons that nobody can take back any more."""
        ...

    def read(self, numbers: Sequence[int]) -> Sequence[Comparison]:
        """These comparisons, in this order."""
        ...

    def report(self, **refresh: Any) -> None:
        """Show those who look after the annotators how a refresh went."""
        ...


class People:
    def __init__(
        self,
        config: FeedbackConfig,
        seed: int,
        run_dir: Path,
        store: PreferenceStore | None,
        learner: RewardLearner,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """``store``: on rank 0, elsewhere None. ``stopping``: whether this process is to end, which ends a wait."""
        self.config, self.seed, self.directory = config, seed, run_dir / "feedback"
        self.store, self.learner, self.stopping = store, learner, stopping
        self.learned: list[int] = []  # comparisons that refreshes learned from, in their order
        self.held_out: list[int] = []
        self.refreshes = 0
        self.accuracy = float("nan")
        self._texts: dict[int, dict[str, Any]] = {}  # comparisons that have been read
        self._since_asked = 0  # how many of them came after the last round of questions

    # ---- one step

    def before(
        self, step: int, engine: Engine, tokenizer: Any, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Metrics:
        """Before a step's rollout: look at what people said, learn from it, ask anew; all ranks call it."""
        asks = step % self.config.every_n_steps == 0
        fresh = self._look(wait=asks and step > 0)
        metrics: Metrics = {}
        sides = {name: [n for n in fresh if self._side(n) == name] for name in ("learn", "hold out", "leave")}
        enough = len(self.held_out) + len(sides["hold out"]) >= self.config.min_held_out
        if len(sides["learn"]) >= self.config.min_new and enough:
            self.held_out += sides["hold out"]
            metrics |= self._refresh(step, sides["learn"])
        if asks:
            metrics["feedback/asked"] = float(self._ask(step, engine, tokenizer, prompts, sampling))
        known = self._texts.values()
        return metrics | {
            "feedback/comparisons": float(len(known)),
            "feedback/simulated": sum(one["simulated"] for one in known) / max(1, len(known)),
            "feedback/undecided": sum(one["chosen"] is None for one in known) / max(1, len(known)),
            "feedback/refreshes": float(self.refreshes),
            "feedback/accuracy": self.accuracy,
        }

    # ---- to people

    def _ask(
        self, step: int, engine: Engine, tokenizer: Any, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> int:
        """Sample pairs, and put those into the store that are most worth an answer; how many."""
        config = self.config
        chosen = self._random(_CHOICE, step).permutation(len(prompts))[: config.num_pairs * config.candidates]
        first = _FIRST_INDEX + 2 * step * config.num_pairs * config.candidates
        requests = make_requests([prompts[index] for index in chosen], 2, first)
        samples = sample(engine, requests, sampling)
        scores = self.learner.source.scores(samples).view(-1, 2).tolist()
        questions: list[dict[str, Any]] = []
        for place, (index, pair) in enumerate(zip(chosen.tolist(), scores, strict=True)):
            one, other = samples[2 * place : 2 * place + 2]
            if one.text == other.text:
                continue
            metadata = {"prompt": index, "samples": [one.sample_index, other.sample_index], "scores": pair}
            questions.append(
                {
                    "key": f"{step}/{index}",
                    "prompt": one.prompt.text,
                    "answers": (one.text, other.text),
                    "priority": float(step),  # answers of the latest policy first
                    "metadata": metadata,
                }
            )
        if config.select == "uncertainty":
            questions.sort(key=lambda question: _difference(question["metadata"]["scores"]))
        questions = questions[: config.num_pairs]
        self._on_store(lambda store: store.ask(step, questions))
        self._since_asked = 0
        return len(questions)

    # ---- from people

    def _look(self, wait: bool) -> list[int]:
        """Numbers of the settled comparisons that no refresh has seen; after it their texts are known on all ranks."""
        seen = {*self.learned, *self.held_out}
        deadline = time.monotonic() + self.config.wait_timeout_s

        def look(store: PreferenceStore) -> tuple[list[int], list[dict[str, Any]]]:
            while True:
                fresh = [number for number in store.settled() if number not in seen]
                unread = [number for number in fresh if number not in self._texts]
                answers = self._since_asked + len(unread)
                if not wait or answers >= self.config.wait_for or time.monotonic() > deadline or self.stopping():
                    return fresh, [_as_record(one) for one in store.read(unread)]
                time.sleep(_POLL_S)

        fresh, records = self._on_store(look) or ([], [])
        self._texts |= {record["id"]: self._readable(record) for record in records}
        self._since_asked += len(records)
        return fresh

    def _readable(self, record: dict[str, Any]) -> dict[str, Any]:
        """A comparison that the reward model cannot hold prefers nobody."""
        if record["chosen"] is not None:
            try:
                self._encode(record)
            except ValueError as error:
                warnings.warn(f"{error} It is left out.", stacklevel=2)
                return {**record, "chosen": None, "rejected": None}
        return record

    def _refresh(self, step: int, fresh: Sequence[int]) -> Metrics:
        """Learn from ``fresh`` comparisons and, again, from some of before."""
        number = self.refreshes + 1
        batches = self._batches(number, fresh)
        held_out = self._pairs(self.held_out)
        before, after, accepted = self.learner.refresh([self._pairs(batch) for batch in batches], held_out)
        self.learned += fresh
        self.refreshes = number
        self.accuracy = (after if accepted else before).accuracy
        if accepted:
            self.learner.measure_scale(self._pairs([*self.held_out, *self.learned][-_SCALE_FROM:]))
        self._record(step, fresh, batches, before, after, accepted)
        self._on_store(
            lambda store: store.report(
                step=step,
                number=number,
                comparisons=len(self.learned),
                held_out=len(self.held_out),
                accuracy_before=before.accuracy,
                accuracy_after=after.accuracy,
                accepted=accepted,
            )
        )
        return {
            "feedback/accuracy_before": before.accuracy,
            "feedback/accuracy_after": after.accuracy,
            "feedback/loss_before": before.loss,
            "feedback/loss_after": after.loss,
            "feedback/accepted": float(accepted),
        }

    def _batches(self, number: int, fresh: Sequence[int]) -> list[list[int]]:
        """Comparisons of each optimizer step: new ones, each before any comes again, and old ones drawn at random."""
        config, random = self.config, self._random(_ORDER, number)
        from_before = round(config.replay * config.batch_size) if self.learned else 0
        num_new = config.batch_size - from_before
        rounds = -(-num_new * config.refresh_steps // len(fresh))
        queue = np.concatenate([random.permutation(fresh) for _ in range(rounds)])
        return [
            [
                *queue[step * num_new : (step + 1) * num_new].tolist(),
                *random.choice(self.learned or [0], from_before).tolist(),
            ]
            for step in range(config.refresh_steps)
        ]

    def _side(self, number: int) -> str:
        """ "learn", "hold out" or, where nobody is preferred, "leave". Every comparison of a prompt is on one side."""
        record = self._texts[number]
        if record["chosen"] is None or record["chosen"] == record["rejected"]:
            return "leave"
        digest = hashlib.sha256(record["prompt"].encode(errors="surrogatepass")).digest()
        return "hold out" if int.from_bytes(digest[:8], "big") < self.config.held_out * 2**64 else "learn"

    def _pairs(self, numbers: Iterable[int]) -> list[Pair]:
        return [self._encode(self._texts[number]) for number in numbers]

    def _encode(self, record: dict[str, Any]) -> Pair:
        return self.learner.encode(
            record["prompt"], record["chosen"], record["rejected"], f"Comparison {record['id']} of the preference store"
        )

    def _record(
        self,
        step: int,
        fresh: Sequence[int],
        batches: list[list[int]],
        before: Judged,
        after: Judged,
        accepted: bool,
    ) -> None:
        """Everything that this refresh saw: with those before it and the first weights, the same model comes again."""
        record = {
            "number": self.refreshes,
            "step": step,
            "accepted": accepted,
            "before": vars(before),
            "after": vars(after),
            "batches": batches,
            "held_out": self.held_out,
            "comparisons": [self._texts[number] for number in [*fresh, *self.held_out]],
        }
        path = self.directory / f"refresh_{self.refreshes}.json"

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1) + "\n")
            partial.replace(path)

        checkpoint.on_rank_zero(write)

    # ---- across stops

    def loop_state(self) -> dict[str, Any]:
        return {
            "learned": self.learned,
            "held_out": self.held_out,
            "refreshes": self.refreshes,
            "accuracy": self.accuracy,
            "since_asked": self._since_asked,
            "texts": [self._texts[number] for number in [*self.learned, *self.held_out]],
        }

    def load_loop_state(self, loaded: dict[str, Any]) -> None:
        self.learned, self.held_out = list(loaded["learned"]), list(loaded["held_out"])
        self.refreshes, self.accuracy = loaded["refreshes"], loaded["accuracy"]
        self._since_asked = loaded["since_asked"]
        self._texts = {record["id"]: record for record in loaded["texts"]}

    # ---- parts

    def _on_store(self, call: Callable[[PreferenceStore], Any]) -> Any:
        """What ``call`` gives on rank 0, on every rank; None and a warning where the store does not answer."""
        result, away = None, ""
        if self.store is not None:
            try:
                result = call(self.store)
            except OutOfReach as error:
                away = str(error)
        result, away = state.share_object(state.gather_objects((result, away))[0])
        if away:
            warnings.warn(
                f"The preference store does not answer, and training goes on without it: {away}", stacklevel=2
            )
        return result

    def _random(self, purpose: int, number: int) -> np.random.Generator:
        key = np.array([(self.seed + purpose) % 2**64, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def open_people(
    config: PPOConfig,
    models: Sequence[ModelSource],
    run_dir: Path,
    store: PreferenceStore | None,
    stopping: Callable[[], bool],
) -> People | None:
    """The loop with that one of ``models`` which learns; None where the configuration names no store."""
    if config.ppo.feedback.store is None:
        return None
    learner = RewardLearner(next(one for one in models if one.name == learning_source(config)))
    return People(config.ppo.feedback, config.seed, run_dir, store, learner, stopping)


def load_people(people: People | None, directory: Path) -> None:
    """The reward model of a checkpoint, where it has one that learned.

    Raises:
        ValueError: it has one, and nobody is asked any more.
    """
    if not (directory / RewardLearner.role).is_dir():
        return
    if people is None:
        raise ValueError(
            f"the checkpoint {directory} has a reward model that learned from people, and ppo.feedback.store is null: "
            "set it as before, or use another exp_manager.explicit_log_dir."
        )
    people.learner.load(directory)


def _difference(scores: Sequence[float]) -> float:
    return abs(scores[0] - scores[1])


def _as_record(one: Comparison) -> dict[str, Any]:
    """Plain data, with "chosen" and "rejected" None where nobody was preferred."""
    chosen = rejected = None
    if one.verdict in ("first", "second"):
        chosen, rejected = one.answers if one.verdict == "first" else one.answers[::-1]
    return {
        "id": one.id,
        "step": one.step,
        "prompt": one.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "verdict": one.verdict,
        "annotator": one.annotator,
        "simulated": one.simulated,
    }
