"""The maths of PPO, each piece against its definition in plain Python loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_rlhf.ops.gae import gae
from nemo_rlhf.ops.kl import kl_estimate, next_kl_coef
from nemo_rlhf.ops.masks import masked_mean, masked_sum, mean_and_variance, moments, whiten
from nemo_rlhf.ops.returns import discounted_returns
from nemo_rlhf.ops.rewards import last_positions, token_rewards
from nemo_rlhf.ops.scaling import ScoreStatistics, scale_scores, update_statistics
from nemo_rlhf.ops.stats import explained_variance, histograms, mean_and_std

# Spans (start, end) of the response in each row: uneven, one token, at either edge, and none.
SPANS = [(3, 9), (1, 12), (5, 6), (0, 0), (11, 12), (1, 2), (4, 11)]
WIDTH = 12


def make_mask() -> Tensor:
    mask = torch.zeros(len(SPANS), WIDTH, dtype=torch.bool)
    for row, (start, end) in enumerate(SPANS):
        mask[row, start:end] = True
    return mask


def noise(seed: int, *, garbage: bool = True) -> Tensor:
    """Random numbers inside the mask, NaN and infinities outside."""
    x = torch.randn(len(SPANS), WIDTH, generator=torch.Generator().manual_seed(seed))
    if garbage:
        x[~make_mask()] = float("nan")
        x[0, 0] = float("inf")
    return x


def selected(x: Tensor) -> np.ndarray:
    return x[make_mask()].double().numpy()


def test_masked_sum_and_mean_ignore_what_is_not_selected():
    x = noise(0)
    assert masked_sum(x, make_mask()).item() == pytest.approx(selected(x).sum(), abs=1e-5)
    assert masked_mean(x, make_mask()).item() == pytest.approx(selected(x).mean(), abs=1e-6)
    assert masked_mean(x, torch.zeros_like(make_mask())).item() == 0.0


def test_masked_sum_gives_no_gradient_outside_the_mask():
    x = noise(0).requires_grad_()
    masked_sum(x, make_mask()).backward()
    assert torch.equal(x.grad, make_mask().float())


def test_moments_of_parts_add_up_to_the_moments_of_the_whole():
    x, mask = noise(1), make_mask()
    parts = moments(x[:2], mask[:2]) + moments(x[2:5], mask[2:5]) + moments(x[5:], mask[5:])
    mean, variance = mean_and_variance(parts)
    assert parts.dtype == torch.float64
    assert parts[0].item() == mask.sum().item()
    assert mean.item() == pytest.approx(selected(x).mean(), abs=1e-12)
    assert variance.item() == pytest.approx(selected(x).var(), abs=1e-12)
    torch.testing.assert_close(parts, moments(x, mask), rtol=0, atol=1e-12)


def test_moments_of_nothing():
    mean, variance = mean_and_variance(moments(noise(1), torch.zeros_like(make_mask())))
    assert (mean.item(), variance.item()) == (0.0, 0.0)


def test_moments_without_mask_select_everything():
    assert moments(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 7.0, 21.0]


def test_whitened_over_cut_batch_equals_whitened_whole():
    x, mask = noise(2) * 3 + 5, make_mask()
    total = moments(x[:3], mask[:3]) + moments(x[3:], mask[3:])
    whitened = torch.cat([whiten(x[:3], mask[:3], total), whiten(x[3:], mask[3:], total)])
    values = selected(x)
    expected = (values - values.mean()) / math.sqrt(values.var() + 1e-8)
    np.testing.assert_allclose(selected(whitened), expected, atol=1e-6)
    assert whitened.dtype == torch.float32
    assert torch.equal(whitened[~mask], torch.zeros(int((~mask).sum())))


def test_whiten_of_equal_values_is_zero_not_nan():
    x, mask = torch.full((len(SPANS), WIDTH), 2.5), make_mask()
    assert torch.equal(whiten(x, mask, moments(x, mask)), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda p, q: p - q),
        ("k2", lambda p, q: (p - q) ** 2 / 2),
        ("k3", lambda p, q: math.exp(q - p) - 1 - (q - p)),
        ("abs", lambda p, q: abs(p - q)),
    ],
)
def test_kl_estimate_per_token(estimator, formula):
    logprobs, ref = -noise(3, garbage=False).abs(), -noise(4, garbage=False).abs()
    estimate = kl_estimate(logprobs, ref, estimator)
    expected = [
        [formula(p, q) for p, q in zip(*rows, strict=True)]
        for rows in zip(logprobs.tolist(), ref.tolist(), strict=True)
    ]
    torch.testing.assert_close(estimate, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(kl_estimate(logprobs, logprobs, estimator), torch.zeros_like(logprobs))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_estimators_average_to_the_true_kl(estimator):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    average = (p * kl_estimate(p.log(), q.log(), estimator)).sum()  # the expectation over tokens drawn from p
    assert average.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)


def test_the_gradient_of_k3_never_points_away_from_the_reference():
    """Those of verl, NeMo-RL, OpenRLHF and slime where they clamp, and of TRL where that does not overflow."""
    d = torch.tensor([-30.0, -21.0, -19.0, -5.0, -1.0, 0.0, 1.0, 5.0, 21.0, 30.0], requires_grad=True)
    kl_estimate(d, torch.zeros(10), "k3").sum().backward()
    expected = [0, 0, 1 - math.exp(19), 1 - math.exp(5), 1 - math.exp(1), 0, 0.63212, 0.99326, 1, 1]
    assert d.grad.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_k3_stays_finite_where_the_reference_excludes_a_token():
    assert torch.isfinite(kl_estimate(torch.tensor([-0.1, -500.0]), torch.tensor([-500.0, -0.1]), "k3")).all()


def test_unknown_kl_estimator():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),
        (5.4, 0.1 * (1 - 0.1 * 64 / 1000)),
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # limited
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_adaptive_kl_coefficient(kl, expected):
    assert next_kl_coef(0.1, kl, target=6.0, horizon=1000, num_samples=64) == pytest.approx(expected, abs=1e-12)


def test_fixed_kl_coefficient():
    assert next_kl_coef(0.1, 99.0, target=None, horizon=1000, num_samples=64) == 0.1


def test_last_positions():
    mask = make_mask()
    found = last_positions(mask)
    for row, (start, end) in enumerate(SPANS):
        assert found[row].nonzero().flatten().tolist() == ([end - 1] if end > start else [])


@pytest.mark.parametrize("with_dense", [False, True])
def test_token_rewards_by_loop(with_dense):
    kl, dense = noise(5), noise(6)
    scores = torch.randn(len(SPANS), generator=torch.Generator().manual_seed(7))
    rewards = token_rewards(kl, scores, make_mask(), 0.3, dense if with_dense else None)
    expected = torch.zeros(len(SPANS), WIDTH)
    for row, (start, end) in enumerate(SPANS):
        for t in range(start, end):
            expected[row, t] = -0.3 * kl[row, t] + (dense[row, t] if with_dense else 0.0)
        if end > start:
            expected[row, end - 1] += scores[row]
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-6)


def slow_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """By definition, in O(n^2): every later temporal difference, discounted."""
    advantages, returns = torch.zeros(len(SPANS), WIDTH), torch.zeros(len(SPANS), WIDTH)
    for row, (start, end) in enumerate(SPANS):
        r, v = rewards[row, start:end].tolist(), [*values[row, start:end].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(end - start)]
        for t in range(end - start):
            advantage = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, end - start))
            advantages[row, start + t] = advantage
            returns[row, start + t] = advantage + v[t]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_by_definition(gamma, lam):
    rewards, values = noise(8), noise(9)
    advantages, returns = gae(rewards, values, make_mask(), gamma, lam)
    expected_advantages, expected_returns = slow_gae(rewards, values, gamma, lam)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages, expected_advantages, rtol=0, atol=2e-6)
    torch.testing.assert_close(returns, expected_returns, rtol=0, atol=2e-6)


def test_gae_passes_over_what_the_environment_said():
    """As if the tokens between were not there."""
    mask = torch.tensor([[False, True, True, False, False, True, False, True, False]])
    rewards, values = torch.randn(1, 9, generator=seeded(3)), torch.randn(1, 9, generator=seeded(4))
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    together = torch.ones(1, 4, dtype=torch.bool)
    expected = gae(rewards[mask][None], values[mask][None], together, 0.9, 0.8)
    for found, wanted in zip((advantages, returns), expected, strict=True):
        assert torch.equal(found[mask][None], wanted) and not found[~mask].any()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gae_returns_are_rewards_to_go_without_bootstrapping():
    rewards, values = noise(10), noise(11)
    _, returns = gae(rewards, values, make_mask(), 1.0, 1.0)
    for row, (start, end) in enumerate(SPANS):
        to_go = rewards[row, start:end].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(returns[row, start:end], to_go, rtol=0, atol=5e-6)


def test_gae_of_bf16_is_fp32_and_of_nothing_is_zero():
    mask = make_mask()
    advantages, _ = gae(noise(8).bfloat16(), noise(9).bfloat16(), mask, 1.0, 0.95)
    expected, _ = slow_gae(noise(8).bfloat16().float(), noise(9).bfloat16().float(), 1.0, 0.95)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=2e-6)
    advantages, returns = gae(noise(8), noise(9), torch.zeros_like(mask), 1.0, 0.95)
    assert not advantages.any()
    assert not returns.any()


def steps_of_scores() -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randn(n, generator=generator) * 4 + 30 for n in (1, 5, 64, 2, 17)]


def test_running_statistics_are_those_of_all_scores():
    state = ScoreStatistics()
    seen: list[float] = []
    for scores in steps_of_scores():
        # as two data-parallel ranks would give them
        state = update_statistics(state, moments(scores[::2]) + moments(scores[1::2]), "running")
        seen += scores.tolist()
        assert (state.count, state.mean) == (len(seen), pytest.approx(np.mean(seen), rel=1e-9))
        expected = np.std(seen, ddof=1) if len(seen) > 1 else 0.0
        assert state.std == pytest.approx(expected, rel=1e-6)
        scaled = scale_scores(scores, state, "running", None)
        np.testing.assert_allclose(scaled.numpy(), scores.numpy() / (expected or 1.0), rtol=1e-5)


def test_reference_statistics_stay_those_of_the_first_step():
    first, *later = steps_of_scores()[1:]
    state = update_statistics(ScoreStatistics(), moments(first), "reference")
    assert state.std == pytest.approx(first.std().item(), rel=1e-5)
    for scores in later:
        assert update_statistics(state, moments(scores), "reference") == state


def test_no_scaling_keeps_state_and_scores():
    scores = steps_of_scores()[2]
    state = update_statistics(ScoreStatistics(), moments(scores), "none")
    assert state == ScoreStatistics()
    assert torch.equal(scale_scores(scores, state, "none", None), scores)


def test_clip_comes_after_scaling_and_shift_is_kept():
    state = ScoreStatistics(count=3, mean=100.0, squared_deviations=8.0)  # std 2
    scaled = scale_scores(torch.tensor([-50.0, -3.0, 0.0, 19.0, 21.0]), state, "running", 10.0)
    assert scaled.tolist() == [-10.0, -1.5, 0.0, 9.5, 10.0]


@pytest.mark.parametrize("mode", ["running", "reference"])
def test_equal_scores_are_not_scaled(mode):
    scores = torch.full((6,), 0.3)
    state = update_statistics(ScoreStatistics(), moments(scores), mode)
    assert torch.equal(scale_scores(scores, state, mode, 10.0), scores)


def test_score_statistics_survive_a_checkpoint():
    state = ScoreStatistics(count=7.0, mean=0.1 + 0.2, squared_deviations=1 / 3)
    assert ScoreStatistics.from_dict(state.to_dict()) == state
    assert state.merge(torch.zeros(3)) == state


def test_explained_variance_over_ranks():
    values, returns, mask = noise(13), noise(14), make_mask()
    residual = moments((returns - values)[:4], mask[:4]) + moments((returns - values)[4:], mask[4:])
    total = moments(returns[:4], mask[:4]) + moments(returns[4:], mask[4:])
    expected = 1 - selected(returns - values).var() / selected(returns).var()
    assert explained_variance(residual, total) == pytest.approx(expected, abs=1e-9)


def test_explained_variance_of_perfect_constant_and_trivial_critics():
    returns, mask = noise(15), make_mask()
    assert explained_variance(moments(returns - returns, mask), moments(returns, mask)) == 1.0
    assert explained_variance(moments(returns - 7.0, mask), moments(returns, mask)) == pytest.approx(0.0, abs=1e-6)
    constant = moments(torch.ones(5))
    assert explained_variance(moments(torch.randn(5)), constant) == 0.0


def test_mean_and_std():
    assert mean_and_std(moments(torch.tensor([1.0, 3.0])) + moments(torch.tensor([5.0]))) == (
        pytest.approx(3.0),
        pytest.approx(math.sqrt(8 / 3)),
    )


def test_discounted_returns_by_action() -> None:
    """Actions are not contiguous; what lies between them takes no time."""
    mask = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    rewards = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0], [3.0, 9.0, 9.0, 9.0, 9.0]])
    expected = torch.tensor([[0.0, 1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 0.0, 4.0], [3.0, 0, 0, 0, 0]])
    assert torch.equal(discounted_returns(rewards, mask, 0.5), expected)


def test_histograms_share_their_bins_and_leave_out_what_is_not_finite():
    edges, counts = histograms(
        {"a": torch.tensor([0.0, 0.9, 1.0, 3.9, 4.0, math.inf]), "b": torch.tensor([2.5, math.nan])}, 4
    )
    assert edges == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert counts == {"a": [2, 1, 0, 2], "b": [0, 0, 1, 0]}


@pytest.mark.parametrize(("values", "centre", "count"), [([], 0.0, 0), ([3.0, 3.0], 3.0, 2)])
def test_histograms_of_nothing_and_of_equal_values(values, centre, count):
    edges, counts = histograms({"a": torch.tensor(values)}, 2)
    assert edges == [centre - 0.5, centre, centre + 0.5]
    assert sum(counts["a"]) == count
