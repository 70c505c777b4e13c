"""The measures against independent implementations, on seeded backbones; cache, sheet, report and loop on fakes."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision

from cldm.request import Request
from scoring import backbones
from scoring.backbones import NotMeasured, find_backbone
from scoring.lpips_distance import LpipsDistance
from scoring.measures import COMPARISONS, LATENCY, Comparer, load_comparer, percentile, summarise
from scoring.metrics import error_stats, psnr, ssim
from scoring.pd import PerceptualDistance
from scoring.pictures import find_pictures
from scoring.reference_cache import Reference, ReferenceCache, reference_key, reference_sources
from scoring.report import format_report, format_table, to_csv, to_json, what_runs
from scoring.runner import CONTEST_REQUEST, Runner, ScoreOptions
from scoring.sheet import GAP, HEADER, SheetRow, contact_sheet, encode_png
from tests.scoring_fakes import FakePipeline, write_pictures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the scoring code must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def images():
    """A smooth picture with texture, and the same with noise and a shift in brightness."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(smooth.astype(int) + rng.integers(-20, 25, smooth.shape), 0, 255).astype(np.uint8)
    return smooth, noisy


# --- PSNR, SSIM, tensor errors


def test_psnr_is_skimage_s(images):
    from skimage.metrics import peak_signal_noise_ratio

    assert psnr(images[1], images[0]) == pytest.approx(peak_signal_noise_ratio(images[0], images[1]), rel=1e-12)
    assert psnr(images[0], images[0]) == float("inf")


@pytest.mark.parametrize("size", [(64, 96), (11, 11), (37, 12)])
def test_ssim_is_skimage_s(images, size):
    from skimage.metrics import structural_similarity

    a, b = (np.ascontiguousarray(image[: size[0], : size[1]]) for image in images)
    expected = structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)
    assert 0.2 < expected < 0.999
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_error_stats():
    stats = error_stats(np.array([3.0, 4.0, 2.0]), np.array([3.0, 0.0, 4.0]))
    assert stats.relative == pytest.approx(np.sqrt(20) / 5)
    assert (stats.max_abs, stats.mean_abs) == (4, 2)
    # Unsigned differences must not wrap around.
    assert error_stats(np.array([0], np.uint8), np.array([255], np.uint8)).max_abs == 255
    assert error_stats(np.zeros(3), np.zeros(3)).relative == 0
    assert error_stats(np.ones(3), np.zeros(3)).relative == float("inf")


@pytest.mark.parametrize(
    ("compare", "a", "b", "message"),
    [
        (error_stats, np.zeros(3), np.zeros(4), r"\(3,\).*\(4,\)"),
        (error_stats, np.zeros(0), np.zeros(0), "empty"),
        (error_stats, np.array([np.nan]), np.zeros(1), "NaN"),
        (psnr, np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), "float32"),
        (psnr, np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (psnr, np.zeros((4, 4, 3), np.uint8), np.zeros((4, 8, 3), np.uint8), r"\(4, 8, 3\)"),
        (ssim, np.zeros((10, 64, 3), np.uint8), np.zeros((10, 64, 3), np.uint8), "11 x 11"),
    ],
)
def test_incomparable_arrays_are_refused(compare, a, b, message):
    with pytest.raises(ValueError, match=message):
        compare(a, b)


# --- PD


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Seeded weights in pytorch-fid's file format, scaled so that features keep their size through 48 layers."""
    with torch.device("meta"):
        shapes = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in shapes.items():
        if value.dim() > 1:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("weight", "running_var")):
            state[name] = torch.ones(value.shape)
        else:
            state[name] = torch.zeros(value.shape, dtype=value.dtype)
    path = tmp_path_factory.mktemp("inception") / "seeded.pth"
    torch.save(state, str(path))
    return path


@pytest.fixture(scope="module")
def distance(inception_file):
    return PerceptualDistance(inception_file)


def test_pd_is_pytorch_fid_s_on_the_contest_s_files(distance, inception_file, images, tmp_path, monkeypatch):
    from pytorch_fid import fid_score, inception

    state = torch.load(str(inception_file), weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: state)
    network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    means = []
    for name, image in zip(("new.jpg", "base.jpg"), images):
        path = str(tmp_path / name)
        assert cv2.imwrite(path, image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the covariance of one sample
            mean, _ = fid_score.calculate_activation_statistics([path], network, 1, 2048, "cpu", num_workers=0)
        means.append(mean)
    expected = np.linalg.norm(means[0] - means[1])
    assert expected > 0.1
    assert distance.between_images(*images) == pytest.approx(expected, rel=1e-6)


def test_pd_follows_the_files_that_the_contest_writes(distance, images, tmp_path):
    def file(name, image):
        path = tmp_path / name
        assert cv2.imwrite(str(path), image)
        return path

    swapped = [file(f"swapped{i}.jpg", image) for i, image in enumerate(images)]
    true = [file(f"true{i}.jpg", np.ascontiguousarray(image[:, :, ::-1])) for i, image in enumerate(images)]
    exact = [file(f"exact{i}.png", image) for i, image in enumerate(images)]
    value = distance.between_images(*images)
    assert value == distance.between_files(*swapped)
    assert abs(value - distance.between_files(*true)) > 1e-3 * value
    assert abs(value - distance.between_files(*exact)) > 1e-3 * value
    assert distance.between_images(images[0], images[0]) == 0


def test_pd_leaves_pytorch_fid_as_it_was(inception_file):
    from pytorch_fid import inception

    loader = inception.load_state_dict_from_url
    PerceptualDistance(inception_file)
    assert inception.load_state_dict_from_url is loader


# --- LPIPS


def test_lpips_is_the_package_s(images, tmp_path, monkeypatch):
    import lpips

    with torch.device("meta"):
        alexnet = torchvision.models.alexnet()
    alexnet.features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(2)
    for parameter in alexnet.features.parameters():
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    path = tmp_path / "alexnet.pth"
    torch.save({f"features.{name}": value for name, value in alexnet.features.state_dict().items()}, str(path))
    ours = LpipsDistance(path)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda pretrained: alexnet)
    theirs = lpips.LPIPS(net="alex", verbose=False)
    with torch.no_grad():
        expected = float(theirs(lpips.im2tensor(images[0]), lpips.im2tensor(images[1])))
    assert expected > 1e-3
    assert ours.between_images(*images) == pytest.approx(expected, rel=1e-5)
    assert ours.between_images(images[0], images[0]) == 0
    # Colour order matters, so the test would see a swap.
    red_blue = [np.ascontiguousarray(image[:, :, ::-1]) for image in images]
    assert abs(ours.between_images(*red_blue) - expected) > 1e-3 * expected


# --- backbones


def _named_by_content(content):
    return f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_backbone_is_found_in_the_first_folder_that_has_it(tmp_path):
    name = _named_by_content(b"weights")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (second / name).write_bytes(b"weights")
    assert find_backbone(name, "torch", [first, second]) == second / name
    (first / name).write_bytes(b"weights")
    assert find_backbone(name, "torch", [first, second]) == first / name


def test_absent_backbone_says_what_goes_where(tmp_path):
    with pytest.raises(NotMeasured, match="^net-00000000.pth not found, put it at .*first/net-00000000.pth$"):
        find_backbone("net-00000000.pth", "torch", [tmp_path / "first", tmp_path])
    name = _named_by_content(b"weights")
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(NotMeasured, match="no_such_package"):
        find_backbone(name, "no_such_package", [tmp_path])


@pytest.mark.parametrize("content", [b"", b"weight", b"other weights"])
def test_damaged_or_foreign_backbone_is_named(tmp_path, content):
    name = _named_by_content(b"weights")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is truncated or another file"):
        find_backbone(name, "torch", [tmp_path])


def test_backbones_are_looked_for_in_models_metrics_first(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert backbones.backbone_folders() == [backbones.METRICS_DIR, tmp_path / "checkpoints"]
    assert backbones.METRICS_DIR.parts[-2:] == ("models", "metrics")


def test_measures_without_backbone_are_reported_and_not_numbers(tmp_path, images):
    comparer = load_comparer([tmp_path])
    place = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    assert comparer.not_measured["pd"] == f"not measured: {place.name} not found, put it at {place}"
    assert "alexnet-owt-7be5be79.pth not found" in comparer.not_measured["lpips"]
    latent = np.ones((1, 4, 2, 2), np.float32)
    values = comparer.compare(*images, latent, latent * 2)
    assert set(values) == {m.key for m in COMPARISONS} - {"pd", "lpips"}
    assert values["latent_relative_error"] == pytest.approx(0.5)
    place.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=place.name):
        load_comparer([tmp_path])


# --- statistics


def test_summary_is_numpy_s():
    values = np.random.default_rng(3).random(17).tolist()
    summary = summarise(values)
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["p50"] == pytest.approx(np.percentile(values, 50))
    assert summary["p95"] == pytest.approx(np.percentile(values, 95))
    assert summary["max"] == max(values)


def test_percentile_of_infinite_values():
    inf = float("inf")
    assert percentile([1.0, 2.0, inf], 50) == 2
    assert percentile([1.0, inf, inf], 50) == inf
    assert percentile([1.0, inf], 50) == inf
    assert summarise([7.0]) == {"mean": 7, "p50": 7, "p95": 7, "max": 7}


# --- pictures


def test_pictures_are_sorted_naturally_and_other_files_left_out(tmp_path):
    write_pictures(tmp_path, ["bird_10.jpg", "bird_2.jpg", "Bird_1.PNG", "cat.jpeg"])
    (tmp_path / "LICENSE.txt").write_text("CC0")
    (tmp_path / "README.md").write_text("pictures")
    names = [picture.name for picture in find_pictures(tmp_path)]
    assert names == ["Bird_1.PNG", "bird_2.jpg", "bird_10.jpg", "cat.jpeg"]
    assert [picture.name for picture in find_pictures(tmp_path, limit=2)] == names[:2]


def test_unreadable_pictures_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no picture folder at .*absent"):
        find_pictures(tmp_path / "absent")
    with pytest.raises(ValueError, match="no .jpg, .jpeg, .png files"):
        find_pictures(tmp_path)
    write_pictures(tmp_path, ["a.jpg"])
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    assert len(find_pictures(tmp_path, limit=1)) == 1
    with pytest.raises(ValueError, match=r"b\.jpg is not a picture"):
        find_pictures(tmp_path)
    cv2.imwrite(str(tmp_path / "b.jpg"), np.zeros((4, 2000, 3), np.uint8))
    with pytest.raises(ValueError, match=r"b\.jpg: .*2000 x 4"):
        find_pictures(tmp_path)


# --- reference cache


def _reference():
    rng = np.random.default_rng(4)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Reference(image, rng.standard_normal((1, 4, 8, 8)).astype(np.float32), {"model": "tiny", "seed": 1})


def test_cache_gives_back_what_was_stored(tmp_path):
    cache, reference = ReferenceCache(tmp_path / "new folder"), _reference()
    assert cache.load("key") is None
    cache.store("key", reference)
    loaded = cache.load("key")
    np.testing.assert_array_equal(loaded.image, reference.image)
    np.testing.assert_array_equal(loaded.latent, reference.latent)
    assert loaded.receipt == reference.receipt
    assert loaded.cached
    assert [path.name for path in cache.folder.iterdir()] == ["key.npz"]


def test_damaged_cache_files_count_as_absent(tmp_path):
    cache = ReferenceCache(tmp_path)
    cache.store("key", _reference())
    path = cache.path("key")
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        assert cache.load("key") is None
    middle = whole.index(b"image.npy") + 200
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    assert cache.load("key") is None
    path.write_bytes(b"garbage" * 100)
    assert cache.load("key") is None
    np.savez(str(path), key="key", image=np.zeros((2, 2, 3)), latent=np.zeros((1, 4, 1, 1), np.float32), receipt="{}")
    assert cache.load("key") is None
    path.write_bytes(whole)
    cache.path("other").write_bytes(whole)
    assert cache.load("key") is not None
    assert cache.load("other") is None


def test_reference_key_depends_on_everything_that_decides_the_image(monkeypatch):
    base = ("picture", CONTEST_REQUEST, "weights", "tokens", "cpu")
    keys = {reference_key(*base)}
    assert reference_key(*base) in keys
    changes = {
        "prompt": "a cat",
        "added_prompt": "",
        "negative_prompt": "",
        "num_samples": 2,
        "image_resolution": 512,
        "ddim_steps": 4,
        "guess_mode": True,
        "strength": 0.5,
        "guidance_scale": 8,
        "seed": 3,
        "eta": 0.5,
        "low_threshold": 50,
        "high_threshold": 150,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Request)}
    requests = [dataclasses.replace(CONTEST_REQUEST, **{name: value}) for name, value in changes.items()]
    keys |= {reference_key("picture", request, *base[2:]) for request in requests}
    keys |= {
        reference_key("another", *base[1:]),
        reference_key(*base[:2], "other", "tokens", "cpu"),
        reference_key(*base[:3], "other", "cpu"),
    }
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(reference_key(*base))
    assert len(keys) == 1 + len(changes) + 3 + 1


def test_reference_key_depends_on_the_gpu(monkeypatch):
    base = ("picture", CONTEST_REQUEST, "weights", "tokens")
    asked = []
    names = {"cuda": "GPU A", "cuda:1": "GPU B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or names[device])
    keys = [reference_key(*base, device) for device in ("cpu", "cuda", "cuda:1", "cuda")]
    assert asked == ["cuda", "cuda:1", "cuda"]
    assert len(set(keys)) == 3 and keys[1] == keys[3]
    names["cuda"] = "GPU C"
    assert reference_key(*base, "cuda") not in keys
    assert reference_key(*base, "cpu") == keys[0]


def test_reference_key_depends_on_the_code_that_makes_references(tmp_path, monkeypatch):
    found = {str(path.relative_to(ROOT)) for path in reference_sources()}
    named = ["controlnet", "image", "model", "noise", "reference", "request"]
    assert found == {f"cldm/{name}.py" for name in named} | {f"ldm/{path.name}" for path in (ROOT / "ldm").glob("*.py")}
    copies = []
    for path in reference_sources():
        copies.append(tmp_path / path.relative_to(ROOT))
        copies[-1].parent.mkdir(exist_ok=True)
        copies[-1].write_bytes(path.read_bytes())
    base = ("picture", CONTEST_REQUEST, "weights", "tokens", "cpu")
    keys = {reference_key(*base)}
    monkeypatch.setattr("scoring.reference_cache.ROOT", tmp_path)
    keys.add(reference_key(*base))
    assert len(keys) == 1, "the place of the repository must not count"
    for copy in copies:
        copy.write_bytes(copy.read_bytes() + b"\n")
        keys.add(reference_key(*base))
    assert len(keys) == 1 + len(copies)


def test_sources_of_references_are_all_that_the_reference_imports():
    """But for what decides tokens and weights, which have digests of their own, and what decides no pixel."""
    others = {"cldm.config", "cldm.result", "cldm.tokenizer"}
    program = "import sys, cldm.reference\nprint(*(name for name in sys.modules if name.startswith(('ldm.', 'cldm.'))))"
    done = subprocess.run([sys.executable, "-c", program], cwd=str(ROOT), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split()) - others
    assert "cldm.noise" in imported
    digested = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in reference_sources()}
    assert imported <= digested


# --- contact sheet


def _row(name="bird.jpg", reference=True, size=(64, 96)):
    photo = np.zeros((50, 80, 3), np.uint8)
    photo[:, :, 2] = 255  # red, as OpenCV reads it
    green = np.zeros((*size, 3), np.uint8)
    green[:, :, 1] = 255
    red = np.zeros((*size, 3), np.uint8)
    red[:, :, 0] = 255  # red, as the pipeline paints it
    edges = np.full(size, 255, np.uint8)
    return SheetRow(name, photo, edges, green if reference else None, red, 3.21)


def test_contact_sheet_shows_true_colours_in_order():
    sheet = cv2.imdecode(np.frombuffer(encode_png(contact_sheet([_row()])), np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape == (2 * HEADER + 64, 4 * 96 + 5 * GAP, 3)
    centres = [sheet[2 * HEADER + 32, GAP + i * (96 + GAP) + 48].tolist() for i in range(4)]
    assert centres == [[0, 0, 255], [255, 255, 255], [0, 255, 0], [0, 0, 255]]  # BGR
    assert (sheet[:HEADER] < 128).any()
    assert (sheet[HEADER : 2 * HEADER] < 128).any()


def test_contact_sheet_without_reference_with_many_rows_sizes_and_names():
    plain = contact_sheet([_row(reference=False)])
    assert plain.shape[1] == 3 * 96 + 4 * GAP
    assert contact_sheet([_row()] * 9).shape[0] == HEADER + 8 * (HEADER + 64)
    mixed = contact_sheet([_row("птица.jpg"), _row(size=(128, 64)), _row(size=(1024, 512), reference=False)])
    assert mixed.shape == (HEADER + 3 * HEADER + 64 + 128 + 512, 4 * 256 + 5 * GAP, 3)
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])


# --- the loop


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "pictures", ["bird_1.jpg", "bird_2.png"])
    return find_pictures(tmp_path / "pictures")


def _run(tmp_path, pictures, pipeline=None, **options):
    pipeline = pipeline or FakePipeline()
    comparer = load_comparer([tmp_path])
    runner = Runner(pipeline, comparer, ScoreOptions(**options), ReferenceCache(tmp_path / "cache"))
    runner.warm_up(pictures[0])
    stages = []
    score = runner.run(pictures, 8, lambda name, doing: stages.append((name, doing)))
    return pipeline, score, stages


def test_process_is_called_as_the_contest_does(tmp_path, pictures):
    pipeline, score, stages = _run(tmp_path, pictures, warmup=2, repeats=3)
    calls = [call for call in pipeline.calls if call[0] == "process"]
    assert len(calls) == 2 + 3 * 2
    for _, image, arguments in calls:
        assert arguments == (
            "a bird",
            "best quality, extremely detailed",
            "longbody, lowres, bad anatomy, bad hands, missing fingers",
            *(1, 256, 20, False, 1, 9, 2946901, 0.0, 100, 200),
        )
        assert any(np.array_equal(image, cv2.imread(str(picture.path))) for picture in pictures)
    assert (pipeline.count("run"), pipeline.count("reference")) == (1 + 2, 2)
    assert all(call[2] == CONTEST_REQUEST for call in pipeline.calls if call[0] != "process")
    assert [len(picture.latencies_ms) for picture in score.pictures] == [3, 3]
    for picture in score.pictures:
        assert picture.values["latency_ms"] == sorted(picture.latencies_ms)[1]
        assert picture.values["pixel_max_abs"] == 2
        assert picture.values["latent_relative_error"] == pytest.approx(0.1, rel=1e-5)
    assert [stage for stage in stages if stage[1] == "done"] == [("bird_1.jpg", "done"), ("bird_2.png", "done")]


def test_references_are_made_once(tmp_path, pictures):
    pipeline, first, _ = _run(tmp_path, pictures)
    assert pipeline.count("reference") == 2
    again, second, _ = _run(tmp_path, pictures)
    assert again.count("reference") == 0
    assert [picture.reference_cached for picture in second.pictures] == [True, True]
    for a, b in zip(first.pictures, second.pictures):
        assert {**a.values, "latency_ms": 0} == {**b.values, "latency_ms": 0}
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert _run(tmp_path, pictures)[0].count("reference") == 2
    other_weights = FakePipeline()
    other_weights.weights_digest = "other"
    _run(tmp_path, pictures, other_weights)
    assert other_weights.count("reference") == 2
    other_vocabulary = FakePipeline()
    other_vocabulary.vocabulary = "other"
    _run(tmp_path, pictures, other_vocabulary)
    assert other_vocabulary.count("reference") == 2


def test_noise_floor_recomputes_both_references(tmp_path, pictures):
    _run(tmp_path, pictures)
    pipeline, score, _ = _run(tmp_path, pictures, FakePipeline(reference_noise=1), noise_floor=True)
    assert pipeline.count("reference") == 4
    assert [picture.floor["pixel_max_abs"] for picture in score.pictures] == [1, 1]
    text = format_report(score)
    assert "Noise floor" in text
    assert to_json(score, {})["noise_floor"]["pixel_max_abs"]["max"] == 1


def test_latency_only(tmp_path, pictures):
    pipeline, score, _ = _run(tmp_path, pictures, reference=False)
    assert pipeline.count("reference") == 0
    assert [set(picture.values) for picture in score.pictures] == [{"latency_ms"}] * 2
    assert "PD" not in format_report(score)
    assert not (tmp_path / "cache").exists()
    assert score.sheet[0].reference is None


def test_images_that_differ_between_calls_are_told(tmp_path, pictures):
    _, score, _ = _run(tmp_path, pictures, FakePipeline(unsteady=True), repeats=2)
    text = format_report(score)
    assert "bird_1.jpg, bird_2.png: repeated calls of process made different images" in text
    assert "process and run made different images" in text


def test_an_error_names_its_picture(tmp_path, pictures):
    pipeline = FakePipeline()
    pipeline.process = lambda *arguments: (_ for _ in ()).throw(ValueError("step gave NaN"))
    with pytest.raises(RuntimeError, match=r"bird_1\.jpg: step gave NaN"):
        _run(tmp_path, pictures, pipeline)


def test_a_disk_that_fills_up_costs_the_cache_only(tmp_path, pictures, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ReferenceCache, "store", full)
    _, score, _ = _run(tmp_path, pictures)
    assert "the reference was not cached: [Errno 28] No space left on device" in format_report(score)
    assert len(score.pictures) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"request": dataclasses.replace(CONTEST_REQUEST, num_samples=2)}, "num_samples 2"),
        ({"request": dataclasses.replace(CONTEST_REQUEST, seed=-1)}, "fixed seed"),
        ({"warmup": -1}, "warmup must be 0 or more, got -1"),
        ({"repeats": 0}, "repeats must be 1 or more, got 0"),
        ({"noise_floor": True, "reference": False}, "noise floor"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ScoreOptions(**options)


# --- report


def test_report_says_what_ran_and_what_was_not_measured(tmp_path, pictures):
    pipeline, score, _ = _run(tmp_path, pictures)
    head = what_runs(score.pictures[0].receipt, 1, 3)
    for part in (
        "fake, no weights",
        "onnxruntime: no CUDA device",
        "fp32 on cpu",
        "20 network evaluations",
        "wall clock of process(), 3 timed calls a picture, their median, after 2 untimed",
    ):
        assert part in head
    by_plan = what_runs(score.pictures[0].receipt, 1, 3, by_plan=True)
    assert "wall clock of run(), 3 timed calls a picture and plan, after 1 untimed a plan and picture size" in by_plan
    lines = format_report(score).splitlines()
    assert lines[0].split()[:4] == ["picture", "latency", "ms", "PD"]
    assert [line.split()[0] for line in lines[2:4]] == ["bird_1.jpg", "bird_2.png"]
    assert [line.split()[0] for line in lines[5:9]] == ["mean", "p50", "p95", "max"]
    place = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    assert lines[9] == f"PD: not measured: {place.name} not found, put it at {place}"
    assert lines[10].startswith("LPIPS: not measured: alexnet-owt-7be5be79.pth not found, put it at")
    assert all(line.split()[2] == "-" for line in lines[2:4])


def test_pass_mark():
    measures = [LATENCY, COMPARISONS[0]]
    rows = [("a", {"latency_ms": 1.0, "pd": 12.0}), ("b", {"latency_ms": 3.0, "pd": 12.002})]
    lines = format_table(measures, rows, {}).splitlines()
    assert lines[2].split() == ["a", "1.00", "12.000", "pass"]
    assert lines[3].split() == ["b", "3.00", "12.002", "FAIL"]
    assert lines[5].split() == ["mean", "2.00", "12.001"]
    assert len({len(line.rstrip()) for line in lines[:2]}) == 1


def test_json_is_strict_and_whole_and_csv_says_not_measured(tmp_path, pictures):
    _, score, _ = _run(tmp_path, pictures, FakePipeline(error=0))

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    value = json.loads(json.dumps(to_json(score, {"limit": 2})), parse_constant=no_constant)
    assert value["arguments"] == {"limit": 2}
    assert value["request"]["seed"] == 2946901
    assert value["pictures"][0]["values"]["psnr_db"] == "inf"
    assert value["pictures"][0]["receipt"]["backend"] == "onnxruntime"
    assert value["pictures"][0]["passes"] is None
    assert "pd" not in value["summary"]
    assert "not measured: " in value["not_measured"]["pd"]
    assert value["environment"]["packages"]["torch"]
    rows = list(csv.DictReader(io.StringIO(to_csv(score))))
    assert [row["picture"] for row in rows] == ["bird_1.jpg", "bird_2.png"]
    assert rows[0]["pd"] == "not measured"
    assert float(rows[0]["latency_ms"]) == score.pictures[0].values["latency_ms"]


def test_pd_and_its_mark_reach_the_report(tmp_path, pictures, distance):
    runner = Runner(FakePipeline(), Comparer(pd=distance), ScoreOptions(), ReferenceCache(tmp_path / "cache"))
    score = runner.run(pictures, 8, lambda name, doing: None)
    expected = distance.between_images(score.sheet[0].image, score.sheet[0].reference)
    assert score.pictures[0].values["pd"] == expected > 0
    assert "PD <= 12: 2 of 2 pictures pass" in format_report(score)
    assert to_json(score, {})["pictures"][0]["passes"] is True


# --- the real pipeline


def test_the_tiny_model_scores_against_its_reference(tmp_path, pictures, tiny_weights):
    from canny2image_TRT import hackathon

    request = dataclasses.replace(CONTEST_REQUEST, image_resolution=64, ddim_steps=2)
    pipeline = hackathon()
    pipeline.initialize("tiny", "torch", "fp32", "cpu", str(tmp_path / "build"), height=64, width=128)
    options = ScoreOptions(request=request, repeats=2, noise_floor=True)
    try:
        runner = Runner(pipeline, load_comparer([tmp_path]), options, ReferenceCache(tmp_path / "cache"))
        score = runner.run(pictures[:1], 8, lambda name, doing: None)
    finally:
        pipeline.close()
    for picture in score.pictures:
        assert picture.warnings == ()
        assert picture.values["latent_relative_error"] < 1e-4
        assert picture.values["pixel_max_abs"] <= 2
        assert picture.values["psnr_db"] > 50
        assert picture.floor["latent_relative_error"] == 0
        assert picture.receipt["evaluations"] == picture.reference_receipt["evaluations"] == 2
        assert (picture.receipt["backend"], picture.reference_receipt["backend"]) == ("torch", "reference")
        assert picture.receipt["weights"] == picture.reference_receipt["weights"] == str(tiny_weights)
    row = score.sheet[0]
    assert row.image.shape == row.reference.shape == (64, 128, 3)
    assert row.image.std() > 30, "a picture has light and dark"
