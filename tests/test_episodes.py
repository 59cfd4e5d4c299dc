"""PPO in an environment: what it learns from is the episode as it was played, for every cut, and it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_rlhf
from nemo_rlhf.algorithms.episodes import as_sample, sampled_rewards
from nemo_rlhf.data.batches import pad_samples
from nemo_rlhf.types import Episode
from tests.spawn import run_distributed
from tests.test_play import save_model
from tests.test_runs import assert_close

PLAYED = Episode(
    turns=("ab", "c", "d", "ee"),
    token_ids=(5, 6, 7, 8, 9, 9),
    action_mask=(False, False, True, False, True, True),
    rewards=(0.5, -1.0),
    token_rewards=(0.0, 0.0, 0.5, 0.0, 0.0, -1.0),
    done=True,
)


def test_an_episode_is_a_sample_with_gaps() -> None:
    sample = as_sample(PLAYED, 3)
    assert (sample.prompt.text, sample.prompt.token_ids) == ("ab", (5, 6))
    assert (sample.text, sample.response_ids, sample.num_sampled) == ("cdee", (7, 8, 9, 9), 3)
    tokens, mask, lengths = pad_samples([sample], 0)
    assert tokens.tolist() == [list(PLAYED.token_ids)] and mask.tolist() == [list(PLAYED.action_mask)]
    assert lengths.tolist() == [6]
    assert sampled_rewards(PLAYED).tolist() == [0.5, 0.0, -1.0]


class Praise:
    """Rewards a "b", twice."""

    def __init__(self, number: int) -> None:
        self.turn = 0

    def reset(self) -> str:
        return "a"

    def step(self, text: str) -> tuple[str, float, bool]:
        self.turn += 1
        return "c", float(text[:1] == "b"), self.turn == 2


SIZES = [
    "trainer.enable_progress_bar=false",
    "exp_manager.create_tensorboard_logger=false",
    "model.global_batch_size=8",
    "model.micro_batch_size=4",
    "ppo.num_prompts=8",
    "generation.num_slots=5",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "memory/"))} for row in rows]


def test_every_cut_plays_and_learns_the_same(directory: Path, tmp_path: Path) -> None:
    def job(name: str, *overrides: str, steps: int = 2) -> dict[str, Any]:
        arguments = [
            "ppo",
            *SIZES,
            f"model.restore_from={directory}",
            f"exp_manager.explicit_log_dir={tmp_path / name}",
            "environment.function=tests.workers.play_worker:Echo",
            "environment.validation_episodes=3",
            "environment.max_sequence_length=64",
            "environment.max_turns=3",
            "trainer.val_check_interval=1",
            f"trainer.max_steps={steps}",
            "generation.max_new_tokens=4",
            "generation.seed=3",
            "ppo.gamma=0.9",
            "ppo.epochs=2",
            "model.optim.lr=1e-3",
            *overrides,
        ]
        return {"arguments": arguments}

    tp2 = "model.tensor_model_parallel_size=2"
    payload = [job("dp2"), job("tp2", tp2), job("rloo", "ppo.advantage=rloo", "ppo.gamma=1.0", steps=1)]
    ranks = run_distributed("tests.workers.run_worker:runs", 2, payload)
    assert all(run["code"] == 0 for rank in ranks for run in rank), [run for rank in ranks for run in rank]
    expected = rows_of(tmp_path / "dp2")
    assert len(expected) == 3 and "val/reward" in expected[0] and expected[1]["check/ratio_step0"] == 1.0
    assert expected[1]["turns/mean"] > 2 and 0 < expected[1]["eos/share"] < 1
    assert_close(rows_of(tmp_path / "tp2"), expected)
    records = [json.loads(line) for line in (tmp_path / "dp2" / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert records[0]["prompt"] == "abcd ", "training begins behind the environments of validation"
    rloo = [json.loads(line) for line in (tmp_path / "rloo" / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in rloo[:4]] == ["abcd ", "abcd ", "abcde ", "abcde "]


def test_it_learns_what_the_environment_rewards(directory: Path, tmp_path: Path) -> None:
    overrides = [
        *SIZES,
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "trainer.max_steps=12",
        "generation.max_new_tokens=1",
        "ppo.num_prompts=32",
        "model.global_batch_size=64",
        "model.micro_batch_size=64",
        "model.optim.lr=1e-2",
        "ppo.kl.coef=0",
    ]
    config = nemo_rlhf.config("ppo", overrides=overrides)
    nemo_rlhf.train(directory, env=Praise, config=config)
    rewards = [row["reward/mean"] for row in rows_of(tmp_path / "run") if "reward/mean" in row]
    assert rewards[0] < 0.5 and rewards[-1] > 1.5, rewards


def test_a_logit_mask_limits_what_ilql_samples_in_validation(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    (only,) = tokenizer("b")["input_ids"]
    mask = torch.zeros(len(tokenizer), len(tokenizer), dtype=torch.bool)
    mask[:, only] = True
    overrides = [
        *SIZES[:4],
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "generation.max_new_tokens=5",
    ]
    nemo_rlhf.train(
        directory,
        samples=[["a", "bc"], ["b", "cd"]] * 4,
        rewards=[1.0, 0.0] * 4,
        eval_prompts=["a", "cd"],
        logit_mask=mask,
        config=nemo_rlhf.config("ilql", overrides=overrides),
    )
    files = sorted((tmp_path / "run" / "validation").iterdir())
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(records) == 4 and {tuple(record["response_ids"]) for record in records} == {(only,) * 5}


def test_what_has_no_use_beside_an_environment_is_refused(directory: Path, tmp_path: Path) -> None:
    for key, value in {
        "environment.function": "a.b:c",
        "data.prompts": "p.jsonl",
        "reward.function": "a.b:c",
        "reward.sources": "[{kind: function, name: f, function: a.b:c}]",
    }.items():
        config = nemo_rlhf.config("ppo", overrides=[f"exp_manager.explicit_log_dir={tmp_path}", f"{key}={value}"])
        with pytest.raises(ValueError, match=rf"{key} is set in the configuration, and env is given in Python"):
            nemo_rlhf.train(directory, env=Praise, config=config)
    with pytest.raises(ValueError, match=r"train\(env=\.\.\.\) has no use for prompts"):
        nemo_rlhf.train(directory, env=Praise, prompts=["a"])
    with pytest.raises(ValueError, match=r"train\(env=\.\.\.\) has no use for logit_mask"):
        nemo_rlhf.train(directory, env=Praise, logit_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"environment\.max_sequence_length=200 has no room"):
        short = ["environment.function=a:b", "environment.max_sequence_length=200"]
        nemo_rlhf.config("ppo", overrides=["exp_manager.explicit_log_dir=x", *short])
