"""The one way tokens go through a model: microbatches, megatron's pipeline schedules, and one forward closure.

A batch is cut into microbatches of rows of like length, each padded to its own longest row. What is computed from the
hidden states of a microbatch is a function of the caller: a loss to learn from, or per-token numbers to keep. Either
finds the model in training mode, so that the very same kernels compute both: nothing here drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_rlhf import device
from nemo_rlhf.parallel import shapes, state
from nemo_rlhf.parallel.experts import goes_in_step
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.packing import fill_rows, join_row, packed_texts


@dataclass(frozen=True)
class Microbatch:
    """Rows that go through the model together.

    ``tokens`` [b, s]; ``selected`` [N] indices into ``tokens`` of the tokens under the mask; ``fields`` [N] each, what
    the batch says of those tokens; ``places`` [N] (host) their indices in the whole batch [B, S]; ``bounds`` (host)
    says where the texts of a single row begin and end (see ``packing.join_row``), None where a row is a text; heads
    read hidden states from the place ``first_needed`` on, and not that of the last place where ``drops_last``;
    ``hidden`` are those states and ``said`` what a head said of them, with their graph, where they were computed
    before.
    """

    tokens: Tensor
    selected: Tensor
    fields: Mapping[str, Tensor]
    places: Tensor
    bounds: Tensor | None = None
    first_needed: int = 0
    drops_last: bool = False
    hidden: Tensor | None = None
    said: tuple[Tensor, ...] | None = None


Loss = Callable[[GPT, Tensor, Microbatch], tuple[Tensor, dict[str, Tensor]]]
Head = Callable[[GPT, Tensor, Microbatch], tuple[Tensor, ...]]
Compute = Callable[[GPT, Tensor, Microbatch], dict[str, Tensor]]


def cut(
    tokens: Tensor,
    mask: Tensor,
    lengths: Tensor,
    rows: Sequence[int],
    *,
    micro_batch_size: int,
    limit: int,
    fields: Mapping[str, Tensor] | None = None,
    multiple_of: int = 1,
    together: int = 1,
    reads: Literal["before", "at"] = "before",
) -> list[Microbatch]:
    """Microbatches of the given rows of a batch of host tensors [B, S], moved to this rank's device.

    Rows are grouped by length, so little is computed on padding. ``limit``: tokens that the model has positions for;
    on GPUs lengths are rounded up to few, but not beyond (``shapes.padded_length``). ``multiple_of`` rounds the padded
    length up (sequence parallelism splits it, and needs to be told: otherwise the last place is left out).
    ``together``: so many rows that follow each other in the batch stay side by side in one microbatch (the two of a
    pair); ``rows`` names the first of each, and ``micro_batch_size`` counts groups.
    ``reads``: whether heads want the states before the selected tokens or at them.
    """
    earlier = 1 if reads == "before" else 0
    groups = [range(row, row + together) for row in rows]
    groups.sort(key=lambda group: max(int(lengths[row]) for row in group), reverse=True)
    microbatches = []
    for start in range(0, len(groups), micro_batch_size):
        chosen = torch.tensor([row for group in groups[start : start + micro_batch_size] for row in group])
        length = shapes.padded_length(int(lengths[chosen].max()), limit, multiple_of)
        part_tokens = _columns(tokens[chosen], length)
        row, place = _columns(mask[chosen], length).nonzero(as_tuple=True)
        places = chosen[row] * tokens.size(1) + place
        to = device.torch_device()
        microbatches.append(
            Microbatch(
                tokens=part_tokens.to(to),
                selected=(row * length + place).to(to),
                fields={name: field.reshape(-1)[places].to(to) for name, field in (fields or {}).items()},
                places=places,
                first_needed=max(0, int(place.min()) - earlier) if len(place) else 0,
                drops_last=bool(earlier) and length > 1 and multiple_of == 1 and not shapes.pads(),
            )
        )
    return microbatches


def pack(
    tokens: Tensor,
    mask: Tensor,
    lengths: Tensor,
    rows: Sequence[int],
    *,
    max_tokens: int,
    share: tuple[int, int] = (0, 1),
    multiple_of: int = 1,
) -> list[Microbatch]:
    """As ``cut``, of one row each, in which as many texts stand one behind the other as ``max_tokens`` hold.

    ``share``: (index, number) of this replica among those that have such a row each.
    """
    replica, num_replicas = share
    filled = fill_rows([int(lengths[row]) for row in rows], max_tokens, num_replicas)
    to = device.torch_device()
    microbatches = []
    for texts in filled[replica::num_replicas]:
        joined, places, bounds = join_row(tokens, lengths, [rows[text] for text in texts], multiple_of)
        selected = mask.reshape(-1)[places].nonzero().squeeze(1)
        microbatches.append(Microbatch(joined.to(to), selected.to(to), {}, places[selected], bounds))
    return microbatches


def _columns(matrix: Tensor, length: int) -> Tensor:
    """The first ``length`` columns, zero-filled where there are fewer."""
    return torch.nn.functional.pad(matrix[:, :length], (0, max(0, length - matrix.size(1))))


def through(model: Any, microbatch: Microbatch) -> Tensor:
    """Hidden states of a microbatch [S, B, H]; on the last stage, of the places that are needed."""
    if microbatch.hidden is not None:
        return microbatch.hidden
    if microbatch.bounds is not None:
        packing = packed_texts(microbatch.bounds)
        return model(microbatch.tokens, packing.positions, packed_seq_params=packing)
    tokens = microbatch.tokens[:, :-1] if microbatch.drops_last else microbatch.tokens
    positions = torch.arange(tokens.size(1), device=tokens.device)[None].expand_as(tokens)
    return model(tokens, positions, first_needed=microbatch.first_needed)


def _run(model: Any, microbatches: Sequence[Microbatch], loss: Loss, forward_only: bool) -> list[dict[str, Tensor]]:
    gpt: GPT = model if isinstance(model, GPT) else model.module

    def forward_step(iterator: Any, wrapped: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        microbatch = next(iterator)
        hidden = through(wrapped, microbatch)
        return hidden, lambda output: loss(gpt, output, microbatch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=max(m.tokens.size(1) for m in microbatches),
        micro_batch_size=microbatches[0].tokens.size(0),
        forward_only=forward_only,
    )


def forward_backward(model: Any, microbatches: Sequence[Microbatch], loss: Loss) -> dict[str, float]:
    """Accumulate the gradient of the summed loss, over all microbatches and data-parallel ranks, in ``model``.

    Args:
        model: a GPT wrapped by megatron's DistributedDataParallel.
        loss: returns a microbatch's share of the loss, already divided by the *global* number of valid tokens, so
            that the gradient does not depend on how the batch was cut; and sums to log.

    Returns:
        The logged sums over microbatches and data-parallel ranks (the maximum for names that end in
        ``max_deviation``), the same on every rank.
    """
    microbatches = _in_step(model.module, microbatches) or [_nothing(model.module)]  # every replica has a gradient
    # megatron divides the loss by the number of microbatches and its gradient by the data-parallel size: undo both
    scale = len(microbatches) * state.dp_size()

    def scaled(gpt: GPT, hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        value, sums = loss(gpt, hidden, microbatch)
        return value * scale, sums

    gathering = model.module.gathering
    with nullcontext() if gathering is None else gathering.overlapped():
        outputs = _run(model, microbatches, scaled, forward_only=False)
    return reduce_sums(outputs)


@torch.no_grad()
def forward(model: Any, microbatches: Sequence[Microbatch], compute: Compute, like: Tensor) -> dict[str, Tensor]:
    """Per-token results of a forward pass, put back in their places, on every pipeline stage.

    Args:
        compute: returns fp32 [N] tensors, one number for each selected token of the microbatch.
        like: [B, S], the shape of the whole batch.

    Returns:
        Host tensors [B, S] fp32, zero where nothing was selected; none where there was no microbatch.
    """
    microbatches = _in_step(model, microbatches)
    if not microbatches:
        return {}

    def no_loss(gpt: GPT, hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Any]:
        return hidden.new_zeros(()), (microbatch.places, compute(gpt, hidden, microbatch))

    outputs: list[Any] = _run(model, microbatches, no_loss, forward_only=True)
    names = _share_from_last_stage(sorted(outputs[0][1]) if outputs else None)
    results = {}
    for name in names:
        whole = torch.zeros(like.numel(), dtype=torch.float32)
        for places, result in outputs:
            whole[places] = result[name].cpu()
        results[name] = state.from_last_stage(whole).view(like.shape)
    return results


@torch.no_grad()
def forward_sums(model: GPT, microbatches: Sequence[Microbatch], loss: Loss) -> dict[str, float]:
    """What ``loss`` logs of this replica's microbatches, summed, on every pipeline stage; nothing is learned."""
    microbatches = _in_step(model, microbatches)
    if not microbatches:
        return {}
    outputs = _run(model, microbatches, loss, forward_only=True)
    names = sorted(outputs[0]) if outputs else []
    return _share_from_last_stage({name: sum(float(output[name]) for output in outputs) for name in names})


def _in_step(gpt: GPT, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
    """``microbatches``, and empty ones where other replicas that need this one's experts have more."""
    if not goes_in_step(gpt):
        return list(microbatches)
    missing = state.max_over_shared_experts(len(microbatches)) - len(microbatches)
    return [*microbatches, *[_nothing(gpt)] * missing]


def _nothing(gpt: GPT) -> Microbatch:
    """A microbatch without a selected token."""
    length = state.tp_size() if gpt.config.sequence_parallel else 1
    nothing = torch.empty(0, dtype=torch.long, device="cpu")
    tokens = torch.zeros(1, length, dtype=torch.long, device=device.torch_device())
    return Microbatch(tokens, nothing.to(tokens.device), {}, nothing)


def reduce_sums(outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Sum logged numbers of the last stage over microbatches and data-parallel ranks; share them with all stages."""
    reduced: dict[str, float] | None = None
    if outputs:
        names = sorted(outputs[0])
        stacked = torch.stack([torch.stack([output[name].double() for name in names]) for output in outputs]).cpu()
        sums = state.sum_over_data_parallel(stacked.sum(0))
        maxima = state.max_over_data_parallel(stacked.amax(0))
        reduced = {
            name: float(maxima[i] if name.endswith("max_deviation") else sums[i]) for i, name in enumerate(names)
        }
    return _share_from_last_stage(reduced)


def _share_from_last_stage(value: Any) -> Any:
    if state.pp_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, group_src=state.pp_size() - 1, group=state.control_group())
    return box[0]
