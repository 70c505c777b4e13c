"""FP32 that is FP32 on a GPU too."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Within it FP32 convolutions and matrix products are FP32, and the same inputs give the same bits.

    PyTorch's default lets convolutions round their inputs to TF32's ten bits of mantissa, and a program may have
    allowed that for matrix products; a reference would be FP32 in name only.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before
