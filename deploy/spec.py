"""One description of each deployable graph: its tensors' names, shapes and types. No torch here.

Export, engine profiles and the runtime's buffers are all made from it. Tensors of the same name in two graphs are the
same memory at run time, which is how graphs chain without copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Tuple, Union

from cldm.config import ModelConfig
from ldm.layout import key_value_widths, time_bias_widths

# What a precision's tensors are. FP8 is of weights, and of what is multiplied with them; between the layers is FP16.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float16"}

# Length of the schedule, the one axis that no graph fixes: the time graph alone has it.
STEPS = "S"

Dim = Union[int, str]


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a tensor, with `STEPS` for the length of the schedule, and its type's name in NumPy and torch."""

    shape: Tuple[Dim, ...]
    dtype: str

    def to_json(self) -> Dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class GraphSpec:
    """A graph's file name and tensors, inputs and outputs in the order of the exported signature."""

    name: str
    file: str
    inputs: Dict[str, TensorSpec]
    outputs: Dict[str, TensorSpec]

    @property
    def tensors(self) -> Dict[str, TensorSpec]:
        return {**self.inputs, **self.outputs}


@dataclass(frozen=True)
class Build:
    """What a set of graphs is made for; names their folder.

    Raises
    ------
    ValueError
        Sizes that the model cannot take, or an unknown precision.
    """

    config: ModelConfig
    height: int
    width: int
    samples: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        multiple = self.config.size_multiple
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < multiple or value % multiple:
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {value}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def folder_name(self) -> str:
        return f"{self.config.name}-{self.height}x{self.width}-n{self.samples}-{self.precision}"

    @property
    def dtype(self) -> str:
        return PRECISIONS[self.precision]

    @property
    def latent_shape(self) -> Tuple[int, int, int, int]:
        return (self.samples, self.config.autoencoder.latent_channels, self.height // 8, self.width // 8)


def key_value_width(config: ModelConfig) -> int:
    """Channels of all cross-attention keys and values, UNet and ControlNet, packed side by side (36480 for SD1.5)."""
    return 2 * (sum(key_value_widths(config.unet, decoder=True)) + sum(key_value_widths(config.unet, decoder=False)))


def time_bias_width(config: ModelConfig) -> int:
    """Channels of all ResBlock time biases, UNet and ControlNet, packed side by side (29760 for SD1.5)."""
    return sum(time_bias_widths(config.unet, decoder=True)) + sum(time_bias_widths(config.unet, decoder=False))


def graph_specs(build: Build) -> Dict[str, GraphSpec]:
    """The five graphs in the order in which they run: text, hint, time, step, decode."""
    config = build.config
    latent = TensorSpec(build.latent_shape, "float32")
    keys_values = TensorSpec((2, config.text.max_length, key_value_width(config)), build.dtype)
    hint = TensorSpec((1, config.unet.model_channels) + build.latent_shape[2:], build.dtype)
    bias_width = time_bias_width(config)
    graphs = [
        GraphSpec(
            "text",
            "clip.onnx",
            {"token_ids": TensorSpec((2, config.text.max_length), "int32")},
            {"keys_values": keys_values},
        ),
        GraphSpec(
            "hint",
            "hint.onnx",
            {"canny": TensorSpec((build.height, build.width), "uint8")},
            {"hint_features": hint},
        ),
        GraphSpec(
            "time",
            "time.onnx",
            {"timesteps": TensorSpec((STEPS,), "int32")},
            {"time_biases": TensorSpec((STEPS, bias_width), build.dtype)},
        ),
        GraphSpec(
            "step",
            "control_unet.onnx",
            {
                "latent": latent,
                "noise_last": latent,
                "keys_values": keys_values,
                "hint_features": hint,
                "time_bias": TensorSpec((1, bias_width), build.dtype),
                "control_scales": TensorSpec((2, config.num_controls), "float32"),
                "guidance_scale": TensorSpec((1,), "float32"),
                "coefficients": TensorSpec((1, 3), "float32"),
            },
            {"latent_next": latent, "noise": latent},
        ),
        GraphSpec(
            "decode",
            "vae_decoder.onnx",
            {"latent": latent},
            {"image": TensorSpec((build.samples, build.height, build.width, 3), "uint8")},
        ),
    ]
    return {graph.name: graph for graph in graphs}
