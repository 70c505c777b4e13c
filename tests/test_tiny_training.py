"""Training of the tiny model: its losses, its bookkeeping, and a few steps of every stage from scenes to file."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Dict, List, Tuple

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from cldm.checkpoint import load_model
from cldm.config import ModelConfig, load_config
from cldm.image import canny_map
from cldm.model import ControlLDM
from cldm.tokenizer import Tokenizer
from cldm.weights import Weights
from ldm.schedule import alpha_bars
from tests.small_model import small_config
from tools import train_tiny
from tools.tiny import store, train_autoencoder, train_diffusion, training
from tools.tiny.scenes import make_scene
from tools.tiny.store import Scenes
from tools.tiny.train_diffusion import DiffusionStep, Latents
from tools.tiny.training import StageSettings, Stopped, Trainer


@pytest.fixture(autouse=True)
def report_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 2)


def random_model(seed: int = 3) -> ControlLDM:
    torch.manual_seed(seed)
    return ControlLDM(small_config()).requires_grad_(False)


def pictures(count: int, height: int = 32, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


# --- Losses ---


def test_gradient_loss_is_the_mean_difference_of_differences() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2, 3, 8, 16))
    wanted = 0.0
    for scale in (1, 2, 4):
        e = (a - b).reshape(2, 3, 8 // scale, scale, 16 // scale, scale).mean(axis=(3, 5))
        wanted += (np.abs(np.diff(e, axis=2)).mean() + np.abs(np.diff(e, axis=3)).mean()) / 3
    got = train_autoencoder.gradient_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert float(got) == pytest.approx(wanted, rel=1e-12)


def test_edge_strength_is_what_canny_thresholds() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    got = train_autoencoder.sobel_strength(train_autoencoder.to_images(torch.from_numpy(image))).numpy() * 127.5
    for picture, strength in zip(image, got):
        dx = cv2.Sobel(picture, cv2.CV_32F, 1, 0, borderType=cv2.BORDER_REPLICATE)
        dy = cv2.Sobel(picture, cv2.CV_32F, 0, 1, borderType=cv2.BORDER_REPLICATE)
        assert np.abs((np.abs(dx) + np.abs(dy)).max(axis=2) - strength).max() < 1e-2


def test_edge_loss_is_zero_for_strong_edges_and_grows_as_they_fade() -> None:
    target = -torch.ones(1, 3, 16, 16)
    target[..., 8:] = 1.0
    edges = torch.zeros(1, 16, 16)
    edges[:, :, 8] = 1.0
    losses = [float(train_autoencoder.edge_loss(contrast * target, target, edges)) for contrast in (1.0, 0.9, 0.5, 0.0)]
    assert losses == pytest.approx([0.0, 0.8, 4.0, 8.0], abs=1e-5)
    moved = target.roll(1, 3)
    assert float(train_autoencoder.edge_loss(moved, target, edges)) == pytest.approx(0.0, abs=1e-6)
    faint = 0.1 * target  # an edge below Canny's threshold in the target is asked for at the threshold and its margin
    wanted = train_autoencoder.EDGE_STRENGTH - 0.8
    assert float(train_autoencoder.edge_loss(faint, faint, edges)) == pytest.approx(wanted, abs=1e-5)
    assert float(train_autoencoder.edge_loss(faint, target, torch.zeros_like(edges))) == 0.0


def test_kl_divergence_is_that_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, log_variance = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    given = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    wanted = torch.distributions.kl_divergence(given, standard).mean()
    assert float(train_autoencoder.kl_divergence(mean, log_variance)) == pytest.approx(float(wanted), rel=1e-5)


def test_critic_gradient_has_its_share_and_leads_towards_higher_scores() -> None:
    model = random_model()
    edges = torch.zeros(4, 32, 8, dtype=torch.uint8)
    critic = train_autoencoder.make_critic(edges.device)
    step = train_autoencoder.make_step(model.first_stage_model, *critic, pictures(4), edges, 2, 4, False, False)
    image = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    reconstruction = torch.ones_like(image)
    gradient = step._critic_gradient(image, reconstruction)
    share = float(gradient.norm() / reconstruction.norm())
    assert share == pytest.approx(train_autoencoder.CRITIC_SHARE, rel=1e-4)
    with torch.no_grad():
        moved = image - 1e-2 * gradient
        assert float(step.critic(moved).mean()) > float(step.critic(image).mean())


def test_standard_latents_leave_pictures_as_they_were() -> None:
    autoencoder = random_model().first_stage_model
    images = pictures(6)
    scale = autoencoder.config.scale_factor
    (x,) = train_autoencoder.batches(images, 6)
    with torch.no_grad():
        mean, log_variance = autoencoder.encode(x)
        before = autoencoder.decode(mean * scale)
        spread = (0.5 * log_variance).exp() / mean.std(dim=(0, 2, 3), keepdim=True)
        train_autoencoder.standardise_latents(autoencoder, images)
        mean, log_variance = autoencoder.encode(x)
        after = autoencoder.decode(mean * scale)
    latents = (mean * scale).double()
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4
    # The noise of the posterior has been scaled with the mean.
    assert torch.allclose((0.5 * log_variance).exp() * scale, spread, rtol=1e-3)


def test_psnr_counts_levels() -> None:
    class Off(nn.Module):
        config = dataclasses.replace(small_config().autoencoder, scale_factor=1.0)

        def encode(self, x: torch.Tensor) -> Tuple[torch.Tensor, None]:
            return x, None

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z + 5 / 127.5

    images = torch.full((3, 8, 8, 3), 100, dtype=torch.uint8)
    assert train_autoencoder.psnr(Off(), images) == pytest.approx(20 * np.log10(255 / 5), abs=1e-4)  # type: ignore


# --- The diffusion step ---


def make_latents(count: int = 6, deviation: float = 0.0) -> Latents:
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(2, count, 4, 4, 8, generator=generator).half()
    edges = torch.randint(0, 256, (count, 32, 8), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 500, (count, 3, 77), generator=generator, dtype=torch.int16)
    return Latents(mean, torch.full_like(mean, deviation), edges, tokens)


def test_unpacked_edges_are_numpys() -> None:
    packed = make_latents().edges
    wanted = np.unpackbits(packed.numpy(), axis=2)[:, None]
    assert np.array_equal(train_autoencoder.unpack_edges(packed).numpy(), wanted.astype(np.float32))


def test_step_noises_the_latent_and_weighs_its_error() -> None:
    """Everything the step hands to the network and what it makes of the answer, redone in float64."""
    latents, schedule = make_latents(), small_config().schedule
    seen: List[Tuple[torch.Tensor, ...]] = []
    factor = torch.ones((), requires_grad=True)

    def predict(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return 0.25 * factor * inputs[0]

    table = torch.from_numpy(alpha_bars(schedule)).float()
    empty = torch.zeros(77, dtype=torch.int16)
    step = DiffusionStep(predict, latents, empty, 0.5, table, 400, True, False)
    figures = step(torch.Generator().manual_seed(0), 0)
    x, t, tokens, edges, keep = (value.detach().double().numpy() for value in seen[0])
    dropped = (tokens == 0).all(axis=1)
    assert 0.05 < dropped.mean() < 0.15 and 0.05 < 1 - keep.mean() < 0.15 and set(keep) == {0.0, 1.0}
    assert t.min() < 20 and t.max() > 980
    hints = np.unpackbits(latents.edges.numpy(), axis=2).astype(float)
    losses, mirrored = [], []
    for i in range(len(x)):
        places = [(n, m) for n in range(6) for m in (0, 1) if np.array_equal(edges[i, 0], hints[n][:, :: 1 - 2 * m])]
        assert len(places) == 1
        scene, mirror = places[0]
        if not dropped[i]:
            assert any(np.array_equal(tokens[i], wording) for wording in latents.tokens[scene].numpy())
        alpha = alpha_bars(schedule)[int(t[i])]
        clean = 0.5 * latents.mean[mirror, scene].double().numpy()
        noise = (x[i] - np.sqrt(alpha) * clean) / np.sqrt(1 - alpha)
        snr = alpha / (1 - alpha)
        losses.append(np.mean((0.25 * x[i] - noise) ** 2) * min(snr, 5.0) / snr)
        mirrored.append(mirror)
        if alpha < 0.5:
            assert 0.7 < noise.std() < 1.3
    assert 0.4 < np.mean(mirrored) < 0.6
    assert float(figures["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert factor.grad is not None


def test_latents_are_drawn_from_the_posterior() -> None:
    latents = dataclasses.replace(
        make_latents(), mean=torch.zeros(2, 6, 4, 4, 8).half(), deviation=torch.full((2, 6, 4, 4, 8), 3.0).half()
    )
    table = torch.from_numpy(alpha_bars(small_config().schedule)).float()
    step = DiffusionStep(lambda *a: a[0], latents, torch.zeros(77), 0.5, table, 300, False, False)
    picks = torch.zeros(300, dtype=torch.long)
    clean = step._clean(picks, picks > 0, torch.Generator().manual_seed(0))
    assert float(clean.std()) == pytest.approx(1.5, rel=0.02) and abs(float(clean.mean())) < 0.03


def test_fresh_controlnet_is_the_encoder_and_changes_nothing() -> None:
    model = random_model()
    train_diffusion.copy_encoder(model)
    source, copied = model.unet.state_dict(), model.control_model.state_dict()
    shared = [name for name in copied if name.startswith(("time_embed", "input_blocks", "middle_block."))]
    assert len(shared) > 20 and all(torch.equal(copied[name], source[name]) for name in shared)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 4, 8, generator=generator), torch.tensor([500])
    context = torch.randn(1, 77, small_config().text.width, generator=generator)
    hint = torch.rand(1, 3, 32, 64, generator=generator)
    with torch.no_grad():
        assert torch.equal(model.predict_noise(x, t, context, hint), model.predict_noise(x, t, context))


def test_fresh_unet_predicts_nothing() -> None:
    model = random_model()
    train_diffusion.initialise_unet(model.unet)
    context = torch.randn(1, 77, small_config().text.width)
    with torch.no_grad():
        assert not model.predict_noise(torch.randn(1, 4, 4, 8), torch.tensor([5]), context).any()


@pytest.mark.parametrize("locked", [False, True])
def test_control_stage_trains_what_it_says(locked: bool) -> None:
    model = random_model()
    train_diffusion.freeze(model, train_diffusion.trained_modules(model, True, locked))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"control_model"} if locked else {"control_model", "model", "cond_stage_model"})


# --- Bookkeeping ---


def test_learning_rate_rises_and_falls() -> None:
    settings = StageSettings(steps=1000, batch=1, learning_rate=2.0, warmup=100)
    rates = [training.learning_rate(settings, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == 2.0 and rates[100] == 2.0
    assert rates[550] == pytest.approx(2.0 * 0.525) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(np.diff(rates[:100]) > 0) and all(np.diff(rates[100:]) <= 0)


def run_toy(folder: Path, stops: List[int]) -> Dict[str, torch.Tensor]:
    """A linear layer trained for ten steps by processes that end at the given ones; its averaged weights."""
    for last in [*stops, 10]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        trainer = Trainer("toy", {"layer": layer}, StageSettings(10, 1, 0.1, warmup=2), folder, 7, "cpu")

        def backward(generator: torch.Generator, step: int, layer: nn.Linear = layer) -> Dict[str, torch.Tensor]:
            loss = layer(torch.randn(4, 3, generator=generator)).square().mean()
            loss.backward()
            return {"loss": loss.detach()}

        stop_at = time.monotonic() + (1e9 if last == 10 else -1)
        with contextlib.suppress(Stopped):  # a time that is past lets two steps happen, the interval of reports
            trainer.run(backward, stop_at)
        assert trainer.step == last
    trainer.use_average()
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def test_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, broken = run_toy(tmp_path / "a", []), run_toy(tmp_path / "b", [2, 4])
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_average_follows_the_weights(tmp_path: Path) -> None:
    layer = nn.Linear(1, 1, bias=False)
    trainer = Trainer("toy", {"layer": layer}, StageSettings(4, 1, 0.5, warmup=1, ema=0.5), tmp_path, 7, "cpu")
    history = [float(layer.weight.detach())]

    def backward(_: torch.Generator, step: int) -> Dict[str, torch.Tensor]:
        if step:
            history.append(float(layer.weight.detach()))
        layer.weight.sum().backward()
        return {"loss": layer.weight.detach().sum()}

    trainer.run(backward, time.monotonic() + 1e9)
    history.append(float(layer.weight.detach()))
    wanted = history[0]
    for step, value in enumerate(history[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
    trainer.use_average()
    assert float(layer.weight) == pytest.approx(wanted, rel=1e-5) and not layer.weight.requires_grad


def test_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    layer = nn.Linear(1, 1)
    trainer = Trainer("toy", {"layer": layer}, StageSettings(4, 1, 0.5), tmp_path, 7, "cpu")

    def backward(_: torch.Generator, step: int) -> Dict[str, torch.Tensor]:
        layer(torch.ones(1, 1)).sum().backward()
        return {"loss": torch.tensor(float("nan"))}

    with pytest.raises(FloatingPointError, match="loss not finite near step 2"):
        trainer.run(backward, time.monotonic() + 1e9)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    settings = StageSettings(4, 1, 0.5)
    Trainer("toy", {"layer": nn.Linear(1, 1)}, settings, tmp_path, 7, "cpu").save()
    with pytest.raises(ValueError, match="saved by another model; remove it"):
        Trainer("toy", {"other": nn.Linear(1, 1)}, settings, tmp_path, 7, "cpu")


def spoiled(step: training.Step, factor: float, layer: nn.Linear) -> training.Step:
    def spoil(generator: torch.Generator, number: int) -> Dict[str, torch.Tensor]:
        figures = step(generator, number)
        assert layer.weight.grad is not None
        layer.weight.grad.mul_(factor)
        return figures

    return spoil


@pytest.mark.parametrize("factor", [0.0, 1.3, float("nan")])
def test_step_with_wrong_gradients_is_passed_over(
    factor: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    trainer = Trainer("toy", {"layer": layer}, StageSettings(10, 1, 0.1), tmp_path, 7, "cpu")

    def step(generator: torch.Generator, number: int) -> Dict[str, torch.Tensor]:
        layer(torch.randn(4, 3, generator=generator)).square().mean().backward()
        return {}

    bad = spoiled(step, factor, layer)
    assert training.choose_step(step, {"fast": bad, "plain": step}, trainer) is step
    assert "toy: fast gradients off by" in caplog.text and "toy: plain gradients off by 0.0 %" in caplog.text
    assert torch.equal(layer.weight, before) and layer.weight.grad is None
    with pytest.raises(RuntimeError, match="no way to run a step gives the gradients of FP32"):
        training.choose_step(step, {"fast": bad}, trainer)


# --- Scenes on disk ---


def test_chunk_holds_scenes_edges_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig
) -> None:
    monkeypatch.setattr(store, "CHUNK", 3)
    store.draw_chunk((str(tmp_path / "chunk.npz"), 6, "train", 11))
    tokenizer = Tokenizer(tiny_config)
    with np.load(str(tmp_path / "chunk.npz")) as chunk:
        for i in range(3):
            scene = make_scene(6 + i, "train", seed=11)
            assert np.array_equal(chunk["images"][i], scene.image)
            edges = canny_map(np.ascontiguousarray(scene.image[:, :, ::-1]), 256, 100, 200)
            assert np.array_equal(np.unpackbits(chunk["edges"][i], axis=1) * 255, edges)
            ids, _ = tokenizer([scene.captions[k % len(scene.captions)] for k in range(store.WORDINGS)])
            assert np.array_equal(chunk["tokens"][i], ids)


def test_scenes_that_are_others_are_noticed() -> None:
    scenes = [make_scene(i, "train") for i in range(2)]
    edges = np.stack([store.packed_edges(scene.image) for scene in scenes])
    tokens = np.stack([Tokenizer(load_config("tiny"))([s.captions[0]] * 6)[0] for s in scenes]).astype(np.int16)
    stored = Scenes(np.stack([s.image for s in scenes]), edges, tokens)
    images = torch.from_numpy(stored.images)
    store.check_scenes(stored, images, 2)
    for other in (dataclasses.replace(stored, edges=edges[::-1]), dataclasses.replace(stored, tokens=tokens[::-1])):
        with pytest.raises(RuntimeError, match="scene 0 as loaded is not scene 0"):
            store.check_scenes(other, images, 2)
    with pytest.raises(RuntimeError, match="equal: .False, True, True."):
        store.check_scenes(stored, images.flip(0), 2)


def test_latents_of_other_pictures_are_noticed() -> None:
    autoencoder = random_model().first_stage_model
    images = pictures(3)
    scenes = Scenes(images.numpy(), np.zeros((3, 32, 8), np.uint8), np.zeros((3, 6, 77), np.int16))
    latents = train_diffusion.encode_scenes(autoencoder, images, scenes, amp=False, batch=2)
    train_diffusion.check_latents(latents, autoencoder, scenes, 3)
    swapped = dataclasses.replace(latents, mean=latents.mean.flip(0))
    with pytest.raises(RuntimeError, match="the latent of scene 0, side 0, is off by"):
        train_diffusion.check_latents(swapped, autoencoder, scenes, 3)


def test_number_of_scenes_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positive multiple of 250, got 100"):
        store.load_scenes(tmp_path, 100)


# --- The command ---


def fake_scenes(folder: Path, count: int, split: str = "train", seed: int = 0) -> Scenes:
    scenes = [make_scene(i, split) for i in range(4)]
    edges = [store.packed_edges(scene.image) for scene in scenes]
    return Scenes(np.stack([s.image for s in scenes]), np.stack(edges), np.ones((4, 6, 77), np.int16))


def few_steps(folder: Path, *more: str) -> List[str]:
    counts = [f"--{stage}-{what}={n}" for stage in train_tiny.STAGES for what, n in (("steps", 4), ("batch", 1))]
    paths = ["--folder", str(folder), "--output", str(folder / "out.safetensors")]
    return [*counts, *paths, "--device", "cpu", "--no-compile", *more]


def test_command_trains_all_stages_and_goes_on_where_it_was_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_config: ModelConfig,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(store, "load_scenes", fake_scenes)
    monkeypatch.setattr(store, "check_scenes", lambda *_: None)  # its words are not the scenes'
    caplog.set_level(logging.INFO)
    assert train_tiny.main(few_steps(tmp_path, "--stages", "autoencoder")) == 0
    assert train_tiny.main(few_steps(tmp_path, "--stop-after", "0")) == 3
    assert "unet: stopped at step 2 of 4" in caplog.text and not (tmp_path / "out.safetensors").exists()
    assert train_tiny.main(few_steps(tmp_path)) == 0
    for line in ("autoencoder: held-out PSNR", "unet: goes on at step 2 of 4", "control: held-out error of the noise"):
        assert line in caplog.text
    with safe_open(str(tmp_path / "out.safetensors"), framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    # Results of other settings are refused, and so are those that stand on a result since replaced.
    assert train_tiny.main(few_steps(tmp_path, "--seed", "9")) == 1
    assert train_tiny.main(few_steps(tmp_path, "--unet-steps", "5")) == 1
    (tmp_path / "autoencoder.safetensors").write_bytes((tmp_path / "unet.safetensors").read_bytes())
    assert train_tiny.main(few_steps(tmp_path)) == 1
    assert capsys.readouterr().err.count("give the same arguments, remove it") == 3
    model = load_model(tiny_config, Weights(tmp_path / "out.safetensors", None, "trained"))
    assert any(bool(conv.weight.any()) for conv in model.control_model.zero_convs.modules() if hasattr(conv, "weight"))


def test_command_refuses_results_of_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(store, "load_scenes", fake_scenes)
    monkeypatch.setattr(store, "check_scenes", lambda *_: None)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "autoencoder.safetensors"), metadata={"model": "other"})
    assert train_tiny.main(few_steps(tmp_path)) == 1
    assert "trained with another models/tiny.yaml" in capsys.readouterr().err


def test_command_names_unknown_stages(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_tiny.main(["--stages", "autoencoder,vae"])
    assert "--stages: vae unknown; there are autoencoder, unet, control" in capsys.readouterr().err
