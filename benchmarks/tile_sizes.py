"""Tile sizes for several images at a time, from those that were measured for one: tuning each number takes minutes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

from runtime.fused.tuning import card_slug, read_table, write_table

SPLITS = 5  # place of the number of splits in a row of a table
# What of a problem's key grows with the images: an attention's heads, a linear layer's rows, a convolution's maps.
GROWING = re.compile(r"(?<= heads=)\d+|(?<= m=)\d+|(?<= )\d+(?=x\d+x\d+ n=)")


def scale_key(key: str, samples: int) -> str:
    """The key of the same problem with `samples` times as many images.

    Raises
    ------
    ValueError
        It is no key that `runtime.fused.tuning` makes.
    """
    scaled, found = GROWING.subn(lambda number: str(samples * int(number.group())), key)
    if found != 1:
        raise ValueError(f"no key of a problem: {key!r}")
    return scaled


def scale_table(table: Mapping[str, Sequence[int]], samples: int) -> Dict[str, List[int]]:
    """`table` and, for what it does not have, its tiles for more images.

    The tiles stay as they are. There are `samples` times as many of them, so that fewer programs need to share one
    tile's sum to fill the card.
    """
    scaled: Dict[str, List[int]] = {}
    for key, numbers in table.items():
        row = list(numbers)
        if "attention" not in key:
            row[SPLITS] = max(1, row[SPLITS] // samples)
        scaled[scale_key(key, samples)] = row
    return {**scaled, **{key: list(numbers) for key, numbers in table.items()}}


class ScaledTables:
    """Scaled tile sizes in a build folder, for the fused networks to find there.

    Parameters
    ----------
    source, target : Path
        Build folders: that of the measured tile sizes, if there are any beside those that ship with the repository,
        and that which gets the scaled ones.
    device : str
    samples : int
    """

    def __init__(self, source: Path, target: Path, device: str, samples: int) -> None:
        import torch

        from runtime.fused.build import SHIPPED
        from runtime.fused.tune import card_of

        card = card_of(device)
        name = f"{card_slug(card)}.json"
        table: Dict[str, List[int]] = {}
        for path in (SHIPPED / name, source / "tuning" / name):
            if path.is_file():
                table.update(read_table(path))
        scaled = scale_table(table, samples)
        self._path, self._given = target / "tuning" / name, set(scaled)
        write_table(self._path, card, {"torch": torch.__version__}, scaled)

    def describe(self) -> str:
        """What was used, once the networks are made."""
        measured = len(set(read_table(self._path)) - self._given)
        return "scaled from those for one image" + (f", {measured} measured" if measured else "")
