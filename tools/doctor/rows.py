"""Rows of the doctor's table. Standard library only."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, TypeVar, Union

OK, MISSING, DIFFERS = "ok", "missing", "differs"
WIDTH = 118

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes
    ----------
    what : str
    state : {"ok", "missing", "differs"}
        "differs": it is there, and does not fit or does not work.
    found : str
        What is there, or what differs.
    fix : str
        The command or the action that changes the state; empty where there is nothing to do.
    """

    what: str
    state: str
    found: str
    fix: str = ""


def guarded(what: str, check: Callable[..., Union[Row, List[Row]]], *arguments: Any) -> List[Row]:
    """The rows of a check. What is examined may be broken in any way; that is a row, too, and not the end."""
    try:
        found = check(*arguments)
    except Exception as error:
        return [Row(what, DIFFERS, f"{type(error).__name__}: {first_line(error)}")]
    return found if isinstance(found, list) else [found]


def or_none(find: Callable[[], T]) -> Optional[T]:
    """What `find` finds; None where it fails, which a row of its own tells."""
    try:
        return find()
    except Exception:
        return None


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def format_rows(rows: List[Row]) -> str:
    """The table: what, state and what was found, and below it what to do."""
    width = max(len(row.what) for row in rows)
    indent = " " * (width + 2 + len(MISSING) + 2)
    lines = []
    for row in rows:
        start = f"{row.what:{width}}  {row.state:{len(MISSING)}}  "
        lines += textwrap.wrap(
            start + row.found, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        if row.fix:
            lines.append(f"{indent}fix: {row.fix}")  # in one piece, to be copied
    return "\n".join(lines)
