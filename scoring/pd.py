"""PD, the contest's perceptual distance, computed on the files that its scorer would have written."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, Union

import numpy as np

PD_LIMIT = 12.0


class PerceptualDistance:
    """L2 distance between the pool3 features of FID's Inception-v3 (2048 of them, arXiv:1706.08500), on the CPU.

    Parameters
    ----------
    weights : path
        State of pytorch-fid's Inception network. The caller answers for its content; see `backbones.find_backbone`.
    """

    def __init__(self, weights: Union[str, Path]) -> None:
        import torch

        state = torch.load(str(weights), map_location="cpu", weights_only=True)
        with _state_from(state):
            from pytorch_fid.inception import InceptionV3

            self._network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()

    def features(self, path: Union[str, Path]) -> np.ndarray:
        """The (2048,) float64 features of an image file, read as pytorch-fid reads it: RGB in [0, 1]."""
        import torch
        from PIL import Image
        from torchvision.transforms.functional import to_tensor

        with Image.open(str(path)) as image:
            pixels = to_tensor(image.convert("RGB"))
        with torch.no_grad():
            return self._network(pixels[None])[0].flatten().numpy().astype(np.float64)

    def between_files(self, path: Union[str, Path], reference: Union[str, Path]) -> float:
        """PD of two image files."""
        return float(np.linalg.norm(self.features(path) - self.features(reference)))

    def between_images(self, image: np.ndarray, reference: np.ndarray) -> float:
        """PD of two images that `process` returned, as the contest's scorer takes it.

        Parameters
        ----------
        image, reference : (H, W, 3) uint8 arrays
            Written as they are by cv2.imwrite at its default quality. That takes them for BGR, so the files have
            red and blue swapped; the published figures are of such files.

        Raises
        ------
        OSError
            A temporary file could not be written.
        """
        import cv2

        with tempfile.TemporaryDirectory(prefix="pd-") as folder:
            paths = [str(Path(folder) / name) for name in ("new.jpg", "base.jpg")]
            for path, pixels in zip(paths, (image, reference)):
                if not cv2.imwrite(path, pixels):
                    raise OSError(f"cannot write {path}; free some space, or set TMPDIR to a folder that has some")
            return self.between_files(*paths)


@contextlib.contextmanager
def _state_from(state: Dict[str, Any]) -> Iterator[None]:
    """Give pytorch-fid these weights where it would fetch its own; it has no parameter for that."""
    from pytorch_fid import inception

    original = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        yield
    finally:
        inception.load_state_dict_from_url = original
