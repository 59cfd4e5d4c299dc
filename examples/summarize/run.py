"""RLHF's three steps in one program: SFT, a reward model from preferences, PPO against it; then what came of it.

    PYTHONPATH=examples python -m summarize.run [--out DIR] [--devices N] [--seed N] [--kl COEFFICIENT]

Every step is a command that could be typed as well; it is printed before it runs. An interrupted run continues with
the first step that has not finished. Another --kl in the same directory shares everything before PPO: with --kl 0
nothing holds the policy back from what only the reward model likes.

No people are asked: see preferences.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from summarize_docstrings.commands import Program, default_devices, newest_checkpoint

from summarize import figures, judge, preferences
from summarize.preferences import Sampled

HERE = Path(__file__).resolve().parent
SFT_CONFIG = HERE.parent / "summarize_docstrings" / "sft.yaml"
NUM_SAMPLES = 4  # of the SFT policy, for each prompt: two pairs in training, best of four on held-out prompts
KL = 0.05  # nats cost this much of a reward whose standard deviation is about 1
GENERATION = (
    "generation.temperature=0.7",  # as in ppo.yaml: the reward model should know what PPO shows it
    "generation.max_new_tokens=24",
    "generation.num_slots=256",
    "data.max_prompt_length=32",
)
console = Console()


def main() -> int:
    options = _parse()
    out: Path = options.out
    data, sft, reward, ppo = out / "data", out / "sft", out / "reward", out / f"ppo_kl_{options.kl:g}"
    program = Program(options.devices, options.seed, console)
    program.step(1, "a corpus of docstrings and its tokenizer")
    model = program.prepare(data)

    program.step(2, "SFT: what people wrote")
    train = (f"data.train={data / 'train.jsonl'}", f"data.validation={data / 'heldout.jsonl'}")
    program.train("sft", SFT_CONFIG, sft, model, *train, *options.sft)

    program.step(3, "summaries of the SFT policy, compared by ROUGE-L with noise in the place of people")
    held_out = _compare(program, newest_checkpoint(sft), data, out, options.prompts)

    program.step(4, "reward model: what people prefer")
    pairs = (f"data.train={out / 'pairs.jsonl'}", f"data.validation={out / 'heldout_pairs.jsonl'}")
    program.train("reward", HERE / "reward.yaml", reward, newest_checkpoint(sft), *pairs, *options.reward)

    program.step(5, f"PPO against the reward model, KL coefficient {options.kl:g}")
    program.train("ppo", HERE / "ppo.yaml", ppo, newest_checkpoint(sft), *_rewards(reward, data, options), *options.ppo)

    program.step(6, "held-out summaries of both policies")
    _evaluate(program, sft, reward, ppo, held_out)
    console.print(f"Done in {program.elapsed_s:.0f} s. Figures: {ppo / 'figures.md'}")
    return 0


def _compare(program: Program, policy: Path, data: Path, out: Path, num_prompts: int) -> list[Sampled]:
    """Write ``pairs.jsonl`` and ``heldout_pairs.jsonl``. Returns the samples for held-out prompts."""
    lines = {name: (data / f"{name}.jsonl").read_text().splitlines() for name in ("prompts", "heldout_prompts")}
    held_out = lines["heldout_prompts"]
    prompts = out / "compared_prompts.jsonl"
    prompts.write_text("\n".join([*held_out, *lines["prompts"][:num_prompts]]) + "\n")
    files = [out / "samples" / f"seed_{seed}.jsonl" for seed in range(NUM_SAMPLES)]
    for seed, file in enumerate(files):
        _generate(program, policy, prompts, file, seed)
    samples = preferences.read_samples(files)
    sides = {"heldout_pairs": samples[: len(held_out)], "pairs": samples[len(held_out) :]}
    for name, side in sides.items():
        pairs = preferences.write_pairs(out / f"{name}.jsonl", side, program.seed)
        agreed = preferences.agreement(pairs)
        console.print(f"{name}.jsonl: {len(pairs)} pairs; ROUGE-L without noise agrees with {agreed:.0%} of them.")
    return sides["heldout_pairs"]


def _generate(program: Program, policy: Path, prompts: Path, out: Path, seed: int) -> None:
    if not out.is_file():
        files = ("--prompts", str(prompts), "--out", str(out))
        program.run("generate", str(policy), *files, *GENERATION, f"generation.seed={seed}", *program.cut)


def _rewards(reward: Path, data: Path, options: argparse.Namespace) -> tuple[str, ...]:
    """The reward model, which the critic starts from as well; ROUGE-L with weight 0 is only watched."""
    judged = f"{{kind: model, name: preference, restore_from: {newest_checkpoint(reward)}, normalise: true}}"
    watched = "{kind: function, name: rouge_l, weight: 0.0, function: 'summarize_docstrings.reward:reward_fn'}"
    return (
        f"reward.sources=[{judged}, {watched}]",
        f"model.critic.restore_from={newest_checkpoint(reward)}",
        f"ppo.kl.coef={options.kl:g}",
        f"data.prompts={data / 'prompts.jsonl'}",
        f"data.validation_prompts={data / 'heldout_prompts.jsonl'}",
    )


def _evaluate(program: Program, sft: Path, reward: Path, ppo: Path, held_out: list[Sampled]) -> None:
    """Greedy summaries of the exported models, sampled ones, and the best of N, with the reward model's opinion."""
    from summarize_docstrings.evaluate import summarize

    prompts = [one.prompt for one in held_out]
    references = [one.reference for one in held_out]
    before, after = (summarize(program.export(run), prompts) for run in (sft, ppo))
    samples = [[one.summaries[number] for one in held_out] for number in range(NUM_SAMPLES)]
    sampled_after = ppo / "samples.jsonl"
    _generate(program, newest_checkpoint(ppo), ppo.parent / "data" / "heldout_prompts.jsonl", sampled_after, 0)
    after_sample = [one.summaries[0] for one in preferences.read_samples([sampled_after])]
    with judge.serve(program, newest_checkpoint(reward), reward / "url") as scores:
        sample_scores = [scores(prompts, some) for some in samples]
        best, best_scores = figures.best_of(samples, sample_scores)
        rows = [
            figures.measure("SFT, greedy", before, references, scores(prompts, before)),
            figures.measure("PPO, greedy", after, references, scores(prompts, after), before),
            figures.measure("SFT, sampled", samples[0], references, sample_scores[0]),
            figures.measure("PPO, sampled", after_sample, references, scores(prompts, after_sample), samples[0]),
            figures.measure(f"SFT, best of {NUM_SAMPLES}", best, references, best_scores, samples[0]),
            figures.measure("references", references, references, scores(prompts, references), before),
        ]
    training = figures.last_metrics(reward, ("val/accuracy", "val/margin", "val/calibration_error"))
    training |= figures.last_metrics(ppo, ("kl/coef", "kl/sequence"))
    figures.write(ppo, rows, training)
    console.print(figures.table(rows, f"{len(prompts)} held-out docstrings"))
    console.print("  ".join(f"{name} {value:.3f}" for name, value in training.items()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small Llama learns to summarise docstrings by RLHF's three steps.")
    parser.add_argument("--out", type=Path, default=Path("runs/summarize"), help="directory of the run")
    parser.add_argument("--devices", type=int, help="processes, which share each layer (default: 2, or the only GPU)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--kl", type=float, default=KL, help=f"coefficient of the KL penalty (default: {KL})")
    parser.add_argument("--prompts", type=int, default=6000, help="how many prompts people compare summaries for")
    for command in ("sft", "reward", "ppo"):
        parser.add_argument(f"--{command}", nargs="*", default=[], metavar="key=value", help="further configuration")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.devices = options.devices or default_devices()
    return options


if __name__ == "__main__":
    sys.exit(main())
