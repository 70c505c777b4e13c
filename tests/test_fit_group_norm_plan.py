"""The fit of the GroupNorm planner's estimates: these themselves, taken for times, give the constants back."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import pytest

from tests.test_group_norm_emulated import PLUGINS, WARNINGS, cuda_headers
from tools import fit_group_norm_plan
from tools.fit_group_norm_plan import (
    GRID,
    HELD,
    KINDS,
    PAIR,
    RUN,
    Kind,
    TableError,
    Timing,
    choose,
    features,
    fit,
    held_out,
    mean_ratio,
    read_timings,
)

# Another GPU than the one whose times the header's constants are fitted to.
PROCESSORS, SHARED_LIMIT = 108, 166912
# Writes a table as kernel_check does, with the estimates for times; apart from the launch ahead, twice as long.
PROGRAM = f"""
#include "kernel_cases.h"
using namespace canny2image;
int main() {{
    DeviceFacts facts;
    facts.processors = {PROCESSORS};
    facts.sharedPerBlock = {SHARED_LIMIT};
    facts.clusters = facts.cooperative = facts.overlap = true;
    cases::writePlanColumns(stdout);
    for (cases::Shape3 const& shape : cases::kSd15) {{
        for (Layout layout : {{Layout::kNCHW, Layout::kNHWC}}) {{
            GroupNormParams const params = cases::sd15Params(shape, layout);
            considerPlans(params, true, facts, [&](Plan plan) {{
                cases::writePlan(stdout, params, false, plan, facts, plan.cost, plan.cost);
                if (plan.overlap) {{
                    plan.overlap = false;
                    cases::writePlan(stdout, params, false, plan, facts, 2.0 * plan.cost, plan.cost);
                }}
            }});
        }}
    }}
}}
"""
TIMING = Timing(
    batch=2, channels=320, pixels=1536, layout="NCHW", shape=RUN, vector=8, stage=HELD, bundle=0, tiles=4, threads=256,
    packs=4, units=64, units_per_launch=0, chunk=480, rows=0, shared_bytes=160, overlap=0, processors=20,
    shared_limit=101376, median_us=5.0,
)  # fmt: skip


def header_constants() -> Dict[Kind, np.ndarray]:
    text = (PLUGINS / "group_norm_plan.h").read_text(encoding="utf-8")
    found = {name: np.array(values.split(","), float) for name, values in re.findall(r"Cost (k\w+)\{([^}]+)\};", text)}
    assert len(found) == len(KINDS)
    return {kind: found[name] for kind, (_, name, _) in KINDS.items()}


def write_table(path: Path, timings: List[Timing]) -> Path:
    lines = [",".join(vars(TIMING)), *(",".join(map(str, vars(timing).values())) for timing in timings)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers = cuda_headers()
    if shutil.which("g++") is None or headers is None:
        pytest.skip("needs g++ and CUDA's headers")
    folder = tmp_path_factory.mktemp("plans")
    (folder / "plans.cpp").write_text(PROGRAM, encoding="utf-8")
    include = ["-I", str(PLUGINS), "-isystem", str(headers)]
    command = ["g++", "-std=c++17", *WARNINGS, *include, "-o", str(folder / "plans"), str(folder / "plans.cpp")]
    subprocess.run(command, check=True, timeout=200)
    with open(folder / "plans.csv", "w", encoding="utf-8") as file:
        subprocess.run([str(folder / "plans")], stdout=file, check=True, timeout=60)
    return folder / "plans.csv"


def test_features_are_the_planners(table: Path) -> None:
    timings = read_timings(table)
    constants = header_constants()
    assert {timing.kind for timing in timings} == set(KINDS)
    assert all(timing.overlap == (timing.stage != GRID) for timing in timings)
    for timing in timings:
        assert abs(np.dot(features(timing), constants[timing.kind]) - timing.median_us) < 0.00051, timing


def test_known_constants_are_recovered(table: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit_group_norm_plan.main([str(table)]) == 0
    output = capsys.readouterr().out
    text = (PLUGINS / "group_norm_plan.h").read_text(encoding="utf-8")
    assert "40 norms: the plans chosen take 1.000 x the time of the fastest in the mean, 1.00 x at worst" in output
    for kind, constants in header_constants().items():
        struct, name, members = KINDS[kind]
        printed = re.search(rf"^constexpr {struct} {name}\{{(.*)\}};$", output, re.MULTILINE)
        assert printed, output
        np.testing.assert_allclose([float(value) for value in printed[1].split(", ")], constants, atol=0.01)
        # The order in which they are printed is that of the header.
        declared = re.search(rf"struct {struct} \{{(.*?)\}};", text, re.DOTALL)
        assert declared and tuple(re.findall(r"double (\w+);", declared[1])) == members


@pytest.fixture(scope="module")
def noisy(table: Path) -> List[Timing]:
    """Times with a spread of 10 %, which no constants fit."""
    rng = np.random.default_rng(0)
    return [replace(one, median_us=one.median_us * float(np.exp(rng.normal(0, 0.1)))) for one in read_timings(table)]


def test_softened_choices_choose_better_than_least_squares(noisy: List[Timing]) -> None:
    first, last = fit(noisy, ()), fit(noisy)
    assert 1.0 < mean_ratio(last.choices) < mean_ratio(first.choices) - 0.01
    assert first.error < last.error < 0.2
    errors = [np.log(np.dot(features(one), last.constants[one.kind]) / one.median_us) for one in noisy]
    assert last.error < 1.5 * np.std(errors)
    for choice in last.choices:
        same = [one for one in noisy if one.norm == choice.chosen.norm]
        estimates = [np.dot(features(one), last.constants[one.kind]) for one in same]
        assert choice.fastest.median_us == min(one.median_us for one in same)
        assert choice.estimate == pytest.approx(min(estimates))
        assert choice.chosen == same[int(np.argmin(estimates))]


def test_softened_objective(noisy: List[Timing]) -> None:
    """Its gradient is that of its values, and sharp choices have the objective's."""
    table = fit_group_norm_plan._Table(noisy)
    values = table.least_squares() + 0.05
    _, gradient = table.softened(values, 0.1)
    for i in range(len(values)):
        step = 1e-5 * np.eye(len(values))[i]
        difference = table.softened(values + step, 0.1)[0] - table.softened(values - step, 0.1)[0]
        assert difference / 2e-5 == pytest.approx(gradient[i], rel=1e-4, abs=1e-8)
    # Unlike the sharp choice's, the chance of plans that are the same is shared: their times differ by 10 % here.
    assert table.softened(values, 1e-7)[0] == pytest.approx(table.objective(values), abs=0.02)


def test_held_out_choices_know_nothing_of_their_norms(noisy: List[Timing]) -> None:
    left, others = [one for one in noisy if one.pixels == 24], [one for one in noisy if one.pixels in (96, 98304)]
    assert sorted({one.channels for one in left}) == [1280, 2560]
    choices = held_out(left + others, 2)
    assert len(choices) == len({one.norm for one in left + others})
    sizes = list(dict.fromkeys(one.norm[:3] for one in left + others))
    for half in (0, 1):
        fitted = fit([one for one in left + others if one.norm[:3] in sizes[1 - half :: 2]])
        members = [one for one in left + others if one.norm[:3] in sizes[half::2]]
        assert [one for one in choices if one.chosen.norm[:3] in sizes[half::2]] == choose(members, fitted.constants)


def test_features_by_hand() -> None:
    # 256 blocks of 256 threads at 48 registers: 5 fit an SM, 18 of 20 SMs have clusters, so 90 at once: 3 waves.
    # A block: 480 packs of 16 bytes, 2 steps of 256 threads.
    kilobytes = 5 * 480 * 16 / 1000
    assert features(TIMING) == (1, 1, 1, 3 * kilobytes, 3 * 2, 0, 3, 0, 3 * 5)
    # 40 blocks are 3 on an SM, where 18 have clusters of four, but 2 where clusters are pairs and all 20 have them.
    few = replace(TIMING, units=10)
    assert features(few)[-1] == 3 and features(replace(few, tiles=2, units=20))[-1] == 2
    assert features(replace(few, processors=1))[-1] == 8 * 5  # of 40 blocks
    # Two kernels: 256 of 20 SMs by 5 are 3 waves; the norm's 2 MB are shared among the SMs.
    pair = replace(TIMING, stage=PAIR)
    share = 2 * 320 * 1536 * 2 / 1000 / 20
    assert features(pair) == pytest.approx((1, share, 0, 3 * kilobytes, 3 * 2, 0, 3, 3))


def test_without_overlap_all_plans_count(tmp_path: Path) -> None:
    apart, over = TIMING, replace(TIMING, overlap=1)
    grid = replace(TIMING, stage=GRID, units_per_launch=8)
    other = replace(TIMING, pixels=96)
    assert read_timings(write_table(tmp_path / "a.csv", [apart, over, grid, other])) == [over, grid, other]


def test_kinds_that_were_not_timed_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit_group_norm_plan.main([str(write_table(tmp_path / "a.csv", [TIMING]))]) == 0
    output = capsys.readouterr().out
    assert "constexpr HeldCost kHeldRun{" in output
    assert "// kGridColumns: no such plan was timed; leave its 4 constants as they are." in output
    assert "norms left out of the fit (1 sizes: at least 5 are wanted to leave one in 5 out)" in output


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("tiles,", ""), "has no column tiles: make it anew"),
        (lambda text: text.splitlines()[0] + "\n", "holds no times"),
        (lambda text: "", "has no column batch, channels"),
        (lambda text: text.replace("480", "many"), "line 2: chunk is 'many', no number"),
        (
            lambda text: text.rsplit(",", 3)[0] + "\n",
            "line 2: processors is None, no number; where the run was stopped",
        ),
        (lambda text: text.replace("5.0", "nan"), "line 2: a time of nan us"),
        (lambda text: text.replace("5.0", "-1"), "line 2: a time of -1.0 us"),
        (lambda text: text.replace("320", "321"), "sizes are of no plan for 32 groups"),
        (lambda text: text.replace(",NCHW,0,", ",NCHW,2,").replace(",8,0,", ",8,1,"), "no plan of shape 2 and stage 1"),
    ],
)
def test_bad_tables(change: Callable[[str], str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_table(tmp_path / "plans.csv", [TIMING])
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(TableError, match=re.escape(message)):
        read_timings(path)
    assert fit_group_norm_plan.main([str(path)]) == 1
    assert message in capsys.readouterr().err


def test_missing_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fit_group_norm_plan.main([str(tmp_path / "none.csv")]) == 1
    assert "none.csv" in capsys.readouterr().err
