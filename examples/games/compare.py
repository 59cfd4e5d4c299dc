"""Offline learning over many turns, side by side: ILQL, SFT on the same games, and SFT on the best tenth of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Game:
    """``records``: played games as data, dicts with "turns", "rewards" and "done". ``env``: number -> environment of
    one more game; it is won when it ends with a reward of 0. ``write_model``: writes tokenizer and configuration."""

    name: str
    records: Sequence[dict[str, Any]]
    env: Callable[[int], Any]
    num_episodes: int
    max_turns: int
    turn_tokens: int
    write_model: Callable[[Path], Path]
    beta: float  # of ILQL's guidance
    ilql: Sequence[str]  # overrides


def options_of(description: str, name: str, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="directory of the runs")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    parser.add_argument("--steps", type=int, default=steps, help="updates of ILQL; SFT does a quarter as many")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size, in as many processes")
    return parser.parse_args()


def compare(game: Game, options: argparse.Namespace) -> None:
    """Train all three, play with each, and print a line for each way of playing."""
    won = sum(record["done"] and record["rewards"][-1] == 0 for record in game.records)
    lines = [f"{game.name}: {len(game.records)} games of the data, won {won / len(game.records):.2f}"]
    for name in ("ilql", "sft", "sft_best_tenth"):
        checkpoint = train(name, game, options)
        ways = {"guided": (game.beta, 0.0)} if name == "ilql" else {"greedy": (0.0, 0.0), "sampled": (0.0, 1.0)}
        for label, (beta, temperature) in ways.items():
            share, turns = play(checkpoint, game, options, beta, temperature)
            lines.append(f"{name} {label}: won {share:.2f} of {game.num_episodes}, in {turns:.1f} turns")
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))


def train(name: str, game: Game, options: argparse.Namespace) -> Path:
    """Returns the checkpoint of "ilql", "sft" or "sft_best_tenth"."""
    import nemo_rlhf

    is_ilql = name == "ilql"
    overrides = [
        f"exp_manager.explicit_log_dir={options.out / name}",
        f"seed={options.seed}",
        f"trainer.devices={options.tp}",
        f"trainer.max_steps={options.steps if is_ilql else options.steps // 4}",
        f"model.tensor_model_parallel_size={options.tp}",
        "model.init=random",
        "model.global_batch_size=64",
        "model.micro_batch_size=64",
        "model.optim.lr=1e-3",
        "model.optim.sched.name=cosine",
        *(game.ilql if is_ilql else ()),
        *(["data.top_percent=10"] if name == "sft_best_tenth" else ()),
    ]
    model = options.out / "model"
    result = nemo_rlhf.train(
        model if (model / "config.json").is_file() else game.write_model(model),
        samples=game.records,
        config=nemo_rlhf.config("ilql" if is_ilql else "sft", overrides=overrides),
    )
    return result.checkpoint


def play(
    checkpoint: Path, game: Game, options: argparse.Namespace, beta: float, temperature: float
) -> tuple[float, float]:
    """Share of the episodes that are won, and how many turns those took."""
    import nemo_rlhf

    config = nemo_rlhf.config(
        "generate",
        overrides=[
            f"trainer.devices={options.tp}",
            f"model.tensor_model_parallel_size={options.tp}",
            f"generation.max_new_tokens={game.turn_tokens}",
            f"generation.temperature={temperature}",
            f"generation.beta={beta}",
        ],
    )
    episodes = nemo_rlhf.play(
        checkpoint, game.env, num_episodes=game.num_episodes, config=config, max_turns=game.max_turns
    )
    won = [episode for episode in episodes if episode.done and episode.rewards[-1] == 0]
    return len(won) / len(episodes), sum(len(episode.rewards) for episode in won) / max(len(won), 1)


def write_model(directory: Path, words: Sequence[str], pattern: str, width: int, layers: int, longest: int) -> Path:
    """A Hugging Face directory with a tokenizer of ``words``, which ``pattern`` finds in a text, and the configuration
    of a small Llama."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=longest,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    ).save_pretrained(directory)
    return directory
