"""People in the loop turn a reward model round that likes the wrong thing. The people are scripted, and say so.

    python examples/people.py [--out runs/people] [--seed 0] [--steps 40] [--noise 0.1] [--alone]

A small model writes eight letters. Its reward model has learned to like the letter a and to dislike b. People want b:
while PPO runs, annotators of ``nemo-rlhf feedback simulate`` compare the policy's answers in the preference store, and
are wrong in one of ten; what they say refreshes the reward model. The run never sees how many b there are; this program
counts them in its samples. With --alone nobody is asked. To answer yourself, start it with --annotators 0 and open the
page that ``nemo-rlhf feedback serve`` gives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

LETTERS = "abcdefgh "
LENGTH = 8
COMMON = ("exp_manager.create_tensorboard_logger=false", "trainer.enable_progress_bar=false")


def taste(prompt: str, answer: str) -> float:
    """What people want."""
    return float(answer.count("b"))


def write_inputs(directory: Path, seed: int) -> None:
    """A model without weights, prompts, and pairs that prefer a to b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    model = directory / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(model)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    ).save_pretrained(model)
    draw = random.Random(seed)

    def word(length: int) -> str:
        return "".join(draw.choice(LETTERS[:-1]) for _ in range(length))

    def likes(answer: str) -> int:
        return answer.count("a") - answer.count("b")

    pairs = []
    while len(pairs) < 600:
        better, worse = sorted((word(LENGTH) for _ in range(2)), key=likes, reverse=True)
        if likes(better) > likes(worse):
            pairs.append({"prompt": f"{word(3)} ", "chosen": better, "rejected": worse})
    prompts = [{"prompt": f"{word(3)} "} for _ in range(200)]
    for name, records in (("prompts", prompts), ("pairs", pairs[:500]), ("held_out", pairs[500:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def run(command: str, *arguments: str) -> None:
    print("nemo-rlhf", command, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "nemo_rlhf", command, *arguments], check=True, env=environment())


def environment() -> dict[str, str]:
    """With this file as the module ``people``."""
    here = str(Path(__file__).resolve().parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}


def ppo(out: Path, seed: int, steps: int, alone: bool, *more: str) -> Path:
    """The run's directory. ``alone``: nobody is asked."""
    directory = out / ("alone" if alone else "together")
    judge = out / "reward" / "checkpoints" / "best"
    people = (
        f"ppo.feedback.store={out / 'feedback.db'}",
        f"ppo.feedback.run={directory.resolve()}",
        "ppo.feedback.every_n_steps=2",
        "ppo.feedback.num_pairs=24",
        "ppo.feedback.candidates=2",
        "ppo.feedback.wait_for=20",
        "ppo.feedback.undo_s=0",
        "ppo.feedback.min_new=12",
        "ppo.feedback.min_held_out=4",
        "ppo.feedback.refresh_steps=10",
        "ppo.feedback.batch_size=32",
        "ppo.feedback.optim.lr=1e-3",
    )
    arguments = (
        f"model.restore_from={out / 'model'}",
        "model.init=random",
        f"data.prompts={out / 'prompts.jsonl'}",
        f"exp_manager.explicit_log_dir={directory}",
        "reward.sources=[{kind: model, name: judge, restore_from: '" + str(judge) + "', normalise: true}]",
        f"seed={seed}",
        f"generation.seed={seed}",
        f"trainer.max_steps={steps}",
        f"generation.max_new_tokens={LENGTH}",
        "generation.ignore_eos=true",
        "generation.num_slots=64",
        "ppo.num_prompts=64",
        "ppo.samples_per_prompt=1",
        "ppo.epochs=2",
        "ppo.kl.coef=0.01",
        "model.global_batch_size=64",
        "model.micro_batch_size=64",
        "model.optim.lr=1e-3",
        "model.critic.optim.lr=1e-3",
        *COMMON,
        *(() if alone else people),
        *more,
    )
    run("ppo", *arguments)
    return directory


def mean_taste(directory: Path, steps: int) -> list[float]:
    """Of the samples of each step."""
    means = []
    for step in range(1, steps + 1):
        lines = (directory / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
        answers = [json.loads(line)["response"] for line in lines]
        means.append(sum(taste("", answer) for answer in answers) / len(answers))
    return means


def turn_round(out: Path, seed: int, steps: int, noise: float, annotators: int, alone: bool, *more: str) -> list[float]:
    """How many b an answer has, in each step; ``more``: further configuration of PPO."""
    out = out.resolve()
    if not (out / "held_out.jsonl").is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_inputs(out, seed)
        data = (f"data.train={out / 'pairs.jsonl'}", f"data.validation={out / 'held_out.jsonl'}")
        model = (f"model.restore_from={out / 'model'}", "model.init=random", "model.optim.lr=2e-3")
        sizes = ("model.global_batch_size=50", "model.micro_batch_size=50", "trainer.max_steps=100")
        place = (f"exp_manager.explicit_log_dir={out / 'reward'}", "trainer.val_check_interval=50", f"seed={seed}")
        run("reward", *model, *data, *sizes, *place, *COMMON)
    if alone or not annotators:
        return mean_taste(ppo(out, seed, steps, alone, *more), steps)
    where = ("--store", str(out / "feedback.db"), "--run", str(out / "together"))
    simulate = [
        sys.executable,
        "-m",
        "nemo_rlhf",
        "feedback",
        "simulate",
        *where,
        "--prefer",
        "people:taste",
        "--watch",
    ]
    simulate += ["--noise", str(noise), "--annotators", str(annotators), "--seed", str(seed)]
    people = subprocess.Popen(simulate, env=environment())
    try:
        return mean_taste(ppo(out, seed, steps, alone, *more), steps)
    finally:
        people.send_signal(signal.SIGTERM)
        people.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Scripted people turn a wrong reward model round.")
    parser.add_argument("--out", type=Path, default=Path("runs/people"), help="directory of the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="of PPO")
    parser.add_argument("--noise", type=float, default=0.1, help="share of wrong answers")
    parser.add_argument("--annotators", type=int, default=3, help="scripted ones; 0: answer yourself")
    parser.add_argument("--alone", action="store_true", help="nobody is asked")
    options = parser.parse_args()
    means = turn_round(options.out, options.seed, options.steps, options.noise, options.annotators, options.alone)
    for step in range(0, len(means), max(1, len(means) // 10)):
        print(f"step {step + 1:3}  b in an answer {means[step]:.2f}")
    print(f"last five steps: {sum(means[-5:]) / 5:.2f}")


if __name__ == "__main__":
    main()
