"""Named random streams: the same arguments give the same draws in any process and any order."""

from __future__ import annotations

from typing import Optional, Sequence, TypeVar

import numpy as np

T = TypeVar("T")
# Each part of a scene draws from a stream of its own, so that a change in one part moves no other.
STREAMS = ("plan", "colour", "words", "back", "main", "other", "front", "fault", "paint")


class Chance:
    """Short draws from one stream."""

    def __init__(self, seed: int, split: str, index: int, stream: str, part: int = 0) -> None:
        self.rng = np.random.default_rng([seed, int(split == "test"), index, STREAMS.index(stream), part])

    def yes(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def whole(self, low: int, high: int) -> int:
        """An integer of low..high, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def sign(self) -> int:
        return 1 if self.rng.random() < 0.5 else -1

    def pick(self, items: Sequence[T], weights: Optional[Sequence[float]] = None) -> T:
        if weights is None:
            return items[int(self.rng.random() * len(items))]
        level = float(self.rng.random()) * sum(weights)
        for item, weight in zip(items, weights):
            level -= weight
            if level < 0:
                return item
        return items[-1]

    def spread(self, count: int) -> np.ndarray:
        """(count,) float64 in -1..1."""
        return self.rng.random(count) * 2.0 - 1.0
