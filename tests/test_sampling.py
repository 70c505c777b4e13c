"""Recording, fitting, searching and keeping of sampling plans, on networks whose answers are known in closed form."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest

from cldm.config import load_config
from cldm.weights import Weights, find_weights
from ldm.plans import calibrated_plan, exact_plan, held_moves, linear_moves, linear_plan, subset_plan
from ldm.schedule import ScheduleConfig, alpha_bars, ddim_timesteps
from sampling.calibration import (
    Calibration,
    CalibrationError,
    Point,
    Running,
    Setting,
    Spread,
    by_count,
    calibrate_command,
    calibration_folder,
    find_calibration,
    find_calibrations,
    load_calibration,
    plan_for,
    plan_within,
    save_calibration,
    shipped_path,
    warnings_of,
)
from sampling.fit import KINDS, SegmentFits, Walker, fit_move
from sampling.gram import gram_matrix, open_loop
from sampling.polish import _Problem, polish
from sampling.search import Effort, all_subsets, front_loaded, prefilter, search, separated, single_moves
from sampling.stages import Stages, latent_errors, selected
from sampling.trajectory import Levels, Trajectories, record
from tests.micro_model import SIZE, shared_build, shared_config, write_micro

CONFIG = ScheduleConfig()
STEPS, CASES, DIM = 8, 6, 12
EFFORT_FEW = Effort(starts=0, trials=60, survivors=1, first_cases=CASES, last_cases=CASES)


class Mixture:
    """The exact noise of a mixture of Gaussians, another one for each case, with guidance away from their union."""

    def __init__(self, num_steps: int = STEPS, cases: int = CASES, guidance: float = 3.0) -> None:
        rng = np.random.default_rng(4)
        self.centres = rng.normal(size=(cases, 3, DIM))
        self.initial = rng.normal(size=(cases, DIM)).astype(np.float32)
        self.guidance = guidance
        self.calls = 0

    def _noise(self, x: np.ndarray, a: float, centres: np.ndarray) -> np.ndarray:
        variance = a * 0.09 + 1 - a  # each component is 0.3 wide
        difference = x - np.sqrt(a) * centres
        logits = -0.5 * (difference**2).sum(axis=1) / variance
        weights = np.exp(logits - logits.max())
        return np.sqrt(1 - a) * (weights / weights.sum()) @ difference / variance

    def __call__(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        self.calls += len(cases)
        found = [
            self._guided(case, alpha_bars(CONFIG)[timestep], x.astype(np.float64)) for case, x in zip(cases, latents)
        ]
        return np.stack(found).astype(np.float32)

    def _guided(self, case: int, a: float, x: np.ndarray) -> np.ndarray:
        free = self._noise(x, a, self.centres.reshape(-1, DIM))
        bound = self._noise(x, a, self.centres[case])
        return free + self.guidance * (bound - free)


class Recorded:
    """A network that says what it said along the reference, wherever it is asked: at the index nearest in time."""

    def __init__(self, trajectories: Trajectories) -> None:
        self.trajectories = trajectories
        self.timesteps = ddim_timesteps(trajectories.num_steps)

    def __call__(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        return self.trajectories.noises[list(cases), np.abs(self.timesteps - timestep).argmin()]


def levels(num_steps: int = STEPS) -> Levels:
    return Levels(CONFIG, num_steps)


@pytest.fixture(scope="module")
def mixture() -> Tuple[Mixture, Trajectories]:
    network = Mixture()
    return network, record(network, levels(), network.initial)


def made_up(noises: np.ndarray) -> Trajectories:
    """The trajectories along which a network would give these (K, S, D) noises."""
    table = Recorded(Trajectories(np.zeros((len(noises), noises.shape[1] + 1, noises.shape[2])), noises))
    initial = np.random.default_rng(9).normal(size=(len(noises), noises.shape[2])).astype(np.float32)
    return record(table, levels(noises.shape[1]), initial)


def relative(final: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(final - wanted) / np.linalg.norm(wanted))


def run_rows(plan: Any, network: Any, case: int, x: np.ndarray) -> np.ndarray:
    """A plan's rows as the step graph applies them."""
    x, last = x.astype(np.float64), np.zeros(x.shape)
    for timestep, (a, b, c) in zip(plan.timesteps, plan.rows):
        noise = network([case], int(timestep), x[None])[0].astype(np.float64)
        x, last = a * x + b * noise + c * last, noise
    return x


# recording and walking


def test_the_reference_is_plain_ddim(mixture: Tuple[Mixture, Trajectories]) -> None:
    network, trajectories = mixture
    for case in range(CASES):
        wanted = run_rows(exact_plan(CONFIG, STEPS), network, case, network.initial[case])
        assert relative(trajectories.final[case], wanted) < 1e-5
        assert np.array_equal(
            trajectories.noises[case, 3],
            network([case], int(levels().timesteps[3]), trajectories.latents[case : case + 1, 4])[0],
        )


def test_numbers_that_are_not_finite_name_their_case() -> None:
    with pytest.raises(ValueError, match="case 5: .* at index 7"):
        record(lambda cases, timestep, x: x * np.nan, levels(), np.ones((1, DIM), np.float32), [5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_is_what_the_step_graph_does(kind: str, mixture: Tuple[Mixture, Trajectories]) -> None:
    network, trajectories = mixture
    indices = (7, 6, 3, 1)
    outcome = Walker(network, levels(), trajectories, kind).walk(indices)
    make = {"subset": subset_plan, "linear": linear_plan}.get(kind)
    plan = make(CONFIG, STEPS, indices) if make else calibrated_plan(CONFIG, STEPS, indices, outcome.moves)
    for case in range(CASES):
        wanted = run_rows(plan, network, case, network.initial[case])
        assert relative(outcome.final[case], wanted) < 1e-5
        error = np.linalg.norm(wanted - trajectories.final[case]) / np.linalg.norm(trajectories.final[case])
        assert outcome.errors[case] == pytest.approx(error, rel=1e-3)


def test_remembered_beginnings_change_nothing(mixture: Tuple[Mixture, Trajectories]) -> None:
    network, trajectories = mixture
    subsets = [(7, 6, 3, 1), (7, 6, 3, 0), (7, 6, 2, 1), (7, 6, 3, 1)]
    free = Walker(network, levels(), trajectories, "calibrated")
    tight = Walker(network, levels(), trajectories, "calibrated", cache_bytes=0)
    for subset in subsets:
        assert np.array_equal(free.walk(subset).final, tight.walk(subset).final)
    # Index 7 is the reference's; then 6, 3, 1; 0; 2, 1.
    assert free.evaluations == 6 * CASES and tight.evaluations > free.evaluations


def test_noise_linear_in_the_timestep_is_followed_exactly() -> None:
    rng = np.random.default_rng(0)
    t = ddim_timesteps(STEPS)[None, :, None] / 1000
    trajectories = made_up(rng.normal(size=(3, 1, DIM)) + t * rng.normal(size=(3, 1, DIM)))
    network = Recorded(trajectories)
    assert Walker(network, levels(), trajectories, "linear").walk((7, 6, 2)).errors.max() < 1e-5
    assert Walker(network, levels(), trajectories, "subset").walk((7, 6, 2)).errors.min() > 1e-2


# fitting


def test_a_fit_recovers_its_weights_and_a_ridge_draws_it_to_the_prior() -> None:
    rng = np.random.default_rng(1)
    noise, last = rng.normal(size=(2, 50))
    target = -1.5 * noise + 0.4 * last
    assert fit_move(target, noise, last, (9.0, 9.0), 0.0) == pytest.approx((-1.5, 0.4), rel=1e-10)
    assert fit_move(target, noise, last, (3.0, -2.0), 1e9) == pytest.approx((3.0, -2.0), rel=1e-6)
    assert fit_move(-2 * noise, noise, None, (0.0, 7.0), 0.0) == (pytest.approx(-2.0), 0.0)


def test_a_ridge_is_the_penalty_that_it_says() -> None:
    rng = np.random.default_rng(2)
    target, noise, last = rng.normal(size=(3, 50))
    prior, ridge = np.asarray([0.3, -0.8]), 0.7
    sizes = np.sqrt(ridge) * np.asarray([np.linalg.norm(noise), np.linalg.norm(last)])
    system = np.concatenate([np.stack([noise, last], axis=1), np.diag(sizes)])
    wanted = np.linalg.lstsq(system, np.concatenate([target, sizes * prior]), rcond=None)[0]
    assert fit_move(target, noise, last, tuple(prior), ridge) == pytest.approx(tuple(wanted), rel=1e-9)


@pytest.mark.parametrize(("evaluated", "end"), [((7,), 4), ((7, 5), 2), ((7, 6, 3), -1)])
def test_segment_fits_are_least_squares_on_the_reference(
    evaluated: Tuple[int, ...], end: int, mixture: Tuple[Mixture, Trajectories]
) -> None:
    _, trajectories = mixture
    own, table = levels(), trajectories.latents.astype(np.float64)
    norms = np.linalg.norm(table[:, 0], axis=1)[:, None]
    start, stop = evaluated[-1], end
    gained = table[:, stop + 1] / own.scale(stop) - table[:, start + 1] / own.scale(start)
    columns = [trajectories.noises[:, index] / norms for index in evaluated[::-1][:2]]
    system = np.stack([column.ravel() for column in columns], axis=1).astype(np.float64)
    wanted = np.linalg.lstsq(system, (gained / norms).ravel(), rcond=None)[0]
    found = SegmentFits(gram_matrix(trajectories, own), own, 0.0)(evaluated, end)
    assert found[: len(wanted)] == pytest.approx(tuple(wanted), rel=1e-3)


def test_fitted_moves_of_a_walk_correct_the_student(mixture: Tuple[Mixture, Trajectories]) -> None:
    """At the last segment they are the least squares from where the student is."""
    network, trajectories = mixture
    walker = Walker(network, levels(), trajectories, "calibrated", ridge=0.0)
    outcome = walker.walk((7, 5, 2))
    state = walker.state((7, 5, 2))
    norms = np.linalg.norm(trajectories.final, axis=1)[:, None]
    target = (trajectories.final / levels().scale(-1) - state.y) / norms
    system = np.stack([(state.noise / norms).ravel(), (state.last / norms).ravel()], axis=1)
    wanted = np.linalg.lstsq(system.astype(np.float64), target.ravel().astype(np.float64), rcond=None)[0]
    assert outcome.moves[-1] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_open_loop_errors_are_those_of_a_network_that_does_not_react(
    kind: str, mixture: Tuple[Mixture, Trajectories]
) -> None:
    trajectories = mixture[1]
    own, ridge = levels(), 1e-3
    gram = gram_matrix(trajectories, own)
    subsets = all_subsets(STEPS, 4)
    moves, errors = open_loop(gram, own, subsets, kind, ridge)
    walker = Walker(Recorded(trajectories), own, trajectories, kind, fits=SegmentFits(gram, own, ridge))
    for place in range(0, len(subsets), 4):
        outcome = walker.walk(tuple(subsets[place].tolist()))
        assert errors[place] == pytest.approx(np.sqrt(np.mean(outcome.errors**2)), rel=1e-3)
        assert moves[place] == pytest.approx(outcome.moves, rel=1e-5, abs=1e-9)
    rule = {"subset": held_moves, "linear": linear_moves}.get(kind)
    if rule is not None:
        assert moves[7] == pytest.approx(rule(CONFIG, STEPS, subsets[7].tolist()), rel=1e-9, abs=1e-12)


# polishing


def test_polish_finds_the_least_mean_error_where_the_network_does_not_react() -> None:
    noises = np.random.default_rng(3).normal(size=(4, STEPS, DIM)).astype(np.float32)
    noises[2:] = 0.2 * noises[2:] + noises[2:, :1]  # cases that are easy, and weigh more in the mean than in its square
    trajectories = made_up(noises)
    walker = Walker(Recorded(trajectories), levels(), trajectories, "subset")
    indices = (7, 5, 2)
    found = polish(walker, walker, indices, held_moves(CONFIG, STEPS, indices), rounds=20)
    norms = np.linalg.norm(trajectories.final, axis=1)[:, None]
    target = ((trajectories.final - trajectories.initial) / norms).astype(np.float64)
    columns = [trajectories.noises[:, i] for i in indices] + [trajectories.initial]
    system = np.stack([column / norms for column in columns], axis=2).astype(np.float64)
    errors = np.ones(4)
    for _ in range(200):  # iteratively reweighted least squares
        weights = 1 / np.sqrt(errors)[:, None]
        best = np.linalg.lstsq((system * weights[:, :, None]).reshape(-1, 4), (target * weights).ravel(), rcond=None)[0]
        errors = np.linalg.norm(target - system @ best, axis=1)
    assert errors.mean() == pytest.approx(found.fit_error, rel=5e-3)
    assert found.error == found.fit_error


def test_polish_brings_the_end_closer(mixture: Tuple[Mixture, Trajectories]) -> None:
    """And what it says is what the step graph does with its plan."""
    network, trajectories = mixture
    indices = (7, 5, 3, 1)
    walker = Walker(network, levels(), trajectories, "subset")
    start = walker.walk(indices)
    found = polish(walker, walker, indices, start.moves)
    assert found.moves.shape == (4, 3) and found.moves[0, 1] == 0
    assert found.fit_error < 0.6 * start.errors.mean()
    assert found.timesteps != tuple(levels().timesteps[list(indices)]) and (found.moves[:, 2] != 0).all()
    plan = calibrated_plan(CONFIG, STEPS, indices, found.moves, timesteps=found.timesteps)
    ends = [run_rows(plan, network, case, network.initial[case]) for case in range(CASES)]
    assert np.mean(list(map(relative, ends, trajectories.final))) == pytest.approx(found.fit_error, rel=1e-3)


def test_columns_of_the_jacobian_are_finite_differences(mixture: Tuple[Mixture, Trajectories]) -> None:
    """Each against a walk of its own; all walked together."""
    network, trajectories = mixture
    indices = (7, 5, 3, 1)
    problem = _Problem(Walker(network, levels(), trajectories, "subset"), indices, held_moves(CONFIG, STEPS, indices))
    place = np.full(len(problem.basis), 0.5)
    residual, jacobian = problem.residual(place), problem.jacobian(place)
    assert jacobian.shape == (CASES * DIM, 4 * 4 - 1)
    for column, unit in enumerate(np.eye(len(place))):
        wanted = (problem.residual(place + unit) - residual).ravel()
        assert relative(jacobian[:, column], wanted) < 5e-3 and np.abs(wanted).max() > 1e-6


def test_cases_that_are_not_polished_on_choose(mixture: Tuple[Mixture, Trajectories]) -> None:
    network, trajectories = mixture
    few, others = ([0], [1, 2, 3, 4, 5])
    walkers = [Walker(network, levels(), trajectories.select(part), "subset", part) for part in (few, others)]
    start = walkers[1].walk((7, 4, 1))
    found = polish(*walkers, (7, 4, 1), start.moves, rounds=6)
    assert found.error <= start.errors.mean()
    again = walkers[1].follow((7, 4, 1), found.moves, found.timesteps).errors.mean()
    assert found.error == pytest.approx(again, rel=1e-5)
    # Noise of every case's own: what fits one does not fit the others.
    apart = made_up(np.random.default_rng(3).normal(size=(6, STEPS, DIM)).astype(np.float32))
    own = [Walker(Recorded(apart), levels(), apart.select(part), "subset", part) for part in (few, others)]
    theirs = polish(own[1], own[1], (7, 4, 1), held_moves(CONFIG, STEPS, (7, 4, 1)))
    kept = polish(*own, (7, 4, 1), theirs.moves, theirs.timesteps)
    assert kept.error <= theirs.error * (1 + 1e-4)
    late = polish(*walkers, (7, 4, 1), start.moves, out_of_time=lambda: True)
    assert np.array_equal(late.moves[:, :2], start.moves) and late.error == pytest.approx(start.errors.mean(), rel=1e-5)


def test_polish_keeps_what_it_cannot_improve() -> None:
    trajectories = made_up(np.ones((2, STEPS, DIM), np.float32))  # held noise is exact here
    walker = Walker(Recorded(trajectories), levels(), trajectories, "subset")
    moves = held_moves(CONFIG, STEPS, (7, 3))
    found = polish(walker, walker, (7, 3), moves)
    assert found.error < 1e-5 and found.moves[:, :2] == pytest.approx(moves, abs=1e-2)


# searching


@pytest.mark.parametrize("kind", KINDS)
def test_search_finds_what_brute_force_finds(kind: str, mixture: Tuple[Mixture, Trajectories]) -> None:
    network, trajectories = mixture
    own = levels()
    gram = gram_matrix(trajectories, own)
    fits = SegmentFits(gram, own)
    walkers: Dict[int, Walker] = {}

    def make(cases: int) -> Walker:
        if cases not in walkers:
            walkers[cases] = Walker(network, own, trajectories.select(range(cases)), kind, fits=fits)
        return walkers[cases]

    found, outcome = search(make, gram, own, 4, kind, 1e-4, Effort(3, 40, 6, 3, CASES))
    every = {
        subset: Walker(network, own, trajectories, kind, fits=fits).walk(subset).errors.mean()
        for subset in ((7, *rest) for rest in itertools.combinations(range(6, -1, -1), 3))
    }
    best = min(every, key=every.__getitem__)
    assert len(every) == 35 and found == best
    assert outcome.errors.mean() == pytest.approx(every[best], rel=1e-6)


def test_search_finds_a_planted_subset() -> None:
    """A noise that changes at three indices only is held exactly by evaluating there."""
    rng = np.random.default_rng(6)
    planted = (11, 8, 7, 2)
    values = rng.normal(size=(4, len(planted), DIM))
    noises = np.stack([values[:, sum(i <= p for p in planted) - 1] for i in range(12)], axis=1).astype(np.float32)
    trajectories = made_up(noises)
    own = levels(12)
    walker = Walker(Recorded(trajectories), own, trajectories, "subset")
    gram = gram_matrix(trajectories, own)
    assert prefilter(gram, own, 4, "subset", 1, 1e-4) == [planted]
    found, outcome = search(lambda cases: walker, gram, own, 4, "subset", 1e-4, Effort(1, 0, 1, 4, 4))
    assert found == planted and outcome.errors.max() < 1e-5


def test_single_moves_lead_to_the_optimum_with_few_trials() -> None:
    """From the suggested starts alone, with fewer trials than there are subsets."""
    own = levels(12)
    network = Mixture(12)
    trajectories = record(network, own, network.initial)
    walker = Walker(network, own, trajectories, "subset")
    silent = np.zeros((12, 12))  # the open-loop error recommends nothing
    found, _ = search(lambda cases: walker, silent, own, 4, "subset", 1e-4, EFFORT_FEW)
    errors = {tuple(s): walker.walk(s).errors.mean() for s in all_subsets(12, 4).tolist()}
    assert len(errors) == 165 and sorted(errors.values()).index(errors[found]) < 2


def test_prefilter_descends_where_there_are_too_many_subsets(
    monkeypatch: pytest.MonkeyPatch, mixture: Tuple[Mixture, Trajectories]
) -> None:
    own = levels()
    gram = gram_matrix(mixture[1], own)
    every = prefilter(gram, own, 4, "calibrated", 3, 1e-4)
    monkeypatch.setattr("sampling.search.MAX_ENUMERATED", 10)
    assert prefilter(gram, own, 4, "calibrated", 3, 1e-4) == every


def test_starts_and_neighbours() -> None:
    assert front_loaded(20, 10) == (19, 18, 17, 16, 15, 14, 13, 11, 8, 4)
    for steps, count in itertools.product((5, 20, 50), (2, 4, 5)):
        found = front_loaded(steps, count)
        assert len(found) == count and found[0] == steps - 1 and found[-1] >= 0
        assert all(a > b for a, b in zip(found, found[1:]))
    assert separated([4, 4, 0, 0], 5) == (4, 3, 1, 0)
    moves = single_moves((5, 3, 0), 6)
    assert len(moves) == len(set(moves)) == 2 * 3 and all(len({5, 3, 0} & set(move)) == 2 for move in moves)
    assert len(all_subsets(20, 3)) == 171 and all_subsets(20, 3)[0].tolist() == [19, 18, 17]


# stages


def make_stages(folder: Path, network: Any, initial: np.ndarray, lines: Optional[List[str]] = None) -> Stages:
    report = (lines if lines is not None else []).append
    return Stages(network, levels(), initial, {"model": "toy"}, folder, Effort(2, 4, 2, 2, 3), report=report)


def finish(stages: Stages) -> Tuple[List[Any], Stages]:
    reference = stages.record().select(stages.held).final
    measure = lambda final: {"latent_relative_error": latent_errors(final, reference)}  # noqa: E731
    return stages.run([3, 4], ["subset", "calibrated"], measure, True), stages


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = Mixture()
    wanted, _ = finish(make_stages(tmp_path / "whole", whole, whole.initial))
    kills = 0

    while True:
        network = Mixture()

        def limited(cases: Any, timestep: int, x: np.ndarray, network: Mixture = network) -> np.ndarray:
            if network.calls >= 700:
                raise KeyboardInterrupt
            return network(cases, timestep, x)

        try:
            found, _ = finish(make_stages(tmp_path / "killed", limited, whole.initial))
            break
        except KeyboardInterrupt:
            kills += 1

            assert kills < 40, "it does not get on"
    assert found == wanted and kills >= 2
    again = Mixture()
    assert finish(make_stages(tmp_path / "whole", again, whole.initial))[0] == wanted and again.calls == 0


def test_stages_of_other_cases_are_not_taken_and_damage_is_done_anew(tmp_path: Path) -> None:
    network = Mixture()
    wanted, stages = finish(make_stages(tmp_path, network, network.initial))
    other = Mixture()
    finish(make_stages(tmp_path, other, other.initial[::-1].copy()))
    assert other.calls > 0
    for file in sorted(tmp_path.glob("*/*")):
        if file.name in ("case_003.npz", "003_subset.json"):
            file.write_bytes(file.read_bytes()[:40])
    repaired = Mixture()
    assert finish(make_stages(tmp_path, repaired, repaired.initial))[0] == wanted
    assert STEPS <= repaired.calls < network.calls / 2


def test_stages_tell_how_long(tmp_path: Path) -> None:
    lines: List[str] = []
    network = Mixture()
    finish(make_stages(tmp_path, network, network.initial, lines))
    assert len(lines) == CASES + 6 and all("about 0:0" in line for line in lines)
    assert lines[0].startswith("recorded case 1 of 6") and "3 evaluations, polished" in lines[-1]
    with pytest.raises(ValueError, match="2 cases or more"):
        make_stages(tmp_path, network, network.initial[:1])


def test_when_time_is_over_what_there_is_is_given(tmp_path: Path) -> None:
    """The counts nearest to 8 come first, and the next run goes on."""
    lines: List[str] = []
    network = Mixture()
    stages = make_stages(tmp_path, network, network.initial, lines)
    measured: List[int] = []

    def measure(final: np.ndarray) -> Dict[str, Spread]:
        measured.append(1)
        if len(measured) == 1:
            stages._end = -np.inf
        return {"latent_relative_error": Spread(1.0, 1.0)}

    found = stages.run([3, 4], ["subset", "calibrated"], measure, True)
    assert [(len(f.indices), f.kind) for f in found] == [(4, "subset")] and "not all was done" in lines[-1]
    assert len(finish(make_stages(tmp_path, network, network.initial))[0]) == 6


def test_groups_are_recorded_together_and_kept_apart(tmp_path: Path) -> None:
    network, alone = Mixture(), Mixture()
    sizes: List[int] = []

    def seen(cases: Sequence[int], timestep: int, x: np.ndarray) -> np.ndarray:
        sizes.append(len(cases))
        return network(cases, timestep, x)

    stages = dataclasses.replace(make_stages(tmp_path / "a", seen, network.initial), group=4)
    together = stages.record()
    assert sizes == [4] * STEPS + [2] * STEPS
    one = make_stages(tmp_path / "b", alone, network.initial).record()
    np.testing.assert_allclose(together.latents, one.latents, rtol=1e-5, atol=1e-5)
    assert stages.polished_on == [0, 2] and stages.choosing == [4] and stages.held == [1, 3, 5]


def test_a_polish_that_is_not_better_held_out_is_dropped(tmp_path: Path) -> None:
    network = Mixture()
    found, _ = finish(make_stages(tmp_path, network, network.initial))
    measure = "latent_relative_error"
    worse = [dataclasses.replace(f, errors={measure: Spread(9.0, 9.0)}) if f.polished else f for f in found]
    better = [dataclasses.replace(f, errors={measure: Spread(0.0, 0.0)}) if f.polished else f for f in found]
    assert [p.polished for p in selected(worse, measure)] == [False] * 4
    assert [p.polished for p in selected(better, measure)] == [False, False, True] * 2


# calibrations

SETTING = Setting("tiny", "cafe", 20, "onnxruntime", "fp32", 9.0)
SEVEN, EIGHT = (19, 18, 17, 14, 11, 7, 2), (19, 18, 17, 16, 14, 11, 7, 2)


def point(indices: Sequence[int], error: float, kind: str = "calibrated", polished: bool = False) -> Point:
    moves = held_moves(CONFIG, 20, indices) * 1.01 if kind == "calibrated" else ()
    errors = {"pixel_mean_abs": Spread(error, 2 * error), "latent_relative_error": Spread(error / 100, error / 50)}
    return Point(kind, tuple(indices), tuple((float(a), float(b)) for a, b in moves), polished, errors)


def calibration(**changes: Any) -> Calibration:
    points = (point(SEVEN, 3.0), point(EIGHT, 2.0, "subset"), point(EIGHT, 1.0, polished=True))
    return Calibration(dataclasses.replace(SETTING, **changes), 32, points, "pixel_mean_abs", {"date": "2026-11-21"})


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tiny.json"
    save_calibration(calibration(), path)
    assert load_calibration(path) == calibration()
    assert [file.name for file in path.parent.iterdir()] == ["tiny.json"]


def test_plans_of_a_calibration() -> None:
    found = plan_for(calibration(), CONFIG, 7)
    assert found.kind == "calibrated" and found.indices == SEVEN
    assert str(found) == "7 of 20 evaluations, calibrated on 32 cases of tiny"
    wanted = calibrated_plan(CONFIG, 20, SEVEN, held_moves(CONFIG, 20, SEVEN) * 1.01)
    assert found.rows == pytest.approx(wanted.rows, rel=1e-12)
    assert plan_for(calibration(), CONFIG, 8).kind == "calibrated", "the one of the lower error"
    held = plan_for(calibration(), CONFIG, 8, kind="subset")
    assert np.array_equal(held.rows, subset_plan(CONFIG, 20, EIGHT).rows) and "chosen on 32 cases" in str(held)
    assert plan_for(calibration(), CONFIG, 20).kind == "exact"
    with pytest.raises(CalibrationError, match="no plan of 9 evaluations .* it has 7, 8, and 20 is the full schedule"):
        plan_for(calibration(), CONFIG, 9)


@pytest.mark.parametrize(("budget", "count"), [(5.0, 7), (3.0, 7), (2.9, 8), (1.0, 8), (0.9, 20), (0.0, 20)])
def test_a_budget_takes_the_fewest_evaluations_within_it(budget: float, count: int) -> None:
    assert len(plan_within([calibration()], CONFIG, budget).indices) == count
    assert len(plan_within([calibration()], CONFIG, budget / 100, "latent_relative_error").indices) == count


def test_budgets_that_mean_nothing_are_refused() -> None:
    for budget in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match="0 or more"):
            plan_within([calibration()], CONFIG, budget)
    with pytest.raises(CalibrationError, match="pd was not measured .* pixel_mean_abs, latent_relative_error"):
        plan_within([calibration()], CONFIG, 1.0, "pd")
    with pytest.raises(CalibrationError, match="psnr_db was not measured"):
        plan_within([calibration()], CONFIG, 1.0, "psnr_db")


def test_another_backend_is_told_and_another_checkpoint_refused() -> None:
    same = Running(**dataclasses.asdict(SETTING))
    running = dataclasses.replace(same, backend="torch", precision="fp16", guidance=5.0)
    text = str(plan_for(calibration(), CONFIG, 7, running=running))
    assert "onnxruntime but run at torch" in text and "fp32 but run at fp16" in text
    assert "guidance 9 but run at 5" in text
    assert str(plan_for(calibration(), CONFIG, 7, running=same)).endswith("calibrated on 32 cases of tiny")
    for change in ({"weights": "beef"}, {"model": "sd15"}, {"num_steps": 30}):
        with pytest.raises(CalibrationError, match="made for something else"):
            plan_for(calibration(), CONFIG, 7, running=dataclasses.replace(same, **change))


def test_small_calibrations_are_told() -> None:
    sized = dataclasses.replace(calibration(), cases=8, made={"height": 256, "width": 128})
    assert sized.shorter_side == 128 and calibration().shorter_side is None
    running = Running(**dataclasses.asdict(SETTING))
    for side, said in ((None, []), (128, []), (256, ["calibrated on pictures of shorter side 128 but run at 256"])):
        assert warnings_of(sized, dataclasses.replace(running, shorter_side=side)) == said
    assert warnings_of(calibration(), dataclasses.replace(running, shorter_side=256)) == [], "the file does not say"
    (few,) = warnings_of(dataclasses.replace(sized, cases=7), running)
    assert few.startswith("only 7 cases were fitted to, 8 or more")


def test_the_command_names_the_build_folder_where_it_is_not_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = load_config("tiny"), Weights(None, 3, "cafe")
    default = Path(__file__).resolve().parent.parent / "build"
    monkeypatch.delenv("HACKATHON_BUILD_DIR", raising=False)
    assert "--build-dir" not in calibrate_command(config, weights, default, SETTING)
    assert calibrate_command(config, weights, tmp_path, SETTING).endswith(f" --build-dir {shlex.quote(str(tmp_path))}")
    monkeypatch.setenv("HACKATHON_BUILD_DIR", str(tmp_path))
    assert calibrate_command(config, weights, default, SETTING).endswith(f" --build-dir {shlex.quote(str(default))}")


def test_calibrations_are_taken_count_by_count(tmp_path: Path) -> None:
    config = dataclasses.replace(load_config("tiny"), folder=str(tmp_path))
    folder = calibration_folder(tmp_path / "build")
    few = dataclasses.replace(calibration(), cases=2, points=(point(SEVEN, 9.0),))
    nearer = dataclasses.replace(calibration(), cases=16, points=(point(EIGHT, 9.0),))
    save_calibration(few, folder / "few.json")
    save_calibration(nearer, folder / "nearer.json")
    os.utime(str(folder / "nearer.json"), (1e9, 1e9))
    save_calibration(calibration(), shipped_path(config))
    running = Running(**dataclasses.asdict(SETTING))
    found = find_calibrations(config, Weights(None, 3, "cafe"), tmp_path / "build", running)
    assert found == [nearer, few, calibration()], "few cases are worse than being older, and the shipped one is last"
    assert by_count(found) == {7: few, 8: nearer}
    assert by_count([*found[1:], nearer]) == {7: few, 8: calibration()}


def test_the_nearest_calibration_is_found(tmp_path: Path) -> None:
    config = dataclasses.replace(load_config("tiny"), folder=str(tmp_path))
    weights = Weights(None, 3, "cafe")
    save_calibration(calibration(backend="shipped"), shipped_path(config))
    assert find_calibration(config, weights, tmp_path / "build").setting.backend == "shipped"
    folder = calibration_folder(tmp_path / "build")
    for age, changes in enumerate([{"precision": "fp16"}, {"guidance": 5.0}, {"weights": "beef"}, {"model": "sd15"}]):
        made = calibration(**changes)
        save_calibration(made, folder / made.setting.file_name)
        os.utime(str(folder / made.setting.file_name), (1e9 - age, 1e9 - age))
    (folder / "broken.json").write_text("{")
    assert len(list(folder.iterdir())) == 5, "each setting has a file of its own"
    find = lambda **wanted: find_calibration(config, weights, tmp_path / "build", **wanted).setting  # noqa: E731
    assert find(precision="fp16", guidance=9.0).precision == "fp16"
    assert find(precision="fp32", guidance=5.0).guidance == 5.0
    assert find().precision == "fp16", "of equals the newest"
    with pytest.raises(CalibrationError, match="number of steps is 20, wanted 30"):
        find(num_steps=30)


def test_polished_points_come_back_with_weights_of_the_latent_and_timesteps(tmp_path: Path) -> None:
    moves = tuple((float(a), float(b), 0.01 * k) for k, (a, b) in enumerate(held_moves(CONFIG, 20, SEVEN)))
    told = (940, 900, 850, 700, 540, 350, 90)
    made = Point("calibrated", SEVEN, moves, True, {"pixel_mean_abs": Spread(1.0, 2.0)}, told)
    save_calibration(Calibration(SETTING, 32, (made,), "pixel_mean_abs", {}), tmp_path / "tiny.json")
    found = load_calibration(tmp_path / "tiny.json")
    assert found.points == (made,)
    plan = plan_for(found, CONFIG, 7)
    assert tuple(plan.timesteps) == told
    assert np.array_equal(plan.rows, calibrated_plan(CONFIG, 20, SEVEN, moves).rows)


def test_without_a_calibration_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    config = dataclasses.replace(load_config("tiny"), folder=str(tmp_path))
    weights = Weights(None, 3, "cafe")
    with pytest.raises(CalibrationError, match="none was made.*calibrate_sampler.py --model .*tiny.yaml --steps 20"):
        find_calibration(config, weights, tmp_path)
    save_calibration(calibration(weights="beef"), shipped_path(config))
    with pytest.raises(CalibrationError, match="checkpoint is beef, wanted cafe.*--precision fp16"):
        find_calibration(config, weights, tmp_path, precision="fp16")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(format=1),
        lambda value: value.pop("points"),
        lambda value: value.update(points=[]),
        lambda value: value["points"][0].update(indices=[19, 3, 5]),
        lambda value: value["points"][0].update(moves=[[1.0, 0.0]]),
        lambda value: value["points"][0].update(timesteps=[1000] * len(SEVEN)),
        lambda value: value["points"][0].update(kind="guessed"),
        lambda value: value["setting"].update(colour="red"),
        lambda value: value.update(selected_by="pd"),
        lambda value: value.update(made={"height": "256", "width": "384"}),
    ],
)
def test_damaged_calibrations_are_refused_by_name(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    save_calibration(calibration(), path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(CalibrationError, match="tiny.json"):
        load_calibration(path)


def test_the_shipped_calibration_is_for_the_shipped_weights(tiny_config: Any, tiny_weights: Weights) -> None:
    if not shipped_path(tiny_config).is_file():
        pytest.skip(f"{shipped_path(tiny_config).name} has not been made: tools/calibrate_sampler.py --model tiny")
    found = load_calibration(shipped_path(tiny_config))
    assert (found.setting.model, found.setting.weights) == ("tiny", tiny_weights.digest)
    assert shipped_path(tiny_config).stat().st_size < 64 << 10
    errors = [found.error(count).mean for count in found.counts]
    assert found.counts == tuple(range(4, 13)) and errors == sorted(errors, reverse=True)
    for count in found.counts:
        assert len(plan_for(found, tiny_config.schedule, count).indices) == count


# the deployed network


def test_the_evaluator_is_the_pipelines_network(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A plan walked with it ends where the pipeline's own run of the plan does."""
    from cldm.noise import draw_noise
    from cldm.request import Request
    from cldm.tokenizer import Tokenizer
    from deploy.spec import graph_specs
    from runtime.evaluator import StepEvaluator
    from runtime.ort_session import OrtSession
    from runtime.pipeline import About, Pipeline

    base = tmp_path_factory.getbasetemp()
    config, build = shared_config(base), shared_build(base, "fp32", 1)
    folder = base / "micro-build" / build.folder_name
    sessions = {name: OrtSession(folder / spec.file, spec) for name, spec in graph_specs(build).items()}
    tokenizer = Tokenizer(config)
    pipeline = Pipeline(build, sessions, tokenizer, About("", "onnxruntime", ""))
    rng = np.random.default_rng(5)
    pictures = [rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(2)]
    requests = [
        Request(f"a {word} bird", seed=seed, ddim_steps=STEPS, image_resolution=SIZE, guidance_scale=3.0 + seed)
        for seed, word in enumerate(("red", "blue"))
    ]
    evaluator = StepEvaluator(build, sessions, tokenizer)
    prepared = [evaluator.prepare(*case) for case in zip(pictures, requests)]
    shape = build.latent_shape
    initial = np.stack([draw_noise(r.seed, shape, STEPS, 0.0, "cpu")[0].numpy().ravel() for r in requests])

    def network(cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        shaped = latents.reshape(-1, *shape[1:])
        return np.stack([evaluator.noise(prepared[k], timestep, x).ravel() for k, x in zip(cases, shaped)])

    trajectories = record(network, levels(), initial)
    indices = (7, 6, 3, 1)
    outcome = Walker(network, levels(), trajectories, "calibrated").walk(indices)
    plans = {"exact": None, "calibrated": calibrated_plan(config.schedule, STEPS, indices, outcome.moves)}
    ends = {"exact": trajectories.final, "calibrated": outcome.final}
    for kind, plan in plans.items():
        for case, (picture, request) in enumerate(zip(pictures, requests)):
            result = pipeline.generate(picture, request, plan=plan)
            assert relative(ends[kind][case], result.latent.ravel()) < 1e-4
            decoded = evaluator.decode(ends[kind][case].reshape(shape[1:]))
            assert np.abs(decoded.astype(int) - result.images[0]).max() <= 1
    with pytest.raises(ValueError, match="resizes to"):
        evaluator.prepare(np.zeros((64, 128, 3), np.uint8), requests[0])
    evaluator.close()
    pipeline.close()


# the command


def test_numbers_of_evaluations_are_read() -> None:
    from tools.calibrate_sampler import parse_arguments, parse_counts

    assert parse_counts("4-6") == (4, 5, 6) and parse_counts("10,7-8,7") == (7, 8, 10)
    for argv in (
        ["--evaluations", "x"],
        ["--evaluations", "1-3"],
        ["--evaluations", "3-5"],
        ["--evaluations", "20"],
        ["--cases", "5"],
        ["--seconds", "0"],
        ["--batched", "--backend", "tensorrt"],
    ):
        with pytest.raises(SystemExit):
            parse_arguments(argv)


def test_held_out_cases_have_pictures_of_their_own(tmp_path: Path) -> None:
    import cv2

    from tools.calibrate_sampler import fit_picture, make_cases, parse_arguments

    for name in ("a", "b", "c"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((200, 500, 3), ord(name), np.uint8))
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    options = ["--pictures", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), "--cases", "10"]
    cases = make_cases(parse_arguments(options), "sd15")
    assert len({case.seed for case in cases}) == 10 and {case.prompt for case in cases} == {"one", "two"}
    assert not {case.name for case in cases[0::2]} & {case.name for case in cases[1::2]}
    assert {case.image.shape for case in cases} == {(256, 384, 3)}
    scenes = make_cases(parse_arguments(["--cases", "16"]), "tiny")
    assert len({case.name for case in scenes}) == 16 and sum("scene " in case.name for case in scenes) == 4
    (tmp_path / "b.png").unlink()
    (tmp_path / "c.png").unlink()
    with pytest.raises(ValueError, match="one picture is not enough"):
        make_cases(parse_arguments(options), "sd15")
    stripes = np.zeros((100, 400, 3), np.uint8)
    stripes[:, 150:250] = 255
    assert (fit_picture(stripes, 64, 64) == 255).all()


def test_the_command_makes_a_calibration_that_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.calibrate_sampler import main

    model = write_micro(tmp_path / "model")
    words = ["--model", str(model), "--backend", "torch", "--device", "cpu", "--precision", "fp32"]
    words += ["--height", "64", "--width", "64", "--steps", "6", "--evaluations", "4", "--cases", "4"]
    words += [
        "--kinds",
        "calibrated",
        "--starts",
        "1",
        "--trials",
        "1",
        "--build-dir",
        str(tmp_path / "build"),
    ]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "4*" in printed.out and "2 held-out cases" in printed.out and "recorded case 4 of 4" in printed.err
    config = load_config(str(model))
    found = find_calibration(config, find_weights(config), tmp_path / "build", 6, "torch", "fp32", 9.0)
    assert found.counts == (4,) and found.cases == 2 and found.setting.guidance == 9.0
    assert {"latent_relative_error", "pixel_mean_abs", "psnr_db"} <= set(found.points[0].errors)
    assert main(words) == 0 and "recorded" not in capsys.readouterr().err
    output = tmp_path / "batched.json"
    assert main([*words, "--batched", "--batch", "4", "--polish", "--output", str(output)]) == 0
    batched = load_calibration(output)
    assert batched.setting == found.setting and batched.made["batched"] and not found.made["batched"]
    assert {"4 calibrated", "4 calibrated, polished"} == set(batched.made["fitted"])
    for one, other in zip(found.points, batched.points):  # the same cases, so nearly the same result
        assert one.indices == other.indices
        assert one.errors["latent_relative_error"].mean == pytest.approx(
            other.errors["latent_relative_error"].mean, rel=0.05
        )
    assert main([*words, "--evaluations", "5", "--seconds", "1e-9"]) == 1
    assert "too short for a single plan" in capsys.readouterr().err
    assert main([*words, "--pictures", str(tmp_path / "nowhere")]) == 1
    assert "no picture folder" in capsys.readouterr().err

    # Another number of the same cases is added; other cases replace the file, which is said before the work.
    (path,) = calibration_folder(tmp_path / "build").glob("*.json")
    assert main([*words, "--evaluations", "5"]) == 0
    printed = capsys.readouterr()
    assert "plans of 4 evaluations will be kept" in printed.err and "made anew" not in printed.err
    assert "4*" in printed.out and "5*" in printed.out
    both = load_calibration(path)
    assert both.counts == (4, 5) and both.point(4) == found.point(4)
    assert set(both.made["fitted"]) == {"4 calibrated", "5 calibrated"} and set(both.made["kept"]) == {"4"}
    assert main([*words, "--evaluations", "5", "--cases", "6"]) == 0
    said = capsys.readouterr().err
    assert f"{path} with 4, 5 evaluations will be replaced: it is of other cases (2 fitted). To keep both give" in said
    assert said.index("will be replaced") < said.index("recorded case")
    assert load_calibration(path).counts == (5,)


def test_a_file_that_cannot_be_added_to_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.calibrate_sampler import Case, cases_digest, kept_calibration, merged, parse_arguments

    case = Case("a", np.zeros((4, 4, 3), np.uint8), "a bird", 1)
    args = parse_arguments(["--evaluations", "8"])
    path = tmp_path / "tiny.json"
    keep = lambda setting, by: kept_calibration(path, setting, [case], by, args)  # noqa: E731
    assert keep(SETTING, "pixel_mean_abs") is None and capsys.readouterr().err == ""
    made = {"cases_digest": cases_digest([case]), "batched": False, "date": "then", "fitted": {"7 x": 1.0, "8 x": 2.0}}
    old = dataclasses.replace(calibration(), made=made)
    save_calibration(old, path)
    assert keep(SETTING, "pixel_mean_abs") == old
    assert "of 7 evaluations will be kept" in capsys.readouterr().err
    for setting, by, said in (
        (SETTING, "pd", "selected by pixel_mean_abs, these are by pd"),
        (dataclasses.replace(SETTING, guidance=5.0), "pixel_mean_abs", "guidance scale is another"),
        (dataclasses.replace(SETTING, weights="beef"), "pixel_mean_abs", "checkpoint is cafe, wanted beef"),
    ):
        assert keep(setting, by) is None
        assert said in capsys.readouterr().err
    args.batched = True
    assert keep(SETTING, "pixel_mean_abs") is None and "without --batched" in capsys.readouterr().err
    path.write_text("{")
    assert keep(SETTING, "pixel_mean_abs") is None and "is damaged" in capsys.readouterr().err

    new = dataclasses.replace(calibration(), points=(point(EIGHT, 5.0),), made={"fitted": {"8 y": 3.0}, "date": "now"})
    both = merged(new, old)
    assert both.points == (old.point(7), new.point(8)) and both.made["fitted"] == {"7 x": 1.0, "8 y": 3.0}
    assert both.made["kept"]["7"]["date"] == "then" and both.made["date"] == "now"
    assert merged(dataclasses.replace(new, made={**new.made, "date": "last"}), both).made["kept"]["7"]["date"] == "then"


def test_what_would_fail_at_the_end_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import calibrate_sampler

    monkeypatch.setattr(calibrate_sampler, "make_cases", lambda *arguments: pytest.fail("work was begun"))
    monkeypatch.setenv("HACKATHON_BUILD_DIR", str(tmp_path / "else where"))
    (tmp_path / "letter.json").write_text("Dear")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("cldm.files.tempfile.mkstemp", _refusing(tmp_path / "locked"))
    for words, said in (
        (["--output", str(tmp_path)], "is a folder; name a file"),
        (["--output", str(tmp_path / "none" / "a.json")], f"there is no folder {tmp_path / 'none'}"),
        (["--output", str(tmp_path / "locked" / "a.json")], "cannot write"),
        (["--output", str(tmp_path / "letter.json")], "letter.json is damaged"),
        (["--height", "100"], "height must be a positive multiple of 64, got 100"),
        (["--batched", "--height", "100"], "height must be a positive multiple of 64, got 100"),
        (["--batched", "--width", "0"], "width must be a positive multiple of 64, got 0"),
    ):
        assert calibrate_sampler.main(["--model", "tiny", *words]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "else where").exists() and (tmp_path / "letter.json").read_text() == "Dear"
    assert calibrate_sampler.parse_arguments([]).build_dir == tmp_path / "else where"
    monkeypatch.delenv("HACKATHON_BUILD_DIR")
    assert calibrate_sampler.parse_arguments([]).build_dir == calibrate_sampler.ROOT / "build"


def _refusing(folder: Path) -> Any:
    """`tempfile.mkstemp` as it is where one folder cannot be written, which root always can."""
    import tempfile

    real = tempfile.mkstemp

    def mkstemp(*arguments: Any, **keywords: Any) -> Any:
        if keywords.get("dir") == str(folder):
            raise PermissionError(13, "Permission denied")
        return real(*arguments, **keywords)

    return mkstemp
