"""Guess the hidden word of five letters in six tries, from the games of players who do not think much.

    python examples/games/words.py [--out runs/words] [--seed 0] [--steps 1000] [--tp 1]

After each guess the game says of every letter whether it is right (G), elsewhere in the word (Y) or not in it (B). A
guess costs 1, the right one nothing. The players have favourite words, which they try whatever they were told; now and
then they keep to the hints, some of them more often than others. ILQL learns from their games what a guess is worth
after such hints, and so to keep to them; supervised fine-tuning has its favourites.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Any

from compare import Game, compare, options_of, write_model

LIST = """
cigar rebut sissy humph awake blush focal evade naval serve heath dwarf model karma stink
grade quiet bench abate feign major death fresh crust stool colon abase marry react batty
"""
WORDS = LIST.split()
TRIES, NUM_GAMES, TASK_SEED = 6, 6000, 1
CARE = (0.0, 0.2, 0.4)  # of players: how often they keep to all hints
START = "?"


def hint_of(guess: str, hidden: str) -> str:
    """The guess with a colour behind each letter, of "GYB"; of letters that it has too often, the last ones are B."""
    left = Counter(h for g, h in zip(guess, hidden, strict=True) if g != h)
    marks = []
    for letter, right in zip(guess, hidden, strict=True):
        if letter == right:
            marks.append(letter + "G")
        elif left[letter]:
            left[letter] -= 1
            marks.append(letter + "Y")
        else:
            marks.append(letter + "B")
    return "".join(marks)


class Guessing:
    """The environment of ``nemo_rlhf.play``: one hidden word."""

    def __init__(self, hidden: str) -> None:
        self.hidden, self.tries = hidden, 0

    def reset(self) -> str:
        return START

    def step(self, text: str) -> tuple[str, float, bool]:
        self.tries += 1
        if text == self.hidden:
            return hint_of(text, self.hidden), 0.0, True
        hint = hint_of(text, self.hidden) if len(text) == len(self.hidden) else START
        return hint, -1.0, self.tries == TRIES


def play_one(draw: random.Random, care: float) -> dict[str, Any]:
    """A player's game, as data."""
    game, turns, rewards, done = Guessing(draw.choice(WORDS)), [], [], False
    text, possible = game.reset(), list(WORDS)
    while not done:
        favourites = [1 / (1 + place) for place in range(len(WORDS))]
        guess = draw.choice(possible) if draw.random() < care else draw.choices(WORDS, favourites)[0]
        turns += [text, guess]
        text, reward, done = game.step(guess)
        rewards.append(reward)
        possible = [word for word in possible if hint_of(guess, word) == text]
    return {"turns": turns, "rewards": rewards, "done": True}


def make_game() -> Game:
    draw = random.Random(TASK_SEED)
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = [*letters, *(letter + colour for letter in letters for colour in "GYB"), START]
    return Game(
        name="words",
        records=[play_one(draw, CARE[index % len(CARE)]) for index in range(NUM_GAMES)],
        env=lambda index: Guessing(WORDS[index % len(WORDS)]),
        num_episodes=len(WORDS) * 4,
        max_turns=TRIES,
        turn_tokens=len(WORDS[0]),
        write_model=partial(write_model, words=tokens, pattern="[a-z][GYB]?|.", width=128, layers=3, longest=128),
        beta=10.0,
        ilql=["ilql.tau=0.8", "ilql.alpha=0.1", "ilql.steps_for_target_q_sync=1", "ilql.gamma=1.0"],
    )


if __name__ == "__main__":
    compare(make_game(), options_of("Guess words from the games of careless players.", "words", 1000))
