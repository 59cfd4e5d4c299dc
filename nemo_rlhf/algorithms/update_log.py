"""What the inner epochs of one PPO step come to: per token, over all minibatches."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_rlhf.algorithms.base import Metrics

# What a role's metrics are in a step in which it learns nothing: critic warm-up, or nothing but truncated responses.
IDLE: dict[str, Metrics] = {
    "policy": {"loss/policy": 0.0, "ratio/mean": 1.0, "clipfrac/policy": 0.0, "approx_kl": 0.0},
    "critic": {"loss/value": 0.0, "clipfrac/value": 0.0},
}


class UpdateLog:
    """Sums of the updates of one step, and what they come to per token. ``idle``: of each role that there is, the
    metrics that it has, with their values where nothing is learned."""

    def __init__(self, idle: Mapping[str, Metrics]) -> None:
        self._idle = idle
        self._sums: dict[str, float] = {}
        self._tokens = dict.fromkeys(idle, 0)
        self._norms: dict[str, list[float]] = {role: [] for role in idle}
        self._epoch_kl = self._epoch_tokens = 0.0
        self._first_deviation: float | None = None
        self._largest_deviation = 0.0
        self.last_kl = 0.0
        self.epochs = 0

    def add(self, role: str, sums: dict[str, float], norm: float, tokens: int) -> None:
        """One optimizer step of ``role``: what its loss summed up, and the norm of its gradient."""
        deviation = sums.pop("ratio/max_deviation", None)
        if deviation is not None:
            self._largest_deviation = max(self._largest_deviation, deviation)
            if self._first_deviation is None:
                self._first_deviation = deviation
            self._epoch_kl += sums["approx_kl"]
            self._epoch_tokens += tokens
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._tokens[role] += tokens
        self._norms[role].append(norm)

    def end_epoch(self) -> None:
        self.last_kl = self._epoch_kl / max(1.0, self._epoch_tokens)
        self._epoch_kl = self._epoch_tokens = 0.0
        self.epochs += 1

    def metrics(self) -> Metrics:
        metrics: Metrics = {}
        for role, idle in self._idle.items():
            tokens, norms = self._tokens[role], self._norms[role]
            metrics |= {name: self._sums[name] / tokens for name in idle} if tokens else idle
            metrics[f"grad_norm/{role}"] = sum(norms) / max(1, len(norms))
        metrics["ratio/max_deviation"] = self._largest_deviation
        metrics["check/ratio_step0"] = 1.0 + (self._first_deviation or 0.0)
        metrics["epochs"] = float(self.epochs)
        return metrics
