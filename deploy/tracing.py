"""Tracing half-precision networks on a processor that has no half-precision arithmetic to speak of."""

from __future__ import annotations

import contextlib
import warnings
from typing import Iterator, List

import torch


@contextlib.contextmanager
def fast_half_convolution() -> Iterator[None]:
    """Within it, FP16 convolutions on the CPU are computed in FP32 and rounded.

    PyTorch's own are a hundred times slower than its FP32 ones, and an export has to run the network once. A kernel
    below the tracer is replaced, so the trace records the FP16 convolution as ever. Products of FP16 numbers are exact
    in FP32 and are summed there, as a GPU's matrix units do.
    """

    def convolve(
        x: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: List[int],
        bias: torch.Tensor,
        stride: List[int],
        padding: List[int],
    ) -> torch.Tensor:
        # oneDNN by name: the general convolution picks the replaced kernel again for some shapes.
        wide = (None if t is None else t.float() for t in (x, weight, bias))
        return torch.mkldnn_convolution(*wide, padding, stride, [1, 1], 1).to(x.dtype)

    if not torch.backends.mkldnn.is_available():  # slow, but right
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it replaces a kernel is the point
        library.impl("_slow_conv2d_forward", convolve, "CPU")
    try:
        yield
    finally:
        del library  # its end puts the kernel back
