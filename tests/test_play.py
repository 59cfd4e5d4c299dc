"""Episodes of several turns, whose caches are kept, are what recomputing the whole dialogue for every token gives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_rlhf
from nemo_rlhf.algorithms.play import play
from nemo_rlhf.convert.source import normal
from nemo_rlhf.data.dialogues import read_dialogues
from nemo_rlhf.data.tokenizer import encode, load_tokenizer
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import state
from nemo_rlhf.types import Episode
from tests.conftest import LETTERS, write_tokenizer
from tests.spawn import run_distributed
from tests.workers import play_worker as worker
from tests.workers.generation_worker import load_model
from tests.workers.ilql_worker import WIDTH
from tests.workers.parallel_worker import SEED
from tests.workers.play_worker import LIMIT, Echo, Game

VOCAB, NEW_TOKENS, BETA, CLIP, EOS = len(LETTERS) + 2, 6, 4.0, 0.2, 1


def successors() -> torch.Tensor:
    """After each token about a third of the others, never EOS after EOS alone."""
    mask = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) < 0.33
    mask[:, 5] = True
    return mask


GREEDY = SamplingParams(NEW_TOKENS, temperature=0.0, stop=("e",))
GUIDED = SamplingParams(NEW_TOKENS, temperature=0.0, beta=BETA, adv_clip=CLIP)
SAMPLED = SamplingParams(NEW_TOKENS, seed=4, top_k=9, beta=1.0)
GAMES = {
    "greedy": Game(GREEDY, 4),
    "guided": Game(GUIDED, 3),
    "three turns": Game(GREEDY, 2, max_turns=3),
    "masked": Game(GUIDED, 4, logit_mask=successors()),
    "sampled": Game(SAMPLED, 3),
    "sampled with other slots": Game(SAMPLED, 9),
    "masked and sampled": Game(SAMPLED, 4, logit_mask=successors()),
    "one turn, masked": Game(SamplingParams(20, ignore_eos=True), 3, num_episodes=0, logit_mask=successors()),
    **{fault: Game(GREEDY, 3, fault=fault) for fault in ("raise", "pair", "text", "reward", "done")},
}
# every cut is about the traffic, not about endings: fewer games and no second set of faults
SHARED = ["guided", "three turns", "masked", "sampled", "one turn, masked", "raise", "done"]
EPISODES = [name for name, game in GAMES.items() if game.fault is None and game.num_episodes]


def save_model(directory: Path, kind: str, **changes: Any) -> Path:
    """One of transformers whose weights are large enough for its text to wander, and a token a letter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    assert write_tokenizer(directory) == VOCAB
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **changes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def one(directory: Path) -> dict[str, Any]:
    state.set_environment_for_one_process()
    payload = {"directory": directory, "cuts": [(1, 1)], "games": list(GAMES.values())}
    return dict(zip(GAMES, worker.run(payload)[1, 1], strict=True))


@pytest.fixture(scope="module")
def two(directory: Path) -> list[dict[tuple[int, int], dict[str, Any]]]:
    games = [GAMES[name] for name in SHARED]
    payload = {"directory": directory, "cuts": [(2, 1), (1, 2), (1, 1)], "games": games}
    ranks = run_distributed("tests.workers.play_worker:run", 2, payload)
    return [{cut: dict(zip(SHARED, results, strict=True)) for cut, results in rank.items()} for rank in ranks]


class Reference:
    """transformers' Llama and the heads in plain torch; the whole dialogue anew for every token, an episode at a time,
    as the game says it."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.tokenizer = load_tokenizer(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.heads = Heads()

    @torch.no_grad()
    def next_token(self, ids: list[int], game: Game) -> int:
        hidden = self.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        scores = torch.log_softmax(self.model.lm_head(hidden), -1)
        if game.sampling.beta:
            q = torch.minimum(*(self.heads(head, hidden) for head in self.heads.target_q))
            advantages = q - self.heads(self.heads.v, hidden)
            if game.sampling.adv_clip is not None:
                advantages = advantages.clamp(-game.sampling.adv_clip, game.sampling.adv_clip)
            scores = scores + game.sampling.beta * advantages
        if game.logit_mask is not None:
            scores[~game.logit_mask[ids[-1]]] = -torch.inf
        return int(scores.argmax())

    def play(self, index: int, game: Game) -> Episode:
        env, tokenizer = Echo(index), self.tokenizer
        turns = [env.reset()]
        ids = encode(tokenizer, turns[0], start=True)
        mask, rewards, by_token = [False] * len(ids), [], [0.0] * len(ids)
        while True:
            response: list[int] = []
            while True:
                response.append(self.next_token(ids + response, game))
                text = tokenizer.decode(response, skip_special_tokens=True)
                found = [text.find(stop) for stop in game.sampling.stop if stop in text]
                if response[-1] == EOS or found or len(response) == game.sampling.max_new_tokens:
                    break
            ids, mask = ids + response, mask + [True] * len(response)
            turns.append(tokenizer.decode(response))
            answer, reward, done = env.step(text[: min(found)] if found else text)
            rewards.append(reward)
            by_token += [*[0.0] * (len(response) - 1), reward]
            following = encode(tokenizer, answer, start=False)
            too_long = len(ids) + len(following) + game.sampling.max_new_tokens > LIMIT
            if done or too_long or len(rewards) == game.max_turns:
                return Episode(tuple(turns), tuple(ids), tuple(mask), tuple(rewards), tuple(by_token), done)
            ids, mask, turns = ids + following, mask + [False] * len(following), [*turns, answer]
            by_token += [0.0] * len(following)


class Heads:
    """The heads of ``open_role``, whose targets are Q as it was drawn, with the worker's V."""

    def __init__(self) -> None:
        self.v = {"fc": torch.zeros(1, 64), "out": torch.zeros(1, 1), "out_bias": 0.3}
        self.target_q = [
            {
                "fc": normal(f"ilql_heads.q.{i}.fc.weight", SEED, (WIDTH, 64)) / (3 * 64) ** 0.5,
                "out": normal(f"ilql_heads.q.{i}.weight", SEED, (VOCAB, WIDTH)) / (3 * WIDTH) ** 0.5,
                "out_bias": 0.0,
            }
            for i in range(2)
        ]

    def __call__(self, head: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(hidden @ head["fc"].T) @ head["out"].T + head["out_bias"]


@pytest.mark.parametrize("name", ["greedy", "guided", "three turns", "masked"])
def test_episodes_equal_the_slow_reference(directory: Path, one: dict[str, Any], name: str) -> None:
    reference, game = Reference(directory), GAMES[name]
    assert one[name] == [reference.play(index, game) for index in range(game.num_episodes)]


def test_a_sliding_window_sees_the_last_tokens_of_earlier_turns_only(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "mistral", sliding_window=7, head_dim=16)
    state.set_environment_for_one_process()
    model, tokenizer = load_model(directory, 1, 1), load_tokenizer(directory)
    engine = Engine(model, tokenizer, num_slots=3, max_sequence_length=LIMIT)
    reference, game = Reference(directory), GAMES["greedy"]
    episodes = play(engine, tokenizer, Echo, 6, game.sampling, max_sequence_length=LIMIT)
    assert episodes == [reference.play(index, game) for index in range(6)]
    assert max(len(episode.token_ids) for episode in episodes) > 30


def test_the_games_differ_and_their_turns_too(one: dict[str, Any]) -> None:
    assert len({tuple(episode.token_ids for episode in one[name]) for name in EPISODES}) == len(EPISODES) - 1
    assert one["sampled"] == one["sampled with other slots"]
    endings = {(len(e.rewards), e.done) for e in one["guided"]}
    assert len(endings) > 3, "episodes of one length test too little"
    responses = {len(turn.replace("<eos>", "E")) for e in one["greedy"] for turn in e.turns[1::2]}
    assert len(responses) > 2, "turns of one length test too little"
    assert {e.done for e in one["three turns"]} == {True, False}
    assert all(len(e.rewards) <= 3 for e in one["three turns"])


def test_every_cut_plays_the_same(one: dict[str, Any], two: list[dict[tuple[int, int], dict[str, Any]]]) -> None:
    for rank in two:
        for cut, games in rank.items():  # the last cut is two replicas, of which each plays its share
            for name in SHARED:
                assert games[name] == one[name], (cut, name)


def test_only_allowed_tokens_follow(one: dict[str, Any]) -> None:
    allowed = successors()
    for episode in [*one["masked"], *one["masked and sampled"]]:
        for before, token, is_action in zip(
            episode.token_ids, episode.token_ids[1:], episode.action_mask[1:], strict=False
        ):
            assert allowed[before, token] or not is_action
    for index, response in enumerate(one["one turn, masked"]):
        row = [5 + index, *response]
        assert all(allowed[before, token] for before, token in pairwise(row))
    assert any(not allowed[a, b] for e in one["sampled"] for a, b in pairwise(e.token_ids))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("raise", "step() of environment 3 raised RuntimeError: the board is gone."),
        ("pair", "step() of environment 3 returned ('a', 1.0), and must return (text, reward, done)."),
        ("text", "step() of environment 3 returned a int as text, and must return (text, reward, done)."),
        ("reward", "step() of environment 3 returned the reward nan, which is not a finite number."),
        (
            "done",
            "step() of environment 3 returned None for whether the episode is over, and must return True or False.",
        ),
    ],
)
def test_a_bad_environment_gets_one_sentence_on_every_rank(
    one: dict[str, Any], two: list[dict[tuple[int, int], dict[str, Any]]], fault: str, sentence: str
) -> None:
    assert one[fault] == sentence
    for rank in two:
        for cut, games in rank.items():
            assert games.get(fault, sentence) == sentence, cut


def test_bad_masks_get_one_sentence(directory: Path) -> None:
    state.set_environment_for_one_process()
    model = load_model(directory, 1, 1)
    nothing_follows = torch.ones(VOCAB, VOCAB, dtype=torch.bool)
    nothing_follows[4] = False
    for mask, sentence in (
        (torch.ones(VOCAB, VOCAB), r"logit_mask is torch.float32 .*must be bool \["),
        (torch.ones(VOCAB, 3, dtype=torch.bool), r"logit_mask is torch.bool \[\d+, 3\]"),
        (nothing_follows, "logit_mask lets nothing follow token 4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Engine(model, None, num_slots=1, max_sequence_length=8, logit_mask=mask)


def test_play_is_public_and_its_episodes_are_data(directory: Path) -> None:
    config = nemo_rlhf.config(
        "generate", overrides=["generation.max_new_tokens=4", "generation.num_slots=2", "generation.temperature=0"]
    )
    episodes = nemo_rlhf.play(directory, Echo, num_episodes=4, config=config, max_turns=4)
    assert [episode.turns[0] for episode in episodes] == ["a ", "ab ", "abc ", "abcd "]
    assert config.model.restore_from == "", "the caller's configuration was changed"
    tokenizer = load_tokenizer(directory)
    records = [{"turns": e.turns, "rewards": e.rewards, "done": e.done} for e in episodes]
    assert {episode.done for episode in episodes} == {True, False}
    for episode, dialogue in zip(episodes, read_dialogues(records, tokenizer, 100), strict=True):
        ended = not episode.done or episode.token_ids[-1] == EOS
        assert dialogue.token_ids == (*episode.token_ids, *(() if ended else (EOS,)))
        assert (sum(dialogue.rewards), dialogue.done) == (episode.total_reward, episode.done)
    with pytest.raises(ValueError, match=r"beta=1\.0 needs an ILQL model"):
        config.generation.beta = 1.0
        nemo_rlhf.play(directory, Echo, num_episodes=1, config=config)
    with pytest.raises(ValueError, match=r'configuration from nemo_rlhf\.config\("generate"'):
        nemo_rlhf.play(directory, Echo, num_episodes=1, config=nemo_rlhf.TrainResult)  # type: ignore[arg-type]
