"""What a user can get wrong: one sentence that says what and where, exit code 2, the same in every cut, no hang."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LETTERS, REWARDS, Tiny, write_model_config, write_tokenizer
from tests.spawn import run_distributed

WORKER = "tests.workers.run_worker:runs"
TP2 = ("model.tensor_model_parallel_size=2",)
PP2 = ("model.pipeline_model_parallel_size=2",)
DP2 = ("model.tensor_model_parallel_size=1",)
NO_VALIDATION = "data.validation_prompts=null"


@dataclass(frozen=True)
class Case:
    overrides: tuple[str, ...]
    sentence: str  # a regular expression
    env: dict[str, str] = field(default_factory=dict)
    copy: tuple[str, str] | None = None
    code: int = 2
    run_dir: str | None = None


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wrong data and models."""
    root = tmp_path_factory.mktemp("bad")
    good = tiny.prompts.read_text().splitlines()
    (root / "empty.jsonl").write_text("\n")
    (root / "line3.jsonl").write_text("\n".join([*good[:2], '{"prompt": "abc', *good[2:]]))
    (root / "long.jsonl").write_text("\n".join([*good[:4], json.dumps({"prompt": "x" * 30, "letter": "x"})]))
    (root / "one_long.jsonl").write_text("\n".join([*good[:7], json.dumps({"prompt": "x" * 60, "letter": "x"})]))
    (root / "plain.jsonl").write_text('{"prompt": "a", "letter": "b"}\n')
    size = write_tokenizer(root / "heads3")
    write_model_config(root / "heads3", size, num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    write_tokenizer(root / "group1")
    write_model_config(root / "group1", size, num_key_value_heads=1)
    write_tokenizer(root / "layers3")
    write_model_config(root / "layers3", size, num_hidden_layers=3)
    write_tokenizer(root / "wider")
    write_model_config(root / "wider", size, intermediate_size=96)
    write_tokenizer(root / "more_tokens", LETTERS + "0123456789")
    write_tokenizer(root / "other_order", LETTERS[::-1])
    write_tokenizer(root / "vocabulary", LETTERS[:-2])
    write_model_config(root / "vocabulary", size - 2)
    return root


def one_rank_cases(files: Path) -> dict[str, Case]:
    def prompts(name: str) -> tuple[str, ...]:
        return (f"data.prompts={files / name}",)

    def reward(name: str) -> tuple[str, ...]:
        return (f"reward.function={name}",)

    bad = {"BAD_PROMPT": ""}
    return {
        "done": Case(("trainer.max_steps=1",), "", code=0),
        "done again": Case(("trainer.max_steps=1",), "", code=0, run_dir="done"),
        "unknown key": Case(("ppo.epoch=3",), r"ppo\.epoch\b.*did you mean ppo\.epochs\?"),
        "missing prompts": Case(prompts("absent.jsonl"), r"absent\.jsonl"),
        "empty prompts": Case(prompts("empty.jsonl"), r"empty\.jsonl"),
        "bad line": Case(prompts("line3.jsonl"), r"line3\.jsonl.*line 3\b|line3\.jsonl:3\b"),
        "long prompt": Case(
            (*prompts("long.jsonl"), "data.max_prompt_length=20"), r"30 tokens.*data\.max_prompt_length is 20"
        ),
        "long sequence": Case(("generation.max_new_tokens=63",), r"generation\.max_new_tokens=63 is more than the 64"),
        "no such module": Case(
            reward("tests.workers.no_rewards:score"), r"there is no module tests\.workers\.no_rewards"
        ),
        "no such function": Case(reward(f"{REWARDS}:nothing"), r"has no nothing"),
        "raises": Case(reward(f"{REWARDS}:raising"), r"rewards\.raising raised RuntimeError: no reward today"),
        "wrong count": Case((*reward(f"{REWARDS}:too_few"), NO_VALIDATION), r"returned 15 rewards for 16 samples"),
        "nan": Case(reward(f"{REWARDS}:nan_on_one"), r"returned nan for sample 0", bad),
        "no number": Case(reward(f"{REWARDS}:text_on_one"), r"returned 'good' for sample 0", bad),
        "tokenizer too large": Case(
            (f"model.tokenizer={files / 'more_tokens'}",), r"has 40 tokens, but .* vocabulary of 30"
        ),
        "other architecture": Case(
            (f"model.restore_from={files / 'wider'}", "exp_manager.allow_changes=true"),
            r"step_1 has another architecture than model\.restore_from",
            copy=("done", "other architecture"),
        ),
        "other tokenizer": Case(
            (f"model.tokenizer={files / 'other_order'}", "exp_manager.allow_changes=true"),
            r"step_1 has another tokenizer than model\.restore_from",
            copy=("done", "other tokenizer"),
        ),
        "no fresh start": Case(
            ("exp_manager.resume_if_exists=false",),
            r"holds checkpoints of an earlier run",
            copy=("done", "no fresh start"),
        ),
        "small": Case(
            ("trainer.max_steps=1", f"model.restore_from={files / 'vocabulary'}", *prompts("plain.jsonl")), "", code=0
        ),
        "other vocabulary": Case(
            (f"model.critic.restore_from={files / 'run_small/checkpoints/step_1/critic'}",),
            r"the critic in .*step_1/critic has a vocabulary of 28 and the policy one of 30",
        ),
        "no weights": Case(("model.init=pretrained",), r"safetensors|weights"),
        "no model": Case((f"model.restore_from={files / 'nowhere'}",), r"There is no directory .*nowhere"),
    }


def two_rank_cases(files: Path) -> dict[str, Case]:
    cases = {
        "heads": Case((*TP2, f"model.restore_from={files / 'heads3'}"), r"size=2 does not divide .*heads=3"),
        "groups": Case((*TP2, f"model.restore_from={files / 'group1'}"), r"size=2 does not divide .*groups=1"),
        "layers": Case((*PP2, f"model.restore_from={files / 'layers3'}"), r"size=2 does not divide .*layers=3"),
        "world size": Case(("model.tensor_model_parallel_size=4",), r"gives 2 processes"),
        "one long sequence": Case(
            (*DP2, f"data.prompts={files / 'one_long.jsonl'}", NO_VALIDATION),
            r"60 tokens, which with generation\.max_new_tokens=8 is more than the 64",
        ),
        "bad line": Case((*TP2, f"data.prompts={files / 'line3.jsonl'}"), r"line3\.jsonl"),
    }
    for cut, overrides in {"tp2": TP2, "pp2": PP2, "dp2": DP2}.items():
        for name, said in {
            "raising_on_one": r"rewards\.raising_on_one raised RuntimeError: one bad prompt",
            "nan_on_one": r"nan_on_one returned nan for sample \d",
            "text_on_one": r"text_on_one returned 'good' for sample \d",
            "too_few": r"too_few returned \d+ rewards for \d+ samples",
        }.items():
            cases[f"{name} {cut}"] = Case((*overrides, f"reward.function={REWARDS}:{name}"), said)
    return cases


def outcome(tiny: Tiny, files: Path, world_size: int, cases: dict[str, Case]) -> dict[str, list[dict[str, Any]]]:
    """What each rank said and returned, by case."""
    first = json.loads(tiny.prompts.read_text().splitlines()[4])["prompt"]
    payload = []
    for name, case in cases.items():
        copy = tuple(str(files / f"run_{end}") for end in case.copy) if case.copy else None
        arguments = tiny.ppo(files / f"run_{case.run_dir or name}", "model.optim.sched.name=constant", *case.overrides)
        payload.append({"arguments": arguments, "copy": copy, "env": {"BAD_PROMPT": first, **case.env}})
    results = run_distributed(WORKER, world_size, payload, timeout_s=300)
    return {name: [rank[place] for rank in results] for place, name in enumerate(cases)}


@pytest.fixture(scope="module")
def one_rank(tiny: Tiny, files: Path) -> dict[str, list[dict[str, Any]]]:
    return outcome(tiny, files, 1, one_rank_cases(files))


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, files: Path) -> dict[str, list[dict[str, Any]]]:
    return outcome(tiny, files, 2, two_rank_cases(files))


def check(case: Case, ranks: list[dict[str, Any]]) -> None:
    for one in ranks:
        assert "traceback" not in one, one["traceback"]
    assert [one["code"] for one in ranks] == [case.code] * len(ranks)
    lines = [line for one in ranks for line in one["stderr"].splitlines() if line.startswith("nemo-rlhf: error")]
    if case.code:
        assert len(lines) == 1, lines
        assert re.search(case.sentence, lines[0]), lines[0]
        assert not any("Traceback" in one["stderr"] for one in ranks)
    else:
        assert lines == []


@pytest.mark.parametrize("name", one_rank_cases(Path()))
def test_on_one_rank(name: str, files: Path, one_rank: dict[str, list[dict[str, Any]]]) -> None:
    check(one_rank_cases(files)[name], one_rank[name])


@pytest.mark.parametrize("name", two_rank_cases(Path()))
def test_on_two_ranks(name: str, files: Path, two_ranks: dict[str, list[dict[str, Any]]]) -> None:
    check(two_rank_cases(files)[name], two_ranks[name])


def test_a_mistake_leaves_nothing_behind(files: Path, one_rank: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("unknown key", "missing prompts", "bad line", "tokenizer too large", "no such module", "no model"):
        assert not (files / f"run_{name}").exists(), name


def test_a_finished_run_is_left_as_it_is(files: Path, one_rank: dict[str, list[dict[str, Any]]]) -> None:
    rows = [json.loads(line) for line in (files / "run_done" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert "has all 1 steps" in one_rank["done again"][0]["stderr"]
