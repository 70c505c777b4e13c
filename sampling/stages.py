"""Making a calibration stage by stage, each kept on disk, so that a killed run goes on with the one it was in."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from cldm.files import atomic_path, locked, source_digest, write_json
from ldm.plans import held_moves
from sampling.calibration import Point, Spread
from sampling.fit import RIDGE, Indices, Outcome, SegmentFits, Walker
from sampling.gram import gram_matrix
from sampling.polish import Polished, polish
from sampling.search import Effort, search
from sampling.trajectory import Levels, Network, Trajectories, record

# (K, D) final latents of the held-out cases to each measure's mean and worst case.
Measure = Callable[[np.ndarray], Dict[str, Spread]]
Report = Callable[[str], None]

# Rounds of a polish from every start, and those from the best of them.
FIRST_ROUNDS, LAST_ROUNDS = 1, 5
# What a polish takes, in those of a search.
POLISH_WEIGHT = 15
# Numbers of evaluations next to this are the most useful ones.
MIDDLE = 8


@dataclass(frozen=True)
class Found:
    """What a stage leaves behind: a plan, its error on the cases it was fitted to, and those measured held out."""

    kind: str
    indices: Indices
    moves: Tuple[Tuple[float, ...], ...]
    polished: bool
    fit_error: float
    errors: Mapping[str, Spread]
    timesteps: Tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The kind, and whether it is polished."""
        return self.point().name

    def point(self) -> Point:
        moves = self.moves if self.kind == "calibrated" else ()
        return Point(self.kind, self.indices, moves, self.polished, self.errors, self.timesteps)


@dataclass
class Stages:
    """One calibration in the making.

    Attributes
    ----------
    network : callable
        The deployed one; cases by their numbers.
    levels : Levels
    initial : (K, D) float32 array
        First latents. Even cases are fitted to, odd ones held out. Of those that are fitted to, every third chooses
        between polished plans and is not polished on.
    identity : mapping
        Everything else that decides the result: what runs, on which cases. With the sources of this package it names
        the folder in which stages are kept.
    folder : Path
    effort : Effort
    ridge : float
    group : int
        Cases that are recorded together: as many as the network likes at a time.
    seconds : float
        After so many no stage is begun, nor another round of a polish; what there is then is the result.
    report : callable
        Takes lines of progress.
    """

    network: Network
    levels: Levels
    initial: np.ndarray
    identity: Mapping[str, Any]
    folder: Path
    effort: Effort = field(default_factory=Effort)
    ridge: float = RIDGE
    group: int = 1
    seconds: float = math.inf
    report: Report = print

    def __post_init__(self) -> None:
        if len(self.initial) < 2:
            raise ValueError(f"a calibration needs 2 cases or more, half of them held out; got {len(self.initial)}")
        self.fitted = list(range(0, len(self.initial), 2))
        self.held = list(range(1, len(self.initial), 2))
        # Of one or two fitted cases there is none to spare.
        self.choosing = self.fitted[2::3] or self.fitted
        self.polished_on = [case for case in self.fitted if case not in self.choosing] or self.fitted
        self._end = time.perf_counter() + self.seconds
        self._walkers: Dict[Tuple[str, Tuple[int, ...]], Walker] = {}
        self._trajectories: Optional[Trajectories] = None
        self._spent = 0
        self._place = self.folder / self._key()

    @property
    def evaluations(self) -> int:
        """Network evaluations of this run so far; those of stages that were kept do not count."""
        return self._spent + sum(walker.evaluations for walker in self._walkers.values())

    def record(self) -> Trajectories:
        """The reference's trajectories; those recorded before are read."""
        if self._trajectories is None:
            clock = _Clock(self.report, len(self.initial))
            paths = [self._place / f"case_{case:03d}.npz" for case in range(len(self.initial))]
            found = [_read_trajectory(path, self.levels.num_steps, x) for path, x in zip(paths, self.initial)]
            missing = [case for case, kept in enumerate(found) if kept is None]
            clock.skip(len(found) - len(missing))
            for first in range(0, len(missing), self.group):
                cases = missing[first : first + self.group]
                made = record(self.network, self.levels, self.initial[cases], cases)
                self._spent += self.levels.num_steps * len(cases)
                for place, case in enumerate(cases):
                    found[case] = made.select([place])
                    _write_trajectory(paths[case], made.select([place]))
                clock.done(len(cases), f"recorded case {cases[-1] + 1} of {len(self.initial)}")
            self._trajectories = Trajectories(
                np.concatenate([t.latents for t in found if t]), np.concatenate([t.noises for t in found if t])
            )
        return self._trajectories

    def run(self, counts: Sequence[int], kinds: Sequence[str], measure: Measure, with_polish: bool) -> List[Found]:
        """Search, fit, polish and measure for each number of evaluations.

        Parameters
        ----------
        counts : sequence of int
        kinds : sequence of {"subset", "linear", "calibrated"}
        measure : callable
        with_polish : bool
            Of each count polish what was searched; kept by `selected` only if its held-out error is lower.

        Returns
        -------
        list of Found
            By count; those are left out that time was too short for, which is reported.
        """
        with locked(self._place, lambda: self.report(f"waiting for another process that works on {self._place}")):
            trajectories = self.record()
            gram = gram_matrix(trajectories.select(self.fitted), self.levels)
            weight = sum(counts)
            clock = _Clock(self.report, weight * (len(kinds) + (POLISH_WEIGHT if with_polish else 0)))
            found: List[Found] = []
            # The numbers of evaluations that matter most come first, in case that time is too short for all.
            ordered = sorted(counts, key=lambda count: (abs(count - MIDDLE), count))
            for count, kind in itertools.product(ordered, kinds):
                if not self._late():
                    found.append(self._stage(count, kind, gram, measure, clock))
            for count in ordered if with_polish else ():
                own = [f for f in found if len(f.indices) == count and not f.polished]
                if own and not self._late():
                    found.append(self._polish_stage(count, own, measure, clock))
            if self._late():
                self.report(f"{self.seconds:.0f} s are over: not all was done; the same command goes on from here")
            return sorted(found, key=lambda f: (len(f.indices), f.polished))

    def _late(self) -> bool:
        return time.perf_counter() > self._end

    def _stage(self, count: int, kind: str, gram: np.ndarray, measure: Measure, clock: _Clock) -> Found:
        path = self._place / f"{count:03d}_{kind}.json"
        kept = _read_found(path)
        if kept is None:
            make = lambda cases: self._walker(kind, self.fitted[:cases])  # noqa: E731
            effort = self._effort()
            indices, outcome = search(make, gram, self.levels, count, kind, self.ridge, effort)
            if kind == "calibrated":
                cases = self.fitted  # a search looks at some of them, the weights are of all
                outcome = fit_segments(
                    self.network, self.levels, self.record().select(cases), indices, cases, self.ridge
                )
                self._spent += 3 * (count - 1) * len(cases)
            moves = tuple((float(newest), float(last)) for newest, last in outcome.moves)
            errors = self._measure(kind, indices, outcome.moves, measure)
            kept = Found(kind, indices, moves, False, float(outcome.errors.mean()), errors)
            _write_found(path, kept)
            clock.done(count, self._describe(kept))
        else:
            clock.skip(count)
        return kept

    def _polish_stage(self, count: int, own: Sequence[Found], measure: Measure, clock: _Clock) -> Found:
        path = self._place / f"{count:03d}_{'_'.join(found.kind for found in own)}_polished.json"
        kept = _read_found(path)
        if kept is None:
            indices, best = self._polish(own)
            walker = self._walker("subset", self.held)
            errors = measure(walker.follow(indices, best.moves, best.timesteps).final)
            moves = tuple(tuple(float(weight) for weight in move) for move in best.moves)
            kept = Found("calibrated", indices, moves, True, best.fit_error, errors, best.timesteps)
            if not self._late():  # else it can still become better
                _write_found(path, kept)
            clock.done(POLISH_WEIGHT * count, self._describe(kept))
        else:
            clock.skip(POLISH_WEIGHT * count)
        return kept

    def _polish(self, own: Sequence[Found]) -> Tuple[Indices, Polished]:
        """A few rounds from each start, and the others from where the best of them is."""
        fitted, choosing = self._walker("subset", self.polished_on), self._walker("subset", self.choosing)
        tried: List[Tuple[Indices, Polished]] = []
        for start in sorted(own, key=lambda found: found.fit_error):
            if not tried or not self._late():
                moves = np.asarray(start.moves)
                found = polish(fitted, choosing, start.indices, moves, None, FIRST_ROUNDS, self._late)
                tried.append((start.indices, found))
        indices, best = min(tried, key=lambda pair: pair[1].error)
        return indices, polish(fitted, choosing, indices, best.moves, best.timesteps, LAST_ROUNDS, self._late)

    def _measure(self, kind: str, indices: Indices, moves: np.ndarray, measure: Measure) -> Dict[str, Spread]:
        """What the held-out cases show; students of held and linear moves share evaluations with those before."""
        rule = kind != "calibrated"
        walker = self._walker(kind, self.held) if rule else self._walker("subset", self.held)
        return measure((walker.walk(indices) if rule else walker.follow(indices, moves)).final)

    def _walker(self, kind: str, cases: Sequence[int]) -> Walker:
        """Over some cases, the same for the same arguments."""
        key = (kind, tuple(cases))
        if key not in self._walkers:
            fits = None
            if kind == "calibrated":
                gram = gram_matrix(self.record().select(self.fitted), self.levels)
                fits = SegmentFits(gram, self.levels, self.ridge)
            part = self.record().select(cases)
            self._walkers[key] = Walker(self.network, self.levels, part, kind, cases, fits, self.ridge)
        return self._walkers[key]

    def _effort(self) -> Effort:
        """No more cases than there are to fit to."""
        plain, most = self.effort, len(self.fitted)
        return Effort(
            plain.starts, plain.trials, plain.survivors, min(plain.first_cases, most), min(plain.last_cases, most)
        )

    def _describe(self, found: Found) -> str:
        name = "polished" if found.polished else found.kind
        held = found.errors["latent_relative_error"].mean
        return f"{len(found.indices)} evaluations, {name}: error {found.fit_error:.4f} fitted, {held:.4f} held out"

    def _key(self) -> str:
        sources = source_digest(sorted(Path(__file__).resolve().parent.glob("*.py")))
        effort = dict(sorted(vars(self.effort).items()))
        parts = json.dumps([dict(self.identity), effort, self.ridge, self.levels.num_steps, sources], sort_keys=True)
        content = hashlib.sha256(np.ascontiguousarray(self.initial, np.float32).tobytes()).hexdigest()
        return hashlib.sha256(f"{parts} {content}".encode()).hexdigest()[:16]


def fit_segments(
    network: Network,
    levels: Levels,
    trajectories: Trajectories,
    indices: Indices,
    cases: Optional[Sequence[int]] = None,
    ridge: float = RIDGE,
) -> Outcome:
    """The best on these cases of the segments' own fits, these half way to held, and a fit to the student."""
    fits = SegmentFits(gram_matrix(trajectories, levels), levels, ridge)
    walker = Walker(network, levels, trajectories, "calibrated", cases, fits, ridge)
    own = walker.walk(indices)
    between = walker.follow(indices, (own.moves + held_moves(levels.config, levels.num_steps, indices)) / 2)
    greedy = Walker(network, levels, trajectories, "calibrated", cases, ridge=ridge).walk(indices)
    return min((own, between, greedy), key=lambda found: float(found.errors.mean()))


def selected(found: Sequence[Found], measure: str) -> List[Point]:
    """The points to keep: all that were searched, and a polished one where it is better than what it began with.

    Parameters
    ----------
    measure : str
        Of which less is better.
    """
    kept = []
    for one in found:
        own = [f for f in found if not f.polished and f.indices == one.indices]
        if not one.polished or one.errors[measure].mean < min(f.errors[measure].mean for f in own):
            kept.append(one.point())
    return kept


def latent_errors(final: np.ndarray, reference: np.ndarray) -> Spread:
    """Mean and largest relative error of (K, D) final latents."""
    errors = np.linalg.norm(final - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return Spread(float(errors.mean()), float(errors.max()))


class _Clock:
    """Says how long work in weighted pieces has taken and may still take."""

    def __init__(self, report: Report, weight: float) -> None:
        self._report = report
        self._left = weight
        self._weight = 0.0
        self._start = time.perf_counter()

    def skip(self, weight: float) -> None:
        self._left -= weight

    def done(self, weight: float, what: str) -> None:
        self._left -= weight
        self._weight += weight
        spent = time.perf_counter() - self._start
        left = spent / self._weight * self._left
        self._report(f"{what} ({_minutes(spent)}, about {_minutes(left)} left)")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _write_trajectory(path: Path, trajectory: Trajectories) -> None:
    with atomic_path(path) as temporary, open(str(temporary), "wb") as file:
        np.savez(file, latents=trajectory.latents, noises=trajectory.noises)


def _read_trajectory(path: Path, num_steps: int, initial: np.ndarray) -> Optional[Trajectories]:
    """A kept trajectory; None where it is absent or damaged, and is recorded anew."""
    try:
        with np.load(str(path)) as data:
            found = Trajectories(data["latents"], data["noises"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found if found.noises.shape == (1, num_steps, initial.size) else None


def _write_found(path: Path, found: Found) -> None:
    value = {**vars(found), "errors": {key: list(spread) for key, spread in found.errors.items()}}
    write_json(path, value)


def _read_found(path: Path) -> Optional[Found]:
    """A kept stage; None where it is absent or damaged, and is done anew."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        value["indices"] = tuple(value["indices"])
        value["moves"] = tuple(tuple(move) for move in value["moves"])
        value["timesteps"] = tuple(value["timesteps"])
        value["errors"] = {key: Spread(*spread) for key, spread in value["errors"].items()}
        return Found(**value)
    except (OSError, ValueError, KeyError, TypeError):
        return None
