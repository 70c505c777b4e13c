"""Choosing a speed: its forms, the plan of a request, the table of choices, and the estimate of the contest's score."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest

import scoring.speed
from canny2image_TRT import hackathon
from cldm.request import Request
from cldm.weights import Weights
from ldm.plans import calibrated_plan, exact_plan, held_moves, subset_plan
from ldm.schedule import ScheduleConfig
from runtime.speed import Planner, Speed, early_indices, parse_speed
from sampling.calibration import (
    Calibration,
    CalibrationError,
    Point,
    Setting,
    Spread,
    calibration_folder,
    save_calibration,
)
from scoring.contest import PUBLISHED, PublishedPoint, ScoreFit, describe_fit, fit_score, left_out_error
from scoring.measures import Comparer
from scoring.pictures import find_pictures
from scoring.reference_cache import ReferenceCache
from scoring.runner import Runner, ScoreOptions
from scoring.speed import SpeedRow, SpeedRunner, estimate, format_speeds, speeds_json
from tests.micro_model import SIZE, shared_config
from tests.scoring_fakes import FakePipeline, write_pictures
from tests.small_model import small_config

SCHEDULE = ScheduleConfig()
FIVE = (19, 17, 13, 8, 3)
SIX = (19, 18, 15, 12, 8, 4)
MOVES = tuple((float(a), -0.01 * k) for k, (a, _) in enumerate(held_moves(SCHEDULE, 20, FIVE)))
ERRORS = {"latent_relative_error": (0.3, 0.2), "pixel_mean_abs": (9.0, 4.0)}


# --- forms


@pytest.mark.parametrize(
    ("choice", "speed"),
    [
        (None, Speed()),
        ("", Speed()),
        ("exact", Speed()),
        (" Exact ", Speed()),
        ("7", Speed(evaluations=7)),
        (7, Speed(evaluations=7)),
        ("pd:5", Speed(measure="pd", budget=5)),
        ("latent_relative_error: 0.05", Speed(measure="latent_relative_error", budget=0.05)),
        ("lpips:0", Speed(measure="lpips")),
    ],
)
def test_forms(choice: Any, speed: Speed) -> None:
    assert parse_speed(choice) == speed
    assert parse_speed(str(speed)) == speed
    assert speed.exact == (str(speed) == "exact")


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ("fast", ValueError, "'fast' is not understood: a speed is \"exact\""),
        ("7.5", ValueError, "not understood"),
        ("0", ValueError, "between 1 and 1000, got 0"),
        (-3, ValueError, "got -3"),
        ("1001", ValueError, "got 1001"),
        ("error:3", ValueError, "unknown measure 'error'.*measures are pd, "),
        (":3", ValueError, "unknown measure ''"),
        ("pd:", ValueError, "the budget '' is not a number"),
        ("pd:low", ValueError, "'low' is not a number"),
        ("pd:-1", ValueError, "0 or more"),
        ("pd:nan", ValueError, "finite"),
        ("pd:inf", ValueError, "finite"),
        (True, TypeError, "got bool True"),
        (7.0, TypeError, "got float 7.0"),
    ],
)
def test_other_forms_are_refused_with_what_there_is(choice: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        parse_speed(choice)


# --- plans


def _calibration(**changes: Any) -> Calibration:
    setting = Setting("some", "0123", 20, "torch", "fp32", 9.0)
    points = tuple(
        Point(kind, indices, moves, False, {key: Spread(e[k], 2 * e[k]) for key, e in ERRORS.items()})
        for k, (kind, indices, moves) in enumerate((("calibrated", FIVE, MOVES), ("subset", SIX, ())))
    )
    return Calibration(dataclasses.replace(setting, **changes), 32, points, "pixel_mean_abs", {})


class _Place:
    """A build folder with planners over it, and the lines that they report."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: List[str] = []

    def add(self, **changes: Any) -> None:
        folder = calibration_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_calibration(_calibration(**changes), folder / f"{len(list(folder.iterdir()))}.json")

    def ship(self, *counts: int, **changes: Any) -> None:
        """A shipped calibration of so many evaluations."""
        (self.folder / "models").mkdir()
        points = tuple(
            Point("subset", early_indices(20, n), (), False, {"pixel_mean_abs": Spread(20.0 - n, 30.0)}) for n in counts
        )
        shipped = dataclasses.replace(_calibration(), points=points, cases=48, **changes)
        save_calibration(shipped, self.folder / "models" / "some_sampler.json")

    def planner(self, speed: str, precision: str = "fp32") -> Planner:
        config = dataclasses.replace(small_config(), name="some", folder=str(self.folder / "models"))
        weights = Weights(None, config.seed, "0123")
        return Planner(parse_speed(speed), config, weights, self.folder, "torch", precision, self.lines.append)


@pytest.fixture
def place(tmp_path: Path) -> _Place:
    return _Place(tmp_path)


def _same(plan: Any, other: Any) -> bool:
    same = plan.indices == other.indices and plan.num_steps == other.num_steps and plan.kind == other.kind
    return same and np.array_equal(plan.rows, other.rows) and plan.fresh_noise == other.fresh_noise


def test_a_number_takes_the_calibrated_plan(place: _Place) -> None:
    place.add()
    plan = place.planner("5").plan(Request(""))
    assert _same(plan, calibrated_plan(SCHEDULE, 20, FIVE, MOVES))
    assert str(plan) == "5 of 20 evaluations, calibrated on 32 cases of some"
    assert place.lines == [f"speed 5 of 20 steps: {plan}"]
    assert _same(place.planner("6").plan(Request("")), subset_plan(SCHEDULE, 20, SIX))


def test_what_differs_from_the_calibration_stands_in_the_plan(place: _Place) -> None:
    place.add()
    planner = place.planner("5", precision="fp16")
    assert str(planner.plan(Request(""))).endswith("calibrated at fp32 but run at fp16")
    assert "calibrated at guidance 9 but run at 7" in str(planner.plan(Request("", guidance_scale=7)))


@pytest.mark.parametrize(
    ("speed", "indices"),
    [
        ("pixel_mean_abs:9", FIVE),
        ("pixel_mean_abs:8.9", SIX),
        ("latent_relative_error:0.25", SIX),
        ("latent_relative_error:1", FIVE),
        ("pixel_mean_abs:3", tuple(range(19, -1, -1))),
    ],
)
def test_a_budget_takes_the_fewest_evaluations_within_it(place: _Place, speed: str, indices: Any) -> None:
    place.add()
    plan = place.planner(speed).plan(Request(""))
    assert plan.indices == indices
    assert str(plan).endswith(f"for {speed}")


def test_the_shipped_calibration_has_what_the_own_one_lacks(place: _Place) -> None:
    place.add()
    place.ship(4, 5, 7)
    cases = {number: place.planner(number).plan(Request("")) for number in "4567"}
    origins = [re.sub(".* (on [0-9]+ cases) .*", r"\1", str(plan)) for plan in cases.values()]
    assert origins == ["on 48 cases", "on 32 cases", "on 32 cases", "on 48 cases"], "the own before the shipped one"
    assert _same(cases["5"], calibrated_plan(SCHEDULE, 20, FIVE, MOVES))
    assert str(place.planner("8").plan(Request(""))).endswith("not calibrated, as only 4, 5, 6, 7 are")
    found = place.planner("exact").choices(Request(""))
    assert [str(plan) for plan in found[:-1]] == [str(plan) for plan in cases.values()]
    for budget, count in ((16, 4), (13, 5), (8.9, 6), (3.9, 20)):
        assert len(place.planner(f"pixel_mean_abs:{budget}").plan(Request("")).indices) == count
    # Only the own one was measured so, and a number that was not is none to choose.
    assert len(place.planner("latent_relative_error:1").plan(Request("")).indices) == 5


def test_few_cases_and_other_pictures_stand_in_the_plan(place: _Place) -> None:
    place.ship(4, made={"height": 128, "width": 192})
    said = "calibrated on pictures of shorter side 128 but run at 256"
    planner = place.planner("4")
    assert str(planner.plan(Request("", image_resolution=256))).endswith(said)
    assert "but run" not in str(planner.plan(Request("", image_resolution=128))), "the size is part of what is kept"
    assert "but run" not in str(planner.plan(Request("", image_resolution=140))), "it becomes 128"


@pytest.mark.parametrize("count", [2, 3])
def test_a_budget_never_goes_below_the_least_number(place: _Place, count: int) -> None:
    place.ship(count, 6)
    plan = place.planner("pixel_mean_abs:500").plan(Request(""))
    assert len(plan.indices) == 6 and [len(p.indices) for p in place.planner("exact").choices(Request(""))] == [6, 20]


@pytest.mark.parametrize(("speed", "file"), [("pd:3", "pt_inception-2015-12-05-6726825d.pth"), ("lpips:1", "alexnet")])
def test_a_budget_in_what_was_not_measured_says_how_to_have_it(place: _Place, speed: str, file: str) -> None:
    place.add()
    measure = speed.partition(":")[0]
    told = f"speed {speed}: {measure} was not measured.* there are pixel_mean_abs, latent_relative_error"
    command = f"run: python3 tools/calibrate_sampler.py .*--guidance 9 --build-dir {re.escape(str(place.folder))}$"
    with pytest.raises(CalibrationError, match=f"{told}.*models/metrics/{file}.*{command}"):
        place.planner(speed).plan(Request(""))


@pytest.mark.parametrize(
    ("speed", "request_", "reason"),
    [
        ("5", {"eta": 0.5}, "as eta is 0.5"),
        ("pixel_mean_abs:9", {"eta": 1}, "as eta is 1"),
        ("3", {}, "as fewer than 4 evaluations are plain DDIM"),
        ("2", {"ddim_steps": 3}, "as fewer than 4 evaluations are plain DDIM"),
        ("pixel_mean_abs:9", {"ddim_steps": 3}, "as fewer than 4 evaluations are plain DDIM"),
        ("pixel_mean_abs:9", {"ddim_steps": 12}, "as no calibration of 12 steps fits"),
    ],
)
def test_fall_back_to_every_step(place: _Place, speed: str, request_: Dict[str, Any], reason: str) -> None:
    place.add()
    request = Request("", **request_)
    plan = place.planner(speed).plan(request)
    exact = exact_plan(SCHEDULE, request.ddim_steps, request.eta)
    assert _same(plan, exact)
    assert str(plan) == f"{exact}, not speed {speed}, {reason}"
    assert place.lines[-1].endswith(str(plan))


@pytest.mark.parametrize(("speed", "steps"), [("exact", 20), ("20", 20), ("7", 7), ("7", 5), ("3", 3)])
def test_nothing_to_leave_out_is_plain_ddim_without_a_word(place: _Place, speed: str, steps: int) -> None:
    place.add()
    plan = place.planner(speed).plan(Request("", ddim_steps=steps))
    assert _same(plan, exact_plan(SCHEDULE, steps)) and plan.detail == ""
    assert place.lines == []


@pytest.mark.parametrize(("speed", "steps"), [("5", 12), ("9", 20)], ids=["other steps", "other number"])
def test_a_number_without_a_calibration_is_ddim_on_early_steps_and_says_so(
    place: _Place, speed: str, steps: int
) -> None:
    place.add()
    plan = place.planner(speed).plan(Request("", ddim_steps=steps))
    assert _same(plan, subset_plan(SCHEDULE, steps, early_indices(steps, int(speed))))
    assert "not calibrated" in str(plan)
    if steps == 12:
        assert re.search(r"python3 tools/calibrate_sampler.py --model \S+ --steps 12 ", place.lines[0])
    assert len(place.lines) == (2 if steps == 12 else 1)


def test_early_indices() -> None:
    assert early_indices(20, 8) == (19, 18, 17, 16, 14, 11, 8, 4)
    assert early_indices(6, 6) == (5, 4, 3, 2, 1, 0) and early_indices(1, 1) == (0,)
    for steps in (4, 10, 20, 50, 1000):
        for count in range(1, min(steps, 60) + 1):
            found = early_indices(steps, count)
            subset_plan(SCHEDULE, steps, found)  # raises unless they fall from the noisiest to 0 or more
            assert len(found) == count
            gaps = -np.diff([*found, -1])
            assert count < 3 or gaps[: count // 2].sum() <= gaps[count // 2 :].sum()
    for bad in (0, 21):
        with pytest.raises(ValueError, match=f"between 1 and the schedule's 20 steps, got {bad}"):
            early_indices(20, bad)


def test_a_calibration_of_other_weights_is_not_used(place: _Place) -> None:
    place.add(weights="4567")
    plan = place.planner("5").plan(Request(""))
    assert (plan.kind, plan.indices) == ("subset", (19, 18, 16, 12, 6))
    assert "checkpoint is 4567, wanted 0123" in place.lines[0]


def test_plans_are_made_once(place: _Place) -> None:
    place.add()
    planner = place.planner("5")
    plan = planner.plan(Request("a", seed=1))
    assert planner.plan(Request("b", seed=2)) is plan
    assert planner.plan(Request("a", ddim_steps=10)) is not plan
    lines = len(place.lines)
    for guidance in np.linspace(1, 20, 200):  # more than are kept
        planner.plan(Request("", guidance_scale=guidance))
    assert len(planner._plans) <= 64
    assert len(place.lines) == lines + 200


def test_choices(place: _Place) -> None:
    without = place.planner("exact").choices(Request(""))
    assert [len(plan.indices) for plan in without] == [*range(4, 13), 20]
    assert all("not calibrated" in str(plan) for plan in without[:-1])
    assert [len(plan.indices) for plan in place.planner("7").choices(Request("", ddim_steps=6))] == [4, 5, 6]
    place.add()
    found = place.planner("exact").choices(Request(""))
    assert [plan.indices for plan in found] == [FIVE, SIX, tuple(range(19, -1, -1))]
    assert [len(plan.indices) for plan in place.planner("5").choices(Request("", eta=0.3))] == [20]


# --- the product


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = shared_config(tmp_path_factory.getbasetemp())
    build = tmp_path_factory.mktemp("build")
    model = str(Path(config.folder) / "micro.yaml")
    options = {"backend": "torch", "device": "cpu", "build_dir": str(build), "height": SIZE, "width": SIZE}
    hk = hackathon()

    def start(**more: Any) -> hackathon:
        hk.initialize(model, **options, **more)
        return hk

    start()
    calibration = dataclasses.replace(
        _calibration(), setting=Setting("micro", hk.weights_digest, 20, "torch", "fp32", 9.0)
    )
    calibration_folder(build).mkdir(parents=True)
    save_calibration(calibration, calibration_folder(build) / "made.json")
    yield start
    hk.close()


PICTURE = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 1, 3))
REQUEST = Request("a bird", image_resolution=64, seed=5)


def test_receipt_and_log_say_what_ran(product: Any, capsys: Any) -> None:
    hk = product(speed="5")
    said = "5 of 20 evaluations, calibrated on 32 cases of micro"
    assert f"canny2image: speed 5 of 20 steps: {said}\n" in capsys.readouterr().err
    result = hk.run(PICTURE, REQUEST)
    assert (result.receipt.evaluations, result.receipt.sampling) == (5, said)
    by_hand = hk.run(PICTURE, REQUEST, plan=calibrated_plan(SCHEDULE, 20, FIVE, MOVES))
    assert np.array_equal(by_hand.latent, result.latent)
    arguments = ("a bird", "", "", 1, 64, 20, False, 1, 9, 5, 0.0, 100, 200)
    assert np.array_equal(hk.process(PICTURE, *arguments)[0], result.images[0])
    generated = hk.generate(PICTURE, "a bird", image_resolution=64, seed=5)
    assert np.array_equal(generated.latent, result.latent)
    assert len(hk.plans(REQUEST)) == 3
    exact = hk.run(PICTURE, REQUEST, plan=exact_plan(SCHEDULE, 20))  # a plan wins over the speed
    assert exact.receipt.evaluations == 20
    assert np.abs(exact.latent - result.latent).max() > 1e-3


def test_exact_is_the_default(product: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HACKATHON_SPEED", raising=False)
    hk = product()
    assert hk.run(PICTURE, REQUEST).receipt.sampling == "20 of 20 evaluations, exact"
    assert "speed" not in capsys.readouterr().err


def test_environment_and_argument(product: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HACKATHON_SPEED", "pixel_mean_abs:5")
    assert product().run(PICTURE, REQUEST).receipt.evaluations == 6
    assert product(speed=5).run(PICTURE, REQUEST).receipt.evaluations == 5
    assert product(speed="exact").run(PICTURE, REQUEST).receipt.evaluations == 20
    hk = product()
    monkeypatch.setenv("HACKATHON_SPEED", "very")
    with pytest.raises(ValueError, match="'very' is not understood"):
        product()
    assert hk.run(PICTURE, REQUEST).receipt.evaluations == 6  # what ran before still runs
    with pytest.raises(CalibrationError, match="lpips was not measured"):
        product(speed="lpips:0.1")
    with pytest.raises(RuntimeError, match="initialize"):
        hk.run(PICTURE, REQUEST)


# --- the table


class _Planned(FakePipeline):
    """The fake pipeline with two plans: an error of 3 levels and a sleep an evaluation less than 20 and 1."""

    def plans(self, request: Request) -> Any:
        return [subset_plan(SCHEDULE, 20, SIX), exact_plan(SCHEDULE, 20)]

    def run(self, image: np.ndarray, request: Request, plan: Any = None) -> Any:
        self.calls.append(("run", image, len(plan.indices)))
        time.sleep(0.002 * len(plan.indices))
        return self._result(image, 20 - len(plan.indices), request)


class _FakePd:
    def between_images(self, image: np.ndarray, reference: np.ndarray) -> float:
        return float(np.abs(image.astype(int) - reference).mean())


def _speeds(folder: Path, **options: Any) -> Any:
    write_pictures(folder / "pictures", ["a.png", "b.png"])
    pictures = find_pictures(folder / "pictures", None, 64)
    pipeline = _Planned()
    comparer = Comparer(_FakePd(), None, {"lpips": "not measured: no file"})  # type: ignore[arg-type]
    request = dataclasses.replace(Request("a bird", seed=1), image_resolution=64)
    runner = Runner(pipeline, comparer, ScoreOptions(request, **options), ReferenceCache(folder / "cache"))
    done: List[Any] = []
    work = SpeedRunner(runner, lambda *seen: done.append(seen))
    rows = work.run(pipeline.plans(request), pictures, "cpu")
    return pipeline, rows, done, comparer, request


def test_rows_hold_every_plan_in_turn(tmp_path: Path) -> None:
    pipeline, rows, done, _, _ = _speeds(tmp_path, warmup=2, repeats=3)
    counts = [call[2] for call in pipeline.calls if call[0] == "run"]
    assert counts == [6] * (2 + 2 * 3) + [20] * (2 + 2 * 3)
    assert [row.evaluations for row in rows] == [6, 20]
    assert [len(row.latencies_ms) for row in rows] == [6, 6]
    assert all(row.latency_ms >= 2 * row.evaluations for row in rows)
    assert rows[0].mean("pd") == 14 and rows[1].mean("pd") == 0
    assert rows[0].mean("latent_relative_error") == pytest.approx(0.7, abs=1e-6)
    assert rows[0].mean("lpips") is None
    assert sum(finished for _, _, finished in done) == 4
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2
    assert pipeline.count("reference") == 2


def test_table_of_speeds(tmp_path: Path) -> None:
    _, _, _, comparer, request = _speeds(tmp_path)
    pictures = [{"pd": 7.0, "psnr_db": 20.0, "latent_relative_error": 0.5}] * 2
    rows = [
        SpeedRow(6, "6 of 20 evaluations, subset", [200.0, 210.0, 400.0], pictures),
        SpeedRow(20, "20 of 20 evaluations, exact", [630.0], [{"pd": 0.0, "psnr_db": float("inf")}]),
    ]
    text = format_speeds(rows, comparer.not_measured)
    lines = text.splitlines()
    titles = ["evaluations", "latency ms", "lowest", "highest", "PD", "PSNR dB", "latent rel. err.", "score, est."]
    assert re.split(r"  +", lines[0].strip()) == titles
    score = fit_score().estimate(210, 7)
    assert lines[2].split() == ["6", "210.00", "200.00", "400.00", "7.000", "20.00", "5.0e-01", f"{score:.0f}"]
    assert lines[3].split()[:7] == ["20", "630.00", "630.00", "630.00", "0.000", "inf", "-"]
    assert "6: 6 of 20 evaluations, subset" in text and "LPIPS: not measured: no file" in text
    assert f"as fast as this machine: {score:.0f} with 6 evaluations" in lines[-1]
    plain = speeds_json(rows, comparer.not_measured, request, {"speed": "table"})
    json.dumps(plain, allow_nan=False)
    assert plain["rows"][0]["score_estimate"] == pytest.approx(score)
    assert [row["score_in_fitted_span"] for row in plain["rows"]] == [True, True]
    assert plain["rows"][1]["pictures"][0]["psnr_db"] == "inf"


def test_estimates_outside_the_fitted_span_are_marked() -> None:
    latencies = {167.9: False, 168.0: True, 633.0: True, 634.0: False}
    rows = [SpeedRow(k, "some", [ms], [{"pd": 7.0}]) for k, ms in enumerate(latencies)]
    lines = format_speeds(rows, {}).splitlines()
    assert [not line.endswith("  outside the fitted span") for line in lines[2:6]] == list(latencies.values())
    assert lines[-1].endswith("with 0 evaluations, outside the fitted span.")
    assert "span 168 to 633 ms" in lines[-2]
    assert format_speeds(rows[1:], {}).splitlines()[-1].endswith("with 1 evaluations.")
    plain = speeds_json(rows, {}, Request(""), {})
    assert [row["score_in_fitted_span"] for row in plain["rows"]] == list(latencies.values())


def test_without_pd_there_is_no_estimate() -> None:
    rows = [SpeedRow(6, "6 of 20", [2.0], [{"psnr_db": 20.0}]), SpeedRow(20, "20 of 20", [3.0])]
    text = format_speeds(rows, {"pd": "not measured: no file"})
    assert "PD: not measured: no file" in text and "PD was not measured" in text.splitlines()[-1]
    assert "score, est." not in text.splitlines()[0]
    assert estimate(rows[0], fit_score()) is None


# --- the contest's score


def test_fit_recovers_a_score_that_has_its_form() -> None:
    known = ScoreFit((9.0, -0.002, -0.05, -0.3))
    points = [
        PublishedPoint("x", ms, pd, known.estimate(ms, pd))
        for ms, pd in ((100, 9), (200, 3), (400, 5), (600, 7.5), (50, 11))
    ]
    points.append(PublishedPoint("far off", 900, 2, 1, fitted=False))
    assert fit_score(points).coefficients == pytest.approx(known.coefficients, rel=1e-6)
    assert left_out_error(points) < 1e-6


def test_fit_of_the_published_points() -> None:
    fit = fit_score()
    used = [p for p in PUBLISHED if p.fitted]
    assert len(used) == 7 and len(PUBLISHED) == 8
    for point in used:
        assert fit.estimate(point.milliseconds, point.pd) == pytest.approx(point.score, rel=0.02)
    assert fit.estimate(200, 5) > fit.estimate(210, 5) > fit.estimate(210, 6)
    assert fit.estimate(100, 12.01) == 0 < fit.estimate(100, 12)
    text = describe_fit(fit)
    assert "an estimate" in text and "left out of the fit" in text and "-83.6 %" in text
    assert all(point.name in text and f"{point.score:.0f}" in text for point in PUBLISHED)
    assert 0.05 < left_out_error() < 0.1


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="do not determine"):
        fit_score([point for point in PUBLISHED if point.pd <= 8])


def test_module_of_the_table_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, runtime.speed, scoring.contest; print('torch' in sys.modules)"
    root = Path(scoring.speed.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=str(root), env=dict(os.environ), capture_output=True)
    assert done.stdout.strip() == b"False", done.stderr
