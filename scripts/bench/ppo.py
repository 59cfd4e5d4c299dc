"""Time and memory of one PPO iteration, against TRL's PPO on the same work in the same run.

    pip install trl==1.12.0        # the last release with trl.experimental.ppo
    python scripts/bench/ppo.py [--iterations 6] [--repeats 3]

Llama, 256 wide, 4 layers, 4 heads, 2000 tokens of vocabulary, random weights; 32 prompts of 32 tokens, 48 new tokens
each, 2 inner epochs, one mini-batch, fp32, 1 thread, one process. The reward costs nothing on both sides. Each
system runs in its own processes, in turns; an iteration lies between two calls of the reward, and two are warm-up.
Figures are medians over iterations of CPU seconds, and the peak resident set; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_PROMPTS, PROMPT_LENGTH, RESPONSE_LENGTH, EPOCHS, VOCABULARY = 32, 32, 48, 2, 2000
LEARNING_RATE = 1e-5
WARM_UP = 2
SYSTEMS = ("nemo_rlhf", "trl")


def write_model(directory: Path) -> None:
    """Model and tokenizer; the tokens are "t0".."t1999", split at spaces."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(VOCABULARY - 2)} | {"<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 2,
            tie_word_embeddings=False,
        )
    ).save_pretrained(directory)


def prompts() -> list[list[int]]:
    import random

    source = random.Random(0)
    return [[source.randrange(VOCABULARY - 2) for _ in range(PROMPT_LENGTH)] for _ in range(NUM_PROMPTS)]


class Clock:
    """CPU and wall seconds between calls."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def result(self) -> dict[str, Any]:
        pairs = list(zip(self.marks[WARM_UP - 1 :], self.marks[WARM_UP:], strict=False))
        return {
            "cpu_s": [b[0] - a[0] for a, b in pairs],
            "wall_s": [b[1] - a[1] for a, b in pairs],
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def run_nemo_rlhf(model: Path, iterations: int) -> dict[str, Any]:
    import nemo_rlhf

    clock = Clock()

    def reward(outputs: list[str], **_: Any) -> list[float]:
        clock.tick()
        return [0.01 * len(output) for output in outputs]

    with tempfile.TemporaryDirectory() as run_dir:
        overrides = [
            f"exp_manager.explicit_log_dir={run_dir}",
            "exp_manager.create_tensorboard_logger=false",
            f"exp_manager.checkpoint_callback_params.every_n_train_steps={iterations + 1}",
            f"trainer.max_steps={iterations}",
            "trainer.enable_progress_bar=false",
            f"model.global_batch_size={NUM_PROMPTS}",
            f"model.micro_batch_size={NUM_PROMPTS}",
            f"model.optim.lr={LEARNING_RATE}",
            f"model.critic.optim.lr={LEARNING_RATE}",
            f"ppo.num_prompts={NUM_PROMPTS}",
            "ppo.samples_per_prompt=1",
            f"ppo.epochs={EPOCHS}",
            "ppo.keep_graph=true",
            f"generation.max_new_tokens={RESPONSE_LENGTH}",
            f"generation.num_slots={NUM_PROMPTS}",
            "generation.ignore_eos=true",
        ]
        config = nemo_rlhf.config("ppo", overrides=overrides)
        texts = [" ".join(f"t{token}" for token in prompt) for prompt in prompts()]
        nemo_rlhf.train(model, reward_fn=reward, prompts=texts, config=config)
    return clock.result()


def run_trl(model: Path, iterations: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.modeling_outputs import BaseModelOutput
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    clock = Clock()

    class NoReward(torch.nn.Module):
        """Looks like a reward model, and costs nothing."""

        base_model_prefix = "base"

        def __init__(self) -> None:
            super().__init__()
            self.base = self.Base()

        class Base(torch.nn.Module):
            def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
                clock.tick()
                return BaseModelOutput(hidden_states=(input_ids.float().unsqueeze(-1) * 1e-3,))

        def score(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    load = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    with tempfile.TemporaryDirectory() as out:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=out,
                per_device_train_batch_size=NUM_PROMPTS,
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                num_ppo_epochs=EPOCHS,
                local_rollout_forward_batch_size=NUM_PROMPTS,
                response_length=RESPONSE_LENGTH,
                total_episodes=NUM_PROMPTS * iterations,
                num_sample_generations=0,
                learning_rate=LEARNING_RATE,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                stop_token=None,
            ),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(model, **load),
            ref_model=AutoModelForCausalLM.from_pretrained(model, **load),
            reward_model=NoReward(),
            value_model=AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **load),
            train_dataset=Dataset.from_dict({"input_ids": prompts() * iterations}),
        )
        trainer.train()
    return clock.result()


def child(system: str, model: Path, iterations: int) -> None:
    import torch

    torch.set_num_threads(1)
    run = {"nemo_rlhf": run_nemo_rlhf, "trl": run_trl}[system]
    print("RESULT " + json.dumps(run(model, iterations)), flush=True)


def measure(system: str, model: Path, iterations: int) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--child", system, str(model), "--iterations", str(iterations)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{system} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="One PPO iteration against TRL's.")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("SYSTEM", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.iterations)
        return
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        for _ in range(options.repeats):
            for system in SYSTEMS:
                results[system].append(measure(system, Path(name), options.iterations))
    print(f"{platform.machine()}, {os.cpu_count()} cores, 1 thread")
    medians = {}
    for system, runs in results.items():
        cpu = statistics.median(value for run in runs for value in run["cpu_s"])
        wall = statistics.median(value for run in runs for value in run["wall_s"])
        peak = max(run["peak_mib"] for run in runs)
        medians[system] = (cpu, peak)
        print(f"{system:10s} {cpu:6.2f} CPU s and {wall:6.2f} s an iteration, peak {peak:5.0f} MiB")
    (ours, our_peak), (theirs, their_peak) = medians["nemo_rlhf"], medians["trl"]
    print(f"ratio      {ours / theirs:6.2f} of the CPU seconds, {our_peak / their_peak:.2f} of the peak memory")


if __name__ == "__main__":
    main()
