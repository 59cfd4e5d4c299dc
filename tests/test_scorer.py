"""Reward models in use: one model gives the same scores in training, in a PPO job, behind HTTP and in transformers."""

from __future__ import annotations

import itertools
import json
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.algorithms.reward import ScoreTraining
from nemo_rlhf.algorithms.scorer import Scorer
from nemo_rlhf.cli import main
from nemo_rlhf.config import load
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.convert import import_hf
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.scores import encode_reply, read_scores
from nemo_rlhf.data.tokenizer import load_tokenizer
from nemo_rlhf.parallel import state
from tests.conftest import REWARDS, Tiny
from tests.jobs import FROM_OUTSIDE, Job, error_lines, metrics_of, rollouts_of
from tests.spawn import run_distributed
from tests.test_data import CHAT, make_tokenizer
from tests.test_serve import TOKEN, ask
from tests.workers.rewards import judged

CUTS = {"TP2": (2, 1), "PP2": (1, 2), "DP2": (1, 1)}
QUIET = ("trainer.enable_progress_bar=false", "trainer.max_steps=2", "trainer.val_check_interval=2")


def make_texts() -> list[tuple[str, str]]:
    draw = random.Random(4)

    def word(least: int) -> str:
        return "".join(draw.choice("abcdefgh .") for _ in range(draw.randint(least, 12)))

    return [("", "abc"), ("ab ", ""), *((word(1), word(0)) for _ in range(11))]


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    return make_texts()


@pytest.fixture(scope="module")
def expected(judge: Path, texts: list[tuple[str, str]]) -> torch.Tensor:
    scores = torch.tensor(judged(*map(list, zip(*texts, strict=True)), directory=str(judge)))
    assert scores.std() > 0.3, "they must differ, or a test of them says little"
    return scores


def open_scorer(directory: Path, **more: Any) -> Scorer:
    state.set_environment_for_one_process()
    state.initialize(1, 1, 1)
    config = ModelConfig(restore_from=str(directory), micro_batch_size=2)
    return Scorer(config, "32", **{"normalise": False, **more})


def scores_of(scorer: Scorer, texts: list[tuple[str, str]]) -> torch.Tensor:
    return scorer.scores([scorer.encode(prompt, response, "here") for prompt, response in texts])


# ---- the tokens


@pytest.mark.parametrize("post", [None, "<s> $A", "<s> $A </s>"])
def test_tokens_are_those_of_training(post: str | None) -> None:
    tokenizer = make_tokenizer(post)
    for prompt, response in (("a b", "c d"), ("a", "b </s>"), ("", "a"), ("a </s>", "b")):
        record = {"prompt": prompt, "chosen": response, "rejected": "j", "response": response, "score": 1}
        (pair,), (text,) = read_pairs([record], tokenizer, 32), read_scores([record], tokenizer, 32)
        assert encode_reply(prompt, response, tokenizer) == pair.chosen == text.token_ids
    assert encode_reply("a b", "", tokenizer) == (*encode_reply("a b", "c", tokenizer)[:-2], tokenizer.eos_token_id)
    tokenizer.chat_template = "<s> " + CHAT
    chat = [{"role": "user", "content": "a b"}]
    (text,) = read_scores([{"prompt": chat, "response": "c", "score": 1}], tokenizer, 32)
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert encode_reply(rendered, "c", tokenizer) == text.token_ids
    assert text.token_ids.count(tokenizer.bos_token_id) == 1


# ---- the scores


def test_scores_are_those_of_transformers_and_of_training(
    judge: Path, texts: list[tuple[str, str]], expected: torch.Tensor, tmp_path: Path
) -> None:
    scores = scores_of(open_scorer(judge), texts)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    # what training says of the same texts, as the distance from these scores
    tokenizer = load_tokenizer(judge)
    records = [
        {"prompt": prompt, "response": response, "score": float(score)}
        for (prompt, response), score in zip(texts, scores, strict=True)
        if response
    ]
    overrides = [f"model.restore_from={judge}", f"exp_manager.explicit_log_dir={tmp_path}", "data.train=none"]
    examples = read_scores(records, tokenizer, 64)
    training = ScoreTraining(load("reward", overrides), tokenizer, judge, examples, examples)
    training.configure_model()
    metrics = training.validate()
    assert metrics["val/mae"] < 1e-6 and metrics["val/correlation"] == pytest.approx(1.0, abs=1e-6)


def test_normalised_scores_and_what_cannot_be_scored(
    judge: Path, tiny: Tiny, texts: list[tuple[str, str]], expected: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"normalise=true needs the mean and deviation.*has none"):
        open_scorer(judge, normalise=True)
    stored = import_hf(judge, tmp_path / "ckpt")
    described = vars(Architecture.load(stored))
    Architecture(**{**described, "score_mean": 0.4, "score_std": 1.7}).save(stored)
    scores = scores_of(open_scorer(stored, normalise=True), texts)
    torch.testing.assert_close(scores, (expected - 0.4) / 1.7, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"here has 65 tokens of prompt and response, .* takes 64 at most"):
        open_scorer(stored).encode("a" * 30, "b" * 34, "here")
    with pytest.raises(ValueError, match="has no head that gives scores: train a reward model"):
        open_scorer(tiny.hf)


# ---- in a job


def sources(tiny: Tiny, run_dir: Path, *entries: dict[str, Any], cut: str = "") -> list[str]:
    """Arguments of PPO, with the sources in a file."""
    more = [f"model.{cut}=2"] if cut else []
    return tiny.ppo(run_dir, *in_a_file(run_dir, *entries), *QUIET, *more)


def rft(tiny: Tiny, run_dir: Path, *entries: dict[str, Any]) -> list[str]:
    return tiny.rft(run_dir, *in_a_file(run_dir, *entries), *QUIET)


def in_a_file(run_dir: Path, *entries: dict[str, Any]) -> list[str]:
    file = run_dir.with_suffix(".yaml")
    file.write_text(json.dumps({"reward": {"sources": list(entries)}}))
    return ["--config", str(file), "reward.function=null"]


def assert_same_run(found: Path, wanted: Path) -> None:
    """Every token the same, and every figure but for rounding."""
    rows, others = metrics_of(found), metrics_of(wanted)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    samples, other_samples = rollouts_of(found), rollouts_of(wanted)
    assert samples.keys() == other_samples.keys() and samples
    flat = (itertools.chain.from_iterable(each.values()) for each in (samples, other_samples))
    for sample, other in zip(*flat, strict=True):
        assert sample.pop("scores") == pytest.approx(other["scores"], rel=1e-3, abs=2e-5)
        for name, value in sample.items():
            exact = not isinstance(value, float)
            assert value == (other[name] if exact else pytest.approx(other[name], rel=1e-3, abs=2e-5)), name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The console program runs in this process, which stays as it is."""
    monkeypatch.setattr("nemo_rlhf.cli.launch_if_needed", lambda *sizes: None)
    for name in FROM_OUTSIDE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def by_function(judge: Path, tiny: Tiny, place: Path) -> Path:
    """A run whose reward is a function that asks transformers."""
    function = {"kind": "function", "name": "judge", "weight": 0.5, "function": f"{REWARDS}:judged"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_rlhf.cli.launch_if_needed", lambda *sizes: None)
        assert main(sources(tiny, place / "function", {**function, "arguments": {"directory": str(judge)}})) == 0
    rows = metrics_of(place / "function")
    assert rows[-1]["reward/mean"] == pytest.approx(0.5 * rows[-1]["reward/judge"], rel=1e-5)
    return place / "function"


@pytest.mark.parametrize("residence", ["resident", "swap"])
def test_a_model_in_the_job_rewards_as_a_function_does(
    judge: Path, tiny: Tiny, place: Path, by_function: Path, alone: None, residence: str
) -> None:
    model = {"kind": "model", "name": "judge", "weight": 0.5, "restore_from": str(judge), "residence": residence}
    assert main(sources(tiny, place / residence, {**model, "micro_batch_size": 5})) == 0
    assert_same_run(place / residence, by_function)


def test_two_ranks_score_alike_and_wait_for_hours(
    judge: Path, tiny: Tiny, place: Path, by_function: Path, texts: list[tuple[str, str]], expected: torch.Tensor
) -> None:
    model = {"kind": "model", "name": "judge", "weight": 0.5, "restore_from": str(judge)}
    runs = {
        "tp2": sources(tiny, place / "tp2", model, cut="tensor_model_parallel_size"),
        "pp2": sources(tiny, place / "pp2", {**model, "residence": "swap"}, cut="pipeline_model_parallel_size"),
    }
    arguments = [*runs.values(), rft(tiny, place / "rft", model), ["serve-reward", str(tiny.hf), "server.port=0"]]
    payload = {
        "judge": str(judge),
        "cuts": CUTS,
        "texts": texts,
        "runs": [{"arguments": each} for each in arguments],
    }
    ranks = run_distributed("tests.workers.scorer_worker:work", 2, payload)
    for rank in ranks:
        for scores in rank["scores"].values():
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        assert [run["code"] for run in rank["runs"]] == [0, 0, 0, 2], rank["runs"]
    assert ranks[0]["idle"] == [1.0, 7.0, 2.0, 7.0]
    for name in runs:
        assert_same_run(place / name, by_function)
    for row in metrics_of(place / "rft")[1:]:
        assert row["reward/mean"] == pytest.approx(0.5 * row["reward/judge"], rel=1e-5)
    told = [line for rank in ranks for line in error_lines(rank["runs"][-1]["stderr"])]
    assert len(told) == 1 and "has no head that gives scores" in told[0]


# ---- behind HTTP


def test_a_server_rewards_as_a_model_in_the_job_does(
    judge: Path,
    tiny: Tiny,
    place: Path,
    by_function: Path,
    texts: list[tuple[str, str]],
    expected: torch.Tensor,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks that share the model; clients at a time, then a PPO run; then a signal."""
    monkeypatch.setenv(TOKEN, "secret")
    file = place / "reward.url"
    server = Job(
        [
            "serve-reward",
            str(judge),
            "server.port=0",
            f"server.url_file={file}",
            f"server.token_env={TOKEN}",
            "server.batch_size=4",
            "trainer.devices=2",
            "model.pipeline_model_parallel_size=2",
        ],
        place,
        **{TOKEN: "secret"},
    )
    server.wait_until(file.is_file)
    url = file.read_text().strip()
    headers = {"Authorization": "Bearer secret"}

    def one(text: tuple[str, str]) -> float:
        status, answer, _ = ask(url, {"samples": [{"prompt": text[0], "response": text[1]}]}, **headers)
        assert status == 200, answer
        return float(answer["rewards"][0])

    with ThreadPoolExecutor(5) as clients:
        torch.testing.assert_close(torch.tensor(list(clients.map(one, texts))), expected, atol=1e-4, rtol=0)
    status, answer, _ = ask(url, {"samples": [{"prompt": "a" * 64, "response": "b"}]}, **headers)
    assert status == 400 and answer["error"].startswith("samples[0] has 66 tokens of prompt and response")
    assert ask(url, {"samples": []})[0] == 401
    service = {"kind": "http", "name": "judge", "weight": 0.5, "url_file": str(file), "token_env": TOKEN}
    assert main(sources(tiny, place / "http", {**service, "batch_size": 3})) == 0
    assert_same_run(place / "http", by_function)
    assert f"scores at {url}" in server.stdout
    server.process.send_signal(signal.SIGTERM)
    assert server.wait(60) == 75
    (used,) = server.stderr.splitlines()  # and nothing else
    assert used.startswith("nemo-rlhf: layers: local,")
    assert not file.exists()
