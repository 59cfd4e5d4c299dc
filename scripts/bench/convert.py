"""Speed and memory of import and export, beside a plain copy of the same bytes.

    python scripts/bench/convert.py [--gigabytes 12] [--workers 1 2] [--directory /tmp] [--repeats 1]

Builds a Llama-shaped bf16 checkpoint with random weights (4096 wide, 14336 feed-forward, 32 heads in 8 groups, 32000
tokens, as many layers as fit), imports it, exports the result, and proves that every byte of the weights came back.
Each step runs in processes of its own; ``cp`` is followed by an fsync of every file, as ours are; dirty pages
are written out before each step, memory is touched, and files are read as the page cache holds them.

Peak resident memory is the sum of the peaks (VmHWM) of all processes of a step, which counts libraries that they share
once a process: an upper bound. ``largest`` is that of the largest of them, which ``/usr/bin/time -v`` would show. The
bound is 1 GiB plus four times the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import psutil

HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 4096, 14336, 32, 8, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_model(directory: Path, gigabytes: float) -> None:
    """The synthetic checkpoint; made in blocks, like everything here."""
    import torch

    from nemo_rlhf.convert.families import architecture_of, weight_map
    from nemo_rlhf.convert.to_hf import write_safetensors

    def sized(layers: int) -> int:
        return 2 * weight_map(architecture_of({**CONFIG, "num_hidden_layers": layers})).num_parameters()

    one, two = sized(1), sized(2)
    config = {**CONFIG, "num_hidden_layers": max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))}
    weights = weight_map(architecture_of(config))

    class Noise:
        where = "noise"

        def names(self) -> tuple[str, ...]:
            return tuple(weights.tensors)

        def shape(self, name: str) -> tuple[int, ...]:
            return weights.shape(name)

        def dtype(self, name: str) -> torch.dtype:
            return torch.bfloat16

        def read(self, name: str, box: tuple[slice, ...]) -> torch.Tensor:
            return torch.empty([part.stop - part.start for part in box], dtype=torch.bfloat16).normal_()

    directory.mkdir()
    write_safetensors(Noise(), directory, 5 * 10**9, workers=1)
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def checksums(directory: Path) -> dict[str, int]:
    result = {}
    for path in sorted(directory.glob("*.safetensors")):
        value = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                value = zlib.crc32(block, value)
        result[path.name] = value
    return result


def largest_tensor(directory: Path) -> int:
    from nemo_rlhf.convert.source import open_hf

    source = open_hf(directory)
    sizes = []
    for name in source.names():
        size = source.dtype(name).itemsize
        for length in source.shape(name):
            size *= length
        sizes.append(size)
    return max(sizes)


def settle(size: int) -> None:
    """Write dirty pages out, and touch as much memory as a step needs: where a virtual machine's host has taken idle
    memory back, whoever comes first would pay for fetching it."""
    os.sync()
    code = "import sys; memory = bytearray(int(sys.argv[1])); memory[::4096] = b'1' * len(memory[::4096])"
    needed = min(2 * size + 2**30, int(0.8 * psutil.virtual_memory().available))
    subprocess.run([sys.executable, "-c", code, str(needed)], check=True)


def peak_of(process: psutil.Process) -> int:
    """VmHWM in bytes."""
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def measure(command: list[str], size: int) -> tuple[float, int, int]:
    """Wall seconds, the sum of all processes' peaks and the largest of them, in bytes."""
    settle(size)
    begin = time.perf_counter()
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                for each in [root, *root.children(recursive=True)]:
                    peaks[each.pid] = max(peaks.get(each.pid, 0), peak_of(each))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, sum(peaks.values()), max(peaks.values())


COPY = """
import os, subprocess, sys
subprocess.run(["cp", "-r", sys.argv[1], sys.argv[2]], check=True)
for directory, _, names in os.walk(sys.argv[2]):
    for name in names:
        file = os.open(os.path.join(directory, name), os.O_RDONLY)
        os.fsync(file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.directory) as name:
        root = Path(name)
        hf, ckpt, back, copy = (root / part for part in ("hf", "ckpt", "back", "copy"))
        write_model(hf, options.gigabytes)
        size, bound = size_of(hf), 2**30 + 4 * largest_tensor(hf)
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {size / 1e9:.2f} GB of weights")
        print(f"bound on resident memory {bound / 2**20:.0f} MiB")
        convert = [sys.executable, "-m", "nemo_rlhf", "convert"]
        steps = {"cp": [sys.executable, "-c", COPY, str(hf), str(copy)]}
        for workers in options.workers:
            many = ["--force", "--workers", str(workers)]
            steps[f"import, {workers} worker(s)"] = [*convert, "import", str(hf), str(ckpt), *many]
            steps[f"export, {workers} worker(s)"] = [*convert, "export", str(ckpt), str(back), *many]
        found: dict[str, list[tuple[float, int, int]]] = {step: [] for step in steps}
        for _ in range(options.repeats):
            for step, command in steps.items():
                found[step].append(measure(command, size))
                shutil.rmtree(copy, ignore_errors=True)
        for step, rows in found.items():
            seconds = statistics.median(row[0] for row in rows)
            total, largest = (max(row[place] for row in rows) / 2**20 for place in (1, 2))
            speed = f"{seconds:7.1f} s {size / seconds / 1e9:6.2f} GB/s"
            print(f"{step:20} {speed}   peak {total:6.0f} MiB, largest process {largest:6.0f} MiB")
        assert checksums(hf) == checksums(back), "the weights that came back differ"
        print("every byte of the weights came back")


if __name__ == "__main__":
    main()
