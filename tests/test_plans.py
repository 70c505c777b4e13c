"""Sampling plans against DDIM written out step by step in float64, and against diffusers' scheduler."""

from __future__ import annotations

from typing import Any, Callable, List, Sequence, Tuple

import numpy as np
import pytest

from ldm.plans import (
    VARIABLES,
    SamplingPlan,
    calibrated_plan,
    exact_plan,
    held_moves,
    linear_moves,
    linear_plan,
    spread_indices,
    subset_plan,
)
from ldm.schedule import ScheduleConfig, alpha_bars, ddim_timesteps

CONFIG = ScheduleConfig()
TEN_OF_TWENTY = (19, 18, 17, 16, 15, 14, 13, 11, 8, 4)


def step(x: np.ndarray, noise: np.ndarray, a: float, a_next: float) -> np.ndarray:
    """One DDIM step as the paper writes it: the clean image's estimate, and noise put back."""
    clean = (x - np.sqrt(1 - a) * noise) / np.sqrt(a)
    return np.sqrt(a_next) * clean + np.sqrt(1 - a_next) * noise


def walk(num_steps: int, x: np.ndarray, noise_at: Callable[[int], np.ndarray]) -> np.ndarray:
    """All DDIM steps, with the noise of each index given."""
    table = alpha_bars(CONFIG)
    a = table[ddim_timesteps(num_steps)]
    for index in range(num_steps - 1, -1, -1):
        x = step(x, noise_at(index), a[index], a[index - 1] if index > 0 else table[0])
    return x


def run(plan: SamplingPlan, x: np.ndarray, noises: Sequence[np.ndarray]) -> np.ndarray:
    last = np.zeros_like(x)
    for (a, b, c), noise in zip(plan.rows, noises):
        x, last = a * x + b * noise + c * last, noise
    return x


def draw(count: int, seed: int = 0) -> Tuple[np.ndarray, List[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=8), [rng.normal(size=8) for _ in range(count)]


def random_subset(num_steps: int, rng: np.random.Generator) -> Tuple[int, ...]:
    count = int(rng.integers(0, num_steps))
    rest = rng.choice(num_steps - 1, size=count, replace=False) if num_steps > 1 else []
    return (num_steps - 1, *sorted((int(i) for i in rest), reverse=True))


@pytest.mark.parametrize("make", [subset_plan, linear_plan])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50])
def test_all_indices_evaluated_is_ddim(make: Callable[..., SamplingPlan], num_steps: int) -> None:
    plan = make(CONFIG, num_steps, range(num_steps - 1, -1, -1))
    exact = exact_plan(CONFIG, num_steps)
    assert np.array_equal(plan.timesteps, exact.timesteps)
    np.testing.assert_allclose(plan.rows, exact.rows, rtol=0, atol=1e-12)
    x, noises = draw(num_steps)
    wanted = walk(num_steps, x, lambda index: noises[num_steps - 1 - index])
    np.testing.assert_allclose(run(plan, x, noises), wanted, rtol=1e-10)


@pytest.mark.parametrize("indices", [TEN_OF_TWENTY, (19, 10, 0), (19,), (19, 18, 3)])
def test_subset_holds_each_prediction(indices: Tuple[int, ...]) -> None:
    x, noises = draw(len(indices))
    held = [noises[sum(index <= i for i in indices) - 1] for index in range(20)]
    np.testing.assert_allclose(
        run(subset_plan(CONFIG, 20, indices), x, noises), walk(20, x, held.__getitem__), rtol=1e-10
    )


def test_subset_is_the_scheduler_of_diffusers() -> None:
    """On timesteps of its own choice: DDIM on a subset is DDIM."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=CONFIG.linear_start,
        beta_end=CONFIG.linear_end,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.alphas_cumprod = torch.from_numpy(alpha_bars(CONFIG))
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(10)
    indices = tuple(range(18, -1, -2))  # of 20 steps of 50, every second one: its 10 steps of 100
    plan = subset_plan(CONFIG, 20, (19, *indices))
    assert plan.timesteps[1:].tolist() == scheduler.timesteps.tolist()
    x, noises = draw(10, seed=3)
    wanted = torch.from_numpy(x)
    for t, noise in zip(scheduler.timesteps, noises):
        wanted = scheduler.step(torch.from_numpy(noise), int(t), wanted).prev_sample
    for (a, b, c), noise in zip(plan.rows[1:], noises):
        assert c == 0
        x = a * x + b * noise
    np.testing.assert_allclose(x, wanted.numpy(), rtol=1e-9)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("indices", [(19, 18, 17, 11, 8, 4), (19, 18, 3), (19, 18, 12, 0)])
def test_noise_linear_in_the_variable_is_integrated_exactly(variable: str, indices: Tuple[int, ...]) -> None:
    """The first segment is one step long here: it has nothing to extrapolate from."""
    table = alpha_bars(CONFIG)[ddim_timesteps(20)]
    s = np.sqrt((1 - table) / table)
    u = {"t": ddim_timesteps(20).astype(float), "s": s, "log-snr": 0.5 * np.log(table / (1 - table))}[variable]
    x, (offset, slope) = draw(2, seed=5)
    noise_at = lambda index: offset + slope * u[index] / abs(u).max()  # noqa: E731
    plan = linear_plan(CONFIG, 20, indices, variable)
    np.testing.assert_allclose(run(plan, x, [noise_at(i) for i in indices]), walk(20, x, noise_at), rtol=1e-9)
    held = run(subset_plan(CONFIG, 20, indices), x, [noise_at(i) for i in indices])
    assert np.abs(held - walk(20, x, noise_at)).max() > 1e-3, "the test would not tell the two apart"


def test_last_segment_can_be_held() -> None:
    plan, held = linear_plan(CONFIG, 20, TEN_OF_TWENTY, hold_last=True), subset_plan(CONFIG, 20, TEN_OF_TWENTY)
    free = linear_plan(CONFIG, 20, TEN_OF_TWENTY)
    assert np.array_equal(plan.rows[-1], held.rows[-1]) and not np.array_equal(plan.rows[-1], free.rows[-1])
    assert np.array_equal(plan.rows[:-1], free.rows[:-1])
    assert str(plan) == "10 of 20 evaluations, linear, in t, last held"


@pytest.mark.parametrize("num_steps", [1, 3, 20, 50, 999, 1000])
def test_coefficients_are_finite_for_every_schedule(num_steps: int) -> None:
    rng = np.random.default_rng(num_steps)
    for indices in [range(num_steps - 1, -1, -1), *(random_subset(num_steps, rng) for _ in range(20))]:
        for variable in VARIABLES:
            plan = linear_plan(CONFIG, num_steps, indices, variable)
            assert plan.rows.shape == (len(indices), 3) and (plan.rows[:, 0] >= 1).all()
            assert plan.rows[0, 2] == 0


def test_calibrated_takes_its_moves() -> None:
    for moves, plan in (
        (held_moves(CONFIG, 20, TEN_OF_TWENTY), subset_plan(CONFIG, 20, TEN_OF_TWENTY)),
        (linear_moves(CONFIG, 20, TEN_OF_TWENTY, "s"), linear_plan(CONFIG, 20, TEN_OF_TWENTY, "s")),
    ):
        np.testing.assert_allclose(calibrated_plan(CONFIG, 20, TEN_OF_TWENTY, moves).rows, plan.rows, rtol=1e-12)
    assert (
        str(calibrated_plan(CONFIG, 20, TEN_OF_TWENTY, moves, "on birds"))
        == "10 of 20 evaluations, calibrated on birds"
    )


def test_calibrated_weighs_the_latent_and_tells_other_timesteps() -> None:
    """Against the sums written out: y_j = (1 + c_x) y_i + c_0 e_i + c_1 e_p."""
    indices, table = (19, 12, 3), alpha_bars(CONFIG)
    rng = np.random.default_rng(8)
    moves = rng.normal(size=(3, 3)) * [[1, 0, 0.1], [1, 1, 0.1], [1, 1, 0.1]]
    x, noises = draw(3, seed=2)
    a = table[ddim_timesteps(20)]
    y, last = x / np.sqrt(a[19]), np.zeros_like(x)
    for (newest, before, stays), noise in zip(moves, noises):
        y, last = (1 + stays) * y + newest * noise + before * last, noise
    plan = calibrated_plan(CONFIG, 20, indices, moves, timesteps=[940, 600, 0])
    np.testing.assert_allclose(run(plan, x, noises), np.sqrt(table[0]) * y, rtol=1e-10)
    assert plan.timesteps.tolist() == [940, 600, 0] and plan.timesteps.dtype == np.int64
    own = calibrated_plan(CONFIG, 20, indices, moves)
    assert np.array_equal(own.timesteps, subset_plan(CONFIG, 20, indices).timesteps)
    moves[:, 2] = 0
    assert np.array_equal(
        calibrated_plan(CONFIG, 20, indices, moves).rows, calibrated_plan(CONFIG, 20, indices, moves[:, :2]).rows
    )


@pytest.mark.parametrize("timesteps", [[1, 2], [1, 2, 1000], [-1, 2, 3], [1.0, 2.0, 3.0], [[1], [2], [3]]])
def test_timesteps_that_no_network_knows_are_refused(timesteps: List[Any]) -> None:
    with pytest.raises(ValueError, match=r"3 evaluations need as many whole timesteps of 0 \.\. 999"):
        calibrated_plan(CONFIG, 20, (19, 12, 3), held_moves(CONFIG, 20, (19, 12, 3)), timesteps=timesteps)


def test_eta_asks_for_fresh_noise() -> None:
    assert exact_plan(CONFIG, 20, 0.5).fresh_noise and not exact_plan(CONFIG, 20).fresh_noise


@pytest.mark.parametrize(("evaluations", "wanted"), [(1, (19,)), (2, (19, 0)), (20, tuple(range(19, -1, -1)))])
def test_spread_indices(evaluations: int, wanted: Tuple[int, ...]) -> None:
    assert spread_indices(20, evaluations) == wanted


def test_spread_indices_are_even() -> None:
    for steps in (5, 20, 50):
        for evaluations in range(2, steps + 1):
            found = spread_indices(steps, evaluations)
            gaps = -np.diff(found)
            assert found[0] == steps - 1 and found[-1] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("indices", [(), (18, 3), (19, 19), (19, 3, 5), (19, -1), (20, 3)])
def test_indices_that_do_not_fall_are_refused(indices: Tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must fall from 19"):
        subset_plan(CONFIG, 20, indices)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one of t, s, log-snr"):
        linear_plan(CONFIG, 20, TEN_OF_TWENTY, "sigma")
    with pytest.raises(ValueError, match=r"shape \(10, 2\) or \(10, 3\)"):
        calibrated_plan(CONFIG, 20, TEN_OF_TWENTY, np.zeros((9, 2)))
    with pytest.raises(ValueError, match="first segment"):
        calibrated_plan(CONFIG, 20, TEN_OF_TWENTY, np.ones((10, 2)))
    with pytest.raises(ValueError, match="not finite"):
        calibrated_plan(CONFIG, 20, (19, 3), [[1.0, 0.0], [np.nan, 0.0]])
    with pytest.raises(ValueError, match="between 1 and the schedule's 20"):
        spread_indices(20, 21)
