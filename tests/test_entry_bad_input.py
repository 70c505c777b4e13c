"""canny2image_TRT.hackathon given what it cannot use, or what is odd but must work."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import export_onnx
from canny2image_TRT import hackathon
from cldm.config import ModelConfig
from cldm.request import Request
from cldm.tokenizer import TokenizerNotFound
from cldm.weights import CheckpointError, find_weights
from deploy.manifest import ArtefactError, check_artefact, identity
from deploy.spec import Build, graph_specs
from runtime.backends import BackendError, choose_backend
from runtime.pipeline import BrokenOutput
from tests.micro_model import SIZE, micro_text, shared_build, shared_config, state_of

pytestmark = pytest.mark.usefixtures("one_thread")

ARGUMENTS: Dict[str, Any] = {
    "prompt": "a bird",
    "a_prompt": "best quality",
    "n_prompt": "lowres",
    "num_samples": 1,
    "image_resolution": SIZE,
    "ddim_steps": 1,
    "guess_mode": False,
    "strength": 1.0,
    "scale": 9.0,
    "seed": 5,
    "eta": 0.0,
    "low_threshold": 100,
    "high_threshold": 200,
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "BACKEND", "PRECISION", "DEVICE", "CHECKPOINT", "BUILD_DIR"):
        monkeypatch.delenv(f"HACKATHON_{name}", raising=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return shared_config(tmp_path_factory.getbasetemp())


def options(config: ModelConfig, **changes: Any) -> Dict[str, Any]:
    """Arguments of `initialize` for the very small model on PyTorch."""
    common = {"model": str(Path(config.folder) / "micro.yaml"), "height": SIZE, "width": SIZE}
    return {**common, "backend": "torch", "device": "cpu", "precision": "fp32", **changes}


@pytest.fixture(scope="module")
def engine(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hackathon]:
    made = hackathon()
    made.initialize(**options(config, build_dir=str(tmp_path_factory.mktemp("build"))))
    yield made
    made.close()


def picture(channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (8, 8, channels)), np.ones((8, 8, 1))).astype(np.uint8)


def process(engine: hackathon, image: Any, **changes: Any) -> List[np.ndarray]:
    return engine.process(image, **{**ARGUMENTS, **changes})


# -- before, after, and instead of initialize ------------------------------------------------------------------------


CALLS: Dict[str, Callable[[hackathon], Any]] = {
    "process": lambda engine: process(engine, picture()),
    "generate": lambda engine: engine.generate(picture(), "a bird"),
    "run": lambda engine: engine.run(picture(), Request("a bird")),
    "reference": lambda engine: engine.reference(picture(), Request("a bird")),
    "summary": lambda engine: engine.summary,
    "weights_digest": lambda engine: engine.weights_digest,
}


def assert_not_ready(engine: hackathon) -> None:
    for call in CALLS.values():
        with pytest.raises(RuntimeError, match=r"call initialize\(\) first"):
            call(engine)


def test_before_initialize_and_after_close(config: ModelConfig, tmp_path: Path) -> None:
    engine = hackathon()
    assert_not_ready(engine)
    engine.close()
    engine.initialize(**options(config, build_dir=str(tmp_path)))
    assert len(process(engine, picture())) == 1
    engine.close()
    engine.close()
    assert_not_ready(engine)
    engine.initialize(**options(config, build_dir=str(tmp_path)))
    assert len(process(engine, picture())) == 1
    engine.close()


BAD_OPTIONS = {
    "model": ({"model": "sd99"}, FileNotFoundError, "no model config .*sd99.*models here: .*tiny"),
    "config": ({"model": __file__ + ".yaml"}, FileNotFoundError, "no model config"),
    "backend": (
        {"backend": "openvino"},
        BackendError,
        "unknown backend 'openvino'; there are tensorrt, torch and onnxruntime",
    ),
    "precision": ({"precision": "int4"}, BackendError, "torch on cpu runs fp32, fp16, bf16, not 'int4'"),
    "precision of a backend": (
        {"precision": "bf16", "backend": "onnxruntime"},
        BackendError,
        "onnxruntime on cpu runs fp32, fp16, not 'bf16'",
    ),
    "device": ({"device": "gpu"}, BackendError, "device 'gpu' is not one that torch knows"),
    "device of torch's alone": ({"device": "meta"}, BackendError, "must be cpu or cuda, got 'meta'"),
    "device number": ({"device": "cuda:99"}, BackendError, "device cuda:99 was asked for, but"),
    "device of a backend": (
        {"device": "cuda", "backend": "onnxruntime"},
        BackendError,
        "onnxruntime backend runs on the CPU",
    ),
    "height": ({"height": 100}, ValueError, "height must be a positive multiple of 16, got 100"),
    "width": ({"width": -64}, ValueError, "width must be a positive multiple of 16, got -64"),
    "samples": ({"samples": 0}, ValueError, "samples must be at least 1"),
    "missing checkpoint": ({"checkpoint": "/absent.pth"}, CheckpointError, "no checkpoint at /absent.pth"),
    "both": ({"checkpoint": "/a.pth", "random_weights": 1}, CheckpointError, "not both"),
    "seed of weights": ({"random_weights": -1}, CheckpointError, "seed of random weights"),
}


@pytest.mark.parametrize("case", list(BAD_OPTIONS))
def test_bad_options_of_initialize(case: str, config: ModelConfig, tmp_path: Path) -> None:
    changes, error, said = BAD_OPTIONS[case]
    engine = hackathon()
    with pytest.raises(error, match=said):
        engine.initialize(**options(config, build_dir=str(tmp_path), **changes))
    assert_not_ready(engine)


def test_failed_initialize_leaves_nothing_of_the_one_before(config: ModelConfig, tmp_path: Path) -> None:
    engine = hackathon()
    engine.initialize(**options(config, build_dir=str(tmp_path)))
    for changes in ({"precision": "int4"}, {"samples": 0}, {"model": "sd99"}):
        with pytest.raises((BackendError, ValueError, FileNotFoundError)):
            engine.initialize(**options(config, build_dir=str(tmp_path), **changes))
        assert_not_ready(engine)


def test_arguments_win_over_the_environment(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODEL", "BACKEND", "PRECISION", "DEVICE", "CHECKPOINT"):
        monkeypatch.setenv(f"HACKATHON_{name}", "nonsense")
    engine = hackathon()
    engine.initialize(**options(config, build_dir=str(tmp_path), random_weights=3))
    assert "random weights, seed 3" in engine.summary and "torch on cpu in fp32" in engine.summary
    engine.close()
    for name in ("model", "backend", "precision", "device"):
        given = {key: value for key, value in options(config, random_weights=3).items() if key != name}
        with pytest.raises((FileNotFoundError, BackendError), match="nonsense"):
            engine.initialize(**given, build_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint at nonsense"):
        engine.initialize(**options(config, build_dir=str(tmp_path)))


def test_missing_vocabulary(config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An error, but for random weights, to which all words are alike."""
    (tmp_path / "micro.yaml").write_text(micro_text())
    arguments = options(config, model=str(tmp_path / "micro.yaml"), build_dir=str(tmp_path))
    engine = hackathon()
    engine.initialize(**arguments)
    assert "vocabulary is not here" in capsys.readouterr().err and len(process(engine, picture())) == 1
    save_file(state_of(config), str(tmp_path / "micro.safetensors"))
    with pytest.raises(TokenizerNotFound, match="put vocab.json and merges.txt into .*vocabulary"):
        engine.initialize(**arguments)
    assert_not_ready(engine)


def test_what_is_left(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.cuda_problem", lambda: "no CUDA device")
    monkeypatch.setattr("runtime.backends.onnxruntime_problem", lambda: "the package onnxruntime is not installed")
    weights = find_weights(config)
    backend, reason = choose_backend(None, None, weights, lambda: None, tmp_path)
    assert (backend.name, backend.device) == ("torch", "cpu")
    assert reason == (
        "all that is left; tensorrt and torch on CUDA: no CUDA device; onnxruntime: the package onnxruntime is not"
        " installed"
    )
    with pytest.raises(BackendError, match="onnxruntime cannot run here: the package onnxruntime is not installed"):
        choose_backend("onnxruntime", None, weights, lambda: None, tmp_path)
    backend, reason = choose_backend("torch", None, weights, lambda: None, tmp_path)
    assert (backend.name, backend.device, reason) == ("torch", "cpu", "asked for")


def test_export_without_its_packages(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was given ONNX Runtime alone is told what it lacks, before any work."""
    backend, _ = choose_backend("onnxruntime", None, find_weights(config), lambda: pytest.fail("loaded"), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="was not made.*onnx, polygraphy is missing: run bash preprocess.sh"):
        backend.sessions(Build(config, 64, 64))


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "no CUDA device"),
        ("cuda:1", "no CUDA device"),
        ("mps", "cpu or cuda"),
        ("banana", "not one that torch"),
    ],
)
def test_a_device_is_honoured_or_refused(
    device: str, words: str, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no backend was named with it."""
    monkeypatch.setattr("runtime.backends.cuda_problem", lambda: "no CUDA device")
    for backend in (None, "auto", "torch"):
        with pytest.raises(BackendError, match=words):
            choose_backend(backend, device, find_weights(config), lambda: None, tmp_path)


# -- pictures --------------------------------------------------------------------------------------------------------


BAD_PICTURES = {
    "float": (picture().astype(np.float32), TypeError, "must be uint8 in 0 .. 255, got float32"),
    "bool": (picture() > 100, TypeError, "must be uint8"),
    "None": (None, TypeError, "cv2.imread returns that where it cannot read the file"),
    "path": ("bird.jpg", TypeError, "NumPy array of uint8, got str"),
    "Path": (Path("bird.jpg"), TypeError, "NumPy array of uint8, got PosixPath"),
    "bytes": (b"\xff\xd8\xff", TypeError, "NumPy array of uint8, got bytes"),
    "list": ([[0, 1], [2, 3]], TypeError, "NumPy array of uint8, got list"),
    "tensor": (torch.zeros(64, 64, 3, dtype=torch.uint8), TypeError, "NumPy array of uint8, got Tensor"),
    "channels first": (np.zeros((3, 64, 64), np.uint8), ValueError, r"got shape \(3, 64, 64\)"),
    "two channels": (np.zeros((64, 64, 2), np.uint8), ValueError, "must be H x W x 1, 3 or 4"),
    "batch": (np.zeros((1, 64, 64, 3), np.uint8), ValueError, "must be H x W x 1, 3 or 4"),
    "row": (np.zeros(64, np.uint8), ValueError, "must be H x W x 1, 3 or 4"),
    "empty": (np.zeros((0, 64, 3), np.uint8), ValueError, "is empty"),
    "no columns": (np.zeros((64, 0, 3), np.uint8), ValueError, "is empty"),
    "enormous": (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), ValueError, "20000 x 20000 has over 100,000,000"),
    "strip": (np.zeros((2, 5000, 3), np.uint8), ValueError, "crop it or change image_resolution"),
}


@pytest.mark.parametrize("case", list(BAD_PICTURES))
def test_bad_pictures(case: str, engine: hackathon) -> None:
    image, error, said = BAD_PICTURES[case]
    with pytest.raises(error, match=said):
        process(engine, image)
    with pytest.raises(error, match=said):
        engine.generate(image, "a bird", image_resolution=SIZE, num_inference_steps=1)
    with pytest.raises(error, match=said):
        engine.reference(image, Request("a bird", image_resolution=SIZE, ddim_steps=1))
    assert len(engine._pipelines) == 1, "nothing may be made ready for a picture that cannot be used"


def test_picture_of_another_size_than_the_graphs(engine: hackathon) -> None:
    pipeline = engine._pipelines[SIZE, SIZE]
    with pytest.raises(ValueError, match=r"resizes to 64 x 128, but these graphs are for 64 x 64"):
        pipeline.generate(np.zeros((64, 128, 3), np.uint8), Request("a bird", image_resolution=SIZE))


@pytest.mark.parametrize(
    "latents, error, said",
    [
        (np.zeros((1, 4, 8, 9), np.float32), ValueError, r"must have shape \(1, 4, 8, 8\).*got \(1, 4, 8, 9\)"),
        (np.zeros((2, 4, 8, 8), np.float32), ValueError, r"got \(2, 4, 8, 8\)"),
        (np.full((1, 4, 8, 8), np.nan), ValueError, "NaN or infinity"),
        (np.zeros((1, 4, 8, 8), np.int64), TypeError, "real numbers"),
        ([0.0], TypeError, "NumPy array or a tensor, got list"),
    ],
    ids=["width", "number", "nan", "integers", "list"],
)
def test_bad_latents(latents: Any, error: type, said: str, engine: hackathon) -> None:
    with pytest.raises(error, match=said):
        engine.generate(picture(), "a bird", image_resolution=SIZE, num_inference_steps=1, latents=latents)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_and_bgra_pictures(channels: int, engine: hackathon) -> None:
    image = picture(channels)
    (made,) = process(engine, image)
    assert made.shape == (SIZE, SIZE, 3) and made.dtype == np.uint8
    if channels == 1:
        assert np.array_equal(made, process(engine, image[:, :, 0])[0])
        assert np.array_equal(made, process(engine, np.repeat(image, 3, axis=2))[0])
    elif channels == 4:
        opaque = image.copy()
        opaque[:, :, 3] = 255
        assert np.array_equal(process(engine, opaque)[0], process(engine, image[:, :, :3])[0])
        clear = image.copy()
        clear[:, :, 3] = 0
        assert np.array_equal(process(engine, clear)[0], process(engine, np.full_like(image[:, :, :3], 255))[0])


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, values",
    [
        ("ddim_steps", [0, -1, 1001, 2.5, "20", None, True]),
        ("num_samples", [0, -1, 65, 1.0]),
        ("image_resolution", [0, -64, 63, 100_000, 64.5]),
        ("low_threshold", [-1, 256, float("nan"), 201]),
        ("high_threshold", [-1, 256, float("inf"), 99]),
        ("eta", [-0.1, 1.1, float("nan")]),
        ("strength", [float("nan"), float("inf"), -1, 11, "strong"]),
        ("scale", [float("nan"), float("-inf"), 101, None]),
        ("seed", [-2, 2**32, 1.5, None]),
        ("guess_mode", ["yes", None, 2]),
        ("prompt", [None, b"a bird", ["a bird"]]),
        ("a_prompt", [None]),
        ("n_prompt", [7]),
    ],
)
def test_bad_arguments(name: str, values: List[Any], engine: hackathon) -> None:
    called = {"a_prompt": "added_prompt", "n_prompt": "negative_prompt", "scale": "guidance_scale"}.get(name, name)
    for value in values:
        with pytest.raises((TypeError, ValueError), match=called):
            process(engine, picture(), **{name: value})


def test_resolution_is_rounded_as_the_original_does(engine: hackathon) -> None:
    (made,) = process(engine, picture(), image_resolution=90)
    assert made.shape == (64, 64, 3)
    (made,) = process(engine, picture(), image_resolution=100)
    assert made.shape == (128, 128, 3)


def test_drawn_seed_is_told(engine: hackathon) -> None:
    arguments = {"image_resolution": SIZE, "num_inference_steps": 1}
    results = [engine.generate(picture(), "a bird", seed=-1, **arguments) for _ in range(3)]
    seeds = [result.receipt.seed for result in results]
    assert all(0 <= seed <= 65535 for seed in seeds) and len(set(seeds)) > 1
    for result in results:
        again = engine.generate(picture(), "a bird", seed=result.receipt.seed, **arguments)
        assert np.array_equal(again.images[0], result.images[0])


def generate(engine: hackathon, prompt: str, **changes: Any) -> Any:
    return engine.generate(picture(), prompt, image_resolution=SIZE, num_inference_steps=1, seed=1, **changes)


def test_long_prompts_are_cut_and_named(engine: hackathon) -> None:
    long = " ".join(["a", "bird"] * 60)
    result = generate(engine, long + " volcano", negative_prompt="lowres")
    (warning,) = result.receipt.warnings
    assert "CLIP takes 75" in warning and "were cut" in warning and "volcano" in warning
    assert result.receipt.to_dict()["warnings"] == (warning,)
    same = generate(engine, long + " glacier", negative_prompt="lowres")
    assert np.array_equal(result.images[0], same.images[0]), "what is cut must not count"
    both = generate(engine, long, negative_prompt=long)
    assert len(both.receipt.warnings) == 2
    assert generate(engine, "a bird").receipt.warnings == ()


@pytest.mark.parametrize(
    "prompt", ["", " ", "一只鸟，最好的质量", "птица на ветке", "🐦🐦", "a\nb\tc\x00d", "طائر", "a" * 5000]
)
def test_odd_prompts_work(prompt: str, engine: hackathon) -> None:
    result = generate(engine, prompt, negative_prompt=prompt)
    plain = generate(engine, "a red house", negative_prompt="")
    assert np.isfinite(result.latent).all() and result.images[0].std() > 0
    assert not np.array_equal(result.latent, plain.latent)


def test_all_texts_empty(engine: hackathon) -> None:
    (made,) = process(engine, picture(), prompt="", a_prompt="", n_prompt="")
    assert made.std() > 0


# -- made files ------------------------------------------------------------------------------------------------------


def test_nothing_built_and_not_allowed_to(config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "my builds"
    engine = hackathon()
    with pytest.raises(ArtefactError, match="clip.onnx was not made.*; make it with: python3 export_onnx.py") as caught:
        engine.initialize(**options(config, backend="onnxruntime", build_dir=str(folder), export=False))
    assert_not_ready(engine)
    words = shlex.split(str(caught.value).split("make it with: ")[1])
    args = export_onnx.parse_arguments(words[2:])
    assert (args.model, args.height, args.width) == (str(Path(config.folder) / "micro.yaml"), SIZE, SIZE)
    assert args.output == folder and args.precision == "fp32"


@pytest.fixture
def built(config: ModelConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a whole build."""
    base = tmp_path_factory.getbasetemp()
    shared_build(base, "fp32", 1)
    folder = tmp_path / "build"
    name = f"micro-{SIZE}x{SIZE}-n1-fp32"
    shutil.copytree(base / "micro-build" / name, folder / name)
    return folder


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest", "garbage manifest"])
def test_damaged_onnx_file(damage: str, config: ModelConfig, built: Path, tmp_path: Path) -> None:
    build = Build(config, SIZE, SIZE)
    spec = graph_specs(build)["hint"]
    file = built / build.folder_name / spec.file
    manifest = file.with_name(file.name + ".json")
    whole = file.read_bytes()
    arguments = options(config, backend="onnxruntime", build_dir=str(built))
    engine = hackathon()
    engine.initialize(**arguments, export=False)
    (wanted,) = process(engine, picture())
    engine.close()
    {
        "truncated": lambda: file.write_bytes(whole[: len(whole) // 2]),
        "changed": lambda: file.write_bytes(whole[:-9] + b"\0" + whole[-8:]),
        "missing": file.unlink,
        "no manifest": manifest.unlink,
        "garbage manifest": lambda: manifest.write_bytes(b"\x80garbage"),
    }[damage]()
    with pytest.raises(ArtefactError, match="hint.onnx.*make it with"):
        engine.initialize(**arguments, export=False)
    engine.initialize(**arguments)
    check_artefact(file, identity(build, spec, find_weights(config)))
    assert np.array_equal(process(engine, picture())[0], wanted)
    engine.close()


def test_build_of_other_weights_is_not_used(config: ModelConfig, built: Path) -> None:
    arguments = options(config, backend="onnxruntime", build_dir=str(built), random_weights=8, export=False)
    with pytest.raises(ArtefactError, match="made for something else: weights is .*--random-weights 8"):
        hackathon().initialize(**arguments)


def test_build_folder_that_cannot_be_written(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="cannot write .*; choose another folder"):
        hackathon().initialize(**options(config, backend="onnxruntime", build_dir=str(tmp_path / "file" / "build")))


# -- broken outputs --------------------------------------------------------------------------------------------------


BROKEN = {
    "text": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
    "hint": "control_model.input_hint_block.2.weight",
    "time": "model.diffusion_model.time_embed.0.weight",
    "step": "model.diffusion_model.middle_block.0.in_layers.2.weight",
    "decode": "first_stage_model.decoder.conv_in.weight",
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("stage", list(BROKEN))
def test_broken_weights_are_told_by_stage(stage: str, value: float, config: ModelConfig, tmp_path: Path) -> None:
    state = state_of(config)
    state[BROKEN[stage]].view(-1)[0] = value
    checkpoint = tmp_path / "broken.safetensors"
    save_file(state, str(checkpoint))
    engine = hackathon()
    engine.initialize(**options(config, checkpoint=str(checkpoint), build_dir=str(tmp_path)))
    with pytest.raises(BrokenOutput, match=f"^stage {stage}: .*broken.safetensors"):
        process(engine, picture())
    with pytest.raises(BrokenOutput, match=f"^stage {stage}: "):
        generate(engine, "a bird", num_images_per_prompt=2)
    engine.close()


def test_a_good_run_after_a_broken_one(config: ModelConfig, tmp_path: Path) -> None:
    """What a broken run leaves in the buffers must not reach the next."""
    engine = hackathon()
    engine.initialize(**options(config, build_dir=str(tmp_path)))
    (wanted,) = process(engine, picture(), ddim_steps=2)
    for tensor in engine._pipelines[SIZE, SIZE].workspace._tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    assert np.array_equal(process(engine, picture(), ddim_steps=2)[0], wanted)
    engine.close()


def test_flat_image_is_told(config: ModelConfig, tmp_path: Path) -> None:
    state = state_of(config)
    for name in ("weight", "bias"):
        state[f"first_stage_model.decoder.conv_out.{name}"].zero_()
    save_file(state, str(tmp_path / "flat.safetensors"))
    engine = hackathon()
    engine.initialize(**options(config, checkpoint=str(tmp_path / "flat.safetensors"), build_dir=str(tmp_path)))
    with pytest.raises(BrokenOutput, match="stage decode: the image is flat: every pixel is 127"):
        process(engine, picture())
    engine.close()


def test_checkpoint_of_another_model(config: ModelConfig, tmp_path: Path) -> None:
    wider = dataclasses.replace(config, text=dataclasses.replace(config.text, mlp_width=96))
    save_file(state_of(wider), str(tmp_path / "wider.safetensors"))
    engine = hackathon()
    with pytest.raises(CheckpointError, match=r"3 mis-shaped:\n.*fc1.weight: \(96, 32\) instead of \(64, 32\)"):
        engine.initialize(**options(config, checkpoint=str(tmp_path / "wider.safetensors"), build_dir=str(tmp_path)))
    assert_not_ready(engine)
