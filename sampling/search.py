"""Which indices to evaluate: a prefilter without evaluations, then a local search with the deployed student.

All subsets of so many indices are scored open-loop on a Gram matrix (`sampling.gram`). The best of them, and two that
experience suggests, start a search by single moves on a few recorded trajectories; its best subsets go on to twice as
many trajectories, and half of them to twice as many again. Held-out cases take no part.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

import numpy as np

from ldm.plans import spread_indices
from sampling.fit import Indices, Outcome, Walker
from sampling.gram import open_loop
from sampling.trajectory import Levels

# What a 2023 contest team evaluated of 20 steps: dense at first. Other lengths stretch it.
FRONT_LOADED = (19, 18, 17, 16, 15, 14, 13, 11, 8, 4)
FRONT_LOADED_STEPS = 20
# As many subsets are scored one by one; of more, a local search on the open-loop error finds some.
MAX_ENUMERATED = 200_000
OPEN_LOOP_ROUNDS = 200


@dataclass(frozen=True)
class Effort:
    """How much a search spends.

    Attributes
    ----------
    starts : int
        Subsets that the prefilter hands over.
    trials : int
        Single moves that are tried with the student.
    survivors : int
        Subsets that go on from the first trajectories to twice as many.
    first_cases, last_cases : int
        Trajectories at the beginning and at the end.
    """

    starts: int = 12
    trials: int = 48
    survivors: int = 8
    first_cases: int = 4
    last_cases: int = 16


def front_loaded(num_steps: int, evaluations: int) -> Indices:
    """`FRONT_LOADED`, stretched to another schedule and another number of evaluations."""
    places = np.linspace(0, len(FRONT_LOADED) - 1, evaluations)
    values = np.interp(places, np.arange(len(FRONT_LOADED)), FRONT_LOADED) * (num_steps - 1) / (FRONT_LOADED_STEPS - 1)
    return separated([int(value) for value in np.rint(values)], num_steps)


def separated(indices: Sequence[int], num_steps: int) -> Indices:
    """The nearest indices that fall from S - 1, each by 1 at least, and stay at 0 or more."""
    found = list(indices)
    found[0] = num_steps - 1
    for k in range(1, len(found)):
        found[k] = min(found[k], found[k - 1] - 1)
    for k in range(len(found) - 1, 0, -1):
        found[k] = max(found[k], len(found) - 1 - k)
    return tuple(found)


def all_subsets(num_steps: int, evaluations: int) -> np.ndarray:
    """(N, E): every choice of E indices that begins at S - 1."""
    rest = list(itertools.combinations(range(num_steps - 2, -1, -1), evaluations - 1))
    first = np.full((len(rest), 1), num_steps - 1)
    return np.concatenate([first, np.asarray(rest, int).reshape(len(rest), evaluations - 1)], axis=1)


def single_moves(indices: Indices, num_steps: int) -> List[Indices]:
    """Every subset in which one index other than the first is replaced by one that is free."""
    free = [index for index in range(num_steps - 1) if index not in indices]
    found = []
    for place in range(1, len(indices)):
        rest = indices[:place] + indices[place + 1 :]
        found += [tuple(sorted((*rest, index), reverse=True)) for index in free]
    return found


def prefilter(gram: np.ndarray, levels: Levels, evaluations: int, kind: str, count: int, ridge: float) -> List[Indices]:
    """The `count` subsets of the least open-loop error, best first."""
    num_steps = levels.num_steps
    if math.comb(num_steps - 1, evaluations - 1) <= MAX_ENUMERATED:
        subsets = all_subsets(num_steps, evaluations)
        _, errors = open_loop(gram, levels, subsets, kind, ridge)
    else:
        subsets, errors = _descend_open_loop(gram, levels, evaluations, kind, count, ridge)
    order = np.argsort(errors, kind="stable")[:count]
    return [tuple(int(index) for index in subsets[k]) for k in order]


def _descend_open_loop(
    gram: np.ndarray, levels: Levels, evaluations: int, kind: str, count: int, ridge: float
) -> Tuple[np.ndarray, np.ndarray]:
    """Subsets around those that single moves lead to, with their errors; for schedules with too many subsets."""
    known: Dict[Indices, float] = {}

    def score(subsets: Iterable[Indices]) -> None:
        new = sorted(set(subsets) - set(known))
        if new:
            _, errors = open_loop(gram, levels, np.asarray(new), kind, ridge)
            known.update(zip(new, errors.tolist()))

    score([spread_indices(levels.num_steps, evaluations), front_loaded(levels.num_steps, evaluations)])
    expanded = set()
    for _ in range(OPEN_LOOP_ROUNDS):
        best = sorted(known, key=known.__getitem__)[:count]
        fresh = [subset for subset in best if subset not in expanded]
        if not fresh:
            break
        expanded.add(fresh[0])
        score(single_moves(fresh[0], levels.num_steps))
    return np.asarray(list(known)), np.asarray(list(known.values()))


MakeWalker = Callable[[int], Walker]


def search(
    make_walker: MakeWalker,
    gram: np.ndarray,
    levels: Levels,
    evaluations: int,
    kind: str,
    ridge: float,
    effort: Effort,
) -> Tuple[Indices, Outcome]:
    """The subset whose student ends closest to the reference, in the mean over the last trajectories.

    Parameters
    ----------
    make_walker : callable
        Number of trajectories to a walker of the kind over the first so many of those for fitting. Asked again for
        the same number it should give the same walker, whose evaluations it remembers.
    gram : (S, S) array
        Of the trajectories for fitting.

    Returns
    -------
    indices : tuple of int
    outcome : Outcome
        Of the walker over the last trajectories.
    """
    starts = prefilter(gram, levels, evaluations, kind, effort.starts, ridge)
    suggested = [spread_indices(levels.num_steps, evaluations), front_loaded(levels.num_steps, evaluations)]
    cases = effort.first_cases
    walker = make_walker(cases)
    scores = _score(walker, [*starts, *suggested], {})
    _descend(walker, scores, gram, kind, ridge, effort.trials)
    survivors = effort.survivors
    while cases < effort.last_cases:
        cases = min(2 * cases, effort.last_cases)
        walker = make_walker(cases)
        best = sorted(scores, key=scores.__getitem__)[:survivors]
        scores = _score(walker, best, {})
        survivors = max(survivors // 2, 1)
    chosen = min(scores, key=scores.__getitem__)
    return chosen, walker.walk(chosen)


def _score(walker: Walker, subsets: Iterable[Indices], scores: Dict[Indices, float]) -> Dict[Indices, float]:
    """Add the mean errors of those subsets that have none yet; sorted, as neighbours share evaluations."""
    for subset in sorted(set(subsets) - set(scores)):
        scores[subset] = float(walker.walk(subset).errors.mean())
    return scores


def _descend(
    walker: Walker, scores: Dict[Indices, float], gram: np.ndarray, kind: str, ridge: float, trials: int
) -> None:
    """Single moves from the best subset, those first that the open-loop error recommends, until none of them helps."""
    while trials > 0:
        best = min(scores, key=scores.__getitem__)
        moves = [move for move in single_moves(best, walker.levels.num_steps) if move not in scores]
        if not moves:
            return
        _, errors = open_loop(gram, walker.levels, np.asarray(moves), kind, ridge)
        for place in np.argsort(errors, kind="stable")[:trials]:
            trials -= 1
            _score(walker, [moves[place]], scores)
            if scores[moves[place]] < scores[best]:
                break
        else:
            return
