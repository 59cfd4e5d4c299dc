"""What the ranks of tests/test_transfer.py do: load a checkpoint with nothing but megatron-core.

Of this package only the process groups and the CPU's stand-in for CUDA are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_rlhf.parallel import checkpoint, state


def build(config: dict[str, Any]) -> GPTModel:
    """Llama as another megatron-core program would build it from the numbers in ``config.json``."""
    tp = ps.get_tensor_model_parallel_world_size()
    settings = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        layernorm_epsilon=config["rms_norm_eps"],
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=ps.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    multiple = 16 * tp
    return GPTModel(
        settings,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=-(-config["vocab_size"] // multiple) * multiple,
        max_sequence_length=config["max_position_embeddings"],
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=config["rope_parameters"]["rope_theta"],
        parallel_output=False,
    ).eval()


@torch.no_grad()
def logits(model: GPTModel, tokens: torch.Tensor, hidden_size: int) -> torch.Tensor | None:
    """Logits [batch, sequence, vocabulary] on the last stage, None before it."""
    batch, length = tokens.shape
    if not ps.is_pipeline_first_stage():
        received = torch.empty(length, batch, hidden_size)
        dist.recv(received, ps.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    output = model(tokens, torch.arange(length).expand(batch, -1), mask)
    if ps.is_pipeline_last_stage():
        return output
    dist.send(output.contiguous(), ps.get_pipeline_model_parallel_next_rank())
    return None


def run(payload: dict[str, Any]) -> list[torch.Tensor | None]:
    """Logits of the checkpoint under every cut of ``payload``."""
    results = []
    for tp, pp in payload["cuts"]:
        state.initialize(tp, pp, seed=1)
        model = build(payload["config"])
        sharded = model.sharded_state_dict(metadata={"dp_cp_group": ps.get_data_parallel_group()})
        loaded = dist_checkpointing.load(sharded, str(Path(payload["checkpoint"]) / "weights"))
        model.load_state_dict(loaded)
        results.append(logits(model, payload["tokens"], payload["config"]["hidden_size"]))
    checkpoint.verify(Path(payload["checkpoint"]))
    return results
