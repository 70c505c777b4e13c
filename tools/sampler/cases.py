"""The cases of the study: edges, a prompt, a seed and a guidance scale each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np

from tools.tiny.measures import find_edges
from tools.tiny.scenes import Scene, make_scene

# Scenes of the test split, so unseen in training; what is measured shares none with what is calibrated, nor a seed.
FIRST_MEASURED, FIRST_FITTED = 3000, 6000
FIRST_SEED = 40_000
# Scenes are looked through for a kind this far.
SEARCHED = 4000


@dataclass(frozen=True)
class Case:
    """What one image is made from.

    Attributes
    ----------
    name : str
    kind : str
        What the scene shows; "photograph" for a photograph.
    canny : (256, 384) uint8 array
    prompt : str
    seed : int
    guidance : float
    """

    name: str
    kind: str
    canny: np.ndarray
    prompt: str
    seed: int
    guidance: float = 9.0


def scene_cases(
    count: int, first: int, guidance: float = 9.0, keep: Optional[Callable[[Scene], bool]] = None
) -> List[Case]:
    """The first `count` scenes from an index on that `keep` keeps, each with its own caption and seed.

    Raises
    ------
    ValueError
        Too few are kept.
    """
    cases: List[Case] = []
    for index in range(first, first + SEARCHED):
        if len(cases) == count:
            return cases
        scene = make_scene(index, "test")
        if keep is None or keep(scene):
            name, seed = f"scene {index}", FIRST_SEED + index
            cases.append(Case(name, scene.kind, find_edges(scene.image), scene.caption, seed, guidance))
    raise ValueError(f"only {len(cases)} of {SEARCHED} scenes from {first} on are kept, {count} were asked for")


def photograph_cases(folder: Path, prompts: Sequence[str], guidance: float = 9.0) -> List[Case]:
    """Every photograph of a folder with every prompt."""
    from tools.measure_tiny import read_photos

    cases: List[Case] = []
    for photo in read_photos(folder):
        for prompt in prompts:
            seed = FIRST_SEED - 1 - len(cases)
            cases.append(Case(f"{photo.name}, {prompt}", "photograph", photo.edges, prompt, seed, guidance))
    return cases


def at_guidance(cases: Sequence[Case], guidance: float) -> List[Case]:
    """The same cases at another guidance scale."""
    return [replace(case, guidance=guidance) for case in cases]


def kinds_of(cases: Sequence[Case]) -> Dict[str, int]:
    """How many cases there are of each kind."""
    found: Dict[str, int] = {}
    for case in cases:
        found[case.kind] = found.get(case.kind, 0) + 1
    return dict(sorted(found.items()))
