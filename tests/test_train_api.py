"""``nemo_rlhf.train`` as trlX's users know it, and what a checkpoint of it is good for: generate, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_rlhf
from tests.conftest import Tiny
from tests.jobs import Job, metrics_of, rollouts_of
from tests.spawn import run_distributed

PPO_PROGRAM = """
import json, os, sys
import nemo_rlhf

def reward(samples, prompts, outputs, tokenizer, letter, **metadata):
    assert samples == [prompt + output for prompt, output in zip(prompts, outputs)]
    assert tokenizer.eos_token == "<eos>" and set(letter) <= {"c", None}
    return [output.count("a") - 0.1 * len(output) for output in outputs]

def metrics(outputs, **rest):
    return {"letters": [len(output) for output in outputs], "constant": 3}

hf, run_dir = sys.argv[1:]
config = nemo_rlhf.config("ppo", overrides=[
    f"exp_manager.explicit_log_dir={run_dir}", "exp_manager.create_tensorboard_logger=false",
    "trainer.devices=2", "trainer.max_steps=2", "trainer.val_check_interval=1", "model.init=random",
    "model.tensor_model_parallel_size=2", "model.global_batch_size=8", "model.micro_batch_size=4",
    "ppo.num_prompts=4", "ppo.samples_per_prompt=2", "generation.max_new_tokens=12",
    "generation.temperature=[0.7,1.0]",
])
result = nemo_rlhf.train(
    hf, reward_fn=reward, prompts=["ab ", {"prompt": "cd ", "letter": "c"}, "e "], eval_prompts=["xy ", "z "],
    metric_fn=metrics, config=config, stop_sequences=["q", "x"],
)
assert config.generation.stop == [] and config.model.restore_from == "", "the caller's configuration was changed"
if os.environ["RANK"] == "0":
    print(json.dumps({"metrics": dict(result.metrics), "checkpoint": str(result.checkpoint)}))
"""


def run_program(tmp_path: Path, tiny: Tiny, run_dir: Path, *launcher: str) -> dict[str, Any]:
    program = tmp_path / "program.py"
    program.write_text(PPO_PROGRAM)
    arguments = [*launcher, str(program), str(tiny.hf), str(run_dir)]
    job = Job(arguments, tmp_path, module="torch.distributed.run" if launcher else None)
    assert job.wait() == 0, job.stderr
    return json.loads(job.stdout)


def test_one_program_starts_itself_and_runs_under_torchrun(tiny: Tiny, tmp_path: Path) -> None:
    result = run_program(tmp_path, tiny, tmp_path / "self")
    rows = metrics_of(tmp_path / "self")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        for name in ("reward", "letters", "constant", "response_length"):
            variants = {f"val/{name}@temperature={value}" for value in ("0.7", "1.0")}
            assert {f"val/{name}", *variants} <= row.keys()
        assert row["val/constant@temperature=0.7"] == 3.0
        assert row["val/letters"] > 0
    assert result["checkpoint"] == str(tmp_path / "self" / "checkpoints" / "step_2")
    assert result["metrics"]["val/reward"] == rows[-1]["val/reward"]
    samples = [sample for step in rollouts_of(tmp_path / "self").values() for sample in step]
    assert {sample["prompt"] for sample in samples} == {"ab ", "cd ", "e "}
    assert all(sample["letter"] == "c" for sample in samples if sample["prompt"] == "cd ")
    stopped = [sample for sample in samples if sample["finish_reason"].startswith("stop:")]
    assert stopped and not any(set("qx") & set(sample["response"]) for sample in samples)

    run_program(tmp_path, tiny, tmp_path / "torchrun", "--nproc-per-node=2", "--standalone")
    assert metrics_of(tmp_path / "torchrun") == rows


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of ``train`` in one process, and what the console program makes of them."""
    root = tmp_path_factory.mktemp("trained")
    (result,) = run_distributed("tests.workers.run_worker:train_api", 1, {"hf": str(tiny.hf), "root": str(root)})
    return {**result, "root": root}


def log_likelihood(hf: Path, texts: list[tuple[list[int], list[bool]]]) -> float:
    """Mean log-probability of the marked tokens, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    chosen = []
    for ids, learned in texts:
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        taken = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        chosen.append(taken[torch.tensor(learned[1:])])
    return torch.cat(chosen).mean().item()


def test_samples_are_learned_on_outputs_only(tiny: Tiny, trained: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tiny.hf).convert_tokens_to_ids

    def ids(text: str) -> list[int]:
        return [*map(encode, text)]

    eos = [encode("<eos>")]
    expected = [
        (ids("ab cdef gh") + eos, [False] * 3 + [True] * 2 + [False] * 3 + [True] * 3),
        (ids("k lm") + eos, [False] * 2 + [True] * 3),
        (ids("whole") + eos, [False] + [True] * 5),
    ]
    found = trained["sft_loss"]
    assert found == pytest.approx(-log_likelihood(trained["root"] / "untouched_hf", expected), rel=1e-5)


def test_dense_rewards(trained: dict[str, Any]) -> None:
    samples = rollouts_of(trained["root"] / "dense")["step_1"]
    for sample in samples:
        expected = sum(0.1 * (place + 1) for place in range(sample["num_tokens"]))
        assert sample["score"] == pytest.approx(expected, rel=1e-4)
    mean = sum(sample["score"] for sample in samples) / len(samples)
    assert metrics_of(trained["root"] / "dense")[0]["reward/mean"] == pytest.approx(mean, rel=1e-5)


def test_generate_and_export_agree_with_transformers(tiny: Tiny, trained: dict[str, Any]) -> None:
    """From the checkpoint that train returned: greedy text of ours and of plain transformers on the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = trained["root"]
    tokenizer = AutoTokenizer.from_pretrained(root / "learned_hf")
    model = AutoModelForCausalLM.from_pretrained(root / "learned_hf", dtype=torch.float32)
    ours = [json.loads(line) for line in (root / "ours.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in ours] == [json.loads(line)["prompt"] for line in tiny.prompts.open()]
    for one in ours:
        batch = tokenizer(one["prompt"], return_tensors="pt")
        out = model.generate(batch["input_ids"], max_new_tokens=12, do_sample=False)
        theirs = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert one["response"] == theirs
    assert len({one["response"] for one in ours}) > 1
    assert any(one["finish_reason"] == "eos" for one in ours)


def test_ppo_starts_from_what_sft_left(trained: dict[str, Any]) -> None:
    assert trained["ppo_after_sft"]["check/kl_step0"] == 0.0
    assert trained["ppo_after_sft"]["check/ratio_step0"] == 1.0


def zero(outputs: list[str], **rest: Any) -> list[float]:
    return [0.0] * len(outputs)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "either reward_fn and prompts, or env, for PPO"),
        ({"reward_fn": zero, "prompts": ["a"], "samples": ["b"]}, "either reward_fn and prompts, or env, for PPO"),
        ({"rewards": [1.0]}, "needs samples, whose rewards they are"),
        ({"samples": ["a"], "rewards": [1.0], "prompts": ["b"]}, "has no use for prompts"),
        ({"samples": ["a"], "rewards": [1.0], "eval_samples": ["b"]}, "has no use for eval_samples"),
        ({"reward_fn": zero}, "needs prompts"),
        ({"reward_fn": zero, "prompts": ["a"], "eval_samples": ["b"]}, "has no use for eval_samples"),
        ({"samples": ["a"], "stop_sequences": ["b"]}, "has no use for stop_sequences"),
        ({"samples": ["a"], "eval_prompts": ["b"]}, "has no use for eval_prompts"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], sentence: str) -> None:
    config = None
    if arguments == {"reward_fn": zero}:
        config = nemo_rlhf.config("ppo", overrides=["exp_manager.explicit_log_dir=run"])
    with pytest.raises(ValueError, match=sentence):
        nemo_rlhf.train("nowhere", config=config, **arguments)


def test_configuration_of_the_other_command() -> None:
    config = nemo_rlhf.config("sft", overrides=["exp_manager.explicit_log_dir=run"])
    with pytest.raises(ValueError, match=r'needs a configuration from nemo_rlhf\.config\("ppo"'):
        nemo_rlhf.train("nowhere", reward_fn=zero, prompts=["a"], config=config)
