"""The study of samplers: its networks against the plain sampler, its harness against closed forms, its report."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import numpy as np
import pytest
import torch

from cldm.checkpoint import load_model
from cldm.config import load_config
from cldm.tokenizer import Tokenizer
from cldm.weights import Weights
from ldm.plans import calibrated_plan, exact_plan, held_moves, linear_plan, spread_indices, subset_plan
from ldm.schedule import ScheduleConfig, alpha_bars, ddim_timesteps
from sampling.calibration import Calibration, Point, Setting, Spread, save_calibration
from sampling.trajectory import Levels, record
from tests.small_model import small_config
from tools import measure_sampler
from tools.sampler import cases as case_module
from tools.sampler.bound import FREEDOMS, own_weights
from tools.sampler.cases import FIRST_FITTED, FIRST_MEASURED, Case, at_guidance, kinds_of, scene_cases
from tools.sampler.chart import Panel, draw_chart
from tools.sampler.methods import TEAM_LISTS, Methods, dpm_solver, refit, unipc
from tools.sampler.network import CaseNetwork, record_all, relative_errors, run_plan, run_scheduler
from tools.sampler.report import StudyReport, fill_tables
from tools.sampler.savings import (
    Saving,
    SavingNetwork,
    control_share,
    high_precision_first,
    interpolated_error,
)
from tools.tiny.sampling import NEGATIVE_PROMPT, Sampler

SCHEDULE = ScheduleConfig()
BARS = alpha_bars(SCHEDULE)
STEPS = ddim_timesteps(20)
TEN = (19, 18, 17, 16, 15, 14, 13, 11, 8, 4)


def _cases(count: int, size: int = 64) -> List[Case]:
    rng = np.random.default_rng(3)
    canny = (rng.random((count, size, size)) > 0.8).astype(np.uint8) * 255
    return [Case(f"case {k}", "noise", canny[k], f"a {k} bird", 70 + k, 2.0 + k) for k in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are quicker on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts() -> Any:
    config = small_config()
    return load_model(config, Weights(None, 7, "")), Tokenizer(config)


@pytest.fixture(scope="module")
def network(parts: Any) -> CaseNetwork:
    return CaseNetwork(_cases(3), *parts, "cpu", batch=2)


# --- networks


def test_record_is_the_samplers_ddim(parts: Any, network: CaseNetwork) -> None:
    levels = Levels(SCHEDULE, 20)
    found = record_all(network, levels)
    cases = network.cases
    images, latents = Sampler(*parts, "cpu", batch=3).generate(
        np.stack([case.canny for case in cases]),
        [case.prompt for case in cases],
        NEGATIVE_PROMPT,
        [case.seed for case in cases],
        guidance=[case.guidance for case in cases],
    )
    assert relative_errors(found.final, latents.reshape(3, -1)).max() < 1e-4
    assert np.abs(network.images(found.final).astype(int) - images).max() <= 1
    alone = record(lambda *asked: network.predict(*asked), levels, found.initial)
    np.testing.assert_allclose(alone.latents, found.latents, atol=2e-3 * np.abs(found.latents).max())
    again = run_plan(network.predict, exact_plan(SCHEDULE, 20), found.initial)
    assert relative_errors(again, found.final).max() < 1e-4


def test_halves_and_residuals_apart(network: CaseNetwork) -> None:
    x = network.initial()
    before = network.evaluations
    cond, uncond, controls = network.halves([2, 0, 1], 501, x)
    assert network.evaluations == before + 3
    ordered = network.halves([0, 1, 2], 501, x[[1, 2, 0]])[0][[2, 0, 1]]
    np.testing.assert_allclose(ordered, cond, atol=1e-5 * np.abs(cond).max())
    before = network.evaluations
    only, nothing, _ = network.halves([2, 0, 1], 501, x, conditional_only=True)
    assert network.evaluations == before + 1.5
    np.testing.assert_allclose(only, cond, atol=1e-5 * np.abs(cond).max())
    assert nothing.size == 0
    reused = network.halves([2, 0, 1], 501, x, controls=controls)
    assert np.array_equal(reused[0], cond) and np.array_equal(reused[1], uncond)
    half = network.halves([2, 0, 1], 501, x, conditional_only=True, controls=controls)[0]
    np.testing.assert_allclose(half, cond, atol=1e-5 * np.abs(cond).max())
    later = network.halves([2, 0, 1], 1, x, controls=controls)[0]
    assert relative_errors(later, network.halves([2, 0, 1], 1, x)[0]).min() > 1e-4
    guided = network.predict([2, 0, 1], 501, x)
    np.testing.assert_allclose(guided, uncond + np.array([[4], [2], [3]]) * (cond - uncond), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_graphs_say_what_the_networks_say(parts: Any) -> None:
    """More cases than a batch, a case twice, and graphs that are filled up."""
    network = CaseNetwork(_cases(3), *parts, "cuda", batch=12)
    cases = [2, 0, 1, 1, 0] * 3
    x = np.random.default_rng(0).normal(size=(len(cases), network.initial().shape[1])).astype(np.float32)
    for timestep in (501, 3):
        cond, uncond, _ = network.halves(cases, timestep, x)
        wanted = network.guide(cases, cond, uncond)
        assert relative_errors(network.predict(cases, timestep, x), wanted).max() < 1e-5
    assert sorted(network._graphs) == [8, 12] and not network._refused


def test_scenes_of_the_study() -> None:
    found = scene_cases(3, FIRST_MEASURED)
    assert [case.seed for case in found] == [43000, 43001, 43002]
    assert found[0].canny.shape == (256, 384) and found[0].canny.any()
    assert [c.guidance for c in at_guidance(found, 5)] == [5] * 3
    birds = scene_cases(2, FIRST_FITTED, keep=lambda scene: scene.kind == "bird")
    assert kinds_of(birds) == {"bird": 2} and birds[0].name != birds[1].name
    assert not {c.seed for c in found} & {c.seed for c in birds}


def test_too_few_scenes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_module, "SEARCHED", 2)
    with pytest.raises(ValueError, match="only 0 of 2 scenes from 6000 on are kept, 1 were asked for"):
        scene_cases(1, FIRST_FITTED, keep=lambda scene: False)


# --- samplers against closed forms


class _OnePoint:
    """The exact noise of data that is one point a case: x = sqrt(a) point + sqrt(1 - a) noise, whatever the solver."""

    def __init__(self, count: int = 2, size: int = 5) -> None:
        rng = np.random.default_rng(0)
        self.point = rng.normal(size=(count, size))
        self.initial = rng.normal(size=(count, size))
        self.calls: List[int] = []

    def predict(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        self.calls.append(timestep)
        a = BARS[timestep]
        return ((latents - np.sqrt(a) * self.point[list(cases)]) / np.sqrt(1 - a)).astype(np.float32)


@pytest.mark.parametrize("make", [subset_plan, linear_plan])
@pytest.mark.parametrize("indices", [TEN, spread_indices(20, 4), tuple(range(19, -1, -1))])
def test_plans_are_exact_where_the_noise_is_constant(make: Any, indices: Any) -> None:
    data = _OnePoint()
    found = run_plan(data.predict, make(SCHEDULE, 20, indices), data.initial)
    a = BARS[STEPS[-1]]
    noise = (data.initial - np.sqrt(a) * data.point) / np.sqrt(1 - a)
    np.testing.assert_allclose(found, np.sqrt(BARS[0]) * data.point + np.sqrt(1 - BARS[0]) * noise, atol=2e-5)
    assert data.calls == [int(STEPS[index]) for index in indices]


@pytest.mark.parametrize("make", [dpm_solver, unipc])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("count", [4, 7, 12])
def test_schedulers_reach_the_point_in_as_many_evaluations(make: Any, spacing: str, count: int) -> None:
    data = _OnePoint()
    found = run_scheduler(data.predict, make(SCHEDULE, spacing), count, data.initial)
    np.testing.assert_allclose(found, data.point, atol=1e-4)
    assert len(data.calls) == count
    assert data.calls[0] == (999 if spacing == "linspace" else count * (1000 // (count + 1)) + 1)


def test_moves_are_refitted_on_other_cases() -> None:
    """One number a case, and noise that is constant: one prediction explains every segment."""
    data = _OnePoint(count=3, size=4)
    levels = Levels(SCHEDULE, 20)

    plan = refit(data.predict, levels, record(data.predict, levels, data.initial), TEN)
    exact = run_plan(data.predict, exact_plan(SCHEDULE, 20), data.initial)
    assert relative_errors(run_plan(data.predict, plan, data.initial), exact).max() < 1e-4


def _calibration(folder: Path) -> Path:
    indices = {4: (19, 15, 9, 3), 5: (19, 16, 12, 7, 2)}
    points = []
    for polished, scale in ((False, 1.0), (True, 0.99)):
        for some in indices.values():
            moves = tuple((float(a) * scale, float(b)) for a, b in held_moves(SCHEDULE, 20, some))
            points.append(Point("calibrated", some, moves, polished, {"pd": Spread(1.0, 2.0)}))
    points += [
        Point(kind, some, (), False, {"pd": Spread(2, 3)}) for kind in ("subset", "linear") for some in indices.values()
    ]
    path = folder / "calibration.json"
    save_calibration(Calibration(Setting("tiny", "x"), 32, tuple(points), "pd", {}), path)
    return path


def test_methods_by_name(tmp_path: Path) -> None:
    from sampling.calibration import load_calibration

    methods = Methods(SCHEDULE, load_calibration(_calibration(tmp_path)))
    five = (19, 16, 12, 7, 2)
    assert methods.plan("DDIM, best subset", 5).indices == five
    assert methods.plan("DDIM, 2023 list", 10).indices == TEN == TEAM_LISTS["trt2023, 10 steps"]
    assert methods.plan("DDIM, 2023 list", 8) is None and methods.plan("calibrated", 9) is None
    assert all(len(indices) == int(name.split()[1]) for name, indices in TEAM_LISTS.items())
    calibrated, polished = methods.plan("calibrated", 5), methods.plan("calibrated, polished", 5)
    assert np.array_equal(calibrated.rows, calibrated_plan(SCHEDULE, 20, five, held_moves(SCHEDULE, 20, five)).rows)
    assert polished.rows[0, 1] == pytest.approx(0.99 * calibrated.rows[0, 1])
    assert methods.plan("DDIM of N steps", 5).num_steps == 5
    data = _OnePoint()
    for name in methods.names():
        assert methods.final(name, 5, data.predict, data.initial) is not None or name == "DDIM, 2023 list"
    without = Methods(SCHEDULE)
    assert without.plan("DDIM, best subset", 5) is None and without.plan("linear, spread subset", 5) is not None


# --- bound


def test_own_weights_are_exact_where_two_predictions_tell_all() -> None:
    """Noises on a line in time, another line for each case: the last two give every sum, one does not."""
    levels, rng = Levels(SCHEDULE, 20), np.random.default_rng(0)
    start, slope, initial = rng.normal(size=(3, 3, 12)).astype(np.float32)

    def line(cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        return start[list(cases)] + timestep / 200 * slope[list(cases)]

    reference = record(line, levels, initial)
    errors = [own_weights(line, levels, reference, (19, 18, 14, 9, 3), freedom) for freedom in FREEDOMS]
    assert errors[0].shape == (3,) and errors[0].min() > 5e-3
    for exact in errors[1:]:
        assert exact.max() < 1e-5


def test_own_weights_are_never_worse_with_more_of_them(network: CaseNetwork) -> None:
    levels = Levels(SCHEDULE, 20)
    reference = record_all(network, levels)
    indices = (19, 4)  # one segment before the last prediction: nothing that is undone later
    errors = [own_weights(network.predict, levels, reference, indices[:1], freedom) for freedom in FREEDOMS]
    held = relative_errors(
        run_plan(network.predict, subset_plan(SCHEDULE, 20, indices[:1]), reference.initial), reference.final
    )
    assert (errors[0] <= held * (1 + 1e-5)).all()
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and (errors[2] < errors[1]).all()


# --- savings


class _Halves:
    """Halves that are known: the conditional one c + d t, the unconditional one a line in t, or c less a constant."""

    config = small_config()

    def __init__(self, line: bool) -> None:
        self.line = line
        self.seen: List[Any] = []

    def halves(
        self, cases: Any, timestep: int, latents: np.ndarray, conditional_only: bool = False, controls: Any = None
    ) -> Any:
        self.seen.append((timestep, conditional_only, controls))
        cond = latents + (0.01 * timestep**2 if not self.line else 3.0)
        uncond = np.full_like(latents, 5 - 0.02 * timestep) if self.line else cond - 0.25
        return cond, uncond[:0] if conditional_only else uncond, timestep if controls is None else controls

    def guide(self, cases: Any, cond: np.ndarray, uncond: np.ndarray) -> np.ndarray:
        return uncond + 9 * (cond - uncond)


@pytest.mark.parametrize("rule", ["difference", "line"])
def test_guess_is_exact_where_its_rule_holds(rule: str) -> None:
    indices = (19, 14, 10, 5, 2)
    x = np.arange(6.0).reshape(2, 3)
    for guessed in (0, 1, 3):
        halves = _Halves(rule == "line")
        saved = SavingNetwork(halves, Saving(guessed=guessed, rule=rule), indices)  # type: ignore[arg-type]
        for index in indices:
            found = saved.predict([0, 1], int(STEPS[index]), x)
            cond, uncond, _ = _Halves(rule == "line").halves([0, 1], int(STEPS[index]), x)
            np.testing.assert_allclose(found, 9 * cond - 8 * uncond, rtol=1e-9)
        assert [only for _, only, _ in halves.seen] == [False] * (5 - guessed) + [True] * guessed


def test_residuals_of_the_last_evaluation_that_made_them_are_reused() -> None:
    indices = (19, 14, 10, 5, 2)
    halves = _Halves(True)
    saved = SavingNetwork(halves, Saving(reused=2), indices)  # type: ignore[arg-type]
    for index in indices:
        for case in (0, 1):
            saved.predict([case], int(STEPS[index]), np.zeros((1, 3)))
    assert [controls for _, _, controls in halves.seen] == [None] * 6 + [int(STEPS[10])] * 4


@pytest.mark.parametrize(
    ("saving", "cost"),
    [
        (Saving(), 16),
        (Saving(reused=3), 16 - 6 * 0.25),
        (Saving(guessed=2), 14),
        (Saving(reused=2, guessed=3), 10 + 0.75 * 2 + 1),
        (Saving(reused=8, guessed=8), 6),
    ],
)
def test_cost_in_halves(saving: Saving, cost: float) -> None:
    assert saving.halves(8, 0.25) == pytest.approx(cost)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="difference, line, got 'cubic'"):
        Saving(guessed=1, rule="cubic")


def test_share_of_the_controlnet() -> None:
    """Convolutions and matrix products of a small model counted by hand are too many; SD1.5's published ones are known.

    ControlNet 0.361 and UNet 0.860 billion parameters, but the decoder's large maps cost the most.
    """
    assert control_share(load_config("sd15")) == pytest.approx(0.246, abs=0.005)


def test_high_precision_first() -> None:
    def of(value: float) -> Any:
        return lambda cases, timestep, latents: np.full_like(latents, value)

    timesteps = STEPS[::-1]
    predict = high_precision_first(of(1), of(2), timesteps, 3)
    assert [predict([0], int(t), np.zeros((1, 1)))[0, 0] for t in timesteps] == [1] * 3 + [2] * 17


def test_interpolated_error() -> None:
    curve = {cost: math.exp(-0.3 * cost) for cost in (8.0, 10.0, 16.0)}
    for cost in (8, 9.5, 13, 16):
        assert interpolated_error(curve, cost) == pytest.approx(math.exp(-0.3 * cost))
    with pytest.raises(ValueError, match="cost 7 is outside"):
        interpolated_error(curve, 7)


# --- report


def _report() -> StudyReport:
    report = StudyReport()
    for name, errors in {"DDIM, best subset": {8: 0.2, 10: 0.1}, "calibrated": {7: 0.13, 8: 0.09}}.items():
        for count, error in errors.items():
            report.add_error("fp32", name, count, {"latent_relative_error": error, "worst": 1.0, "psnr_db": 30.0})
    report.add_error("fp32", "exact", 20, {"latent_relative_error": 0.0, "worst": 0.0})
    report.add_latency("fp32", "torch", 10.0, 2.0)
    report.add_saving("residuals of the last 1 reused", 8, 15.5, 0.1, 0.11)
    report.add_transfer("guidance 5", 8, {"calibrated": 0.1})
    report.add_precision(20, 0, 0.01)
    report.add_bound((19, 9), {"held": 0.2, "the last 2": 0.1})
    return report


def test_tables() -> None:
    tables = _report().tables()
    assert tables["errors-fp32"].splitlines() == [
        "| evaluations | 7 | 8 | 10 | 20 |",
        "| --- | --- | --- | --- | --- |",
        "| DDIM, best subset | - | 0.200 | 0.100 | - |",
        "| calibrated | 0.130 | 0.090 | - | - |",
        "| exact | - | - | - | 0.000 |",
    ]
    assert "| 8 | calibrated | 0.90 | 1 | yes |" in tables["wanted"]
    assert "| 7 | calibrated | 1.30 | 1.2 | **missed** |" in tables["wanted"]
    assert tables["savings"].endswith("| residuals of the last 1 reused | 8 | 15.50 | 0.100 | 0.110 | yes |")
    assert tables["transfer"].endswith("| guidance 5 | 8 | 0.100 |")
    assert tables["bound"].endswith("| 2 | 19 9 | 0.200 | 0.100 |")
    assert "PSNR, dB, 8 evaluations" in tables["images-fp32"] and "PD" not in tables["images-fp32"]


def test_tables_go_between_their_marks() -> None:
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n"
    filled = fill_tables(text, {"x": r"new \1", "y": "other"})
    assert filled == "a\n<!-- begin x -->\nnew \\1\n<!-- end x -->\nb\n<!-- begin y -->\nother\n<!-- end y -->\n"
    assert fill_tables(filled, {"x": "old"}).count("old") == 1
    with pytest.raises(ValueError, match="no place for the table z"):
        fill_tables(text, {"z": ""})


def test_chart_places_its_points() -> None:
    panels = [
        Panel("one", "evaluations", {"first & best": [(4, 0.1), (12, 0.001)], "second": [(8, 0.01)]}),
        Panel("two", "ms", {"second": [(5, 0.01)]}),
    ]
    root = ElementTree.fromstring(draw_chart(panels, "error"))
    tag = "{http://www.w3.org/2000/svg}"
    spots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{tag}circle")]
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = spots
    assert x2 == pytest.approx((x0 + x1) / 2, abs=0.1) and y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert y0 < y1 and y3 == y2 and x3 > x1
    assert sum(text.text == "first & best" for text in root.iter(f"{tag}text")) == 1
    with pytest.raises(ValueError, match="above 0"):
        draw_chart([Panel("", "", {"zero": [(1, 0.0)]})], "")


# --- the command


def test_counts() -> None:
    assert measure_sampler.parse_counts("4-6,12,5") == [4, 5, 6, 12]
    for bad in ("1", "21", "a", "4-", ""):
        with pytest.raises(measure_sampler.argparse.ArgumentTypeError):
            measure_sampler.parse_counts(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "errors,all"], "--only: known are errors"),
        (["--precisions", "fp8"], "fp32 and fp16 are known"),
        (["--cases", "0"], "must be 1 or more"),
        (["--methods", "Euler"], "--methods: known are DDIM of N steps; "),
    ],
)
def test_bad_arguments(arguments: List[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        measure_sampler.parse_arguments(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_all_of_it_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    small = replace(small_config(), name="tiny")
    monkeypatch.setattr("cldm.config.load_config", lambda name: small)
    made: Dict[int, int] = {}

    def few(count: int, first: int, guidance: float = 9.0, keep: Any = None) -> List[Case]:
        made[first] = count
        return [replace(case, kind="bird" if k == 0 else "boat") for k, case in enumerate(_cases(2))]

    monkeypatch.setattr(measure_sampler, "scene_cases", few)
    monkeypatch.setattr(measure_sampler, "photograph_cases", lambda folder, prompts: _cases(2 * len(prompts))[:4])
    monkeypatch.setattr(measure_sampler, "PHOTO_PROMPTS", ("a bird",))
    monkeypatch.setattr(measure_sampler, "GUIDANCE_SCALES", (5.0,))
    monkeypatch.setattr(measure_sampler, "TRANSFER_COUNTS", (4,))
    monkeypatch.setattr(measure_sampler, "SAVING_COUNTS", (5,))
    monkeypatch.setattr(measure_sampler, "SAVINGS", (Saving(reused=1), Saving(guessed=1)))
    document = tmp_path / "sampler.md"
    names = ("errors-fp32", "images-fp32", "transfer", "savings", "bound", "measured")
    document.write_text("".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in names), encoding="utf-8")
    monkeypatch.setattr(measure_sampler, "DOCS", document)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [
        "--device",
        "cpu",
        "--counts",
        "4,5",
        "--methods",
        "DDIM, best subset;calibrated, polished",
        "--only",
        "errors,transfer,savings,precision,bound",
        "--docs",
    ]
    command += ["--calibration", str(_calibration(tmp_path)), "--output", str(tmp_path / "out")]
    assert measure_sampler.main(command) == 0
    assert made[FIRST_MEASURED] == 64
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    errors = study["errors"]["fp32"]
    assert errors["exact"]["20"]["latent_relative_error"] < 1e-4
    polished = errors["calibrated, polished"]
    assert set(polished) == {"4", "5"} and 0 < polished["5"]["latent_relative_error"] < 2
    wheres = [row["where"] for row in study["transfer"]]
    assert wheres == ["guidance 5", "photographs", "birds, used on photographs", "birds, used on other scenes"]
    assert [(row["evaluations"], row["halves"] < 10) for row in study["savings"]] == [(5, True)] * 2
    (own,) = {len(row["indices"]) for row in study["bound"]}
    assert own == 4 and all(row["errors"]["the last 2"] > 0 for row in study["bound"])
    assert study["settings"]["kinds"] == {"bird": 1, "boat": 1}
    output = capsys.readouterr()
    assert measure_sampler.main([*command, "--seconds", "1e-9", "--output", str(tmp_path / "short")]) == 0
    assert json.loads((tmp_path / "short" / "study.json").read_text())["errors"] == {}
    assert "errors: not finished" in capsys.readouterr().err
    assert "| calibrated, polished |" in output.out and "precision: left out" in output.err
    assert "| guidance 5 | 4 |" in document.read_text(encoding="utf-8")
    ElementTree.parse(str(tmp_path / "sampler_error.svg"))
