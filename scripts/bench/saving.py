"""How long training stands still for a checkpoint: written by the ranks, and by processes beside them.

    python scripts/bench/saving.py [--layers 12] [--hidden 768] [--directory /tmp] [--repeats 3]

One rank trains a Llama-shaped fp32 model (134 million parameters as it stands; with AdamW's state a checkpoint of
2.1 GB) on short rows. Each way of saving has a process of its own. Of every save are told: seconds until training goes
on (``stop``); seconds until the checkpoint has its name (``whole``); by how many seconds the steps in between were
slower than steps without a save; and seconds that completing it takes (``end``), on which training waits, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = {"ranks": False, "beside": True}
ROWS, LENGTH, VOCABULARY = 2, 64, 32000
WARM, PLAIN = 2, 5  # steps before anything is measured, and steps without a save


def build(hidden: int, layers: int) -> Any:
    import torch

    from nemo_rlhf.config.architecture import Architecture
    from nemo_rlhf.config.optim import OptimConfig
    from nemo_rlhf.config.schema import ModelConfig
    from nemo_rlhf.models.policy import PolicyModel

    architecture = Architecture(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden * 2 // 3,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 64,
        kv_channels=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        layernorm_epsilon=1e-5,
        rope={"rope_type": "default", "rope_theta": 1e4},
        tie_embeddings=False,
    )
    model = PolicyModel(ModelConfig(restore_from="", micro_batch_size=ROWS), architecture, "32")
    for parameter in model.gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.make_trainable(OptimConfig(), 1000)
    return model


def child(way: str, options: argparse.Namespace) -> None:
    import torch

    from nemo_rlhf.parallel import checkpoint, state
    from nemo_rlhf.parallel.saver import Saver

    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    model = build(options.hidden, options.layers)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[:, 0] = False

    def loss(gpt: Any, hidden: Any, batch: Any) -> Any:
        total = -gpt.vocab_logprobs(hidden, batch.tokens, batch.selected)[0].mean()
        return total, {"loss": total.detach()}

    def step() -> float:
        begin = time.perf_counter()
        model.learn(model.cut(tokens, mask, torch.full((ROWS,), LENGTH), range(ROWS)), loss)
        return time.perf_counter() - begin

    def write(partial: Path) -> None:
        checkpoint.save_model(model.gpt, partial / "policy")
        model.save_training_state(partial / "training")

    saver, place = Saver(WAYS[way], 600), Path(options.directory)
    for _ in range(WARM):
        step()
    saves = []
    for number in range(options.repeats + 1):
        plain = statistics.median(step() for _ in range(PLAIN))
        os.sync()
        begin = time.perf_counter()
        saver.save(place / f"step_{number}", write)
        stop = time.perf_counter() - begin
        between, end = [], 0.0
        while saver.pending is not None:
            between.append(step())
            asked = time.perf_counter()
            saver.poll()
            end = time.perf_counter() - asked
        whole = time.perf_counter() - begin
        slower = sum(between) - plain * len(between)
        saves.append(
            {"plain": plain, "stop": stop, "whole": whole, "slower": slower, "steps": len(between), "end": end}
        )
        size = sum(file.stat().st_size for file in (place / f"step_{number}").rglob("*") if file.is_file())
        shutil.rmtree(place / f"step_{number}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    parameters = sum(parameter.numel() for parameter in model.gpt.parameters())
    print(
        "RESULT " + json.dumps({"saves": saves[1:], "bytes": size, "peak": peak, "parameters": parameters}), flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="How long training stands still for a checkpoint.")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--directory", default=None, help="where checkpoints go (default: a temporary directory)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores")
    for way in WAYS:
        with tempfile.TemporaryDirectory(dir=options.directory) as place:
            same = ["--hidden", str(options.hidden), "--layers", str(options.layers), "--repeats", str(options.repeats)]
            command = [sys.executable, "-W", "ignore", __file__, "--child", way, "--directory", place, *same]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not lines:
            raise SystemExit(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found = json.loads(lines[0].removeprefix("RESULT "))
        median = {name: statistics.median(save[name] for save in found["saves"]) for name in found["saves"][0]}
        print(
            f"{way:7s} {found['parameters'] / 1e6:.0f} million parameters, {found['bytes'] / 1e9:.2f} GB: stop "
            f"{median['stop']:.2f} s, whole after {median['whole']:.2f} s, {median['steps']:.0f} steps in between "
            f"{median['slower']:.2f} s slower in all (a step takes {median['plain']:.2f} s), end "
            f"{median['end']:.2f} s; peak {found['peak']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
