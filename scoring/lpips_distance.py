"""LPIPS (Zhang et al. 2018, arXiv:1801.03924) with the AlexNet backbone, version 0.1 of its linear heads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Union

import numpy as np


class LpipsDistance:
    """The lpips package's distance, on the CPU, with the backbone's weights read from a local file.

    Parameters
    ----------
    weights : path
        State of torchvision's AlexNet. The caller answers for its content; see `backbones.find_backbone`.
    """

    def __init__(self, weights: Union[str, Path]) -> None:
        import lpips
        import torch

        state = torch.load(str(weights), map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            # The package calls torchvision by a parameter name that torchvision has deprecated.
            warnings.simplefilter("ignore")
            self._network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False).eval()
        # The package's "slice<n>.<i>.<parameter>" is AlexNet's "features.<i>.<parameter>".
        backbone = self._network.net
        names = {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}
        backbone.load_state_dict({name: state[source] for name, source in names.items()})

    def between_images(self, image: np.ndarray, reference: np.ndarray) -> float:
        """LPIPS of two (H, W, 3) uint8 RGB images; 0 for equal ones."""
        import torch

        with torch.no_grad():
            return float(self._network(_to_tensor(image), _to_tensor(reference)))


def _to_tensor(image: np.ndarray) -> Any:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)[None]
