"""How long a step takes, roughly: operations at a stated share of the peak, bytes at stated bandwidths.

Nothing here is measured on the machine that is planned for; the assumptions are keys of the configuration
(``cluster.*``). Communication is added, never hidden behind computation. All responses are taken to be of full length.
"""

from __future__ import annotations

from functools import lru_cache

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.launch.memory import held
from nemo_rlhf.launch.parameters import Cut, num_trunks
from nemo_rlhf.launch.work import ONLINE, Model, Plan, Work

KEPT = (0.3, 0.05)  # of rft's samples, which its first and last pass learn from, by its default percentiles


def seconds(work: Work, plan: Plan) -> dict[str, float]:
    """Of one step, by phase."""
    asked = work.config.plan
    found: dict[str, float] = {}
    if asked.algorithm in ONLINE:
        found["rollout"] = _prefill(work, plan) + _decode(work, plan)
    if work.reward_model is not None:
        found["score"] = _forward(work, plan, work.reward_model, 0)
    if work.reference is not None:
        found["experience"] = sum(
            _forward(work, plan, model, 0 if model.role == "critic" else work.learned)
            for model in (work.model, work.reference, work.critic)
            if model is not None
        )
    passes: float = 1
    if asked.algorithm == "ppo":
        passes = asked.epochs
    elif asked.algorithm == "rft":
        passes = asked.epochs * sum(KEPT) / 2
    found["update"] = passes * sum(_learn(work, plan, model) for model in work.learners)
    if (moved := _moved(work, plan)) > 0:
        found["offloading"] = moved / (work.cluster.host_gb_per_s * 1e9)
    return found


def samples_per_hour(work: Work, plan: Plan) -> float:
    return 3600 * work.samples / sum(seconds(work, plan).values())


@lru_cache(maxsize=10_000)
def forward_flops(model: Model, length: int, selected: int) -> float:
    """Of one text of ``length`` tokens, with the output layer on ``selected`` of them: two for every weight and token
    (a token visits ``experts_per_token`` experts), and causal attention over half the length on average."""
    what = model.architecture
    queries = what.num_attention_heads * what.kv_channels
    attention = what.hidden_size * (2 * queries + 2 * what.num_query_groups * what.kv_channels)
    inputs = 3 if what.gated else 2
    weights = 0
    for layer in range(what.num_layers):
        weights += attention
        if what.is_sparse(layer):
            weights += what.experts_per_token * inputs * what.hidden_size * what.expert_ffn_hidden_size
        else:
            weights += inputs * what.hidden_size * what.ffn_hidden_size
    scores = what.num_layers * 4 * queries * length * length / 2
    trunks = num_trunks(what, model.role)
    return trunks * (2 * weights * length + scores) + 2 * _head_weights(model) * selected


def _head_weights(model: Model) -> int:
    what = model.architecture
    if model.role == "critic":
        return 0
    output = what.vocab_size * what.hidden_size
    if model.role == "ilql":  # a target Q head is asked for single actions only
        width = what.ilql_head_width
        output += width * (what.hidden_size * (1 + 2 * what.ilql_num_q) + what.vocab_size * what.ilql_num_q)
    return output


def _rate(work: Work) -> float:
    """Operations a second that matrix products reach on one GPU."""
    peak = work.cluster.tflops if work.model.itemsize == 2 else work.cluster.tflops_fp32
    return peak * 1e12 * work.cluster.utilisation


def _between(work: Work, ranks: int) -> float:
    """Bytes a second, of one GPU, among ``ranks`` neighbours."""
    inside = ranks <= work.cluster.gpus_per_node
    return (work.cluster.nvlink_gb_per_s if inside else work.cluster.network_gb_per_s) * 1e9


def _exchange(work: Work, plan: Plan, what: Architecture, tokens: int, itemsize: int) -> float:
    """Seconds of communication in one forward pass of one layer: two all-reduces over the tensor-parallel ranks (a
    gather and a scatter each, under sequence parallelism), and the way of tokens to experts and back."""
    cut, size = plan.cut, tokens * what.hidden_size * itemsize
    total = 4 * (cut.tp - 1) / cut.tp * size / _between(work, cut.tp)
    if what.num_experts and cut.ep > 1:
        mine = size * what.experts_per_token / (cut.tp if cut.sequence_parallel else 1)
        total += 2 * (cut.ep - 1) / cut.ep * mine / _between(work, cut.ep)
    return total


def _microbatch(
    work: Work, plan: Plan, model: Model, rows: int, selected: int, compute: float, exchange: float
) -> float:
    """Seconds of one pipeline stage for ``rows`` texts. ``compute`` and ``exchange``: how many times the operations and
    the communication of a forward pass."""
    what, cut = model.architecture, plan.cut
    flops = rows * forward_flops(model, work.length, selected) / (cut.tp * cut.pp)
    layer = _exchange(work, plan, what, rows * work.length, model.itemsize)
    hop = 0.0
    if cut.pp > 1:
        shard = rows * work.length // (cut.tp if cut.sequence_parallel else 1)
        hop = shard * what.hidden_size * model.itemsize / _between(work, cut.tp * cut.dp + 1)
    layers = num_trunks(what, model.role) * what.num_layers // cut.pp
    return compute * flops / _rate(work) + exchange * layers * layer + hop


def _forward(work: Work, plan: Plan, model: Model, selected: int) -> float:
    """Seconds in which ``model`` evaluates a step's samples."""
    count = max(1, work.samples // plan.cut.dp // plan.micro_batch_size)
    one = _microbatch(work, plan, model, plan.micro_batch_size * work.rows, selected, 1, 1)
    return (count + plan.cut.pp - 1) * one


def _learn(work: Work, plan: Plan, model: Model) -> float:
    """Seconds in which ``model`` learns from each of a step's samples once: forward, twice as much backward (and the
    gathers of sequence parallelism once more), what is recomputed, the pipeline's bubble, and the exchange of gradients
    and weights with every optimizer step."""
    cut, batch = plan.cut, work.config.plan.global_batch_size
    again, sent_again = _recomputed(model, work.length, plan.recompute, work.config.plan.layer_spec)
    rows = plan.micro_batch_size * work.rows
    one = _microbatch(work, plan, model, rows, work.learned, 3 + again, 2.5 + sent_again)
    count = batch // cut.dp // plan.micro_batch_size
    mine = held(model, cut, 0, True)
    bandwidth = _between(work, cut.tp * cut.dp)
    gradients = (cut.dp - 1) / cut.dp * (mine.gradients + mine.weights) / bandwidth
    step = 3 * mine.optimizer / (work.cluster.memory_gb_per_s * 1e9)
    return work.samples / batch * ((count + cut.pp - 1) * one + gradients + step)


def _recomputed(model: Model, length: int, recompute: str | None, layer_spec: str) -> tuple[float, float]:
    """Shares of a forward pass, of its operations and of its communication, that the backward pass repeats. Of experts
    Transformer Engine repeats the activation alone, local layers all."""
    if recompute != "selective":
        return (1, 1) if recompute == "full" else (0, 0)
    what = model.architecture
    sparse = sum(what.is_sparse(layer) for layer in range(what.num_layers))
    dense, sparse = what.num_layers - sparse, sparse if layer_spec == "local" else 0
    width = dense * what.ffn_hidden_size + sparse * what.experts_per_token * what.expert_ffn_hidden_size
    inputs = 3 if what.gated else 2
    repeated = num_trunks(what, model.role) * 2 * inputs * what.hidden_size * width * length
    return repeated / forward_flops(model, length, 0), 0.5 * (dense + sparse) / what.num_layers


def _prefill(work: Work, plan: Plan) -> float:
    prompt, samples, cut = work.config.plan.prompt_tokens, work.samples / plan.cut.dp, plan.cut
    flops = samples * forward_flops(work.model, prompt, 1) / (cut.tp * cut.pp)
    what = work.model.architecture
    exchange = samples * what.num_layers / cut.pp * _exchange(work, plan, what, prompt, work.model.itemsize)
    return flops / _rate(work) + exchange


def _decode(work: Work, plan: Plan) -> float:
    """Every slot draws a token in a round. A pipeline stage works on one group of slots after the other, and reads its
    weights and the group's keys and values for each; it is never faster than its kernels can be launched."""
    asked, cut, what = work.config.plan, plan.cut, work.model.architecture
    samples = work.samples / cut.dp
    slots = min(plan.slots, samples)
    rows = slots / cut.pp
    layers = what.num_layers // cut.pp
    length = asked.prompt_tokens + asked.response_tokens / 2
    groups, size = what.num_query_groups / cut.tp, work.model.itemsize
    cache = 2 * layers * rows * groups * length * what.kv_channels * size
    weights = _weights_read(work.model, cut, rows)
    read = (weights + cache) / (work.cluster.memory_gb_per_s * 1e9)
    flops = rows * forward_flops(work.model, 1, 1) / (cut.tp * cut.pp) / _rate(work)
    exchange = layers * _exchange(work, plan, what, max(1, round(rows)), size)
    stage = max(read + flops + exchange, layers * work.cluster.layer_us * 1e-6)
    return samples / slots * asked.response_tokens * cut.pp * stage


def _weights_read(model: Model, cut: Cut, rows: float) -> float:
    """Bytes of a stage's weights that a decoding step of ``rows`` tokens reads: of experts, those that are asked."""
    what = model.architecture
    whole = held(model, cut, cut.pp - 1, False).weights
    if not what.num_experts:
        return whole
    sparse = sum(what.is_sparse(layer) for layer in range(what.num_layers)) // cut.pp
    inputs = 3 if what.gated else 2
    experts = sparse * what.num_experts // cut.ep * inputs * what.hidden_size * what.expert_ffn_hidden_size
    asked = min(1.0, rows * what.experts_per_token / what.num_experts)
    return whole - (1 - asked) * experts * model.itemsize


def _moved(work: Work, plan: Plan) -> float:
    """Bytes that a GPU and its node's memory exchange in one step, both ways."""
    total = 0
    if "optimizer" in plan.offload:
        total += sum(2 * held(model, plan.cut, 0, True).optimizer for model in work.learners)
    if "critic" in plan.offload and work.critic is not None:  # for experience and for the update
        total += 4 * held(work.critic, plan.cut, 0, True).weights
    if work.reference is not None and plan.reference != "resident":
        times = 3 if plan.reference == "swap" else 2
        total += times * held(work.reference, plan.cut, 0, False).weights
    if work.reward_model is not None and plan.reward_model == "swap":
        total += 2 * held(work.reward_model, plan.cut, 0, False).weights
    return total
