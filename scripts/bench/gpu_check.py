"""One table of what only a GPU can say; scripts/gpu_check.sh runs it in an environment that it has made.

    python scripts/bench/gpu_check.py [--sizes NAME=NUMBER ...] [--seconds 420]

Each part is a process of its own, so that one that fails or is out of time takes no other with it: tests/gpu; decoding
beside transformers and beside the time that reading weights and keys takes; two steps of PPO beside the plan
(scripts/bench/gpu.py). Decoding is timed as a call for all tokens less a call for one, by the number of tokens between.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu

ROOT = Path(__file__).resolve().parents[2]
CASE = "everything on the GPU"
SHARES = {"tests": 0.45, "decoding": 0.5, "ppo": 1.0}  # of the time that is left when a part starts, at most


def decoding(sizes: gpu.Sizes) -> dict[str, float]:
    """Seconds of one decoding step of ``sizes.prompts`` rows, and the bytes that it has to read."""
    from transformers import AutoTokenizer

    from nemo_rlhf.algorithms.roles import open_role
    from nemo_rlhf.config.schema import ModelConfig
    from nemo_rlhf.generation.engine import Engine
    from nemo_rlhf.generation.sampling import SamplingParams
    from nemo_rlhf.models.policy import PolicyModel
    from nemo_rlhf.parallel import state
    from nemo_rlhf.types import Prompt, Request

    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    with tempfile.TemporaryDirectory() as directory:
        path = str(gpu.write_model(Path(directory), sizes))
        tokenizer = AutoTokenizer.from_pretrained(path)
        policy = open_role(PolicyModel, ModelConfig(restore_from=path, init="random"), path, "bf16", 1)
        longest = sizes.prompt_tokens + sizes.new_tokens
        engine = Engine(policy.gpt, tokenizer, num_slots=sizes.prompts, max_sequence_length=longest)
        prompts = gpu.prompt_ids(sizes)
        requests = [Request(Prompt(tuple(ids), ""), number) for number, ids in enumerate(prompts)]

        def ours(tokens: int) -> None:
            engine.generate(requests, SamplingParams(max_new_tokens=tokens, ignore_eos=True))

        theirs = transformers_generate(path, prompts)
        found = {"step_s": step_seconds(ours, sizes.new_tokens)}
        found["transformers_step_s"] = step_seconds(theirs, sizes.new_tokens)
    weights = sum(p.numel() * p.element_size() for n, p in policy.gpt.named_parameters() if "word_embeddings" not in n)
    width = sizes.hidden_size // sizes.num_attention_heads * sizes.num_key_value_heads
    context = sizes.prompt_tokens + sizes.new_tokens / 2
    cache = sizes.prompts * context * sizes.num_hidden_layers * 2 * width * 2
    return {**found, "bytes": weights + cache, "bytes_per_s": copied_bytes_per_s(sizes.copied_mib)}


def transformers_generate(path: str, prompts: list[list[int]]) -> Callable[[int], None]:
    """The same by transformers: random weights of the same shape, bf16, sampled."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_rlhf import device

    with torch.device(device.torch_device()):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16).eval()
        ids = torch.tensor(prompts)
    model.generation_config.eos_token_id = None

    def generate(tokens: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0
        )

    return generate


def step_seconds(generate: Callable[[int], None], tokens: int) -> float:
    generate(min(tokens, 4))  # what is done at first use
    return (timed(generate, tokens) - timed(generate, 1)) / (tokens - 1)


def timed(call: Callable[..., None], *arguments: Any) -> float:
    from nemo_rlhf import device

    device.synchronize()
    start = time.perf_counter()
    call(*arguments)
    device.synchronize()
    return time.perf_counter() - start


def copied_bytes_per_s(mib: int) -> float:
    """Read and written by a copy within the device's memory, the best of five."""
    import torch

    from nemo_rlhf import device

    source = torch.zeros(mib * 2**20, dtype=torch.uint8, device=device.torch_device())
    target = torch.empty_like(source)
    return 2 * source.numel() / min(timed(target.copy_, source) for _ in range(5))


def rows_of_decoding(found: dict[str, float], sizes: gpu.Sizes) -> list[tuple[str, str, str]]:
    floor = found["bytes"] / found["bytes_per_s"]
    layer = 1000 / sizes.num_hidden_layers
    ours, theirs = found["step_s"], found["transformers_step_s"]
    return [
        (
            f"decoding, ms a layer at {sizes.prompts} rows",
            f"{ours * layer:.3f}",
            f"transformers {theirs * layer:.3f}; floor {floor * layer:.3f}",
        ),
        (
            "decoding, tokens/s",
            f"{sizes.prompts / ours:.0f}",
            f"transformers {sizes.prompts / theirs:.0f}; floor {sizes.prompts / floor:.0f}",
        ),
        (
            "device memory, GB/s by a copy",
            f"{found['bytes_per_s'] / 1e9:.0f}",
            f"a decoding step reads {found['bytes'] / 1e9:.2f} GB",
        ),
    ]


def rows_of_ppo(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    first, planned = found["first"], found["planned"]
    rows = [
        ("ratio at step 0, bf16", f"{first['check/ratio_step0']:.8f}", "exactly 1"),
        ("KL at step 0, bf16", f"{first['check/kl_step0']:.3g}", "exactly 0"),
    ]
    for phase in ("rollout", "experience", "update"):
        key = f"time/{phase}_s"
        seconds = f"first step {first[key]:.2f}; planned {planned['seconds'][phase]:.2f}"
        rows.append((f"PPO, {phase}, s in the second step", f"{found[key]:.2f}", seconds))
    for phase, size in found["bytes"].items():
        expected = planned["bytes"].get(phase)
        beside = f"planned {expected / 2**30:.2f} ({expected / size:.2f})" if expected else ""
        rows.append((f"PPO, {phase}, GiB at most", f"{size / 2**30:.2f}", beside))
    return rows


def run_part(name: str, command: list[str], seconds: float) -> tuple[str, str]:
    """(what it printed, "" or why there is nothing to read)."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"not done after {seconds:.0f} s"
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    if done.returncode:
        print(done.stdout[-6000:] + done.stderr[-6000:], file=sys.stderr)
        return done.stdout, f"failed ({done.returncode}); its output is above"
    return done.stdout, ""


def check(sizes: gpu.Sizes, given: list[str], seconds: float) -> tuple[list[tuple[str, str, str]], bool]:
    """Rows (what, measured, beside), and whether every part was done."""
    end = time.monotonic() + seconds
    python = [sys.executable, "-W", "ignore"]
    here = Path(__file__).parent
    parts = {
        "tests": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "tests/gpu"],
        "decoding": [*python, __file__, "--decoding", "--sizes", *given],
        "ppo": [*python, str(here / "gpu.py"), "--case", CASE, "--steps", "2", "--sizes", *given],
    }
    rows, whole = [("GPU, torch", *device_and_torch())], True
    for name, command in parts.items():
        said, problem = run_part(name, command, SHARES[name] * (end - time.monotonic()))
        last = said.strip().splitlines()[-1] if said.strip() else ""
        whole = whole and not problem
        if name == "tests":
            rows.append(("tests/gpu", last or problem, ""))
        elif problem:
            rows.append((name, problem, ""))
        else:
            rows += rows_of_decoding(json.loads(last), sizes) if name == "decoding" else rows_of_ppo(json.loads(last))
    return rows, whole


def device_and_torch() -> tuple[str, str]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: these are figures of a CPU"
    return name, f"torch {torch.__version__}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description="What only a GPU can say, in one table.")
    parser.add_argument("--sizes", nargs="*", default=[], metavar="NAME=NUMBER", help="other than a 1.1B model's")
    parser.add_argument("--seconds", type=float, default=420, help="that all parts may take")
    parser.add_argument("--decoding", action="store_true", help="this part alone, in this process")
    options = parser.parse_args()
    sizes = gpu.Sizes.read(options.sizes)
    if options.decoding:
        print(json.dumps(decoding(sizes)))
        return
    rows, whole = check(sizes, options.sizes, options.seconds)
    print("| | measured | beside |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.exit(not whole)


if __name__ == "__main__":
    main()
