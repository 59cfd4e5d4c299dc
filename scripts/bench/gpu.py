"""Time and memory of PPO on one GPU, beside what ``nemo-rlhf plan`` says of the same work.

    python scripts/bench/gpu.py [--out gpu.json] [--steps 3] [--sizes NAME=NUMBER ...]

A Llama of 1.1 billion parameters with random weights, bf16, TP1: policy, critic of the same size and reference, 64
prompts of 256 tokens, 256 sampled tokens each (EOS does not end them), a reward that costs nothing. Memory is the most
that PyTorch had allocated in a phase; time is the median of the steps after the first. Each case is a process of its
own. The plan's seconds use ``cluster.utilisation`` as it ships.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Of the model, in the words of its Hugging Face configuration, and of a step."""

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    prompts: int = 64
    prompt_tokens: int = 256
    new_tokens: int = 256
    batch: int = 16
    copied_mib: int = 2048  # by which scripts/bench/gpu_check.py measures the memory's bandwidth

    @classmethod
    def read(cls, pairs: list[str]) -> Sizes:
        """Of "name=number"; what is not named is as above."""
        return cls(**{name: int(value) for name, _, value in (pair.partition("=") for pair in pairs)})

    def architecture(self) -> dict[str, int]:
        """The fields that LlamaConfig knows."""
        return dict(list(dataclasses.asdict(self).items())[:6])


CASES: dict[str, list[str]] = {
    "everything on the GPU": ["model.micro_batch_size=4"],
    "recomputation": ["model.micro_batch_size=8", "model.activations_checkpoint_granularity=full"],
    "offloading": ["model.micro_batch_size=4", "ppo.offload=[optimizer,critic,reference]"],
    "no critic (RLOO)": [
        "model.micro_batch_size=4",
        "ppo.advantage=rloo",
        "ppo.num_prompts=16",
        "ppo.samples_per_prompt=4",
    ],
}
PHASES = {"configure_model": "load", "collect": "rollout", "experience": "experience", "update": "update"}


def write_model(directory: Path, sizes: Sizes) -> Path:
    """Configuration and a tokenizer of words "t2", "t3", ...; no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, sizes.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    config = LlamaConfig(
        **sizes.architecture(), max_position_embeddings=1024, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    return directory


def measure(case: str, steps: int, sizes: Sizes) -> dict[str, Any]:
    """Runs ``steps`` PPO steps in this process; bytes and seconds by phase, and what the first step says. On a CPU
    memory is the peak of the process so far."""
    import torch

    import nemo_rlhf
    from nemo_rlhf import device
    from nemo_rlhf.algorithms.ppo import PPO
    from nemo_rlhf.cli.run import run_ppo

    peaks: dict[str, int] = {}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if device.is_cuda():
                torch.cuda.reset_peak_memory_stats()
            result = call(*arguments)
            device.synchronize()
            peaks[name] = max(peaks.get(name, 0), int(device.peak_memory_mib() * 2**20))
            return result

        return run

    for method, name in PHASES.items():
        setattr(PPO, method, watched(name, getattr(PPO, method)))
    PPO.save_models = lambda self, directory: None  # type: ignore[method-assign]  # 40 GB that nobody reads
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory) / "model", sizes)
        run_dir = Path(directory) / "run"
        config = nemo_rlhf.config(
            "ppo",
            overrides=[
                "model.init=random",
                f"exp_manager.explicit_log_dir={run_dir}",
                "exp_manager.create_tensorboard_logger=false",
                "exp_manager.checkpoint_callback_params.every_n_train_steps=1000",
                f"trainer.max_steps={steps}",
                "trainer.precision=bf16",
                "trainer.enable_progress_bar=false",
                f"ppo.num_prompts={sizes.prompts}",
                f"model.global_batch_size={sizes.batch}",
                f"generation.max_new_tokens={sizes.new_tokens}",
                f"generation.num_slots={sizes.prompts}",
                "generation.ignore_eos=true",
                *CASES[case],
            ],
        )
        config.model.restore_from = str(model)
        code = run_ppo(
            config,
            reward_fn=lambda outputs, **_: [float(len(output)) / 1000 for output in outputs],
            prompts=[{"prompt": " ".join(f"t{i}" for i in ids)} for ids in prompt_ids(sizes)],
        )
        assert code == 0, code
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        plan = planned(config, sizes)
    keys = ("time/rollout_s", "time/experience_s", "time/update_s")
    keys += ("perf/generated_tokens_per_s", "perf/trained_tokens_per_s")
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in keys}
    first = {key: rows[0][key] for key in (*keys, "check/ratio_step0", "check/kl_step0")}
    return {"bytes": peaks, **medians, "first": first, "planned": plan}


def prompt_ids(sizes: Sizes) -> list[list[int]]:
    words = sizes.vocab_size - 2
    return [[2 + (31 * p + 7 * i) % words for i in range(sizes.prompt_tokens)] for p in range(sizes.prompts)]


def planned(config: Any, sizes: Sizes) -> dict[str, Any]:
    """What the planner says of exactly this plan: bytes and seconds by phase, and forward operations of a token."""
    from nemo_rlhf.config.architecture import Architecture
    from nemo_rlhf.config.plan import PlanConfig
    from nemo_rlhf.convert.locate import read_architecture
    from nemo_rlhf.launch.memory import phases
    from nemo_rlhf.launch.parameters import Cut
    from nemo_rlhf.launch.time import forward_flops, seconds
    from nemo_rlhf.launch.work import Plan, make_work

    architecture: Architecture = read_architecture(config.model.restore_from)
    asked = PlanConfig()
    asked.plan.model, asked.plan.advantage = "measured", config.ppo.advantage
    asked.plan.prompt_tokens, asked.plan.response_tokens = sizes.prompt_tokens, sizes.new_tokens
    asked.plan.num_prompts, asked.plan.samples_per_prompt = config.ppo.num_prompts, config.ppo.samples_per_prompt
    asked.plan.global_batch_size, asked.cluster.gpus_per_node = sizes.batch, 1
    asked.plan.epochs = config.ppo.epochs
    work = make_work(asked, architecture, None, None)
    away = tuple(name for name in config.ppo.offload if name != "reference")
    plan = Plan(
        cut=Cut(tp=1, pp=1, dp=1),
        micro_batch_size=config.model.micro_batch_size,
        recompute=config.model.activations_checkpoint_granularity,
        slots=config.generation.num_slots,
        reference="offload" if "reference" in config.ppo.offload else "resident",
        offload=away,
    )
    return {
        "bytes": {name: sum(rows.values()) for name, rows in phases(work, plan, 0).items()},
        "rows": phases(work, plan, 0),
        "seconds": seconds(work, plan),
        "forward_flops_per_sample": forward_flops(work.model, work.length, sizes.new_tokens),
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    for case, result in results.items():
        print(f"\n{case}")
        for phase, size in result["bytes"].items():
            expected = result["planned"]["bytes"].get(phase)
            if expected:
                print(f"  {phase:11} {size / 2**30:6.2f} GiB, planned {expected / 2**30:6.2f} ({expected / size:.2f})")
        for name, value in result.items():
            if name.startswith(("time/", "perf/")):
                print(f"  {name:32} {value:10.2f}")
        print("  planned seconds ", {name: round(value, 2) for name, value in result["planned"]["seconds"].items()})


def main() -> None:
    parser = argparse.ArgumentParser(description="PPO on one GPU: time and memory, beside the plan.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    parser.add_argument("--case", choices=CASES, help="one case, in this process")
    parser.add_argument("--sizes", nargs="*", default=[], metavar="NAME=NUMBER", help="other than a 1.1B model's")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.steps, Sizes.read(options.sizes))))
        return
    results = {}
    for case in CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--case", case, "--steps", str(options.steps)]
        command += ["--sizes", *options.sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{case}: {done.stderr[-2000:]}", file=sys.stderr)
            continue
        results[case] = json.loads(done.stdout.splitlines()[-1])
        show({case: results[case]})
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
