"""The games of ``examples/games``: what they say is consistent, and values stitch a way out of poor walks."""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

GAMES = Path(__file__).resolve().parents[1] / "examples" / "games"
sys.path.insert(0, str(GAMES))

import compare  # noqa: E402
import maze  # noqa: E402
import words  # noqa: E402


@pytest.fixture(scope="module")
def labyrinth():
    return maze.make_maze()


def test_a_maze_connects_every_cell_both_ways(labyrinth):
    assert len(labyrinth.distance) == maze.SIZE**2
    assert len(labyrinth.doors) == 2 * (maze.SIZE**2 - 1 + maze.EXTRA_DOORS)
    for cell, way in labyrinth.doors:
        there = labyrinth.move(cell, way)
        assert any(labyrinth.move(there, back) == cell for back in maze.WAYS)
    for cell, distance in labyrinth.distance.items():
        nearest = min(labyrinth.distance[labyrinth.move(cell, way)] for way in maze.WAYS)
        assert distance == (0 if cell == labyrinth.goal else nearest + 1)
    assert labyrinth.move((0, 0), "n") == labyrinth.move((0, 0), "w") == labyrinth.move((0, 0), "x") == (0, 0)
    assert maze.make_maze() == labyrinth and maze.make_maze(seed=2) != labyrinth
    assert max(labyrinth.distance.values()) < maze.MAX_MOVES


def test_walks_are_what_the_environment_says_and_few_arrive(labyrinth):
    game = maze.make_game()
    assert game.records == maze.make_game().records and len(game.records) == maze.NUM_WALKS
    cells = {maze.name_of(cell): cell for cell in labyrinth.distance}
    for record in game.records[:50]:
        turns, rewards = record["turns"], record["rewards"]
        walk = maze.Walk(labyrinth, cells[turns[0]])
        assert walk.reset() == turns[0]
        answers = [walk.step(way) for way in turns[1::2]]
        assert [text for text, _, _ in answers[:-1]] == turns[2::2]
        assert [reward for _, reward, _ in answers] == rewards
        assert answers[-1][2] == record["done"] == (rewards[-1] == 0)
        assert record["done"] or len(rewards) == maze.MAX_MOVES
    assert sum(record["done"] for record in game.records) < 0.15 * len(game.records)


@pytest.mark.parametrize(
    ("guess", "hidden", "hint"),
    [
        ("abate", "abate", "aGbGaGtGeG"),
        ("sissy", "humph", "sBiBsBsByB"),
        ("abase", "batty", "aYbYaBsBeB"),
        ("stool", "colon", "sBtBoYoGlY"),
    ],
)
def test_hints_count_letters(guess, hidden, hint):
    assert words.hint_of(guess, hidden) == hint


def test_players_games_are_what_the_environment_says():
    draw = random.Random(3)
    records = [words.play_one(draw, 0.5) for _ in range(50)]
    for record in records:
        turns, rewards = record["turns"], record["rewards"]
        (hidden,) = [word for word in words.WORDS if _says(word, turns, rewards)][:1]
        assert (rewards[-1] == 0) == (turns[-1] == hidden) and set(rewards[:-1]) <= {-1.0}
        assert len(rewards) <= words.TRIES
    careful = [words.play_one(draw, 1.0)["rewards"][-1] for _ in range(50)]
    assert sum(careful) > sum(words.play_one(draw, 0.0)["rewards"][-1] for _ in range(50))
    assert words.Guessing("abate").step("a") == ("?", -1.0, False)


def _says(word: str, turns: list[str], rewards: list[float]) -> bool:
    game = words.Guessing(word)
    answers = [game.step(guess) for guess in turns[1::2]]
    return [text for text, _, _ in answers[:-1]] == turns[2::2] and [reward for _, reward, _ in answers] == rewards


@pytest.mark.parametrize("game", ["maze", "words"])
def test_every_text_of_a_game_is_tokens(game, tmp_path):
    from transformers import AutoTokenizer

    made = {"maze": maze, "words": words}[game].make_game()
    tokenizer = AutoTokenizer.from_pretrained(made.write_model(tmp_path))
    turns = [turn for record in made.records[:100] for turn in record["turns"]]
    assert tokenizer.pad_token_id not in {token for turn in turns for token in tokenizer(turn)["input_ids"]}
    assert {len(tokenizer(turn)["input_ids"]) for record in made.records[:100] for turn in record["turns"][1::2]} == {
        made.turn_tokens
    }


def test_values_stitch_a_way_out_of_poor_walks(tmp_path, monkeypatch):
    for name, value in {"SIZE": 4, "MAX_MOVES": 15, "EXTRA_DOORS": 2, "NUM_WALKS": 1500}.items():
        monkeypatch.setattr(maze, name, value)
    game = maze.make_game()
    game = replace(game, ilql=[*game.ilql, "ilql.gamma=0.9"])  # ways are short
    walkers = sum(record["done"] for record in game.records) / len(game.records)
    options = argparse.Namespace(out=tmp_path, seed=0, steps=300, tp=1)
    won = {
        name: compare.play(compare.train(name, game, options), game, options, beta, 0.0)[0]
        for name, beta in (("ilql", game.beta), ("sft", 0.0))
    }
    assert walkers < 0.4 and won["ilql"] >= 0.95 and won["sft"] < 0.8, (walkers, won)
