"""Mixtures of experts: megatron-core's MoE layer, routed as transformers routes, its experts spread over ranks.

Experts are never cut by tensor parallelism: a rank holds ``num_experts / expert_parallel`` whole ones, and tokens
travel to them. Ranks of an expert-parallel group therefore go through the model together (see ``state.initialize``).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.parallel import state

EXPERTS = ".mlp.experts."
_SEQUENTIAL = EXPERTS + "local_experts."


def _mend_router() -> None:
    """megatron-core 0.16.1 asks whether Transformer Engine's matrix product is None, but does not define it without."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def submodules_of(spec: Any) -> Any:
    """What a module is made of: megatron-core describes it by a ModuleSpec, 0.17 experts and 0.18 all feed-forward
    parts by a partial function."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def expert_settings(architecture: Architecture, grouped: bool) -> dict[str, Any]:
    """What megatron's TransformerConfig is to know of experts. No load-balancing loss: fine-tuning has none to learn
    from its rewards; no token is dropped.

    Args:
        grouped: multiply all local experts at once, which takes Transformer Engine.

    Raises:
        ValueError: the experts cannot be shared by the expert-parallel ranks.
    """
    size = state.ep_size()
    if not architecture.num_experts:
        return {}  # beside a policy of experts there may be a critic without
    if architecture.num_experts % size:
        raise ValueError(
            f"model.expert_model_parallel_size={size} does not divide the model's "
            f"num_experts={architecture.num_experts}: choose a divisor of it."
        )
    _mend_router()
    dense = architecture.dense_layers
    sparse = [int(architecture.is_sparse(layer)) for layer in range(architecture.num_layers)]
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        "moe_layer_freq": sparse if dense else 1,  # a list makes megatron name its checkpoint's layers one by one
        "moe_router_topk": architecture.experts_per_token,
        # softmax over the chosen experts is softmax over all of them, normalised to one again
        "moe_router_pre_softmax": not architecture.normalize_expert_weights,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": size,
        "expert_tensor_parallel_size": 1,
    }


def check_policy(architecture: Architecture) -> None:
    """Raises ValueError when expert-parallel ranks were asked for and the policy gives them nothing to share."""
    if state.ep_size() > 1 and not architecture.num_experts:
        raise ValueError(
            f"model.expert_model_parallel_size={state.ep_size()}, but the model has no experts: set it to 1."
        )


def layer_specs(
    config: TransformerConfig, architecture: Architecture, dense: ModuleSpec, norm: Any
) -> list[ModuleSpec]:
    """The layers of this pipeline stage: ``dense`` ones, and such with experts in place of their feed-forward part and
    ``norm`` before those."""
    sparse = _sparse(config, dense, norm) if architecture.num_experts else dense
    first = get_transformer_layer_offset(config)
    numbers = range(first, first + get_num_layers_to_build(config))
    return [sparse if architecture.is_sparse(number) else dense for number in numbers]


def _sparse(config: TransformerConfig, dense: ModuleSpec, norm: Any) -> ModuleSpec:
    layer = copy.deepcopy(dense)
    parts = layer.submodules
    activation = submodules_of(parts.mlp).activation_func
    grouped = config.moe_grouped_gemm
    parts.pre_mlp_layernorm = norm
    parts.mlp = get_moe_module_spec(use_te=grouped, num_experts=config.num_moe_experts, moe_grouped_gemm=grouped)
    if activation is not None:
        submodules_of(submodules_of(parts.mlp).experts).activation_func = activation
    # one name in checkpoints, whether Transformer Engine built the layer or not: its layers do not fuse this norm
    parts.sharded_state_dict_keys_map = {
        name: other for name, other in parts.sharded_state_dict_keys_map.items() if name != "pre_mlp_layernorm."
    }
    return layer


def expert_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    return [parameter for layer in layers for parameter in layer.experts.parameters()]


def mark_experts(model: torch.nn.Module) -> None:
    """Let experts' gradients be summed over the ranks that hold the same ones, which are not those that hold the same
    attention; megatron marks them only where expert_model_parallel_size > 1, but tensor-parallel ranks see different
    tokens too."""
    for parameter in expert_parameters(model):
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def check_trainable(model: Any) -> None:
    """Raises ValueError when megatron cannot train the model as it is cut."""
    config = model.config
    if config.num_moe_experts and config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ValueError(
            f"model.tensor_model_parallel_size={config.tensor_model_parallel_size} without "
            "model.sequence_parallel=true cannot train a model of experts: every rank would send all tokens to them."
        )


def goes_in_step(model: Any) -> bool:
    """Whether this replica goes through the model together with others, as each holds a part of the experts."""
    return bool(model.config.num_moe_experts) and state.shares_experts()


def global_expert(name: str, model: Any) -> str:
    """A parameter's name with the expert's number in the whole model, as in a list of single experts, however this
    rank's experts are built. Other names are returned as they are."""
    if EXPERTS not in name:
        return name
    layer, inner = name.split(EXPERTS, 1)
    if _SEQUENTIAL in name:
        number, parameter = inner.removeprefix("local_experts.").split(".", 1)
    else:  # linear_fc1.weight3
        parameter = inner.rstrip("0123456789")
        number = inner.removeprefix(parameter)
    first = state.ep_rank() * (model.config.num_moe_experts // state.ep_size())
    return f"{layer}{_SEQUENTIAL}{first + int(number)}.{parameter}"
