"""The README's commands, as they stand: only paths are put in their places, and the work is made small."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_model_config, write_tokenizer
from tests.jobs import FROM_OUTSIDE

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path(sys.executable).with_name("nemo-rlhf")
SMALL = ["trainer.max_steps=1", "model.global_batch_size=4", "generation.max_new_tokens=4"]
# appended to what the README says, by command
MADE_SMALL = {
    "sft": ["trainer.max_steps=1", "trainer.val_check_interval=1", "model.global_batch_size=4"],
    "ppo": [*SMALL, "trainer.val_check_interval=1", "ppo.num_prompts=4", "ppo.samples_per_prompt=1"],
    "rft": [*SMALL, "rft.num_prompts=4", "rft.samples_per_prompt=2"],
    "reward": ["trainer.max_steps=1", "model.global_batch_size=4"],
    "ilql": ["trainer.max_steps=1", "model.global_batch_size=4"],
    "generate": ["generation.max_new_tokens=4"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the README takes for granted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place = tmp_path_factory.mktemp("reader")
    for name in ("Llama-3.2-1B", "Llama-3.2-1B-Instruct"):
        model = place / "models" / name
        write_model_config(model, write_tokenizer(model), max_position_embeddings=2048)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    pairs = [{"prompt": f"{word} ", "response": word[::-1]} for word in ("stone", "river", "cloud", "leaf")]
    for name in ("train", "validation", "prompts", "validation_prompts"):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dialogues = [{"turns": [p["prompt"], p["response"]], "rewards": [n]} for n, p in enumerate(pairs)]
    (place / "dialogues.jsonl").write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues))
    compared = [{"prompt": p["prompt"], "chosen": p["response"], "rejected": "none"} for p in pairs]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in compared))
    shutil.copy(ROOT / "conf" / "cluster" / "pyxis.yaml", place / "my_cluster.yaml")
    (reward,) = [block for block in blocks("python") if block.startswith("def score")]
    (place / "my_package").mkdir()
    (place / "my_package" / "rewards.py").write_text(reward)
    return place


def run(place: Path, *command: str | Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name not in FROM_OUTSIDE}
    env = {**outside, "PYTHONPATH": f"{place}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("nemo-rlhf ")]


def test_the_commands_run_one_after_the_other(place: Path) -> None:
    names = set()
    for command in commands():
        local = [word.replace("/models/", f"{place}/models/") for word in command]
        run(place, PROGRAM, *local, *MADE_SMALL.get(command[0], []))
        names |= {" ".join(command[: 2 if command[0] == "convert" else 1])}
    conversions = {f"convert {way}" for way in ("import", "export", "verify", "inspect")}
    assert {"sft", "ppo", "ilql", "rft", "reward", "generate", "report"} | conversions <= names
    assert len((place / "responses.jsonl").read_text().splitlines()) == 4
    assert (place / "runs" / "ppo" / "report.html").is_file() and (place / "exported" / "model.safetensors").is_file()


def test_the_python_script_runs(place: Path) -> None:
    (script,) = [block for block in blocks("python") if "nemo_rlhf.train(" in block]
    small = ", ".join(f'"{override}"' for override in [*SMALL, "ppo.num_prompts=4", "ppo.samples_per_prompt=1"])
    script = script.replace("/models/", f"{place}/models/").replace('"trainer.max_steps=20"', small)
    assert small in script
    (place / "sea.py").write_text(script)
    run(place, sys.executable, "sea.py")
    assert (place / "runs" / "sea" / "metrics.jsonl").is_file()


def test_the_batch_script_is_one(place: Path) -> None:
    """Its syntax; and that the exit code 75 is documented."""
    (script,) = [block for block in blocks("sh") if "sbatch" in block]
    run(place, PROGRAM, *shlex.split(script.replace("\\\n", " ").splitlines()[0])[1:])
    (name,) = re.findall(r"^sbatch (\S+)$", script, re.MULTILINE)
    run(place, "bash", "-n", name)
    assert "#SBATCH --nodes=8" in (place / name).read_text()
    assert re.search(r"^\| `?75`? \|", (ROOT / "docs" / "exit_codes.md").read_text(), re.MULTILINE)


def test_the_named_scripts_are_there() -> None:
    named = re.findall(r"^(scripts/\S+\.sh|python (?:examples|scripts)/\S+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= set(named)
    for name in named:
        path = ROOT / name.removeprefix("python ")
        assert path.is_file() and (path.suffix == ".py" or os.access(path, os.X_OK))
