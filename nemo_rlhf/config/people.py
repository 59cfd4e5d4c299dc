"""Keys of ``ppo.feedback``: people compare the policy's answers while it trains. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_rlhf.config.optim import OptimConfig


@dataclass
class FeedbackConfig:
    """The reward model in the job learns from what people prefer, through the preference store alone."""

    store: str | None = None  # sqlite:///FILE or postgresql://...; null: no people
    run: str | None = None  # the run's name in the store; null: the run directory
    every_n_steps: int = 10  # steps between rounds of new pairs for people
    num_pairs: int = 32  # pairs of a round
    candidates: int = 4  # pairs that are sampled for each one that people get
    select: str = "uncertainty"  # of these: "uncertainty" those that the reward model can tell least | "random"
    source: str | None = None  # the name in reward.sources of the reward model that learns; null: the only one
    held_out: float = 0.2  # share of prompts whose comparisons judge a refresh and are never learned
    min_new: int = 16  # new comparisons that start a refresh
    min_held_out: int = 8  # held-out ones that it takes, too
    refresh_steps: int = 8  # optimizer steps of a refresh
    batch_size: int = 16  # comparisons of each, over all data-parallel ranks
    replay: float = 0.5  # share of a batch that comes from earlier refreshes
    wait_for: int = 0  # new comparisons to wait for before the next round; 0: never wait
    wait_timeout_s: float = 600.0  # seconds after which training goes on all the same
    answers_wanted: int = 1  # annotators by pair
    undo_s: float = 60.0  # how long an answer can be taken back; the run sees it afterwards
    guidelines: str | None = None  # text file that the page shows on top; null: as the store has it
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))  # anew in each refresh
