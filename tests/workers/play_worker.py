"""Plays with the real model on whatever ranks the launcher started; also called in the test's own process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.play import play
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.data.tokenizer import load_tokenizer
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.parallel import state
from nemo_rlhf.types import Episode, Prompt, Request
from tests.workers.ilql_worker import WIDTH
from tests.workers.parallel_worker import SEED

LIMIT = 96  # tokens of an episode


class Echo:
    """Answers with a text that depends on what was said, of uneven length and now and then empty; over after a number
    of turns that depends on the episode. ``fault`` goes wrong in the second turn of episode 3."""

    def __init__(self, index: int, fault: str | None = None) -> None:
        assert state.is_model_leader(), "environments belong to the leader"
        self.index, self.fault, self.turn = index, fault, 0

    def reset(self) -> str:
        return "abcdefg"[: 1 + self.index % 5] + " "

    def step(self, text: str) -> Any:
        self.turn += 1
        answer = "" if self.turn % 4 == 3 else " ." + text[::-1][: self.index % 7] + "z" * (self.turn % 3)
        if self.fault and self.index == 3 and self.turn == 2:
            return wrong_answer(self.fault)
        return answer, len(text) - self.turn / 2, self.turn == 2 + self.index % 6


def wrong_answer(fault: str) -> Any:
    if fault == "raise":
        raise RuntimeError("the board\nis gone")
    answers = {
        "pair": ("a", 1.0),
        "text": (7, 1.0, False),
        "reward": ("a", float("nan"), False),
        "done": ("a", 1.0, None),
    }
    return answers[fault]


@dataclass(frozen=True)
class Game:
    """One call of ``play``, or of plain generation where there are no episodes."""

    sampling: SamplingParams
    num_slots: int
    num_episodes: int = 7
    max_turns: int | None = None
    fault: str | None = None
    logit_mask: Tensor | None = None


def run_game(model: ILQLModel, tokenizer: Any, game: Game) -> list[Episode] | list[tuple[int, ...]] | str:
    engine = Engine(
        model.gpt, tokenizer, num_slots=game.num_slots, max_sequence_length=LIMIT, logit_mask=game.logit_mask
    )
    if not game.num_episodes:
        requests = [Request(Prompt((5 + index,) * (index + 1), ""), index) for index in range(4)]
        return [sample.response_ids for sample in engine.generate(requests, game.sampling)]

    def env(index: int) -> Echo:
        return Echo(index, game.fault)

    limits = {"max_sequence_length": LIMIT, "max_turns": game.max_turns}
    try:
        return play(engine, tokenizer, env, game.num_episodes, game.sampling, **limits)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)


def run(payload: dict[str, Any]) -> dict[tuple[int, int], list[Any]]:
    """payload: ``directory``, ``cuts``, ``games``."""
    results = {}
    directory: Path = payload["directory"]
    tokenizer = load_tokenizer(directory)
    for tp, pp in payload["cuts"]:
        state.initialize(tp, pp, SEED)
        config = ModelConfig(str(directory), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        config.sequence_parallel = tp > 1
        model = open_role(ILQLModel, config, str(directory), "32", SEED, ilql_num_q=2, ilql_head_width=WIDTH)
        with torch.no_grad():
            give_values(model)
        results[tp, pp] = [run_game(model, tokenizer, game) for game in payload["games"]]
    return results


def give_values(model: ILQLModel) -> None:
    """Values that are not all 0, as after training; those of Q are drawn already."""
    if model.gpt.ilql_heads is not None:
        model.gpt.ilql_heads.v.out.bias.fill_(0.3)
