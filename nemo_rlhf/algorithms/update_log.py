"""What the inner epochs of one PPO step come to: per token, over all minibatches."""

from __future__ import annotations

from nemo_rlhf.algorithms.base import Metrics


class UpdateLog:
    """Sums of the updates of one step, and what they come to per token."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._norms: dict[str, list[float]] = {}
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
        self._tokens[role] = self._tokens.get(role, 0) + tokens
        self._norms.setdefault(role, []).append(norm)

    def end_epoch(self) -> None:
        self.last_kl = self._epoch_kl / max(1.0, self._epoch_tokens)
        self._epoch_kl = self._epoch_tokens = 0.0
        self.epochs += 1

    def metrics(self) -> Metrics:
        """A step of critic warm-up leaves the policy as it is: its ratios are 1 and its losses 0."""
        names = ("loss/policy", "ratio/mean", "clipfrac/policy", "approx_kl")
        idle = {"loss/policy": 0.0, "ratio/mean": 1.0, "clipfrac/policy": 0.0, "approx_kl": 0.0}
        policy_tokens = self._tokens.get("policy", 0)
        metrics = {n: self._sums[n] / policy_tokens if policy_tokens else idle[n] for n in names}
        for name in ("loss/value", "clipfrac/value"):
            metrics[name] = self._sums[name] / self._tokens["critic"]
        for role in ("policy", "critic"):
            norms = self._norms.get(role, [0.0])
            metrics[f"grad_norm/{role}"] = sum(norms) / len(norms)
        metrics["ratio/max_deviation"] = self._largest_deviation
        metrics["check/ratio_step0"] = 1.0 + (self._first_deviation or 0.0)
        metrics["epochs"] = float(self.epochs)
        return metrics
