"""Reward models: losses and data by hand, learning equal to transformers' for every cut, calibration."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.algorithms.reward import calibration_error
from nemo_rlhf.convert import export_hf
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.losses.reward import bradley_terry_loss
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
    ],
)
def test_wrong_pairs_are_named(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pairs(write_lines(tmp_path / "pairs.jsonl", record), make_tokenizer(), 16)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No pair is left within"):
        read_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}], make_tokenizer(), 2)


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
        f"mb{size}": (Cut(), {"directory": origin, "target": shelf / f"mb{size}", "micro_batch": size})
        for size in (1, 2, 4)
    }
    return worker.run(jobs)


def cut_jobs(world: int, origin: Path, shelf: Path) -> list[dict[str, Any]]:
    jobs = {label: (cut, {"directory": origin, "target": shelf / label}) for label, cut in CUTS[world].items()}
    return run_distributed("tests.workers.reward_worker:run", world, jobs)


def scores_of(model: Any) -> torch.Tensor:
    """A text at a time, without padding."""
    tokens, _, lengths, _ = worker.make_pairs()
    rows = [tokens[i : i + 1, :length] for i, length in enumerate(lengths.tolist())]
    return torch.stack([model.score(model.model(row).last_hidden_state)[0, -1, 0] for row in rows])


def test_learns_what_transformers_and_adamw_learn(one: dict[str, Any], origin: Path, shelf: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(origin)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": OPTIM.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=tuple(OPTIM.betas), eps=OPTIM.eps)
    margins = worker.make_pairs()[3][::2, 0]
    torch.testing.assert_close(one["mb2"]["before"], scores_of(model).detach(), atol=1e-4, rtol=0)
    for step, logged in enumerate(one["mb2"]["steps"], start=1):
        optimizer.zero_grad()
        chosen, rejected = scores_of(model).view(-1, 2).unbind(1)
        losses = -torch.log(torch.sigmoid(chosen - rejected - margins))
        losses.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(step)
        optimizer.step()
        assert logged["loss"] == pytest.approx(float(losses.sum().detach()), rel=2e-5)
        assert logged["norm"] == pytest.approx(norm, rel=2e-5)
        assert logged["accuracy"] == int((chosen > rejected).sum())
    after = scores_of(model).detach()
    torch.testing.assert_close(one["mb2"]["after"], after, atol=1e-4, rtol=1e-4)
    exported = export_hf(shelf / "mb2", shelf / "hf")
    exported_scores = scores_of(AutoModelForSequenceClassification.from_pretrained(exported)).detach()
    torch.testing.assert_close(exported_scores, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("world", CUTS)
def test_every_cut_learns_the_same(one: dict[str, Any], origin: Path, shelf: Path, world: int) -> None:
    for rank in cut_jobs(world, origin, shelf):
        for label in CUTS[world]:
            assert_same_steps(rank[label]["steps"], one["mb2"]["steps"])
            for name in ("before", "after"):
                torch.testing.assert_close(rank[label][name], one["mb2"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 4])
def test_every_microbatch_learns_the_same(one: dict[str, Any], size: int) -> None:
    assert_same_steps(one[f"mb{size}"]["steps"], one["mb2"]["steps"])


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
    assert stored.heads == ("value",) and stored.score_std > 0
    model = AutoModelForSequenceClassification.from_pretrained(export_hf(best, tmp_path / "hf"))
    batch = AutoTokenizer.from_pretrained(tmp_path / "hf")(["xy abab<eos>", "xy cdcd<eos>"], return_tensors="pt")
    liked, disliked = model(input_ids=batch["input_ids"]).logits[:, 0].tolist()
    assert liked > disliked
    ppo = tiny.ppo(tmp_path / "ppo", f"model.critic.restore_from={best}", "trainer.max_steps=1")
    job = Job(ppo, tmp_path)
    assert job.process.wait(timeout=300) == 0, job.stderr
    assert abs(metrics_of(tmp_path / "ppo")[-1]["value/mean"]) > 1e-3, "the critic did not start from the reward model"
