"""What only a CUDA device can show; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest

from canny2image_TRT import hackathon
from cldm.config import ModelConfig
from cldm.request import Request
from cldm.weights import Weights
from scoring.pictures import OWN_FOLDER

pytestmark = pytest.mark.gpu

REQUEST = Request("a bird", "best quality", "lowres", ddim_steps=20, seed=2946901, eta=0.3, num_samples=2)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A photograph, as the score has them."""
    import cv2

    return cv2.imread(str(OWN_FOLDER / "eagle.jpg"))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def make_engine(**options: Any) -> hackathon:
    hk = hackathon()
    hk.initialize(**{"model": "tiny", **options})
    return hk


@pytest.fixture(scope="module", autouse=True)
def _with_trained_weights(tiny_weights: Weights) -> None:
    """Errors of the tiny model are those of the weights that ship."""


def test_cuda_is_chosen_by_itself(picture: np.ndarray) -> None:
    hk = make_engine()
    assert "backend torch on cuda in fp16" in hk.summary
    receipt = hk.run(picture, REQUEST).receipt
    assert (receipt.backend, receipt.device, receipt.precision) == ("torch", "cuda", "fp16")
    assert receipt.milliseconds["steps"] > 0
    hk.close()


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 5e-5), ("fp16", 2e-2), ("bf16", 2e-1)])
def test_tiny_on_cuda_against_its_reference(picture: np.ndarray, precision: str, bound: float) -> None:
    hk = make_engine(precision=precision)
    found, wanted = hk.run(picture, REQUEST), hk.reference(picture, REQUEST)
    error = relative(found.latent, wanted.latent)
    print(f"tiny {precision}: latent error {error:.2e} after 20 steps at guidance scale {REQUEST.guidance_scale:g}")
    assert error < bound
    assert np.array_equal(hk.run(picture, REQUEST).images, found.images), "a second run gave other bits"
    hk.close()


def test_noise_on_cuda_is_that_of_the_original() -> None:
    import torch

    from cldm.noise import draw_noise

    shape = (2, 4, 32, 48)
    initial, noise = draw_noise(7, shape, 3, 0.5, "cuda")
    torch.manual_seed(7)
    assert torch.equal(initial, torch.randn(shape, device="cuda"))
    assert noise is not None and all(torch.equal(n, torch.randn(shape, device="cuda")) for n in noise)


def test_reference_on_cuda_is_that_of_the_cpu(picture: np.ndarray) -> None:
    """From the same initial latent: the devices draw different noise."""
    import torch

    noise = torch.randn((1, 4, 32, 48), generator=torch.Generator().manual_seed(1))
    request = Request("a bird", ddim_steps=20, seed=1)
    latents = []
    for device in ("cuda", "cpu"):
        hk = make_engine(backend="torch", device=device, precision="fp32")
        latents.append(hk.reference(picture, request, latents=noise).latent)
        hk.close()
    error = relative(latents[0], latents[1])
    print(f"tiny's reference on CUDA and on the CPU: latent error {error:.2e}")
    assert error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 5e-2)])
def test_sd15_size_on_cuda(picture: np.ndarray, precision: str, bound: float) -> None:
    request = Request("a bird", ddim_steps=20, seed=1)
    hk = make_engine(model="sd15", random_weights=1, precision=precision)
    found, wanted = hk.run(picture, request), hk.reference(picture, request)
    print(f"sd15 {precision}: latent error {relative(found.latent, wanted.latent):.2e} after 20 steps")
    print({stage: round(ms, 1) for stage, ms in hk.run(picture, request).receipt.milliseconds.items()})
    assert relative(found.latent, wanted.latent) < bound
    hk.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_export_traced_on_cuda(precision: str, tiny_config: ModelConfig, tiny_weights: Weights, tmp_path: Path) -> None:
    """Its check against ONNX Runtime on the CPU is part of the export."""
    pytest.importorskip("polygraphy")
    from cldm.checkpoint import load_model
    from deploy.export import export_all
    from deploy.spec import Build

    build = Build(tiny_config, 256, 384, 1, precision)
    rows = export_all(build, tiny_weights, lambda: load_model(tiny_config, tiny_weights), tmp_path, report=print)
    errors: Dict[str, Any] = {row.graph: row.error for row in rows}
    print(precision, errors)
    assert set(errors) == {"text", "hint", "time", "step", "decode"}
