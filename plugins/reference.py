"""What the GroupNorm operator computes, in NumPy: the measure of its kernels, its plugins and its torch operator."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

LAYOUTS = ("nchw", "nhwc")
ACTIVATIONS = ("none", "silu")
Array = np.ndarray


def group_norm(
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    epsilon: float = 1e-5,
    activation: str = "none",
    channel_bias: Optional[Array] = None,
    layout: str = "nchw",
    channels: Optional[int] = None,
    dtype: type = np.float64,
) -> Array:
    """`act(group_norm(x + channel_bias) * gamma + beta)`, with the population variance of each group.

    NaN and infinity in `x` or `channel_bias` spread to the whole group. SiLU of minus infinity, which then only an
    infinite gamma or beta gives, is 0, its limit. PyTorch gives NaN there, and so do the kernels but for float16 and
    bfloat16 elements that they take in pairs: those come out as -0 and -3.5e-17.

    Parameters
    ----------
    x : (N, C, ...) for "nchw", (N, ..., S) for "nhwc", where S >= C and the channels from C on are padding
    gamma, beta : (C,) or (R, C), both alike; R divides N, and sample n has row n // (N / R)
    groups : divides C
    epsilon : added to the variance; finite, not negative
    activation : "none" or "silu"
    channel_bias : (N, C), added to `x` before the statistics
    layout : "nchw" or "nhwc"
    channels : C where S is larger ("nhwc" only); default S
    dtype : floating type in which everything is computed, np.float64 or np.float32

    Returns
    -------
    array of `dtype` with the shape of `x`; padding channels are 0

    Raises
    ------
    ValueError
        where sizes, names or epsilon do not fit the above
    """
    count = _check(x, gamma, beta, groups, epsilon, activation, channel_bias, layout, channels)
    values = _grouped(x, count, layout).astype(dtype)
    batch, _, pixels = values.shape
    if channel_bias is not None:
        values = values + channel_bias.astype(dtype)[:, :, None]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        normal = _normalise(values.reshape(batch, groups, -1), dtype(epsilon)).reshape(batch, count, pixels)
        result = normal * _per_sample(gamma.astype(dtype), batch) + _per_sample(beta.astype(dtype), batch)
        if activation == "silu":
            result = silu(result)
    return _ungrouped(result, x.shape, layout)


def silu(x: Array) -> Array:
    """`x / (1 + exp(-x))`, 0 at minus infinity."""
    # NaN is not below the bound and stays.
    bounded = np.where(x < -1000, x.dtype.type(-1000), x)
    with np.errstate(over="ignore"):
        return bounded / (1 + np.exp(-bounded))


def _per_sample(parameter: Array, batch: int) -> Array:
    """(C,) or (R, C) to (batch, C, 1)."""
    rows = parameter.reshape(-1, parameter.shape[-1])
    return np.repeat(rows, batch // rows.shape[0], axis=0)[:, :, None]


def _normalise(values: Array, epsilon: float) -> Array:
    """Zero mean, unit deviation along the last axis; the mean is taken about the first value, exact for constants."""
    first = values[..., :1]
    mean = first + (values - first).mean(axis=-1, keepdims=True)
    centred = values - mean
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon)


def _grouped(x: Array, channels: int, layout: str) -> Array:
    """(N, C, pixels), without the padding."""
    if layout == "nchw":
        return x.reshape(x.shape[0], channels, -1)
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, :, :channels].transpose(0, 2, 1)


def _ungrouped(values: Array, shape: Tuple[int, ...], layout: str) -> Array:
    if layout == "nchw":
        return values.reshape(shape)
    batch, channels, pixels = values.shape
    result = np.zeros((batch, pixels, shape[-1]), dtype=values.dtype)
    result[:, :, :channels] = values.transpose(0, 2, 1)
    return result.reshape(shape)


def _check(
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    epsilon: float,
    activation: str,
    channel_bias: Optional[Array],
    layout: str,
    channels: Optional[int],
) -> int:
    """The number of channels; raises ValueError where the arguments do not fit together."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is none of {', '.join(LAYOUTS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"x: shape {x.shape}, at least two dimensions and one element are wanted")
    stride = x.shape[1] if layout == "nchw" else x.shape[-1]
    count = stride if channels is None else channels
    if not 0 < count <= stride or (layout == "nchw" and count != stride):
        raise ValueError(f"channels: {count} do not fit x of shape {x.shape} in layout {layout}")
    if groups < 1 or count % groups:
        raise ValueError(f"groups: {groups} does not divide {count} channels")
    if not (np.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon: {epsilon} is not finite or is negative")
    batch = x.shape[0]
    rows = gamma.shape[0] if gamma.ndim == 2 else 1
    if gamma.ndim not in (1, 2) or gamma.shape[-1] != count or rows < 1 or batch % rows:
        raise ValueError(f"gamma: shape {gamma.shape}, ({count},) or (rows, {count}) is wanted, rows dividing {batch}")
    for name, values, shape in (("beta", beta, gamma.shape), ("channel_bias", channel_bias, (batch, count))):
        if values is not None and values.shape != shape:
            raise ValueError(f"{name}: shape {values.shape}, {shape} is wanted")
    return count
