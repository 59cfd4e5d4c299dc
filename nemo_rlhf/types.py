"""The records that travel between the stages of training: one small frozen dataclass an arrow.

Per-token tensors are aligned to the token itself: ``logprobs[b, t]`` is the log-probability of
``tokens[b, t]`` given ``tokens[b, :t]``, and ``values[b, t]`` the value of the state before it. Position 0 has
no predecessor and is never selected by a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# What ended a response: "eos"; "eos:" with the name of another token that ends the model's responses; "stop:" with the
# string, or the token, of the configuration that did; or "length", its limit.
FinishReason = str


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt. ``metadata`` holds every other field of its record; rewards receive it. ``messages``: the
    chat of which ``text`` is what the template made; None: it was text."""

    token_ids: tuple[int, ...]
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Request:
    """One continuation to sample. ``sample_index`` keys its noise, so it is unique over a whole run."""

    prompt: Prompt
    sample_index: int


@dataclass(frozen=True)
class Sample:
    """One prompt with the continuation that was generated for it.

    ``response_ids`` are the sampled tokens, EOS included when it was drawn; text is never tokenised again.
    ``text`` is the response as people read it: without special tokens, cut before what ended it.
    ``action_mask``: in an episode of several turns, which of ``response_ids`` were sampled, for the environment's words
    lie between them; None: all of them.
    """

    prompt: Prompt
    sample_index: int
    response_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    action_mask: tuple[bool, ...] | None = None

    @property
    def num_sampled(self) -> int:
        return len(self.response_ids) if self.action_mask is None else sum(self.action_mask)


@dataclass(frozen=True)
class Rollout:
    """Samples of this data-parallel rank, in the order of their requests."""

    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Scored:
    """A rollout with its rewards. ``scores``: [samples] fp32, one scalar a sample (0 where rewards are dense).
    ``token_rewards``: [samples] of fp32 [response length], or None where every reward is a scalar. ``by_source``:
    unweighted totals [samples] of each named source of rewards; ``fallbacks``: how many samples got a source's fallback
    score, where it has one."""

    rollout: Rollout
    scores: torch.Tensor
    token_rewards: tuple[torch.Tensor, ...] | None = None
    by_source: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Experience:
    """What PPO learns from. All tensors [samples, sequence], right-padded, zero where ``response_mask`` is False.

    ``tokens`` int64; ``response_mask`` bool, True on sampled tokens (EOS included); ``loss_mask`` bool, those of them
    that are learned from; ``lengths`` int64 [samples], prompt and response together; the others fp32: ``logprobs`` and
    ``ref_logprobs`` of the sampling policy and the reference, ``advantages`` (whitened if configured, zero outside
    ``loss_mask``), and, where there is a critic, its ``values`` and the ``returns`` that it learns.
    """

    tokens: torch.Tensor
    response_mask: torch.Tensor
    loss_mask: torch.Tensor
    lengths: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None


@dataclass(frozen=True)
class Text:
    """One tokenised text for supervised training; ``loss_mask[t]`` says whether token t is learned."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True)
class Dialogue:
    """One tokenised dialogue for offline reinforcement learning. ``action_mask[t]``: token t is the agent's;
    ``rewards[t]``: what was given for it, 0 for tokens that are no actions; ``done``: it came to its end, rather than
    being cut off, so that nothing follows its last action."""

    token_ids: tuple[int, ...]
    action_mask: tuple[bool, ...]
    rewards: tuple[float, ...]
    done: bool = True


@dataclass(frozen=True)
class Episode:
    """One dialogue with an environment. ``turns``: observation, action, observation, action, ..., as text; actions with
    the special tokens and stop strings that ended them, so that training on them teaches how a turn ends.
    ``token_ids`` and ``action_mask`` (token t is the agent's) are all of it as it was sampled; ``rewards``: one for
    each action; ``token_rewards``: the same on the actions' last tokens, 0 elsewhere; ``done``: the environment ended
    it, rather than a limit on turns or length."""

    turns: tuple[str, ...]
    token_ids: tuple[int, ...]
    action_mask: tuple[bool, ...]
    rewards: tuple[float, ...]
    token_rewards: tuple[float, ...]
    done: bool

    @property
    def total_reward(self) -> float:
        return sum(self.rewards)


@dataclass(frozen=True)
class Pair:
    """Two tokenised texts of which people preferred the first, ``margin`` by how much at least."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class ScoredText:
    """One tokenised text, prompt and response, with the score that somebody gave it."""

    token_ids: tuple[int, ...]
    score: float
