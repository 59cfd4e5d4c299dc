"""Time and memory of an ILQL step against an SFT step on the same tokens.

    python scripts/bench/ilql.py [--steps 6] [--repeats 2]

Llama, random weights, every token of 16 texts learned, fp32, 1 thread, one process. "small" is 144 wide with 6 layers
and 23 tokens of vocabulary (randomwalks), 128 tokens a text; "vocabulary" is 256 wide with 4 layers and 32000 tokens
of vocabulary, 64 tokens a text. Each run is a process of its own, in turns; two steps are warm-up. Figures are medians
of CPU seconds a step, and memory a token: how much higher the resident set peaks with 64 texts, by token more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, int]] = {
    "small": {"vocab_size": 23, "hidden_size": 144, "num_hidden_layers": 6, "num_attention_heads": 6, "length": 128},
    "vocabulary": {
        "vocab_size": 32000,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "length": 64,
    },
}
SYSTEMS = ("sft", "ilql")
NUM_TEXTS, MORE_TEXTS, WARM_UP = 16, 64, 2


def write_model(directory: Path, sizes: dict[str, int]) -> None:
    """Configuration and tokenizer; the tokens are "t0", "t1", ..., split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    size = sizes["vocab_size"]
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    config = LlamaConfig(
        **{name: value for name, value in sizes.items() if name != "length"},
        intermediate_size=4 * sizes["hidden_size"],
        num_key_value_heads=sizes["num_attention_heads"],
        max_position_embeddings=2 * sizes["length"],
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)


def run(system: str, case: str, steps: int, num_texts: int) -> dict[str, Any]:
    import torch

    import nemo_rlhf
    from nemo_rlhf.algorithms.ilql import ILQL
    from nemo_rlhf.algorithms.sft import SFT

    torch.set_num_threads(1)
    sizes = CASES[case]
    cpu_s: list[float] = []
    peak: list[int] = []
    kind: Any = ILQL if system == "ilql" else SFT

    def timed(self: Any, step: int, original: Any = kind.run_step) -> Any:
        start = time.process_time()
        metrics = original(self, step)
        cpu_s.append(time.process_time() - start)
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # saving, which follows, is no part of it
        return metrics

    kind.run_step = timed
    draw = random.Random(0)
    texts = [
        " ".join(f"t{draw.randrange(2, sizes['vocab_size'])}" for _ in range(sizes["length"] - 1))
        for _ in range(num_texts)
    ]
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", sizes)
        overrides = [
            f"exp_manager.explicit_log_dir={name}/run",
            "exp_manager.create_tensorboard_logger=false",
            "trainer.enable_progress_bar=false",
            f"trainer.max_steps={steps}",
            "model.init=random",
            f"model.global_batch_size={num_texts}",
            f"model.micro_batch_size={num_texts}",
        ]
        config = nemo_rlhf.config(system, overrides=overrides)  # type: ignore[operator]
        rewards = {"rewards": [draw.random() for _ in texts]} if system == "ilql" else {}
        nemo_rlhf.train(Path(name) / "model", samples=texts, config=config, **rewards)
    return {"cpu_s": cpu_s[WARM_UP:], "peak_kib": peak[-1]}


def start(system: str, case: str, steps: int, num_texts: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--only", system, case, str(num_texts)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs=3, metavar=("SYSTEM", "CASE", "TEXTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        system, case, num_texts = options.only
        print(json.dumps(run(system, case, options.steps, int(num_texts))))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, 1 thread")
    for case, sizes in CASES.items():
        cpu_s: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for _ in range(options.repeats):
            for system in SYSTEMS:
                cpu_s[system] += start(system, case, options.steps, NUM_TEXTS)["cpu_s"]
        tokens = (MORE_TEXTS - NUM_TEXTS) * sizes["length"]
        memory = {}
        for system in SYSTEMS:
            few, many = (start(system, case, WARM_UP, number)["peak_kib"] for number in (NUM_TEXTS, MORE_TEXTS))
            memory[system] = (many - few) / tokens
        time_s = {system: statistics.median(values) for system, values in cpu_s.items()}
        for system in SYSTEMS:
            print(f"{case:>10}  {system:>4}  {time_s[system]:.3f} CPU s a step  {memory[system]:.1f} KiB a token")
        times, memories = time_s["ilql"] / time_s["sft"], memory["ilql"] / memory["sft"]
        print(f"{case:>10}  ratio {times:.2f} in time, {memories:.2f} in memory")


if __name__ == "__main__":
    main()
