"""A pipeline of a few lines with known errors, and pictures, for the tests of the score."""

from __future__ import annotations

import cv2
import numpy as np

from cldm.image import canny_map
from cldm.result import Receipt, Result


class FakePipeline:
    """Paints the picture itself; `process` and `run` are `error` grey levels off the reference.

    Parameters
    ----------
    error : int
        Added to every pixel; the latent is off by a twentieth of it, relatively.
    reference_noise : int
        Added to each reference after the first of a picture.
    unsteady : bool
        Whether each call of process gives another image.
    """

    weights_digest = "fake"
    vocabulary = "fake"

    def __init__(self, error=2, reference_noise=0, unsteady=False):
        self.error = error
        self.reference_noise = reference_noise
        self.unsteady = unsteady
        self.calls = []
        self.initialized = None
        self.closed = False

    def initialize(self, **keywords):
        self.initialized = keywords

    def close(self):
        self.closed = True

    def count(self, name):
        return sum(call[0] == name for call in self.calls)

    def token_digest(self, request):
        return f"{self.vocabulary} {request.conditional_text} {request.negative_prompt}"

    def process(self, image, *arguments):
        self.calls.append(("process", image, arguments))
        offset = self.count("process") if self.unsteady else 0
        return [self._paint(image, self.error + offset)]

    def run(self, image, request):
        self.calls.append(("run", image, request))
        return self._result(image, self.error, request)

    def reference(self, image, request):
        again = any(call[0] == "reference" and np.array_equal(call[1], image) for call in self.calls)
        self.calls.append(("reference", image, request))
        return self._result(image, self.reference_noise if again else 0, request)

    def _paint(self, image, error):
        return image // 2 + np.uint8(error)

    def _result(self, image, error, request):
        latent = np.full((1, 4, 8, 8), 1 + 0.05 * error, np.float32)
        receipt = Receipt(
            model="fake",
            weights="no weights",
            backend="onnxruntime",
            backend_reason="no CUDA device",
            precision="fp32",
            device="cpu",
            height=image.shape[0],
            width=image.shape[1],
            num_samples=1,
            seed=request.seed,
            evaluations=request.ddim_steps,
            sampling="as asked",
            milliseconds={"total": 1.0},
        )
        edges = canny_map(image, 64, 100, 200)
        return Result([self._paint(image, error)], edges, latent, receipt)


def write_pictures(folder, names):
    """Write a seeded 64 x 96 picture of each name; none equals another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for name in names:
        pixels = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / name), cv2.resize(pixels, (96, 64), interpolation=cv2.INTER_CUBIC))
