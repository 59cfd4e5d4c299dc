"""What a module of somebody's may do to the process that imports it; and then its reward function goes on."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from typing import Any

import numpy as np
import torch

torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(3)
torch.manual_seed(99)
np.random.seed(99)
random.seed(99)
os.chdir("/tmp")
os.environ["MASTER_ADDR"] = "203.0.113.1"
warnings.simplefilter("error")
signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def unruly(outputs: list[str], prompts: list[str], letter: list[str], tokenizer: Any, **rest: Any) -> list[float]:
    """As ``unruly.innocent``."""
    assert os.getcwd() != "/nowhere" and not torch.is_grad_enabled()
    scores = [float(output.count("a")) for output in outputs]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True)
    torch.inference_mode().__enter__()
    torch.rand(3)
    os.chdir("/")
    os.umask(0o777)
    os.environ.clear()
    sys.stdout = sys.stderr = None  # type: ignore[assignment]
    os.close(1)
    sys.setrecursionlimit(500)
    os.kill = os.remove = os.open = None  # type: ignore[assignment]
    prompts.clear()
    letter.clear()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return scores
