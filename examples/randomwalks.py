"""Find the shortest way through a graph: random walks, the small task that RLHF libraries are compared on.

    python examples/randomwalks.py [--algorithm ppo|ilql] [--out runs/randomwalks] [--tp 1] [--seed 0] [--steps N]

A graph of 21 nodes, named a to u, has random edges; node a is the goal. The model first learns 1000 random walks of at
most 10 nodes by heart (SFT), which reach the goal late or never, and then, with PPO, to get there as fast as the graph
allows. With ILQL it learns from the walks and their scores alone, without ever trying one. A walk's optimality is
``(10 - length) / (10 - shortest)``: 1 for the shortest way, 0 for one that takes 10 nodes, uses an edge that is not
there, or never arrives. Everything runs on a CPU in a few minutes.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

NUM_NODES, MAX_LENGTH, NUM_WALKS, EDGE_PROBABILITY = 21, 10, 1000, 0.1
TASK_SEED = 1000
NAMES = "abcdefghijklmnopqrstu"
GOAL = 0


@dataclass(frozen=True)
class Task:
    """``edges[i, j]``: there is an edge from i to j. ``shortest[i]``: nodes on the shortest way from i to the goal,
    both included, inf where there is none. ``walks``: strings of node names."""

    edges: np.ndarray
    shortest: tuple[float, ...]
    walks: tuple[str, ...]

    @property
    def starts(self) -> list[str]:
        """Nodes to start from: those that can do better than MAX_LENGTH nodes."""
        return [NAMES[i] for i in range(NUM_NODES) if i != GOAL and self.shortest[i] < MAX_LENGTH]


def make_task(seed: int = TASK_SEED) -> Task:
    """A graph without self-edges in which every node but the goal has a way out, and random walks on it. A walk ends at
    the goal or after MAX_LENGTH nodes."""
    random = np.random.RandomState(seed)
    while True:  # drawn again until every node has a way out
        edges = random.rand(NUM_NODES, NUM_NODES) > 1 - EDGE_PROBABILITY
        np.fill_diagonal(edges, False)
        if edges.any(1).all():
            break
    edges[GOAL] = False
    walks = []
    for _ in range(NUM_WALKS):
        walk = [int(random.randint(1, NUM_NODES))]
        while walk[-1] != GOAL and len(walk) < MAX_LENGTH:
            walk.append(int(random.choice(np.flatnonzero(edges[walk[-1]]))))
        walks.append("".join(NAMES[node] for node in walk))
    return Task(edges, shortest_ways(edges), tuple(walks))


def shortest_ways(edges: np.ndarray) -> tuple[float, ...]:
    """Breadth-first search from the goal, against the edges."""
    nodes = [math.inf] * len(edges)
    nodes[GOAL] = 1
    queue = deque([GOAL])
    while queue:
        node = queue.popleft()
        for before in np.flatnonzero(edges[:, node]):
            if nodes[before] == math.inf:
                nodes[before] = nodes[node] + 1
                queue.append(int(before))
    return tuple(nodes)


def optimality(task: Task, samples: list[str]) -> list[float]:
    """One number a walk, between 0 and 1. What follows the goal does not count."""
    return [_optimality(task, [NAMES.find(name) for name in sample]) for sample in samples]


def _optimality(task: Task, walk: list[int]) -> float:
    if GOAL not in walk or task.shortest[walk[0]] >= MAX_LENGTH:
        return 0.0
    length = walk.index(GOAL) + 1
    way = walk[:length]
    if min(way) < 0 or not all(task.edges[here, there] for here, there in pairwise(way)):
        return 0.0
    return (MAX_LENGTH - min(length, MAX_LENGTH)) / (MAX_LENGTH - task.shortest[walk[0]])


def write_model(directory: Path) -> Path:
    """A Hugging Face directory with a tokenizer of node names and the configuration of a 6 x 144 Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", *NAMES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=144,
        intermediate_size=432,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    ).save_pretrained(directory)
    return directory


def train_ppo(out: Path, shared: list[str], seed: int, steps: int) -> dict[str, float]:
    """SFT on the walks, then PPO; returns the metrics of PPO's last step, ``val/optimality`` among them."""
    import nemo_rlhf

    task, model = make_task(), model_in(out)
    sft = nemo_rlhf.train(
        model,
        samples=list(task.walks),
        config=nemo_rlhf.config(
            "sft",
            overrides=[
                *shared,
                f"exp_manager.explicit_log_dir={out / 'sft'}",
                "trainer.max_steps=200",
                "trainer.enable_progress_bar=false",
                "model.init=random",
                "model.global_batch_size=100",
                "model.micro_batch_size=100",
                "model.optim.lr=1e-3",
            ],
        ),
    )

    def reward(samples: list[str], **_: Any) -> list[float]:
        return optimality(task, samples)

    ppo = nemo_rlhf.train(
        sft.checkpoint,
        reward_fn=reward,
        prompts=task.starts,
        eval_prompts=task.starts * (1000 // len(task.starts)),
        metric_fn=lambda samples, **_: {"optimality": optimality(task, samples)},
        config=nemo_rlhf.config(
            "ppo",
            overrides=[
                *shared,
                f"exp_manager.explicit_log_dir={out / 'ppo'}",
                f"trainer.max_steps={steps}",
                "trainer.val_check_interval=5",
                "model.global_batch_size=128",
                "model.micro_batch_size=128",
                # whitening blows up what is left to learn near the optimum, so the rates end at 0
                *(f"model.{role}lr=3e-4" for role in ("optim.", "critic.optim.")),
                *(f"model.{role}sched.name=cosine" for role in ("optim.", "critic.optim.")),
                "ppo.num_prompts=128",
                "ppo.samples_per_prompt=1",
                "ppo.epochs=4",
                "ppo.kl.coef=0",
                "generation.max_new_tokens=9",
                "generation.num_slots=128",
                f"generation.seed={seed}",
                "generation.validation.temperature=1.0",
            ],
        ),
    )
    return dict(ppo.metrics)


def train_ilql(out: Path, shared: list[str], seed: int, steps: int) -> dict[str, float]:
    """ILQL from scratch on the walks and their optimality (trlX's recipe); returns the metrics of its last step."""
    import nemo_rlhf

    task, model = make_task(), model_in(out)
    result = nemo_rlhf.train(
        model,
        samples=list(task.walks),
        rewards=optimality(task, list(task.walks)),
        eval_prompts=task.starts * (1000 // len(task.starts)),
        metric_fn=lambda samples, **_: {"optimality": optimality(task, samples)},
        config=nemo_rlhf.config(
            "ilql",
            overrides=[
                *shared,
                f"exp_manager.explicit_log_dir={out / 'ilql'}",
                f"trainer.max_steps={steps}",
                "trainer.val_check_interval=20",
                "exp_manager.checkpoint_callback_params.monitor='val/optimality@beta=100.0'",
                "exp_manager.checkpoint_callback_params.mode=max",
                "model.init=random",
                "model.global_batch_size=100",
                "model.micro_batch_size=100",
                "model.optim.lr=2e-4",
                "ilql.tau=0.8",
                "ilql.alpha=0.1",
                "generation.beta=[0,1,100]",
                "generation.top_k=10",
                "generation.max_new_tokens=9",
                "generation.num_slots=128",
                f"generation.seed={seed}",
                "generation.validation.temperature=1.0",
            ],
        ),
    )
    return dict(result.metrics)


def model_in(out: Path) -> Path:
    model = out / "model"
    return model if (model / "config.json").is_file() else write_model(model)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the shortest ways through a graph.")
    parser.add_argument("--algorithm", choices=("ppo", "ilql"), default="ppo")
    parser.add_argument("--out", type=Path, default=Path("runs/randomwalks"), help="directory of the runs")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size, in as many processes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
    parser.add_argument("--steps", type=int, help="PPO iterations of 4 updates each (40), or ILQL updates (200)")
    options = parser.parse_args()
    shared = [
        f"seed={options.seed}",
        f"trainer.devices={options.tp}",
        f"model.tensor_model_parallel_size={options.tp}",
    ]
    if options.algorithm == "ppo":
        metrics = train_ppo(options.out, shared, options.seed, options.steps or 40)
    else:
        metrics = train_ilql(options.out, shared, options.seed, options.steps or 200)
    if os.environ.get("RANK", "0") == "0":
        for name, value in metrics.items():
            if name.startswith("val/optimality"):
                print(f"{name.removeprefix('val/')} {value:.3f}")


if __name__ == "__main__":
    main()
