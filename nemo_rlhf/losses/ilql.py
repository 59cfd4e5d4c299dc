"""The loss of implicit language Q-learning, in trlX's variant (Snell et al. 2022, "Offline RL for Natural Language
Generation with Implicit Language Q Learning").

Works on the actions of whole dialogues, one after the other: each of the agent's tokens is an action, taken in the
state before it. What lies between two actions (the other side's tokens) is part of the next state only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ilql_loss(
    q_taken: Sequence[Tensor],
    q_logsumexp: Sequence[Tensor],
    target_q_taken: Sequence[Tensor],
    values: Tensor,
    logprobs: Tensor,
    rewards: Tensor,
    is_last: Tensor,
    is_cut: Tensor,
    *,
    tau: float,
    gamma: float,
    beta: float,
    cql_scale: float,
    awac_scale: float,
    normalizer: float | Tensor,
    returns: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``L_Q + L_V + cql_scale * L_CQL + awac_scale * L_AWAC``, each summed over actions and divided by ``normalizer``.

    With ``Qhat = min_i target Q_i(a)``, and ``V'`` the value of the state of the dialogue's next action (0 behind the
    last):

    - ``L_Q = sum_i (Q_i(a) - (r + gamma * V'))^2``, the target without gradient;
    - ``L_V = |tau - 1[Qhat < V]| * (Qhat - V)^2``, the expectile regression of Kostrikov et al. 2021;
    - ``L_CQL = sum_i logsumexp(Q_i) - Q_i(a)``, the conservative term of Kumar et al. 2020, in every state;
    - ``L_AWAC = -log pi(a) * exp(beta * (Qhat - V))``, its weight without gradient (Nair et al. 2020).

    Args:
        q_taken, q_logsumexp, target_q_taken: one tensor [N] a Q head: of the action taken, and over all actions. The
            last has no gradient.
        values: [N] of the states before the actions. ``logprobs``: [N] of the actions under the policy.
        rewards: [N] given for each action.
        is_last: bool [N], the dialogue's last action; actions of a dialogue lie side by side, in order.
        is_cut: bool [N], the last action of a dialogue that was cut off before its end: what follows is unknown, so it
            has no part in ``L_Q``.
        normalizer: number of actions over all microbatches and ranks.
        returns: [N] Monte-Carlo returns, which then take the place of ``r + gamma * V'``.

    Metrics are detached fp64 scalars, sums over this microbatch's actions: "loss/q", "loss/v", "loss/cql", "loss/awac",
    "q/mean" (of all heads), "q/target", "v/mean", "advantage/mean" (Qhat - V), "td_error/mean" (absolute) and
    "awac_weight/mean".
    """
    assert is_last.dtype == torch.bool and len(q_taken) == len(q_logsumexp) == len(target_q_taken) > 0
    q_hat = torch.stack(tuple(target_q_taken)).amin(0).detach()
    with torch.no_grad():
        following = torch.where(is_last, 0.0, values.roll(-1))
        targets = rewards + gamma * following if returns is None else returns
        advantages = q_hat - values
        weights = (beta * advantages).exp()
    errors = torch.stack([torch.where(is_cut, 0.0, q - targets) for q in q_taken])
    parts = {
        "loss/q": errors.square().sum(0),
        "loss/v": (tau - (q_hat < values).to(q_hat.dtype)).abs() * (q_hat - values).square(),
        "loss/cql": torch.stack([total - taken for total, taken in zip(q_logsumexp, q_taken, strict=True)]).sum(0),
        "loss/awac": -logprobs * weights,
    }
    scales = {"loss/q": 1.0, "loss/v": 1.0, "loss/cql": cql_scale, "loss/awac": awac_scale}
    total = sum((scales[name] * part.sum() for name, part in parts.items()), start=values.new_zeros(()))
    metrics = parts | {
        "q/mean": torch.stack(tuple(q_taken)).mean(0),
        "q/target": q_hat,
        "v/mean": values,
        "advantage/mean": advantages,
        "td_error/mean": errors.abs().mean(0),
        "awac_weight/mean": weights,
    }
    return total / normalizer, {name: value.detach().sum(dtype=torch.float64) for name, value in metrics.items()}
