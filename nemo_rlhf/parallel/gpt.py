"""The transformer that every role is made of: megatron's GPTModel, which ends in hidden states instead of logits.

Heads are applied to chosen tokens only (``vocab_logprobs``, ``values``), inside the loss closure: no logits exist for
prompts or padding, and none outlive a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rlhf import device
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.attention import later_queries
from nemo_rlhf.parallel.experts import check_policy, mark_experts
from nemo_rlhf.parallel.gathering import Gathering
from nemo_rlhf.parallel.heads import ILQLHeads, ILQLScores
from nemo_rlhf.parallel.kv_cache import KVCache
from nemo_rlhf.parallel.layers import block_spec
from nemo_rlhf.parallel.libraries import LayerSpec, choose_layer_spec
from nemo_rlhf.parallel.logprobs import fp32_product, vocab_parallel_logprobs
from nemo_rlhf.parallel.settings import Recompute, rotary_frequencies, transformer_config

Role = Literal["policy", "critic", "ilql", "trunk"]
_WITHOUT_OUTPUT = ("critic", "trunk")  # have no output layer, so their embedding is tied to nothing
# what makes a module work on a part of the sequence
_SPLIT = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
VOCABULARY_MULTIPLE = 8  # rows a tensor-parallel rank: what matrix units like


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    multiple = VOCABULARY_MULTIPLE * tensor_parallel
    return math.ceil(vocab_size / multiple) * multiple


class ValueHead(torch.nn.Module):
    """One fp32 number a token, on every tensor-parallel rank alike. Without a bias, as transformers' sequence
    classification models have it, so that it can become one."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden_size, dtype=torch.float32, device=device.torch_device()))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight).squeeze(-1)


class GPT(GPTModel):
    """megatron's GPTModel over this rank's layers; ``forward`` returns hidden states [S, B, H] on every stage, and from
    the last one those of the last places [S - first_needed, B, H] alone, where it may leave out the others.

    ``value_trunk``: a second one without output layer, beside the first in an ILQL model whose heads do not stand on
    the policy's trunk (Snell et al. 2022). Its hidden states travel with the policy's, as [S, B, 2H].
    """

    post_process: bool
    output_layer: Any

    def __init__(
        self, architecture: Architecture, config: TransformerConfig, role: Role, layer_spec: LayerSpec
    ) -> None:
        self.architecture, self.role, self.layer_spec = architecture, role, layer_spec
        self.padded_vocab_size = padded_vocab_size(architecture.vocab_size, config.tensor_model_parallel_size)
        rotary = architecture.position_embedding == "rope"
        super().__init__(
            config,
            block_spec(config, architecture, layer_spec),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=state.is_first_stage(),
            post_process=state.is_last_stage(),
            position_embedding_type="rope" if rotary else "learned_absolute",
            share_embeddings_and_output_weights=architecture.tie_embeddings and role not in _WITHOUT_OUTPUT,
        )
        self.gathering: Gathering | None = None  # of an optimizer that leaves weights to be gathered
        self.has_frozen_layers = False  # on whatever stage: what is stored of an optimizer is then named layer by layer
        self.value_trunk: GPT | None = None
        if role == "ilql" and architecture.ilql_value_trunk:
            self.value_trunk = GPT(architecture, config, "trunk", layer_spec)
        if rotary:
            self.rotary_pos_emb.inv_freq = rotary_frequencies(architecture).to(device.torch_device())
            self.forget_rotary_angles()
        elif self.pre_process:
            self.embedding.position_embeddings.to(config.params_dtype)  # megatron makes it fp32
        # on CUDA the mask would cost flash attention
        trims = layer_spec == "local" and not device.is_cuda()
        self._trims = trims and self.post_process and not config.sequence_parallel
        if self._trims:
            self.decoder.layers[-1].self_attention.trims_queries = True
        if role in _WITHOUT_OUTPUT and self.post_process:
            self.output_layer = None
        if role == "critic" and self.post_process:
            self.value_head = ValueHead(config.hidden_size)
        self.ilql_heads: ILQLHeads | None = None
        if role == "ilql" and self.post_process:
            rows = self.padded_vocab_size // config.tensor_model_parallel_size
            self.ilql_heads = ILQLHeads(config, rows, num_q=architecture.ilql_num_q, width=architecture.ilql_head_width)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: KVCache | None = None,
        packed_seq_params: Any = None,
        first_needed: int = 0,
    ) -> Tensor:
        how = {"inference_context": inference_context, "packed_seq_params": packed_seq_params}
        if first_needed and self._trims:
            attention_mask = later_queries(first_needed, input_ids.size(1), input_ids.device)
        hidden = super().forward(input_ids, position_ids, attention_mask, **how)
        if self.value_trunk is None:
            return hidden
        return torch.cat([hidden, self.value_trunk(input_ids, position_ids, attention_mask, **how)], dim=-1)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """As megatron's; two trunks share what the stage before sent."""
        if self.value_trunk is not None:
            (received,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
            if received is not None:
                input_tensor, values = (part.contiguous() for part in received.chunk(2, dim=-1))
                self.value_trunk.set_input_tensor(values)
        super().set_input_tensor(input_tensor)

    def layers(self) -> list[torch.nn.Module]:
        """This stage's, of both trunks."""
        return [*self.decoder.layers, *(self.value_trunk.layers() if self.value_trunk is not None else ())]

    def settle(self) -> None:
        """Make the weights those after the last optimizer step, on all data-parallel ranks together: to be called
        before weights are read or moved outside of a learning pass."""
        if self.gathering is not None:
            self.gathering.settle()

    @property
    def hidden_width(self) -> int:
        """Last dimension of the hidden states."""
        return self.config.hidden_size * (1 if self.value_trunk is None else 2)

    def _of_trunks(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the output layer reads, and what V and Q heads do."""
        if self.value_trunk is None:
            return hidden, hidden
        policy, values = hidden.chunk(2, dim=-1)
        return policy, values

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if self.pre_process and self.architecture.embedding_scale != 1.0:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            # rounded first, as transformers does it
            scale = torch.tensor(self.architecture.embedding_scale, dtype=decoder_input.dtype).item()
            decoder_input = decoder_input * scale
        return super()._preprocess(input_ids, position_ids, decoder_input, **kwargs)

    def forget_rotary_angles(self) -> None:
        """Empty megatron's cache of rotary angles, if this model has any."""
        if self.architecture.position_embedding == "rope":
            self.rotary_pos_emb.forward.cache_clear()
        if self.value_trunk is not None:
            self.value_trunk.forget_rotary_angles()

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """As megatron's, which takes for granted that the last stage has an output layer."""
        last, self.post_process = self.post_process, self.post_process and self.role not in _WITHOUT_OUTPUT
        try:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.post_process = last

    @torch.no_grad()
    def zero_vocabulary_padding(self) -> None:
        """Rows beyond the vocabulary, which another cut's checkpoint does not have."""
        start, end = self.vocab_range()
        real = min(max(self.architecture.vocab_size - start, 0), end - start)
        if self.pre_process:
            self.embedding.word_embeddings.weight[real:] = 0
        if self.post_process and self.role not in _WITHOUT_OUTPUT:
            self.output_weight()[real:] = 0
        if self.value_trunk is not None:
            self.value_trunk.zero_vocabulary_padding()

    @torch.no_grad()
    def start_value_trunk(self) -> None:
        """As a copy of the policy's."""
        if self.value_trunk is not None:
            for name, parameter in self.value_trunk.named_parameters():
                parameter.copy_(self.get_parameter(name))

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer [padded vocabulary / TP, H]. Last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def vocab_range(self) -> tuple[int, int]:
        """First and one past the last of this rank's rows of the padded vocabulary."""
        rows = self.padded_vocab_size // state.tp_size()
        return state.tp_rank() * rows, (state.tp_rank() + 1) * rows

    def output_logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, padded vocabulary / TP] of hidden states [N, H], fp32, without gradient to other ranks: for
        sampling."""
        return fp32_product(self._of_trunks(hidden)[0], self.output_weight())

    def guided_logits(self, hidden: Tensor, beta: float, adv_clip: float | None) -> Tensor:
        """The same plus ``beta * (min target Q - V)``, fp32: log-probabilities that ILQL's heads guide (Snell et
        al. 2022, section 4.2), up to a constant of each row."""
        assert self.ilql_heads is not None
        advantages = self.ilql_heads.advantages(self._of_trunks(hidden)[1])
        if adv_clip is not None:
            advantages = advantages.clamp(-adv_clip, adv_clip)
        return self.output_logits(hidden) + beta * advantages

    def vocab_logprobs(
        self, hidden: Tensor, tokens: Tensor, selected: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of ``tokens`` and entropies of their distributions at the selected places.

        Args:
            hidden: [S, B, H] of the last stage ([S / TP, B, H] under sequence parallelism), or of some of the last
                places before that of the last token.
            tokens: [B, S].
            selected: [N] indices b * S + t, t >= 1, of the tokens asked for.
            temperature: divides the logits, as in sampling.

        Returns:
            (logprobs [N], entropies [N]), fp32, the same on every tensor-parallel rank.
        """
        group = state.tp_group()
        hidden, _ = self._of_trunks(hidden)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        return vocab_parallel_logprobs(
            _before(hidden, tokens, selected),
            self.output_weight(),
            tokens.reshape(-1)[selected],
            vocab_size=self.architecture.vocab_size,
            temperature=temperature,
        )

    def values(self, hidden: Tensor, tokens: Tensor, selected: Tensor) -> Tensor:
        """Values [N] fp32 of the states before the selected tokens; arguments as of ``vocab_logprobs``."""
        return self.value_head(_before(self._gathered(hidden), tokens, selected))

    def scores(self, hidden: Tensor, tokens: Tensor, selected: Tensor) -> Tensor:
        """Values [N] fp32 of the states that the selected tokens lead to: of whole texts, where they are the last."""
        return self.value_head(_at(self._gathered(hidden), tokens, selected))

    def ilql_scores(self, hidden: Tensor, tokens: Tensor, selected: Tensor, detach: bool) -> ILQLScores:
        """What ILQL's loss needs of the selected tokens; arguments as of ``vocab_logprobs``. ``detach``: what the heads
        say has no gradient for the trunk."""
        assert self.ilql_heads is not None
        logprobs, _ = self.vocab_logprobs(hidden, tokens, selected)
        _, states = self._of_trunks(hidden)
        states = _before(self._gathered(states.detach() if detach else states), tokens, selected)
        return self.ilql_heads.scores(states, tokens.reshape(-1)[selected], logprobs, self.architecture.vocab_size)

    def _gathered(self, hidden: Tensor) -> Tensor:
        """Hidden states of the whole sequence, for heads that every tensor-parallel rank computes alike."""
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=state.tp_group())


def _before(hidden: Tensor, tokens: Tensor, selected: Tensor) -> Tensor:
    """Rows [N, H] that predict the selected tokens: those one place earlier. Where hidden is not of all places, it ends
    one before the last, which predicts nothing (see ``schedule.Microbatch``)."""
    length = tokens.size(1)
    end = length if hidden.size(0) == length else length - 1
    return _rows(hidden, selected // length, selected % length - 1, end)


def _at(hidden: Tensor, tokens: Tensor, selected: Tensor) -> Tensor:
    """Rows [N, H] of the selected tokens themselves."""
    length = tokens.size(1)
    return _rows(hidden, selected // length, selected % length, length)


def _rows(hidden: Tensor, row: Tensor, place: Tensor, end: int) -> Tensor:
    """Of hidden [S, B, H], the states of the places up to ``end``."""
    return hidden.reshape(-1, hidden.size(-1))[(place - end + hidden.size(0)) * hidden.size(1) + row]


def build_gpt(
    architecture: Architecture,
    *,
    role: Role = "policy",
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: Recompute | None = None,
    layer_spec: str = "auto",
) -> GPT:
    """This rank's part of a model, its weights yet to be loaded, on this rank's device.

    ``layer_spec``: see ``libraries.choose_layer_spec``.

    Raises:
        ValueError: the model cannot be cut as the process groups ask, or built of the modules that are asked for.
    """
    if role != "critic":
        check_policy(architecture)
    spec = choose_layer_spec(layer_spec)
    config = transformer_config(
        architecture, dtype=dtype, sequence_parallel=sequence_parallel, recompute=recompute, layer_spec=spec
    )
    model = GPT(architecture, config, role, spec).to(device.torch_device())
    for module in model.modules():  # megatron before 0.18 marks split weights only where it also initialises them
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            weight, split = module.weight, 1 if isinstance(module, RowParallelLinear) else 0
            if weight is not None and not hasattr(weight, "partition_dim"):
                set_tensor_model_parallel_attributes(weight, True, split, 1)
    mark_experts(model)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # a weight that nobody loads must not pass for one
    return model


@contextmanager
def sequence_parallel_off(model: GPT) -> Iterator[None]:
    """Generation works on single tokens, which cannot be split along the sequence. megatron's own switch remembers a
    model's modules by its id, which another model may get when it is gone."""
    switches = [
        (owner, name) for owner in (model.config, *model.modules()) for name in _SPLIT if owner.__dict__.get(name)
    ]
    for owner, name in switches:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in switches:
            setattr(owner, name, True)
