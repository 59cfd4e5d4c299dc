"""People in the loop (Christiano et al. 2017): ask them about the policy's answers, learn from what they said.

Every ``ppo.feedback.every_n_steps`` steps pairs of fresh answers go into the preference store; whatever people have
said of them by a later step refreshes the reward model. The store alone connects the two: nobody waits for anybody,
unless told to.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_rlhf.algorithms.base import Metrics
from nemo_rlhf.algorithms.evaluate import sample
from nemo_rlhf.algorithms.model_source import ModelSource
from nemo_rlhf.algorithms.preferences import PreferenceStore, SharedStore, as_record
from nemo_rlhf.algorithms.refreshes import RefreshFiles
from nemo_rlhf.algorithms.reward_learner import RewardLearner
from nemo_rlhf.config.people import FeedbackConfig
from nemo_rlhf.config.schema import PPOConfig
from nemo_rlhf.config.validate_people import learning_source, num_replayed
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.types import Pair, Prompt

if TYPE_CHECKING:
    from nemo_rlhf.algorithms.ppo import PPOInputs

_FIRST_INDEX = 2**41  # of samples for people: noise of their own, apart from rollouts and validation
_CHOICE, _ORDER = 0x5851F42D4C957F2D, 0x14057B7EF767814F  # keep these draws apart from others of the same seed
_SCALE_FROM = 512  # comparisons, the latest, that the scale of scores is measured on
_POLL_S = 0.5


class People:
    def __init__(
        self,
        config: FeedbackConfig,
        seed: int,
        run_dir: Path,
        store: PreferenceStore | None,
        learner: RewardLearner,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """``store``: on rank 0, elsewhere None. ``prompts``, ``tokenizer``: the policy's. ``stopping``: whether this
        process is to end, which ends a wait."""
        self.config, self.seed, self.prompts, self.tokenizer = config, seed, prompts, tokenizer
        self.store, self.learner, self.stopping = SharedStore(store), learner, stopping
        self.files = RefreshFiles(run_dir / "feedback")
        self.learned: list[int] = []  # comparisons that refreshes learned from, in their order
        self.held_out: list[int] = []
        self.refreshes = 0
        self.accuracy = float("nan")
        self._texts: dict[int, dict[str, Any]] = {}  # comparisons that have been read
        self._read_from = ""  # the store that they are from
        self._since_asked = 0  # how many of them came after the last round of questions
        self._has_begun = False  # in this process

    # ---- one step

    def before(self, step: int, engine: Engine, sampling: SamplingParams) -> Metrics:
        """Before a step's rollout: look at what people said, learn from it, ask anew; all ranks call it.

        Raises:
            ValueError: on every rank; the store is another one than before, or holds what it must not.
        """
        if not self._has_begun:
            self.files.rewind(self.refreshes)
            self._has_begun = True
        asks = step % self.config.every_n_steps == 0
        fresh = self._look(wait=asks and step > 0)
        metrics: Metrics = {}
        sides = {name: [n for n in fresh if self._side(n) == name] for name in ("learn", "hold out", "leave")}
        enough = len(self.held_out) + len(sides["hold out"]) >= self.config.min_held_out
        if len(sides["learn"]) >= self.config.min_new and enough:
            self.held_out += sides["hold out"]
            metrics |= self._refresh(step, sides["learn"][: self._num_new() * self.config.refresh_steps])
        if asks:
            metrics["feedback/asked"] = float(self._ask(step, engine, sampling))
        known = self._texts.values()
        return metrics | {
            "feedback/comparisons": float(len(known)),
            "feedback/simulated": sum(one["simulated"] for one in known) / max(1, len(known)),
            "feedback/undecided": sum(one["chosen"] is None for one in known) / max(1, len(known)),
            "feedback/refreshes": float(self.refreshes),
            "feedback/accuracy": self.accuracy,
        }

    # ---- to people

    def _ask(self, step: int, engine: Engine, sampling: SamplingParams) -> int:
        """Sample pairs, and put those into the store that are most worth an answer; how many it had not yet."""
        config = self.config
        chosen = self._random(_CHOICE, step).permutation(len(self.prompts))[: config.num_pairs * config.candidates]
        first = _FIRST_INDEX + 2 * step * config.num_pairs * config.candidates
        requests = make_requests([self.prompts[index] for index in chosen], 2, first)
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
                    "messages": one.prompt.messages,
                    "answers": (one.text, other.text),
                    "priority": float(step),  # answers of the latest policy first
                    "metadata": metadata,
                }
            )
        if config.select == "uncertainty":
            questions.sort(key=lambda question: _difference(question["metadata"]["scores"]))
        num_new = self.store.call(lambda store: store.ask(step, questions, config.num_pairs)) or 0
        if num_new:
            self._since_asked = 0
        return num_new

    # ---- from people

    def _look(self, wait: bool) -> list[int]:
        """Numbers of the settled comparisons that no refresh has seen; after it their texts are known on all ranks."""
        seen = {*self.learned, *self.held_out}
        deadline = time.monotonic() + self.config.wait_timeout_s

        def look(store: PreferenceStore) -> tuple[str, list[int], list[dict[str, Any]]]:
            while True:
                may_grow = wait and store.may_grow()  # before the look, which then has what settles in between
                fingerprint = self._same_store(store.fingerprint())
                fresh = [number for number in store.settled() if number not in seen]
                unread = [number for number in fresh if number not in self._texts]
                enough = self._since_asked + len(unread) >= self.config.wait_for
                if not may_grow or enough or time.monotonic() > deadline or self.stopping():
                    return fingerprint, fresh, [as_record(one, self.tokenizer) for one in store.read(unread)]
                time.sleep(_POLL_S)

        self._read_from, fresh, records = self.store.call(look) or (self._read_from, [], [])
        self._texts |= {record["id"]: self._readable(record) for record in records}
        self._since_asked += len(records)
        return fresh

    def _same_store(self, fingerprint: str) -> str:
        if self._texts and fingerprint != self._read_from:
            raise ValueError(
                f"The run has read {len(self._texts)} comparisons from another preference store than this one: set "
                "ppo.feedback.store and ppo.feedback.run as before, or use another exp_manager.explicit_log_dir."
            )
        return fingerprint

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
            self.learner.measure_scale(self._pairs(sorted([*self.held_out, *self.learned])[-_SCALE_FROM:]))
        record = {
            "step": step,
            "accepted": accepted,
            "before": vars(before),
            "after": vars(after),
            "optim": asdict(self.config.optim),
            "batches": batches,
            "held_out": self.held_out,
            "comparisons": [self._texts[one] for one in [*fresh, *self.held_out]],
        }
        self.files.write(number, record)
        self.store.call(
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

    def _num_new(self) -> int:
        """Comparisons of a batch that no refresh has seen."""
        config = self.config
        return config.batch_size - (num_replayed(config) if self.learned else 0)

    def _batches(self, number: int, fresh: Sequence[int]) -> list[list[int]]:
        """Comparisons of each optimizer step: new ones, each before any comes again, and old ones drawn at random."""
        config, random, num_new = self.config, self._random(_ORDER, number), self._num_new()
        rounds = -(-num_new * config.refresh_steps // len(fresh))
        queue = np.concatenate([random.permutation(fresh) for _ in range(rounds)])
        return [
            [
                *queue[step * num_new : (step + 1) * num_new].tolist(),
                *random.choice(self.learned or [0], config.batch_size - num_new).tolist(),
            ]
            for step in range(config.refresh_steps)
        ]

    def _side(self, number: int) -> str:
        """ "learn", "hold out" or, where nobody is preferred, "leave". Every comparison of a prompt is on one side."""
        record = self._texts[number]
        if record["chosen"] is None or record["chosen"] == record["rejected"]:
            return "leave"
        return "hold out" if _is_held_out(record["prompt"], self.config.held_out) else "learn"

    def _pairs(self, numbers: Iterable[int]) -> list[Pair]:
        return [self._encode(self._texts[number]) for number in numbers]

    def _encode(self, record: dict[str, Any]) -> Pair:
        where = f"Comparison {record['id']} of the preference store"
        return self.learner.encode(record["prompt"], record["chosen"], record["rejected"], where, record["margin"])

    # ---- across stops

    def loop_state(self) -> dict[str, Any]:
        return {
            "learned": self.learned,
            "held_out": self.held_out,
            "refreshes": self.refreshes,
            "accuracy": self.accuracy,
            "since_asked": self._since_asked,
            "texts": list(self._texts.values()),
            "read_from": self._read_from,
        }

    def load_loop_state(self, loaded: dict[str, Any]) -> None:
        self.learned, self.held_out = list(loaded["learned"]), list(loaded["held_out"])
        self.refreshes, self.accuracy = loaded["refreshes"], loaded["accuracy"]
        self._since_asked = loaded["since_asked"]
        self._texts = {record["id"]: record for record in loaded["texts"]}
        self._read_from = loaded["read_from"]

    # ---- parts

    def _random(self, purpose: int, number: int) -> np.random.Generator:
        key = np.array([(self.seed + purpose) % 2**64, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def open_people(config: PPOConfig, models: Sequence[ModelSource], inputs: PPOInputs) -> People | None:
    """The loop with that one of ``models`` which learns; None where the configuration names no store.

    Raises:
        ValueError: all prompts are held out, or none is.
    """
    feedback, prompts = config.ppo.feedback, inputs.prompts
    if feedback.store is None:
        return None
    if len({_is_held_out(prompt.text, feedback.held_out) for prompt in prompts}) < 2:
        nobody = "none to learn from" if _is_held_out(prompts[0].text, feedback.held_out) else "none that is held out"
        raise ValueError(
            f"ppo.feedback.held_out={feedback.held_out:g} splits prompts by a hash of their text, and of the "
            f"{len(prompts)} of data.prompts leaves {nobody}: give more prompts, or another share."
        )
    learner = RewardLearner(next(one for one in models if one.name == learning_source(config)))
    run_dir = Path(config.exp_manager.explicit_log_dir)
    return People(feedback, config.seed, run_dir, inputs.store, learner, prompts, inputs.tokenizer, inputs.stopping)


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


def _is_held_out(prompt: str, share: float) -> bool:
    digest = hashlib.sha256(prompt.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _difference(scores: Sequence[float]) -> float:
    return abs(scores[0] - scores[1])
