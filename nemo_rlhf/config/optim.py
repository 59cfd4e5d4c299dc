"""The optimizer's keys, which every model that learns has. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SchedConfig:
    name: str = "constant"  # after warm-up: "constant" | "cosine" | "linear" (down to min_lr at max_steps)
    warmup_steps: int = 0  # optimizer steps in which the learning rate rises linearly from 0
    min_lr: float = 0.0  # where cosine and linear end


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = 1e-6  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of the first and second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled; not on norms and biases
    clip_grad: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    sched: SchedConfig = field(default_factory=SchedConfig)
