"""What each number of network evaluations costs and gives on this machine, to choose one from."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence

import numpy as np

from cldm.request import Request
from cldm.result import Result
from ldm.plans import SamplingPlan
from scoring.contest import ScoreFit, describe_fit, fit_score
from scoring.measures import COMPARISONS
from scoring.pictures import Picture
from scoring.reference_cache import Reference
from scoring.report import ABSENT, environment, to_plain
from scoring.runner import Pipeline, Runner, naming

# Of `scoring.measures.COMPARISONS` the table has these, means over the pictures; the JSON has all.
SHOWN = ("pd", "lpips", "psnr_db", "latent_relative_error")
HEAD = ("evaluations", "latency ms", "lowest", "highest")
OUTSIDE = "outside the fitted span"
CHOOSING = (
    "Choose one with HACKATHON_SPEED, the argument speed of initialize(), or compute_score.py --speed N; exact DDIM is"
    " the default."
)


class PlannedPipeline(Pipeline, Protocol):
    """A pipeline that can be told a plan."""

    def plans(self, request: Request) -> List[SamplingPlan]: ...

    def run(self, image: np.ndarray, request: Request, *, plan: Optional[SamplingPlan] = None) -> Result: ...


@dataclass(frozen=True)
class SpeedRow:
    """One plan, measured.

    Attributes
    ----------
    evaluations : int
    sampling : str
        The plan in words, as receipts have it.
    latencies_ms : list of float
        Wall time of each timed run, over all pictures.
    pictures : list of dict
        Measures by key of each picture, against its reference; empty without references.
    """

    evaluations: int
    sampling: str
    latencies_ms: List[float]
    pictures: List[Dict[str, float]] = field(default_factory=list)

    @property
    def latency_ms(self) -> float:
        """The median."""
        return statistics.median(self.latencies_ms)

    def mean(self, key: str) -> Optional[float]:
        """Of a measure over the pictures; None where it was not taken."""
        values = [picture[key] for picture in self.pictures if key in picture]
        return sum(values) / len(values) if values else None


class SpeedRunner:
    """Runs every plan that a pipeline has for the runner's request.

    Parameters
    ----------
    runner : Runner
        With a pipeline that can be told a plan. Its references, measures, repeats and warm-up are used.
    progress : callable
        Called with a picture's name, what is being done with it, and whether a painting is finished.
    """

    def __init__(self, runner: Runner, progress: Callable[[str, str, bool], None]) -> None:
        self.runner = runner
        self.progress = progress

    def run(self, plans: Sequence[SamplingPlan], pictures: Sequence[Picture], device: str) -> List[SpeedRow]:
        """A row for each plan, in their order.

        One plan is finished before the next begins, so that what a plan prepares on its first run stays prepared.

        Parameters
        ----------
        device : str
            Where the pipeline runs, from a receipt.

        Raises
        ------
        RuntimeError
            A picture could not be painted; the message names it.
        """
        images = [picture.read() for picture in pictures]
        references = self._references(pictures, images, device)
        return [self._row(plan, pictures, images, references) for plan in plans]

    def _references(
        self, pictures: Sequence[Picture], images: Sequence[np.ndarray], device: str
    ) -> List[Optional[Reference]]:
        found: List[Optional[Reference]] = []
        for picture, image in zip(pictures, images):
            reference: Optional[Reference] = None
            if self.runner.options.reference:
                self.progress(picture.name, "reference", False)
                with naming(picture):
                    reference = self.runner.reference(picture, image, device, [])
            found.append(reference)
        return found

    def _row(
        self,
        plan: SamplingPlan,
        pictures: Sequence[Picture],
        images: Sequence[np.ndarray],
        references: Sequence[Optional[Reference]],
    ) -> SpeedRow:
        row = SpeedRow(len(plan.indices), str(plan), [])
        warm = set()  # each size of picture has graphs of its own
        for picture, image, reference in zip(pictures, images, references):
            with naming(picture):
                for _ in range(0 if image.shape in warm else self.runner.options.warmup):
                    self._paint(plan, image)
                warm.add(image.shape)
                timed = [self._timed(plan, image, row) for _ in range(self.runner.options.repeats)]
                result = timed[0]
                if reference is not None:
                    values = self.runner.comparer.compare(
                        result.images[0], reference.image, result.latent, reference.latent
                    )
                    row.pictures.append(values)
            self.progress(picture.name, f"{row.evaluations} evaluations", True)
        return row

    def _paint(self, plan: SamplingPlan, image: np.ndarray) -> Result:
        pipeline: Any = self.runner.pipeline
        return pipeline.run(image, self.runner.options.request, plan=plan)

    def _timed(self, plan: SamplingPlan, image: np.ndarray, row: SpeedRow) -> Result:
        start = time.perf_counter()
        result = self._paint(plan, image)
        row.latencies_ms.append(1e3 * (time.perf_counter() - start))
        return result


def format_speeds(rows: Sequence[SpeedRow], not_measured: Dict[str, str], fit: Optional[ScoreFit] = None) -> str:
    """The table of choices, what each number of evaluations runs, and the estimate of the contest's score."""
    fit = fit or fit_score()
    measures = [m for m in COMPARISONS if m.key in SHOWN and any(row.mean(m.key) is not None for row in rows)]
    scored = any(row.mean("pd") is not None for row in rows)
    lines = [[*HEAD, *(m.title for m in measures), *(["score, est.", ""] if scored else [])]]
    for row in rows:
        latencies = (row.latency_ms, min(row.latencies_ms), max(row.latencies_ms))
        means = [row.mean(m.key) for m in measures]
        cells = [str(row.evaluations), *(f"{value:.2f}" for value in latencies)]
        cells += [ABSENT if value is None else format(value, m.form) for m, value in zip(measures, means)]
        lines.append([*cells, *(_score_cells(row, fit) if scored else [])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(text.rjust(width) for text, width in zip(line, widths)).rstrip() for line in lines]
    table.insert(1, "-" * max(map(len, table)))
    table.append("Latency: wall clock of run(), which process() wraps; median, lowest and highest of all timed runs.")
    table += [f"{row.evaluations:>{widths[0]}}: {row.sampling}" for row in rows]
    titles = {m.key: m.title for m in COMPARISONS if m.key in SHOWN}
    table += [f"{titles[key]}: {reason}" for key, reason in not_measured.items() if key in titles]
    return "\n".join([*table, CHOOSING, "", describe_fit(fit), _best(rows, fit)])


def estimate(row: SpeedRow, fit: ScoreFit) -> Optional[float]:
    """The contest's score of a row's median latency and mean PD, estimated; None where PD was not measured."""
    pd = row.mean("pd")
    return None if pd is None else fit.estimate(row.latency_ms, pd)


def _score_cells(row: SpeedRow, fit: ScoreFit) -> List[str]:
    """The estimate, and a remark on it."""
    score = estimate(row, fit)
    if score is None:
        return [ABSENT, ""]
    return [f"{score:.0f}", "" if fit.covers(row.latency_ms) else OUTSIDE]


def _best(rows: Sequence[SpeedRow], fit: ScoreFit) -> str:
    scores = [(score, row) for row in rows for score in [estimate(row, fit)] if score is not None]
    if not scores:
        return "  No estimate for the rows above: PD was not measured."
    score, row = max(scores, key=lambda entry: entry[0])
    remark = "" if fit.covers(row.latency_ms) else f", {OUTSIDE}"
    found = f"{score:.0f} with {row.evaluations} evaluations{remark}"
    return f"  Highest estimate, on an A10 as fast as this machine: {found}."


def speeds_json(
    rows: Sequence[SpeedRow], not_measured: Dict[str, str], request: Request, arguments: Dict[str, Any]
) -> Dict[str, Any]:
    """Everything, as plain values."""
    fit = fit_score()
    return to_plain(
        {
            "arguments": arguments,
            "request": dataclasses.asdict(request),
            "environment": environment(),
            "not_measured": not_measured,
            "rows": [
                {
                    **dataclasses.asdict(row),
                    "latency_ms": row.latency_ms,
                    "score_estimate": estimate(row, fit),
                    "score_in_fitted_span": fit.covers(row.latency_ms),
                }
                for row in rows
            ],
        }
    )
