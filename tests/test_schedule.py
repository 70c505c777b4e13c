"""The noise schedule and DDIM's coefficients against formulas written here and against diffusers."""

from __future__ import annotations

import math
from typing import List, Tuple

import numpy as np
import pytest

from ldm.schedule import ScheduleConfig, alpha_bars, ddim_alpha_bars, ddim_coefficients, ddim_timesteps
from tests.diffusers_ddim import original_scheduler

CONFIG = ScheduleConfig()


def alpha_bars_by_hand() -> List[float]:
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    product, table = 1.0, []
    for i in range(1000):
        product *= 1.0 - (first + (last - first) * i / 999) ** 2
        table.append(product)
    return table


def diffusers_scheduler(num_steps: int):
    """diffusers' DDIM with the settings of the original code, its tables replaced by float64 ones."""
    import torch

    scheduler = original_scheduler(num_steps)
    single = scheduler.alphas_cumprod.double().numpy()
    scheduler.alphas_cumprod = torch.tensor(alpha_bars_by_hand(), dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler, single


def test_alpha_bars() -> None:
    table = alpha_bars(CONFIG)
    assert table.shape == (1000,) and table.dtype == np.float64
    np.testing.assert_allclose(table, alpha_bars_by_hand(), rtol=1e-12)
    _, single = diffusers_scheduler(20)
    np.testing.assert_allclose(table, single, rtol=2e-5)
    assert table[0] == pytest.approx(1 - 0.00085, rel=1e-12)
    assert (np.diff(table) < 0).all()


def test_timesteps_of_every_length() -> None:
    for count in range(1, 1001):
        steps = ddim_timesteps(count)
        assert steps.shape == (count,) and steps.dtype == np.int64, count
        assert steps.min() >= 0 and steps.max() <= 999, count
        if count < 1000:
            assert (np.diff(steps) > 0).all(), count
        if count < 1000 and 1000 % count == 0:
            assert steps.tolist() == [step + 1 for step in range(0, 1000, 1000 // count)], count
        if count < 1000:  # as even as whole numbers can be
            assert count == 1 or np.ptp(np.diff(steps)) <= 1, count


def test_timesteps_of_a_thousand_steps_end_on_the_table() -> None:
    assert ddim_timesteps(1000).tolist() == [*range(1, 1000), 999]


def test_known_timesteps() -> None:
    assert ddim_timesteps(20).tolist() == list(range(1, 1000, 50))
    assert ddim_timesteps(1).tolist() == [1]
    assert ddim_timesteps(3).tolist() == [1, 334, 667]
    assert ddim_timesteps(7).tolist() == [1, 143, 286, 429, 572, 715, 858]


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_bad_number_of_steps(count: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {count}"):
        ddim_timesteps(count)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        ddim_coefficients(CONFIG, count, 0.0)


def test_last_step_goes_to_the_first_alpha_bar() -> None:
    table = alpha_bars_by_hand()
    now, prev = ddim_alpha_bars(CONFIG, ddim_timesteps(4))
    np.testing.assert_allclose(now, [table[1], table[251], table[501], table[751]], rtol=1e-12)
    np.testing.assert_allclose(prev, [table[0], table[1], table[251], table[501]], rtol=1e-12)


def ddim_step_by_hand(
    x: float, e: float, n: float, alpha: float, alpha_prev: float, eta: float
) -> Tuple[float, float, float]:
    """Eq. 12 and 16 of arXiv:2010.02502 as they stand: the next x, its prediction of x0, and sigma."""
    sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
    x0 = (x - math.sqrt(1 - alpha) * e) / math.sqrt(alpha)
    direction = math.sqrt(max(1 - alpha_prev - sigma**2, 0.0)) * e
    return math.sqrt(alpha_prev) * x0 + direction + sigma * n, x0, sigma


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 3, 7, 20, 50, 1000])
def test_coefficients_are_equation_12(count: int, eta: float) -> None:
    table = alpha_bars_by_hand()
    timesteps, rows = ddim_coefficients(CONFIG, count, eta)
    assert timesteps.tolist() == ddim_timesteps(count)[::-1].tolist()
    assert rows.shape == (count, 3) and rows.dtype == np.float64
    x, e, n = 0.7, -1.3, 0.4
    for i, (timestep, (a, b, c)) in enumerate(zip(timesteps, rows)):
        alpha = table[timestep]
        alpha_prev = table[timesteps[i + 1]] if i + 1 < count else table[0]
        expected, _, sigma = ddim_step_by_hand(x, e, n, alpha, alpha_prev, eta)
        assert a * x + b * e + c * n == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert c == pytest.approx(sigma, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("count", [20, 50])
def test_trajectory_is_diffusers(count: int, eta: float) -> None:
    import torch

    scheduler, _ = diffusers_scheduler(count)
    timesteps, rows = ddim_coefficients(CONFIG, count, eta)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    random = np.random.default_rng(count)
    ours = theirs = random.standard_normal((1, 4, 3, 5))
    for timestep, (a, b, c) in zip(timesteps, rows):
        e, n = random.standard_normal((2, *ours.shape))
        ours = a * ours + b * e + c * n
        step = scheduler.step(
            torch.from_numpy(e), int(timestep), torch.from_numpy(theirs), eta=eta, variance_noise=torch.from_numpy(n)
        )
        theirs = step.prev_sample.numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_rows_are_finite_for_every_length() -> None:
    for eta in (0.0, 0.7, 1.0):
        for count in range(1, 1001):
            timesteps, rows = ddim_coefficients(CONFIG, count, eta)
            assert np.isfinite(rows).all(), (count, eta)
            assert (rows[:, 2] >= 0).all(), (count, eta)
            if eta == 0:
                assert not rows[:, 2].any(), count
            assert timesteps.shape == (count,)


def test_exact_noise_leads_to_the_right_latent() -> None:
    """With the true noise of a fixed x0, deterministic DDIM ends at x0 noised to the first alpha-bar."""
    table = alpha_bars_by_hand()
    x0, e = 0.8, -0.6
    timesteps, rows = ddim_coefficients(CONFIG, 20, 0.0)
    x = math.sqrt(table[timesteps[0]]) * x0 + math.sqrt(1 - table[timesteps[0]]) * e
    for a, b, _ in rows:
        x = a * x + b * e
    assert x == pytest.approx(math.sqrt(table[0]) * x0 + math.sqrt(1 - table[0]) * e, rel=1e-10)


@pytest.mark.parametrize(
    "values",
    [{"linear_start": 0.0}, {"linear_start": -0.1}, {"linear_start": 0.02}, {"linear_end": 1.0}]
    + [{"linear_start": float("nan")}],
)
def test_bad_betas(values: dict) -> None:
    with pytest.raises(ValueError, match="schedule: betas"):
        ScheduleConfig(**values)


@pytest.mark.parametrize("train_steps", [0, -5])
def test_bad_train_steps(train_steps: int) -> None:
    with pytest.raises(ValueError, match=f"schedule.train_steps: {train_steps} is not positive"):
        ScheduleConfig(train_steps=train_steps)
