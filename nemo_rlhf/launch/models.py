"""Architectures that can be planned by name, without their checkpoints: public facts of the models' cards."""

from __future__ import annotations

from dataclasses import replace

from nemo_rlhf.config.architecture import Architecture

_LLAMA3_8B = Architecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    layernorm_epsilon=1e-5,
    rope={"rope_type": "default", "rope_theta": 500000.0},
    tie_embeddings=False,
    dtype="bfloat16",
)
_QWEN3_32B = Architecture(
    family="qwen3",
    num_layers=64,
    hidden_size=5120,
    ffn_hidden_size=25600,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    layernorm_epsilon=1e-6,
    rope={"rope_type": "default", "rope_theta": 1000000.0},
    tie_embeddings=False,
    qk_norm=True,
    dtype="bfloat16",
)
_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama3-8b": _LLAMA3_8B,
    "llama3-70b": replace(_LLAMA3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64),
    "llama3.1-405b": replace(
        _LLAMA3_8B,
        num_layers=126,
        hidden_size=16384,
        ffn_hidden_size=53248,
        num_attention_heads=128,
        max_position_embeddings=131072,
        rope=_LLAMA31_ROPE,
    ),
    "qwen3-8b": replace(_QWEN3_32B, num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32),
    "qwen3-32b": _QWEN3_32B,
    "mixtral-8x7b": replace(
        _LLAMA3_8B,
        family="mixtral",
        vocab_size=32000,
        max_position_embeddings=32768,
        rope={"rope_type": "default", "rope_theta": 1000000.0},
        num_experts=8,
        experts_per_token=2,
        expert_ffn_hidden_size=14336,
    ),
}
