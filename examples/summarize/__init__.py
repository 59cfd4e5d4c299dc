"""RLHF's three steps on the docstring corpus: a preference set, a reward model, and PPO against it."""
