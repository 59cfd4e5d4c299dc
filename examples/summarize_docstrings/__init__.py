"""A complete run on text that every machine has: a small Llama learns to summarise docstrings, by SFT and by PPO."""
