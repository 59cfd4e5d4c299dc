"""Stands for pandas where scripts/gpu_check.sh runs: NeMo imports it at the top and calls it to read data only."""
