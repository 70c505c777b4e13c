"""The contest's class on a small model: every argument counts, nothing else does.

Its weights are random, so that what an argument changes in the picture is for tests/test_tiny_model.py to say.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import yaml

from canny2image_TRT import ROOT, hackathon
from cldm.request import Request
from ldm.plans import exact_plan, linear_plan, subset_plan
from ldm.schedule import ScheduleConfig
from tests.small_model import small_config

pytestmark = pytest.mark.usefixtures("one_thread")

ARGUMENTS: Dict[str, Any] = {
    "prompt": "a bird",
    "a_prompt": "best quality, extremely detailed",
    "n_prompt": "longbody, lowres, bad anatomy, bad hands, missing fingers",
    "num_samples": 1,
    "image_resolution": 64,
    "ddim_steps": 4,
    "guess_mode": False,
    "strength": 1,
    "scale": 9,
    "seed": 2946901,
    "eta": 0.0,
    "low_threshold": 100,
    "high_threshold": 200,
}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Discs of different contrast, so that the thresholds of Canny matter."""
    rows, columns = np.mgrid[:64, :96]
    image = np.full((64, 96, 3), 90, np.float32)
    for row, column, radius, change in ((20, 24, 14, 20), (40, 60, 18, 120), (30, 84, 9, -40)):
        image[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] += change
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a user's own config file."""
    import dataclasses

    config = small_config()
    values = dataclasses.asdict(config)
    values.pop("folder")
    values["tokenizer"] = str(Path(config.folder) / config.tokenizer)
    path = tmp_path_factory.mktemp("models") / "small.yaml"
    plain = yaml.safe_load(yaml.safe_dump(_lists(values)))
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def engine(request: Any, config_file: Path, build_dir: Path) -> Iterator[hackathon]:
    hk = hackathon()
    hk.initialize(str(config_file), request.param, device="cpu", build_dir=str(build_dir), height=64, width=64)
    yield hk
    hk.close()


def process(hk: hackathon, image: np.ndarray, **changes: Any) -> List[np.ndarray]:
    return hk.process(image, **{**ARGUMENTS, **changes})


def test_positional_call_of_the_scorer(engine: hackathon, picture: np.ndarray) -> None:
    images = engine.process(picture, *ARGUMENTS.values())
    assert isinstance(images, list)
    assert len(images) == 1
    assert images[0].shape == (64, 128, 3)  # 96 at resolution 64 rounds to the even multiple, as NumPy rounds
    assert images[0].dtype == np.uint8


def test_same_arguments_give_bit_equal_images(engine: hackathon, picture: np.ndarray) -> None:
    first = process(engine, picture, eta=0.3)[0]
    process(engine, picture, seed=1, ddim_steps=5, strength=0.2)
    assert np.array_equal(process(engine, picture, eta=0.3)[0], first)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a red house"},
        {"a_prompt": "blurred"},
        {"n_prompt": "birds"},
        {"ddim_steps": 5},
        {"guess_mode": True},
        {"strength": 0.5},
        {"strength": 0},
        {"scale": 5},
        {"seed": 2946902},
        {"eta": 0.5},
        {"low_threshold": 1, "high_threshold": 60},
        {"high_threshold": 255},
    ],
    ids=str,
)
def test_every_argument_counts(engine: hackathon, picture: np.ndarray, change: Dict[str, Any]) -> None:
    before = process(engine, picture)[0].astype(int)
    after = process(engine, picture, **change)[0].astype(int)
    # To random weights a few edges more or less are next to nothing.
    assert np.abs(after - before).mean() > (0 if "high_threshold" in change else 2)


def test_resolution_sets_the_size(engine: hackathon, picture: np.ndarray) -> None:
    assert process(engine, picture, image_resolution=96)[0].shape == (128, 128, 3)


def test_channels_are_taken_as_they_come(
    engine: hackathon, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No BGR/RGB swap inside: the picture reaches the edge detector as it was given."""
    from cldm.image import canny_map

    seen: List[np.ndarray] = []

    def record(image: Any, *arguments: Any) -> np.ndarray:
        seen.append(np.array(image))
        return canny_map(image, *arguments)

    monkeypatch.setattr("runtime.pipeline.canny_map", record)
    monkeypatch.setattr("cldm.reference.canny_map", record)
    colored = picture.copy()
    colored[..., 1] //= 2
    colored[..., 2] = 90
    process(engine, colored)
    engine.reference(colored, Request("a bird", image_resolution=64, ddim_steps=1, seed=1))
    assert len(seen) == 2
    assert all(np.array_equal(image, colored) for image in seen)


def test_samples_are_one_draw_of_noise(engine: hackathon, picture: np.ndarray) -> None:
    """Each of three samples is what its part of one noise tensor gives alone."""
    import torch

    request = Request("a bird", image_resolution=64, ddim_steps=4, num_samples=3, seed=3)
    result = engine.run(picture, request)
    drawn = torch.randn((3, 4, 8, 16), generator=torch.Generator().manual_seed(3))
    alone = [engine.run(picture, replace(request, num_samples=1), latents=drawn[i : i + 1]) for i in range(3)]
    assert len(result.images) == 3
    assert all(np.array_equal(image, one.images[0]) for image, one in zip(result.images, alone))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(result.latent[i] - result.latent[j]) > 0.5 * np.linalg.norm(result.latent[j])


def test_noise_of_the_steps_is_the_references(engine: hackathon, picture: np.ndarray) -> None:
    request = Request("a bird", image_resolution=64, ddim_steps=4, num_samples=3, seed=3, eta=0.5)
    found, wanted = engine.run(picture, request).latent, engine.reference(picture, request).latent
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)
    still = engine.run(picture, replace(request, eta=0.0)).latent
    assert np.linalg.norm(found - still) > 0.05 * np.linalg.norm(still)


@pytest.mark.parametrize("kind", ["subset", "linear"])
@pytest.mark.parametrize("indices", [(5, 4, 2, 0), (5, 3, 2), (5,), (5, 4, 3, 2, 1, 0)])
def test_plan_is_ddim_with_estimated_noise(
    engine: hackathon, picture: np.ndarray, kind: str, indices: Tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original algorithm takes all its steps, but is told the estimate where the plan does not evaluate."""
    request = Request("a bird", image_resolution=64, ddim_steps=6, num_samples=2, seed=3)
    engine.reference(picture, request)
    model = engine._reference.model
    schedule = model.config.schedule
    plan = (subset_plan if kind == "subset" else linear_plan)(schedule, 6, indices)
    predict, known = model.predict_noise, {}

    def estimate(x: Any, t: Any, context: Any, hint: Any, scales: Any) -> Any:
        seen, now = known.setdefault(context.data_ptr(), []), int(t[0])
        if now in plan.timesteps:
            seen.append((now, predict(x, t, context, hint, scales)))
        (earlier, before), (last, noise) = seen[-2:] if len(seen) > 1 else (seen[-1], seen[-1])
        if kind == "subset" or earlier == last:
            return noise
        return noise + (now - last) / (last - earlier) * (noise - before)

    monkeypatch.setattr(model, "predict_noise", estimate)
    wanted = engine.reference(picture, request).latent
    found = engine.run(picture, request, plan=plan)
    assert np.linalg.norm(found.latent - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert (found.receipt.evaluations, found.receipt.sampling) == (len(indices), str(plan))


def test_plan_of_all_steps_is_the_default(engine: hackathon, picture: np.ndarray) -> None:
    request = Request("a bird", image_resolution=64, ddim_steps=4, seed=3)
    default = engine.run(picture, request)
    exact = engine.run(picture, request, plan=exact_plan(ScheduleConfig(), 4))
    assert np.array_equal(default.latent, exact.latent)
    assert default.receipt.sampling == exact.receipt.sampling == "4 of 4 evaluations, exact"


def test_plan_for_another_request_is_refused(engine: hackathon, picture: np.ndarray) -> None:
    request = Request("a bird", image_resolution=64, ddim_steps=4, seed=3)
    with pytest.raises(ValueError, match="the plan is for 5 steps, the request for 4"):
        engine.run(picture, request, plan=exact_plan(ScheduleConfig(), 5))
    with pytest.raises(ValueError, match="eta is 0.5"):
        engine.run(picture, replace(request, eta=0.5), plan=exact_plan(ScheduleConfig(), 4))


def test_process_is_generate(engine: hackathon, picture: np.ndarray) -> None:
    result = engine.generate(
        picture,
        "a bird",
        added_prompt=ARGUMENTS["a_prompt"],
        negative_prompt=ARGUMENTS["n_prompt"],
        image_resolution=64,
        num_inference_steps=4,
        seed=ARGUMENTS["seed"],
    )
    assert np.array_equal(result.images[0], process(engine, picture)[0])
    assert result.canny.shape == (64, 128)
    assert set(np.unique(result.canny)) == {0, 255}
    receipt = result.receipt
    assert (receipt.model, receipt.precision, receipt.device) == ("small", "fp32", "cpu")
    assert (receipt.seed, receipt.evaluations, receipt.num_samples) == (2946901, 4, 1)
    stages = {"host", "text", "hint", "schedule", "steps", "decode"}
    assert set(receipt.milliseconds) == stages | {"total"}
    assert sum(receipt.milliseconds[s] for s in stages) <= receipt.milliseconds["total"]


def test_latents_replace_the_seed(engine: hackathon, picture: np.ndarray) -> None:
    import torch

    options = {"image_resolution": 64, "num_inference_steps": 4}
    own = engine.generate(picture, "a bird", seed=8, **options)
    noise = torch.randn((1, 4, 8, 16), generator=torch.Generator().manual_seed(8))
    for latents in (noise, noise.numpy(), noise.double()):
        given = engine.generate(picture, "a bird", seed=9, latents=latents, **options)
        assert np.array_equal(given.images[0], own.images[0])
    for bad, error in (
        (noise[:, :3], ValueError),
        (noise * float("nan"), ValueError),
        (noise.int(), TypeError),
        ([[1.0]], TypeError),
    ):
        with pytest.raises(error, match="latents"):
            engine.generate(picture, "a bird", latents=bad, **options)


def test_any_seed_is_drawn_and_told(engine: hackathon, picture: np.ndarray) -> None:
    options = {"image_resolution": 64, "num_inference_steps": 1}
    drawn = engine.generate(picture, "a bird", seed=-1, **options)
    assert 0 <= drawn.receipt.seed <= 65535
    again = engine.generate(picture, "a bird", seed=drawn.receipt.seed, **options)
    assert np.array_equal(drawn.images[0], again.images[0])


def test_global_generators_are_left_alone(engine: hackathon, picture: np.ndarray) -> None:
    import torch

    torch.manual_seed(1)
    wanted = torch.randn(3)
    torch.manual_seed(1)
    process(engine, picture, eta=0.5)
    assert torch.equal(torch.randn(3), wanted)


def test_progress_counts_evaluations(engine: hackathon, picture: np.ndarray) -> None:
    seen = []
    request = Request("a bird", image_resolution=64, ddim_steps=3, num_samples=2, seed=1)
    engine.run(picture, request, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_many_schedules_in_turn(engine: hackathon, picture: np.ndarray) -> None:
    """More schedule lengths than are kept: the first one is made anew and gives the same image."""
    first = process(engine, picture, ddim_steps=1)[0]
    for steps in range(2, 12):
        process(engine, picture, ddim_steps=steps)
    assert np.array_equal(process(engine, picture, ddim_steps=1)[0], first)


@pytest.mark.parametrize("samples", [2, 3])
def test_graphs_for_several_samples(samples: int, config_file: Path, build_dir: Path, picture: np.ndarray) -> None:
    """Five images in runs of two or three, the last one not full, are those of five runs of one."""
    hk, one = hackathon(), hackathon()
    request = Request("a bird", image_resolution=64, ddim_steps=2, num_samples=5, seed=1, eta=0.4)
    results = []
    for engine, n in ((hk, samples), (one, 1)):
        engine.initialize(
            str(config_file), "torch", device="cpu", build_dir=str(build_dir), samples=n, height=64, width=128
        )
        results.append(engine.run(picture, request))
        engine.close()
    assert results[0].latent.shape == (5, 4, 8, 16)
    np.testing.assert_allclose(results[0].latent, results[1].latent, rtol=0, atol=1e-4)


def test_backends_agree(config_file: Path, build_dir: Path, picture: np.ndarray) -> None:
    request = Request("a bird", "x", "y", image_resolution=64, ddim_steps=7, seed=1, eta=0.4, guess_mode=True)
    latents = []
    for backend in ("onnxruntime", "torch"):
        hk = hackathon()
        hk.initialize(str(config_file), backend, device="cpu", build_dir=str(build_dir), height=64, width=128)
        latents.append(hk.run(picture, request).latent)
        assert backend in hk.summary
        hk.close()
    assert np.linalg.norm(latents[0] - latents[1]) < 1e-4 * np.linalg.norm(latents[1])


def test_threads_take_turns(engine: hackathon, picture: np.ndarray) -> None:
    """Pictures of two sizes and four seeds from four threads are those of one thread."""
    from concurrent.futures import ThreadPoolExecutor

    def paint(seed: int) -> np.ndarray:
        return process(engine, picture, seed=seed, ddim_steps=2 + seed % 2, image_resolution=64 + 32 * (seed % 2))[0]

    alone = [paint(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(paint, range(8)))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together))


def test_closed_is_closed(config_file: Path, build_dir: Path, picture: np.ndarray) -> None:
    hk = hackathon()
    hk.initialize(str(config_file), "torch", device="cpu", build_dir=str(build_dir), height=64, width=64)
    hk.close()
    hk.close()
    with pytest.raises(RuntimeError, match="initialize"):
        process(hk, picture)
    with pytest.raises(RuntimeError, match="initialize"):
        hk.reference(picture, Request("a bird"))


def test_fp32_graphs_and_reference_share_one_model(config_file: Path, build_dir: Path, picture: np.ndarray) -> None:
    """On a laptop a second SD1.5 in memory is 5 GB."""
    hk = hackathon()
    hk.initialize(str(config_file), "torch", device="cpu", build_dir=str(build_dir), height=64, width=64)
    hk.reference(picture, Request("a bird", image_resolution=64, ddim_steps=1, seed=1))
    graphs = next(iter(hk._backend._modules.values()))
    weight = graphs["step"].unet.input_blocks[0][0].weight
    assert hk._reference.model.unet.input_blocks[0][0].weight.data_ptr() == weight.data_ptr()
    hk.close()


def test_floating_point_mode_is_left_alone(config_file: Path, build_dir: Path) -> None:
    """ONNX Runtime can make the calling thread flush denormals to zero, for good."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from canny2image_TRT import hackathon\n"
        "hk = hackathon(); hk.initialize(sys.argv[2], 'onnxruntime', build_dir=sys.argv[3], height=64, width=64)\n"
        "print(float('1e-310') * float(sys.argv[4]) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(config_file), str(build_dir), "1.0"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_receipt_says_why(engine: hackathon, picture: np.ndarray) -> None:
    receipt = engine.run(picture, Request("a bird", image_resolution=64, ddim_steps=1, seed=1)).receipt
    assert receipt.backend_reason == "asked for"
    assert "random weights" in receipt.weights
    assert replace(receipt, seed=2).to_dict()["seed"] == 2


def test_runs_from_another_directory(config_file: Path, build_dir: Path, tmp_path: Path) -> None:
    """As a scorer would: the repository on sys.path, another working directory, no network."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from canny2image_TRT import hackathon\n"
        "import numpy as np\n"
        "hk = hackathon(); hk.initialize(sys.argv[2], 'onnxruntime', build_dir=sys.argv[3], height=64, width=64)\n"
        "image = np.zeros((64, 64, 3), np.uint8); image[20:40] = 255\n"
        "out = hk.process(image, 'a bird', '', '', 1, 64, 2, False, 1, 9, 1, 0.0, 100, 200)\n"
        "print(out[0].shape, len(out))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(config_file), str(build_dir)],
        cwd=str(tmp_path),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(64, 64, 3) 1"
    assert not list(tmp_path.iterdir())
