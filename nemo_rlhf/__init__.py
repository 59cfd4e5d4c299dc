"""Reinforcement learning for language models too large for one machine."""

__version__ = "0.1.0"
