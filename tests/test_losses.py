"""The losses, values and gradients, against loops over single tokens and hand-written derivatives."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rlhf.losses.ilql import ilql_loss
from nemo_rlhf.losses.ppo import policy_loss, value_loss
from nemo_rlhf.losses.sft import sft_loss

ROWS, WIDTH = 6, 10
LOW, HIGH = 0.2, 0.28


def make_mask(seed: int = 0) -> Tensor:
    """Uneven responses; one row has one token, one has none."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    for row in range(ROWS):
        start = int(torch.randint(1, WIDTH - 1, (), generator=generator))
        mask[row, start : int(torch.randint(start + 1, WIDTH + 1, (), generator=generator))] = True
    mask[1] = False
    mask[2] = False
    mask[2, 4] = True
    return mask


def draw(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def policy_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old = -draw(1).abs()
    return (old + draw(2, 0.4)).requires_grad_(), old, draw(3), make_mask()


def slow_policy(new: float, old: float, advantage: float, dual_clip: float | None) -> tuple[float, float, bool]:
    """Loss, derivative with respect to ``new``, and whether it is clipped, of one token."""
    log_ratio = min(max(new - old, -20.0), 20.0)
    ratio = math.exp(log_ratio)
    slope = ratio * advantage if abs(new - old) <= 20.0 else 0.0
    limited = min(max(ratio, 1 - LOW), 1 + HIGH)
    objective, is_clipped = ratio * advantage, False
    if limited * advantage < objective:
        objective, slope, is_clipped = limited * advantage, 0.0, True
    if dual_clip is not None and advantage < 0 and objective < dual_clip * advantage:
        objective, slope, is_clipped = dual_clip * advantage, 0.0, True
    return -objective, -slope, is_clipped


@pytest.mark.parametrize("dual_clip", [None, 1.3])
def test_policy_loss_and_gradient_by_token(dual_clip):
    new, old, advantages, mask = policy_inputs()
    loss, metrics = policy_loss(
        new, old, advantages, mask, clip_low=LOW, clip_high=HIGH, dual_clip=dual_clip, normalizer=7.0
    )
    loss.backward()
    gradient = torch.zeros_like(old)
    sums = dict.fromkeys(["loss", "clipped", "ratio", "kl"], 0.0)
    deviation = 0.0
    for index in mask.nonzero().tolist():
        b, t = index
        token_loss, slope, is_clipped = slow_policy(
            new[b, t].item(), old[b, t].item(), advantages[b, t].item(), dual_clip
        )
        gradient[b, t] = slope / 7.0
        d = (new[b, t] - old[b, t]).item()
        sums["loss"] += token_loss
        sums["clipped"] += is_clipped
        sums["ratio"] += math.exp(d)
        sums["kl"] += math.exp(d) - 1 - d
        deviation = max(deviation, abs(math.exp(d) - 1))
    assert loss.item() == pytest.approx(sums["loss"] / 7.0, abs=1e-12)
    torch.testing.assert_close(new.grad, gradient, rtol=0, atol=1e-12)
    assert metrics["loss/policy"].item() == pytest.approx(sums["loss"], abs=1e-12)
    assert 0 < metrics["clipfrac/policy"].item() == sums["clipped"] < mask.sum().item()
    assert metrics["ratio/mean"].item() == pytest.approx(sums["ratio"], abs=1e-12)
    assert metrics["approx_kl"].item() == pytest.approx(sums["kl"], abs=1e-12)
    assert metrics["ratio/max_deviation"].item() == pytest.approx(deviation, abs=1e-12)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_dual_clip_changes_only_negative_advantages():
    old, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    new = torch.tensor([[2.0, 2.0, 0.5, -2.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, -1.0]])
    loss, _ = policy_loss(new, old, advantages, mask, clip_low=LOW, clip_high=HIGH, dual_clip=3.0, normalizer=1.0)
    loss.backward()
    # clipped from above; held at 3 A; in between; clipped from below
    expected = -(1 + HIGH) + 3.0 + math.exp(0.5) + (1 - LOW)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert new.grad.tolist() == [[0.0, 0.0, pytest.approx(math.exp(0.5)), 0.0]]


def test_first_update_has_ratio_one_and_plain_policy_gradient():
    old, advantages, mask = -draw(1, dtype=torch.float32).abs(), draw(3, dtype=torch.float32), make_mask()
    new = old.clone().requires_grad_()
    loss, metrics = policy_loss(new, old, advantages, mask, clip_low=LOW, clip_high=HIGH, normalizer=float(mask.sum()))
    loss.backward()
    assert metrics["ratio/mean"].item() == mask.sum().item()
    for name in ("ratio/max_deviation", "approx_kl", "clipfrac/policy"):
        assert metrics[name].item() == 0.0
    expected = torch.where(mask, -advantages / mask.sum(), 0.0)
    torch.testing.assert_close(new.grad, expected, rtol=1e-6, atol=0)


def test_entropy_bonus_adds_its_gradient_and_stays_out_of_the_surrogate():
    new, old, advantages, mask = policy_inputs()
    entropy = draw(4).abs().requires_grad_()
    keywords = {"clip_low": LOW, "clip_high": HIGH, "normalizer": 5.0}
    plain, plain_metrics = policy_loss(new, old, advantages, mask, **keywords)
    loss, metrics = policy_loss(new, old, advantages, mask, entropy=entropy, entropy_coef=0.01, **keywords)
    total = entropy[mask].sum().item()
    assert loss.item() == pytest.approx(plain.item() - 0.01 * total / 5.0, abs=1e-12)
    assert metrics["entropy/mean"].item() == pytest.approx(total, abs=1e-12)
    assert metrics["loss/policy"] == plain_metrics["loss/policy"]
    loss.backward()
    torch.testing.assert_close(entropy.grad, mask.double() * (-0.01 / 5.0), rtol=0, atol=1e-15)


def test_entropy_that_is_only_watched_gets_no_gradient():
    new, old, advantages, mask = policy_inputs()
    entropy = draw(4).requires_grad_()
    loss, metrics = policy_loss(
        new, old, advantages, mask, clip_low=LOW, clip_high=HIGH, entropy=entropy, normalizer=1.0
    )
    loss.backward()
    assert entropy.grad is None
    assert "entropy/mean" in metrics


def slow_value(value: float, old: float, target: float, clip: float | None) -> tuple[float, float, bool]:
    loss, slope = 0.5 * (value - target) ** 2, value - target
    if clip is not None:
        limited = old + min(max(value - old, -clip), clip)
        if 0.5 * (limited - target) ** 2 > loss + 1e-15:
            return 0.5 * (limited - target) ** 2, 0.0, True
    return loss, slope, False


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss_and_gradient_by_token(clip):
    old, returns, mask = draw(5), draw(6), make_mask()
    values = (old + draw(7, 0.5)).requires_grad_()
    loss, metrics = value_loss(values, old, returns, mask, value_clip=clip, normalizer=torch.tensor(11.0))
    loss.backward()
    gradient = torch.zeros_like(old)
    total, num_clipped = 0.0, 0
    for b, t in mask.nonzero().tolist():
        token_loss, slope, is_clipped = slow_value(values[b, t].item(), old[b, t].item(), returns[b, t].item(), clip)
        gradient[b, t] = slope / 11.0
        total += token_loss
        num_clipped += is_clipped
    assert loss.item() == pytest.approx(total / 11.0, abs=1e-12)
    assert metrics["loss/value"].item() == pytest.approx(total, abs=1e-12)
    assert metrics["clipfrac/value"].item() == num_clipped
    assert (num_clipped > 0) == (clip is not None)
    torch.testing.assert_close(values.grad, gradient, rtol=0, atol=1e-12)


def test_values_inside_the_interval_never_count_as_clipped():
    # In fp32 old + (value - old) is not always value; the difference must not pass for clipping.
    values, old, returns = 0.1 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(8))
    assert (old + (values - old) != values).any()
    _, metrics = value_loss(values, old, returns, torch.ones(4000, dtype=torch.bool), value_clip=5.0, normalizer=1.0)
    assert metrics["clipfrac/value"].item() == 0


def test_sft_loss_and_gradient():
    logprobs, mask = (-draw(9).abs()).requires_grad_(), make_mask()
    loss, metrics = sft_loss(logprobs, mask, normalizer=13.0)
    loss.backward()
    expected = -sum(logprobs[b, t].item() for b, t in mask.nonzero().tolist())
    assert loss.item() == pytest.approx(expected / 13.0, abs=1e-12)
    assert metrics["loss"].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(logprobs.grad, mask.double() * (-1 / 13.0), rtol=0, atol=1e-15)


def run_policy(new: Tensor, x: list[Tensor], mask: Tensor, normalizer: float) -> tuple[Tensor, dict[str, Tensor]]:
    return policy_loss(
        new, x[0], x[1], mask, clip_low=LOW, clip_high=HIGH, dual_clip=2.0, entropy=x[2], entropy_coef=0.1,
        normalizer=normalizer,
    )  # fmt: skip


def run_value(new: Tensor, x: list[Tensor], mask: Tensor, normalizer: float) -> tuple[Tensor, dict[str, Tensor]]:
    return value_loss(new, x[0], x[1], mask, value_clip=0.2, normalizer=normalizer)


def run_sft(new: Tensor, x: list[Tensor], mask: Tensor, normalizer: float) -> tuple[Tensor, dict[str, Tensor]]:
    return sft_loss(new, mask, normalizer=normalizer)


LOSSES = pytest.mark.parametrize("run", [run_policy, run_value, run_sft])


@LOSSES
@pytest.mark.parametrize("cuts", [(1, 2, 3), (2, 4), (1, 2, 3, 4, 5)])
def test_losses_gradients_and_metrics_do_not_depend_on_the_cut(run, cuts):
    new, mask = draw(10).requires_grad_(), make_mask()
    others = [draw(seed) for seed in (11, 12, 13)]
    normalizer = float(mask.sum())
    whole, whole_metrics = run(new, others, mask, normalizer)
    (expected,) = torch.autograd.grad(whole, new)
    bounds = [0, *cuts, ROWS]
    parts = [run(new[a:b], [x[a:b] for x in others], mask[a:b], normalizer) for a, b in itertools.pairwise(bounds)]
    total = torch.stack([loss for loss, _ in parts]).sum()
    (gradient,) = torch.autograd.grad(total, new)
    assert total.item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    for name, value in whole_metrics.items():
        values = [metrics[name].item() for _, metrics in parts]
        combined = max(values) if name == "ratio/max_deviation" else sum(values)
        assert combined == pytest.approx(value.item(), abs=1e-12), name


@LOSSES
def test_flat_selected_tokens_give_the_same_as_padded_rows(run):
    new, mask, others = draw(10), make_mask(), [draw(seed) for seed in (11, 12, 13)]
    padded, _ = run(new, others, mask, 3.0)
    flat, _ = run(new[mask], [x[mask] for x in others], torch.ones(int(mask.sum()), dtype=torch.bool), 3.0)
    assert flat.item() == pytest.approx(padded.item(), abs=1e-12)


@LOSSES
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_garbage_outside_the_mask_changes_nothing(run, garbage):
    mask = make_mask()
    clean = [draw(seed, dtype=torch.float32) for seed in (10, 11, 12, 13)]
    dirty = [torch.where(mask, x, garbage) for x in clean]
    results = []
    for x in (clean, dirty):
        new = x[0].clone().requires_grad_()
        loss, metrics = run(new, x[1:], mask, 3.0)
        loss.backward()
        results.append((loss.item(), {k: v.item() for k, v in metrics.items()}, new.grad))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])
    assert not results[1][2][~mask].any()


@LOSSES
def test_nothing_selected_is_a_loss_of_zero_with_zero_gradient(run):
    new = draw(10).requires_grad_()
    loss, metrics = run(new, [draw(seed) for seed in (11, 12, 13)], torch.zeros(ROWS, WIDTH, dtype=torch.bool), 3.0)
    loss.backward()
    assert loss.item() == 0.0
    assert not new.grad.any()
    assert metrics["loss/policy" if run is run_policy else "loss/value" if run is run_value else "loss"].item() == 0.0
    empty = torch.zeros(0)
    loss, _ = run(empty, [empty] * 3, torch.zeros(0, dtype=torch.bool), 3.0)
    assert loss.item() == 0.0


@LOSSES
def test_gradcheck(run):
    new, others = draw(10, 0.5).requires_grad_(), [draw(seed, 0.5) for seed in (11, 12, 13)]
    assert torch.autograd.gradcheck(lambda x: run(x, others, make_mask(), 3.0)[0], (new,), eps=1e-7, atol=1e-6)


@LOSSES
def test_bf16_inputs_are_summed_in_fp32(run):
    new = draw(10, dtype=torch.float32).bfloat16()
    others, mask = [draw(seed, dtype=torch.float32).bfloat16() for seed in (11, 12, 13)], make_mask()
    loss, _ = run(new, others, mask, 3.0)
    exact, _ = run(new.double(), [x.double() for x in others], mask, 3.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_enormous_log_ratio_stays_finite():
    new = torch.tensor([300.0, -300.0], requires_grad=True)
    loss, metrics = policy_loss(
        new, torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.ones(2, dtype=torch.bool), clip_low=LOW, clip_high=HIGH,
        normalizer=1.0,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-6)
    assert torch.isfinite(new.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())


# ---- ILQL

ILQL = {"tau": 0.7, "gamma": 0.9, "beta": 0.5, "cql_scale": 0.1, "awac_scale": 0.8}


def ilql_inputs(num_heads: int = 2, seed: int = 0) -> dict[str, Any]:
    """Logits of three dialogues of 1, 4 and 2 actions over 5 tokens; double, with gradient where there is one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "q": [draw(7, 5).requires_grad_() for _ in range(num_heads)],
        "target_q": [draw(7, 5) for _ in range(num_heads)],
        "values": draw(7).requires_grad_(),
        "logits": draw(7, 5).requires_grad_(),
        "actions": torch.tensor([0, 3, 1, 4, 2, 2, 0]),
        "rewards": draw(7),
        "is_last": torch.tensor([True, False, False, False, True, False, True]),
        "is_cut": torch.tensor([False, False, False, False, True, False, False]),
    }


def ilql_by_action(x: dict[str, Any], returns: list[float] | None) -> tuple[torch.Tensor, dict[str, float]]:
    """The paper's sums, one action at a time."""
    total = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(("loss/q", "loss/v", "loss/cql", "loss/awac"), 0.0)
    for t, action in enumerate(x["actions"].tolist()):
        v = x["values"][t]
        q_hat = min(float(head[t, action]) for head in x["target_q"])
        next_v = 0.0 if x["is_last"][t] else float(x["values"][t + 1].detach())
        target = float(x["rewards"][t]) + ILQL["gamma"] * next_v if returns is None else returns[t]
        l_q = torch.zeros(()) if x["is_cut"][t] else sum((head[t, action] - target) ** 2 for head in x["q"])
        weight = 1 - ILQL["tau"] if q_hat < float(v.detach()) else ILQL["tau"]
        l_v = weight * (q_hat - v) ** 2
        l_cql = sum(-torch.log_softmax(head[t], -1)[action] for head in x["q"])
        l_awac = -torch.log_softmax(x["logits"][t], -1)[action] * math.exp(ILQL["beta"] * (q_hat - float(v.detach())))
        total = total + l_q + l_v + ILQL["cql_scale"] * l_cql + ILQL["awac_scale"] * l_awac
        for name, part in zip(sums, (l_q, l_v, l_cql, l_awac), strict=True):
            sums[name] += float(part.detach())
    return total / 11.0, sums


def ilql_by_tensor(x: dict[str, Any], returns: list[float] | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    taken = x["actions"][:, None]
    return ilql_loss(
        [head.gather(-1, taken)[:, 0] for head in x["q"]],
        [head.logsumexp(-1) for head in x["q"]],
        [head.gather(-1, taken)[:, 0] for head in x["target_q"]],
        x["values"],
        torch.log_softmax(x["logits"], -1).gather(-1, taken)[:, 0],
        x["rewards"],
        x["is_last"],
        x["is_cut"],
        returns=None if returns is None else torch.tensor(returns, dtype=torch.float64),
        normalizer=11.0,
        **ILQL,
    )


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("returns", [None, [0.5, -1.0, 2.0, 0.0, 1.0, 3.0, -2.0]])
def test_ilql_loss_and_gradients_by_action(num_heads: int, returns: list[float] | None) -> None:
    for seed in range(3):
        x, y = ilql_inputs(num_heads, seed), ilql_inputs(num_heads, seed)
        expected, parts = ilql_by_action(x, returns)
        loss, sums = ilql_by_tensor(y, returns)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for name, part in parts.items():
            assert float(sums[name]) == pytest.approx(part, rel=1e-12)
        expected.backward()
        loss.backward()
        for left, right in zip([*x["q"], x["values"], x["logits"]], [*y["q"], y["values"], y["logits"]], strict=True):
            torch.testing.assert_close(right.grad, left.grad, rtol=1e-12, atol=1e-14)


def test_ilql_metrics_are_sums_over_actions() -> None:
    x = ilql_inputs()
    _, sums = ilql_by_tensor(x, None)
    taken = x["actions"][:, None]
    q_hat = torch.minimum(*(head.gather(-1, taken)[:, 0] for head in x["target_q"]))
    assert float(sums["q/target"]) == pytest.approx(float(q_hat.sum()))
    assert float(sums["v/mean"]) == pytest.approx(float(x["values"].sum()))
    assert float(sums["advantage/mean"]) == pytest.approx(float((q_hat - x["values"]).sum()))
    assert float(sums["awac_weight/mean"]) == pytest.approx(float((0.5 * (q_hat - x["values"])).exp().sum()))
