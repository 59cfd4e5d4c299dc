"""Generation on the very model that is trained: its weights, its layers, its tensor- and pipeline-parallel cut.

The slots are divided into as many groups as there are pipeline stages. Every stage runs the same loop over pieces of
work, one group after the other, so that while stage 1 works on group 0, stage 0 works on group 1. Hidden states go from
stage to stage; the last stage draws the tokens and tells the others over the control group, on the host: two
communicators, so that traffic in opposite directions cannot wait for itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rlhf.generation.ending import Ending
from nemo_rlhf.generation.sampling import SamplingParams, sample_tokens
from nemo_rlhf.generation.slots import GoOn, Scheduler, Work
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.experts import goes_in_step
from nemo_rlhf.parallel.gpt import GPT, sequence_parallel_off
from nemo_rlhf.parallel.kv_cache import KVCache
from nemo_rlhf.parallel.shapes import padded_length, padded_rows
from nemo_rlhf.types import Request, Sample

CACHE_MULTIPLE = 64  # the cache's length is a multiple of it


class Engine:
    """Samples continuations with a fixed number of slots, refilled from the queue as sequences finish.

    Args:
        model: this rank's part of a policy.
        tokenizer: transformers tokenizer, or anything with its ``decode``, ``eos_token_id`` and ``all_special_ids``.
        num_slots: sequences in the key-value cache of this model-parallel group at once.
        max_sequence_length: of prompt and response together.
        logit_mask: [vocabulary, vocabulary] bool, whether a token (second index) may follow the one before it.

    Raises:
        ValueError: ``num_slots`` is not positive, ``max_sequence_length`` is beyond what the model was made for, or
            ``logit_mask`` is of another form or lets nothing follow some token.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Any,
        *,
        num_slots: int,
        max_sequence_length: int,
        logit_mask: Tensor | None = None,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"generation.num_slots={num_slots}: at least one slot is needed.")
        longest = model.architecture.max_position_embeddings
        if max_sequence_length > longest:
            raise ValueError(
                f"Sequences of {max_sequence_length} tokens are longer than the model's "
                f"max_position_embeddings={longest}: shorten prompts or generation.max_new_tokens."
            )
        self._model = model
        self._tokenizer = tokenizer
        self._num_slots = num_slots
        self._max_sequence_length = max_sequence_length
        self._forbidden = None if logit_mask is None else _forbidden(model, logit_mask)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, go_on: GoOn | None = None
    ) -> tuple[Sample, ...]:
        """One sample a request, in their order. All ranks of a model-parallel group call this with the same arguments
        and get the same samples; requests of other data-parallel ranks are none of its business, but where replicas
        hold each other's experts all of them have to call it, also without requests.

        ``go_on`` makes sequences of several turns: called with those that have ended just now, on every rank of the
        group with the same ones, it gives the tokens (the same on every rank) after which each has its next turn, or
        None. What it gives has to leave room for ``max_new_tokens``. The samples are then the last turns.

        Raises:
            ValueError: a prompt is empty or does not fit with its response, or the model's logits are NaN; or what
                ``go_on`` raises.
        """
        self._model.settle()
        try:
            self.check(requests, sampling)
        except ValueError:
            _agree(self._model, _FAILED)
            raise
        if not requests and not goes_in_step(self._model):
            return ()
        scheduler = Scheduler(requests, Ending(self._tokenizer, sampling), self._num_slots, state.pp_size(), go_on)
        longest = max((len(request.prompt.token_ids) for request in requests), default=0) + sampling.max_new_tokens
        if go_on is not None:
            longest = self._max_sequence_length
        length = -(-longest // CACHE_MULTIPLE) * CACHE_MULTIPLE
        with _without_autograd(self._model), _evaluating(self._model), sequence_parallel_off(self._model):
            _run(scheduler, _Stage(self._model, sampling, scheduler.group_sizes, length, self._forbidden))
        return scheduler.samples()

    def check(self, requests: Sequence[Request], sampling: SamplingParams) -> None:
        """Raises ValueError when a prompt is empty or does not fit with its response, or guidance is asked of a model
        without Q heads."""
        if sampling.beta and self._model.role != "ilql":
            raise ValueError(f"generation.beta={sampling.beta} needs an ILQL model's Q heads: name one, or leave it 0.")
        for request in requests:
            length = len(request.prompt.token_ids)
            if not length:
                raise ValueError(f"The prompt of sample {request.sample_index} has no tokens: give it at least one.")
            if length + sampling.max_new_tokens > self._max_sequence_length:
                text = " ".join(request.prompt.text.split())
                raise ValueError(
                    f'The prompt "{text[:40]}{"..." * (len(text) > 40)}" has {length} tokens, which with '
                    f"generation.max_new_tokens={sampling.max_new_tokens} is more than the {self._max_sequence_length} "
                    "that a sequence may have: shorten the prompt or ask for fewer tokens."
                )


def _forbidden(model: GPT, logit_mask: Tensor) -> Tensor:
    """True [vocabulary, padded vocabulary / TP] where this rank's token may not follow the one before it."""
    size = model.architecture.vocab_size
    if logit_mask.dtype != torch.bool or logit_mask.shape != (size, size):
        raise ValueError(
            f"logit_mask is {logit_mask.dtype} {list(logit_mask.shape)}, and must be bool [{size}, {size}]: for each "
            "token, which ones may follow it."
        )
    if not (allowed := logit_mask.any(1)).all():
        raise ValueError(f"logit_mask lets nothing follow token {int(allowed.int().argmin())}: allow it EOS at least.")
    start, end = model.vocab_range()
    forbidden = torch.ones(size, end - start, dtype=torch.bool, device=next(model.parameters()).device)
    mine = ~logit_mask[:, start:end]
    forbidden[:, : mine.size(1)] = mine
    return forbidden


# What a replica says of its next step to those that hold some of its experts; what is done is the most of all.
_FINISHED, _WAITING, _WORKING, _FAILED = range(4)


def _agree(model: GPT, step: int) -> int:
    return state.max_over_shared_experts(step) if goes_in_step(model) else step


def _run(scheduler: Scheduler, stage: _Stage) -> None:
    """Every stage sees the same tokens at the same point of this loop, so their schedulers never differ.

    Replicas that hold each other's experts make every forward pass together: where one has nothing to do, it makes an
    idle one.
    """
    under_way: list[tuple[Work, _Tokens] | None] = [None] * len(scheduler.group_sizes)
    while True:
        for group in range(len(under_way)):
            if (pending := under_way[group]) is not None:
                work, tokens = pending
                under_way[group] = None
                try:
                    moves = scheduler.record(group, work, tokens.get())
                except ValueError:
                    stage.abandon(under_way)
                    stage.agree(_FAILED)
                    raise
                stage.move(group, moves)
            next_work = scheduler.next_work(group)
            step = stage.agree(_FINISHED if scheduler.finished else _WORKING if next_work else _WAITING)
            if step == _FAILED:
                stage.abandon(under_way)
                raise ValueError("Generation failed in another replica, whose experts are needed here.")
            if step == _FINISHED:
                stage.finish()
                return
            if next_work is not None:
                under_way[group] = (next_work, stage.start(group, next_work))
            elif step == _WORKING:
                stage.idle()


@dataclass
class _Tokens:
    """Sampled tokens, here already or on their way from the last stage."""

    ids: Tensor  # int64, on the host
    arrival: Any = None

    def get(self) -> list[int]:
        if self.arrival is not None:
            self.arrival.wait()
        return self.ids.tolist()


class _Stage:
    """This rank's pipeline stage: runs pieces of work, passes hidden states on, draws the tokens if it is the last."""

    def __init__(
        self,
        model: GPT,
        sampling: SamplingParams,
        group_sizes: Sequence[int],
        max_length: int,
        forbidden: Tensor | None,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._forbidden = forbidden
        self._max_length = max_length
        self._caches = [KVCache(size, max_length) for size in group_sizes]
        self._idle_cache = KVCache(1, CACHE_MULTIPLE)
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._device = next(model.parameters()).device

    def start(self, group: int, work: Work) -> _Tokens:
        """One forward pass. Its tokens have to be fetched before the same group's next one."""
        inputs, positions, last = self._inputs(work)
        cache = self._caches[group]
        if work.prefill:
            cache.prefill(work.first_slot, len(work.rows))
        elif work.append:
            lengths = [len(row.new_ids) for row in work.rows]
            cache.append(work.slots, [row.cached for row in work.rows], lengths, self._device)
        else:
            cache.decode(positions[:, 0], max(row.length for row in work.rows) - 1)
        if not state.is_first_stage():
            self._model.set_input_tensor(self._receive(inputs.size(1), inputs.size(0)))
        first_needed = min(len(row.new_ids) for row in work.rows) - 1 if work.prefill else 0
        hidden = self._model(inputs, positions, inference_context=cache, first_needed=first_needed)
        if state.is_last_stage():
            last -= inputs.size(1) - hidden.size(0)  # of the places that the model answers for
            drawn = self._draw(hidden[last, torch.arange(len(work.rows), device=self._device)], work)
            return self._announce(drawn.cpu())
        self._send(hidden)
        return self._expect(len(work.rows))

    def idle(self) -> None:
        """A forward pass of a token that is nobody's, for the sake of replicas that need this one's experts."""
        self._idle_cache.prefill(0, 1)
        token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        if not state.is_first_stage():
            config = self._model.config
            self._model.set_input_tensor(
                torch.zeros(1, 1, self._model.hidden_width, dtype=config.pipeline_dtype, device=self._device)
            )
        self._model(token, token, inference_context=self._idle_cache)

    def agree(self, step: int) -> int:
        return _agree(self._model, step)

    def abandon(self, under_way: Sequence[tuple[Work, _Tokens] | None]) -> None:
        """Every stage stops here: let arrive what is on its way, or a slower one would wait for ever."""
        for pending in filter(None, under_way):
            pending[1].get()
        self.finish()

    def move(self, group: int, moves: Sequence[tuple[int, int]]) -> None:
        self._caches[group].move(moves)

    def finish(self) -> None:
        while self._sending:
            self._sending.popleft()[0].wait()

    def _inputs(self, work: Work) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and positions [n, S], and where each row's last token is [n]."""
        if not (work.prefill or work.append):
            pairs = [(row.response[-1], row.length - 1) for row in work.rows]
            tokens, positions = torch.tensor(pairs, device=self._device).t().unsqueeze(-1)
            return tokens, positions, torch.zeros_like(positions[:, 0])
        new = [row.new_ids for row in work.rows]
        longest = max(map(len, new))
        if work.prefill:
            longest = padded_length(longest, self._max_length)
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in new]
        # a later turn's padding stays within the positions that there are
        places = [[min(row.cached + place, row.length - 1) for place in range(longest)] for row in work.rows]
        if work.prefill:  # rows that are nobody's, where shapes are to be few
            nobody = [[0] * longest] * (padded_rows(len(new)) - len(new))
            padded, places = padded + nobody, places + nobody
        tokens, positions = torch.tensor([padded, places], device=self._device)
        return tokens, positions, torch.tensor([len(ids) - 1 for ids in new], device=self._device)

    def _draw(self, hidden: Tensor, work: Work) -> Tensor:
        beta, model = self._sampling.beta, self._model
        logits = model.guided_logits(hidden, beta, self._sampling.adv_clip) if beta else model.output_logits(hidden)
        if self._forbidden is not None:
            before = [row.response[-1] if row.response else row.context[-1] for row in work.rows]
            logits = logits.masked_fill(self._forbidden[torch.tensor(before, device=self._device)], -torch.inf)
        names = [(row.request.sample_index, row.length) for row in work.rows]
        sample_index, position = torch.tensor(names, device=self._device).t()
        return sample_tokens(
            logits,
            vocab_start=self._model.vocab_range()[0],
            vocab_size=self._model.architecture.vocab_size,
            sampling=self._sampling,
            sample_index=sample_index,
            position=position,
            group=state.tp_group(),
        )

    # Pipeline traffic. Hidden states forwards on the pipeline group, tokens backwards on the control group.

    def _receive(self, length: int, rows: int) -> Tensor:
        config = self._model.config
        hidden = torch.empty(length, rows, self._model.hidden_width, dtype=config.pipeline_dtype, device=self._device)
        dist.recv(hidden, group=state.pp_group(), group_src=state.pp_rank() - 1)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        self._sending.append((dist.isend(hidden, group=state.pp_group(), group_dst=state.pp_rank() + 1), hidden))
        while len(self._sending) > len(self._caches):
            self._sending.popleft()[0].wait()

    def _announce(self, ids: Tensor) -> _Tokens:
        return _Tokens(ids, self._broadcast(ids) if state.pp_size() > 1 else None)

    def _expect(self, rows: int) -> _Tokens:
        ids = torch.empty(rows, dtype=torch.long, device="cpu")
        return _Tokens(ids, self._broadcast(ids))

    def _broadcast(self, ids: Tensor) -> Any:
        return dist.broadcast(ids, group_src=state.pp_size() - 1, group=state.control_group(), async_op=True)


@contextmanager
def _without_autograd(model: GPT) -> Iterator[None]:
    # inference mode is cheaper, but Transformer Engine keeps tensors between calls, which training must be able to save
    with torch.inference_mode(model.layer_spec == "local"), torch.no_grad():
        yield


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        # megatron keeps rotary angles too; those of inference mode must not meet autograd
        model.forget_rotary_angles()
