"""FP32 that is FP32 on a GPU too."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Within it cuDNN convolves FP32 tensors in FP32, and the same inputs give the same bits.

    PyTorch's default lets convolutions round their inputs to TF32's ten bits of mantissa, which would make a reference
    of FP32 in name only.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
