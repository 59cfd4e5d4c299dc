"""Reward models: losses and data by hand, learning equal to transformers' for every cut, calibration."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.algorithms.reward import calibration_error
from nemo_rlhf.cli.run import run_reward
from nemo_rlhf.config import load
from nemo_rlhf.convert import export_hf
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.scores import read_scores
from nemo_rlhf.losses.reward import bradley_terry_loss, regression_loss
from nemo_rlhf.ops.stats import correlation
from nemo_rlhf.parallel import state
from tests.conftest import Tiny, write_tokenizer
from tests.jobs import Job, metrics_of
from tests.spawn import run_distributed
from tests.test_data import EOS, ids, make_tokenizer, write_lines
from tests.test_models import assert_same_steps, reference_rate
from tests.workers import reward_worker as worker
from tests.workers.parallel_worker import OPTIM, VOCAB, Cut

CUTS = {
    2: {"TP2": Cut(tp=2), "TP2+SP": Cut(tp=2, sequence_parallel=True), "PP2": Cut(pp=2), "DP2": Cut()},
    4: {"TP2xPP2": Cut(2, 2)},
}
KINDS = ("pairs", "scores")


# ---- losses


def test_bradley_terry_by_pair() -> None:
    chosen, rejected, margins = [0.5, -1.0, 2.0], [0.1, 0.3, 2.0], [0.0, 0.5, 1.0]
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    loss, sums = bradley_terry_loss(*tensors, torch.tensor(margins, dtype=torch.float64), normalizer=4)
    losses = [math.log1p(math.exp(-(c - r - m))) for c, r, m in zip(chosen, rejected, margins, strict=True)]
    assert float(loss.detach()) == pytest.approx(sum(losses) / 4, rel=1e-12)
    loss.backward()
    slopes = [-1 / (1 + math.exp(c - r - m)) / 4 for c, r, m in zip(chosen, rejected, margins, strict=True)]
    assert tensors[0].grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert tensors[1].grad.tolist() == pytest.approx([-slope for slope in slopes], rel=1e-12)
    assert float(sums["accuracy"]) == 1 and float(sums["margin/mean"]) == pytest.approx(-0.9)
    assert float(sums["score/square"]) == pytest.approx(sum(x * x for x in chosen + rejected) / 2)


def test_regression_by_text() -> None:
    given, scores = [0.5, -1.0, 2.0], [0.0, 1.0, 2.0]
    predicted = torch.tensor(given, dtype=torch.float64, requires_grad=True)
    loss, sums = regression_loss(predicted, torch.tensor(scores, dtype=torch.float64), normalizer=4)
    assert float(loss.detach()) == pytest.approx((0.25 + 4.0 + 0.0) / 4, rel=1e-12)
    loss.backward()
    assert predicted.grad.tolist() == pytest.approx([2 * 0.5 / 4, 2 * -2.0 / 4, 0.0], rel=1e-12)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {"loss": 4.25, "mae": 2.5, "score/mean": 1.5, "score/square": 5.25}
    )


def test_correlation() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    y = 0.3 * x + torch.randn(50, generator=torch.Generator().manual_seed(2))
    assert correlation(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    assert correlation(x, 2 * x + 1) == pytest.approx(1.0)
    assert correlation(x, torch.ones(50)) == 0.0


def test_calibration_error() -> None:
    assert calibration_error(torch.ones(4)) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(torch.full((8,), 0.5)) == pytest.approx(0.0, abs=1e-6)
    # says 0.75, and is right every time
    assert calibration_error(torch.full((8,), 0.75)) == pytest.approx(0.25, abs=1e-6)
    assert calibration_error(torch.zeros(4)) == pytest.approx(1.0, abs=1e-6)


# ---- data


def test_pairs_in_every_form(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = write_lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "a b", "chosen": "c", "rejected": "d", "margin": 2},
        {"text": "a c"},
        {"text": "a d"},
    )
    first, second = read_pairs(path, tokenizer, 16)
    assert list(first.chosen) == [*ids("a b c"), EOS] and list(first.rejected) == [*ids("a b d"), EOS]
    assert (first.margin, second.margin) == (2.0, 0.0)
    assert list(second.chosen) == [*ids("a c"), EOS] and list(second.rejected) == [*ids("a d"), EOS]
    with pytest.warns(UserWarning, match="Of 2 pairs, 1 are longer"):
        assert read_pairs(path, tokenizer, 3) == [second]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, 'line 1 has no field "rejected"'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 1: chosen and rejected are the same text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}, "line 1: the margin -1 must be a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "the margin 'big' must be a number"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "line 1: the response is empty"),
        ({"text": "a"}, "line 1 is the last of an odd number of"),
        (["a", "b"], "line 1 is a list"),
        ({"prompt": "a", "response": "b", "score": 1}, "line 1 is a scored response.*reward_model.loss=regression"),
    ],
)
def test_wrong_pairs_are_named(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pairs(write_lines(tmp_path / "pairs.jsonl", record), make_tokenizer(), 16)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No pair is left within"):
        read_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}], make_tokenizer(), 2)


def test_scored_texts_in_every_form(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = write_lines(
        tmp_path / "scores.jsonl",
        {"prompt": "a b", "response": "c", "score": 2},
        {"text": "a d", "reward": -0.5},
    )
    first, second = read_scores(path, tokenizer, 16)
    assert list(first.token_ids) == [*ids("a b c"), EOS] and list(second.token_ids) == [*ids("a d"), EOS]
    assert (first.score, second.score) == (2.0, -0.5)
    with pytest.warns(UserWarning, match="Of 2 scored texts, 1 are longer"):
        assert read_scores(path, tokenizer, 3) == [second]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No scored text is left within"):
        read_scores(path, tokenizer, 2)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "response": "b"}, 'line 1 has no field "score" or "reward"'),
        ({"prompt": "a", "response": "b", "scores": 1}, 'rename "scores"'),
        ({"prompt": "a", "score": 1}, 'line 1 has no field "response"'),
        ({"prompt": "a", "response": "b", "score": "good"}, "line 1: the reward 'good' is not a number"),
        ({"prompt": "a", "response": "b", "score": float("nan")}, "line 1: the reward nan is not a finite number"),
        ({"prompt": "a", "response": "b", "score": 1, "reward": 1}, 'line 1 has both "score" and "reward"'),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "line 1 compares two responses.*bradley_terry"),
        ({"prompt": "a", "response": "", "score": 1}, "line 1: the response is empty"),
        (["a"], "line 1 is a list"),
    ],
)
def test_wrong_scored_texts_are_named(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scores(write_lines(tmp_path / "scores.jsonl", record), make_tokenizer(), 16)


# ---- learning


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    directory = tmp_path_factory.mktemp("classifier")
    write_tokenizer(directory)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        num_labels=1,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reward")


@pytest.fixture(scope="module")
def one(origin: Path, shelf: Path) -> dict[str, Any]:
    state.set_environment_for_one_process()
    jobs = {
        f"{kind}/mb{size}": (
            Cut(),
            {"directory": origin, "target": shelf / f"{kind}-mb{size}", "micro_batch": size, "kind": kind},
        )
        for kind in KINDS
        for size in (1, 2, 4)
    }
    return worker.run(jobs)


def cut_jobs(world: int, origin: Path, shelf: Path) -> list[dict[str, Any]]:
    jobs = {
        f"{kind}/{label}": (cut, {"directory": origin, "target": shelf / f"{kind}-{label}", "kind": kind})
        for kind in KINDS
        for label, cut in CUTS[world].items()
    }
    return run_distributed("tests.workers.reward_worker:run", world, jobs)


def scores_of(model: Any) -> torch.Tensor:
    """A text at a time, without padding."""
    tokens, _, lengths, _ = worker.make_pairs()
    rows = [tokens[i : i + 1, :length] for i, length in enumerate(lengths.tolist())]
    return torch.stack([model.score(model.model(row).last_hidden_state)[0, -1, 0] for row in rows])


def reference_losses(kind: str, scores: torch.Tensor) -> torch.Tensor:
    if kind == "scores":
        return torch.nn.functional.mse_loss(scores, worker.make_targets(), reduction="none")
    chosen, rejected = scores.view(-1, 2).unbind(1)
    return -torch.log(torch.sigmoid(chosen - rejected - worker.make_pairs()[3][::2, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_learns_what_transformers_and_adamw_learn(
    one: dict[str, Any], origin: Path, shelf: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    ours = one[f"{kind}/mb2"]
    model = AutoModelForSequenceClassification.from_pretrained(origin)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=tuple(OPTIM.betas), eps=OPTIM.eps)
    torch.testing.assert_close(ours["before"], scores_of(model).detach(), atol=1e-4, rtol=0)
    for step, logged in enumerate(ours["steps"], start=1):
        optimizer.zero_grad()
        scores = scores_of(model)
        losses = reference_losses(kind, scores)
        losses.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(step)
        optimizer.step()
        assert logged["loss"] == pytest.approx(float(losses.sum().detach()), rel=2e-5)
        assert logged["norm"] == pytest.approx(norm, rel=2e-5)
        if kind == "pairs":
            assert logged["accuracy"] == int((scores[::2] > scores[1::2]).sum())
        else:
            errors = scores.detach() - worker.make_targets()
            assert logged["mae"] == pytest.approx(float(errors.abs().sum()), rel=2e-5)
    after = scores_of(model).detach()
    torch.testing.assert_close(ours["after"], after, atol=1e-4, rtol=1e-4)
    exported = export_hf(shelf / f"{kind}-mb2", tmp_path / "hf")
    exported_scores = scores_of(AutoModelForSequenceClassification.from_pretrained(exported)).detach()
    torch.testing.assert_close(exported_scores, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("world", CUTS)
def test_every_cut_learns_the_same(one: dict[str, Any], origin: Path, shelf: Path, world: int) -> None:
    for rank in cut_jobs(world, origin, shelf):
        for kind, label in itertools.product(KINDS, CUTS[world]):
            assert_same_steps(rank[f"{kind}/{label}"]["steps"], one[f"{kind}/mb2"]["steps"])
            for name in ("before", "after"):
                expected = one[f"{kind}/mb2"][name]
                torch.testing.assert_close(rank[f"{kind}/{label}"][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4])
def test_every_microbatch_learns_the_same(one: dict[str, Any], size: int, kind: str) -> None:
    assert_same_steps(one[f"{kind}/mb{size}"]["steps"], one[f"{kind}/mb2"]["steps"])


# ---- a run


def test_a_run_learns_what_people_like(tiny: Tiny, tmp_path: Path) -> None:
    """Under PP2, stopped and continued; the best checkpoint is a classifier for transformers, and a critic's start."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    draw = random.Random(1)

    def word(letters: str) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(3, 6)))

    pairs = [{"prompt": f"{word('xyz')} ", "chosen": word("ab"), "rejected": word("cd")} for _ in range(80)]
    for name, part in (("train", pairs[:64]), ("held_out", pairs[64:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    command = [
        "reward",
        f"model.restore_from={tiny.hf}",
        "model.init=random",
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.validation={tmp_path / 'held_out.jsonl'}",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "exp_manager.create_tensorboard_logger=false",
        "trainer.devices=2",
        "model.pipeline_model_parallel_size=2",
        "trainer.val_check_interval=10",
        "model.global_batch_size=16",
        "model.micro_batch_size=4",
        "model.optim.lr=3e-3",
    ]
    for limit in ("trainer.max_steps=10", "trainer.max_epochs=5"):
        job = Job([*command, limit], tmp_path)
        assert job.process.wait(timeout=300) == 0, job.stderr
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["step"] == 20 and lines[-1]["val/accuracy"] >= 0.9, lines[-1]
    assert 0 <= lines[-1]["val/calibration_error"] <= 1
    best = tmp_path / "run" / "checkpoints" / "best"
    stored = read_architecture(best)
    at_best = next(row for row in lines if row["step"] == int(best.resolve().name.removeprefix("step_")))
    assert stored.heads == ("value",)
    assert (stored.score_mean, stored.score_std) == (at_best["val/score_mean"], at_best["val/score_std"])
    model = AutoModelForSequenceClassification.from_pretrained(export_hf(best, tmp_path / "hf"))
    batch = AutoTokenizer.from_pretrained(tmp_path / "hf")(["xy abab<eos>", "xy cdcd<eos>"], return_tensors="pt")
    liked, disliked = model(input_ids=batch["input_ids"]).logits[:, 0].tolist()
    assert liked > disliked
    ppo = tiny.ppo(tmp_path / "ppo", f"model.critic.restore_from={best}", "trainer.max_steps=1")
    job = Job(ppo, tmp_path)
    assert job.process.wait(timeout=300) == 0, job.stderr
    assert abs(metrics_of(tmp_path / "ppo")[-1]["value/mean"]) > 1e-3, "the critic did not start from the reward model"


def test_a_run_learns_scores_from_a_classifier_of_hugging_face(tiny: Tiny, tmp_path: Path) -> None:
    """In this process: from what transformers wrote, with a head of its own, to what people said of texts."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    origin = tmp_path / "classifier"
    shutil.copytree(tiny.hf, origin)
    torch.manual_seed(5)
    config = LlamaConfig.from_pretrained(tiny.hf, num_labels=1)
    classifier = LlamaForSequenceClassification(config)
    classifier.score.weight.data.normal_(std=0.1)
    classifier.save_pretrained(origin)
    draw = random.Random(2)
    words = ["".join(draw.choice("abcd") for _ in range(6)) for _ in range(160)]
    records = [{"prompt": "x ", "response": word, "score": word.count("a") - word.count("b")} for word in words]
    for name, part in (("train", records[:128]), ("held_out", records[128:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    config = load(
        "reward",
        [
            f"model.restore_from={origin}",
            "reward_model.loss=regression",
            f"data.train={tmp_path / 'train.jsonl'}",
            f"data.validation={tmp_path / 'held_out.jsonl'}",
            f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
            "exp_manager.create_tensorboard_logger=false",
            "trainer.enable_progress_bar=false",
            "trainer.val_check_interval=40",
            "trainer.max_steps=80",
            "model.global_batch_size=32",
            "model.micro_batch_size=32",
            "model.optim.lr=1e-2",
        ],
    )
    assert run_reward(config) == 0
    lines = metrics_of(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(origin)
    held_out = torch.tensor([record["score"] for record in records[128:]], dtype=torch.float32)
    batch = tokenizer([f"x {word}<eos>" for word in words[128:]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = AutoModelForSequenceClassification.from_pretrained(origin)(input_ids=batch).logits[:, 0]
        best = export_hf(tmp_path / "run" / "checkpoints" / "best", tmp_path / "hf")
        after = AutoModelForSequenceClassification.from_pretrained(best)(input_ids=batch).logits[:, 0]
    logged = min((line for line in lines if line["step"]), key=lambda line: line.get("val/loss", math.inf))
    for line, scores in ((lines[0], before), (logged, after)):
        assert line["val/loss"] == pytest.approx(float((scores - held_out).square().mean()), rel=1e-4)
        assert line["val/mae"] == pytest.approx(float((scores - held_out).abs().mean()), rel=1e-4)
        expected = float(torch.corrcoef(torch.stack([scores, held_out]))[0, 1])
        assert line["val/correlation"] == pytest.approx(expected, abs=1e-4)
    assert logged["val/correlation"] > 0.9, lines[-1]


def test_without_held_out_pairs_a_model_knows_no_scale(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_rlhf.algorithms.scorer import UNMEASURED
    from nemo_rlhf.cli import main

    monkeypatch.setattr("nemo_rlhf.cli.launch_if_needed", lambda *sizes: None)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}) + "\n")
    arguments = [
        f"model.restore_from={tiny.hf}",
        "model.init=random",
        f"data.train={tmp_path / 'pairs.jsonl'}",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        "exp_manager.create_tensorboard_logger=false",
        "trainer.max_steps=1",
        "model.global_batch_size=1",
    ]
    assert main(["reward", *arguments]) == 0
    stored = read_architecture(tmp_path / "run" / "checkpoints" / "step_1")
    assert (stored.score_mean, stored.score_std) == UNMEASURED
