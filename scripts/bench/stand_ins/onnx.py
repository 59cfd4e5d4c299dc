"""Stands for onnx where scripts/gpu_check.sh runs: NeMo imports it at the top and calls it to export a model only."""
