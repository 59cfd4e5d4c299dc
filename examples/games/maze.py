"""Find the way out of a maze from other people's wandering: offline learning over many turns.

    python examples/games/maze.py [--out runs/maze] [--seed 0] [--steps 1500] [--tp 1]

Each turn the maze says where one is ("C4", column and row), and the answer is a way to go: n, e, s or w. A move costs
1, the one that reaches the goal nothing. The data are walks from all over the maze by walkers of whom a third go at
random, a third lean a little towards the goal and a third away from it; few of them arrive. ILQL puts their pieces
together: guided by its values it finds the goal from anywhere, where supervised fine-tuning on all walks wanders as
they do, and on the best tenth has seen too little of the maze. Everything runs on a CPU in a few minutes.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

from compare import Game, compare, options_of, write_model

SIZE, MAX_MOVES, NUM_WALKS, TASK_SEED = 7, 30, 4000, 4
EXTRA_DOORS = 4  # beyond those that just connect all cells
LEANINGS = (0.0, 0.2, -0.4)  # of walkers: how often they go nearer (farther, where negative) instead of at random
WAYS = {"n": (0, -1), "e": (1, 0), "s": (0, 1), "w": (-1, 0)}
COLUMNS, ROWS = "ABCDEFGHIJ", "0123456789"
Cell = tuple[int, int]


def name_of(cell: Cell) -> str:
    return COLUMNS[cell[0]] + ROWS[cell[1]]


@dataclass(frozen=True)
class Maze:
    """``doors``: pairs (cell, way) through which one can go. ``distance``: moves from each cell to the goal."""

    doors: frozenset[tuple[Cell, str]]
    distance: dict[Cell, int]
    goal: Cell

    @property
    def starts(self) -> list[Cell]:
        return [cell for cell in self.distance if cell != self.goal]

    def move(self, cell: Cell, way: str) -> Cell:
        """Where one is then; a wall, or what is no way at all, leaves one where one was."""
        return neighbour(cell, way) if (cell, way) in self.doors else cell


def neighbour(cell: Cell, way: str) -> Cell:
    return cell[0] + WAYS[way][0], cell[1] + WAYS[way][1]


def make_maze(seed: int = TASK_SEED) -> Maze:
    """A spanning tree of the grid by depth-first search, and some more doors."""
    draw = random.Random(seed)
    cells = {(x, y) for x in range(SIZE) for y in range(SIZE)}
    goal = (SIZE - 1, SIZE - 1)
    doors: set[tuple[Cell, str]] = set()
    seen, stack = {goal}, [goal]
    while stack:
        free = [way for way in WAYS if neighbour(stack[-1], way) in cells - seen]
        if not free:
            stack.pop()
            continue
        way = draw.choice(free)
        open_door(doors, stack[-1], way)
        stack.append(neighbour(stack[-1], way))
        seen.add(stack[-1])
    walls = [(c, w) for c in sorted(cells) for w in "es" if neighbour(c, w) in cells and (c, w) not in doors]
    for cell, way in draw.sample(walls, EXTRA_DOORS):
        open_door(doors, cell, way)
    distance, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for way in WAYS:
            if (cell, way) in doors and (there := neighbour(cell, way)) not in distance:
                distance[there] = distance[cell] + 1
                queue.append(there)
    return Maze(frozenset(doors), distance, goal)


def open_door(doors: set[tuple[Cell, str]], cell: Cell, way: str) -> None:
    back = {"n": "s", "s": "n", "e": "w", "w": "e"}[way]
    doors |= {(cell, way), (neighbour(cell, way), back)}


class Walk:
    """The environment of ``nemo_rlhf.play``: one walk through the maze."""

    def __init__(self, maze: Maze, start: Cell) -> None:
        self.maze, self.cell = maze, start

    def reset(self) -> str:
        return name_of(self.cell)

    def step(self, text: str) -> tuple[str, float, bool]:
        self.cell = self.maze.move(self.cell, text)
        arrived = self.cell == self.maze.goal
        return name_of(self.cell), 0.0 if arrived else -1.0, arrived


def walk_of(maze: Maze, draw: random.Random, leaning: float) -> dict[str, Any]:
    """A walk of at most MAX_MOVES moves from a random cell, as data."""
    walk, turns, rewards, arrived = Walk(maze, draw.choice(maze.starts)), [], [], False
    text = walk.reset()
    while not arrived and len(rewards) < MAX_MOVES:
        change = {way: maze.distance[maze.move(walk.cell, way)] - maze.distance[walk.cell] for way in WAYS}
        leant = [way for way in WAYS if change[way] * leaning < 0]
        way = draw.choice(leant if leant and draw.random() < abs(leaning) else list(WAYS))
        turns += [text, way]
        text, reward, arrived = walk.step(way)
        rewards.append(reward)
    return {"turns": turns, "rewards": rewards, "done": arrived}


def make_game() -> Game:
    maze, draw = make_maze(), random.Random(TASK_SEED)
    words = [*map(name_of, sorted(maze.distance)), *WAYS]
    return Game(
        name="maze",
        records=[walk_of(maze, draw, LEANINGS[index % len(LEANINGS)]) for index in range(NUM_WALKS)],
        env=lambda index: Walk(maze, maze.starts[index % len(maze.starts)]),
        num_episodes=len(maze.starts),
        max_turns=MAX_MOVES,
        turn_tokens=1,
        write_model=partial(write_model, words=words, pattern="[A-Z][0-9]|[a-z]", width=64, layers=2, longest=128),
        beta=100.0,
        # a high expectile: the best of what was tried in a cell; targets that follow quickly, as the way is long
        ilql=[
            "ilql.tau=0.9",
            "ilql.gamma=0.97",
            "ilql.alpha=0.2",
            "ilql.steps_for_target_q_sync=1",
        ],
    )


if __name__ == "__main__":
    compare(make_game(), options_of("Find the way out of a maze from the walks of others.", "maze", 1500))
