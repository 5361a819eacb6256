"""Which chunks have arrived, so that a chunk counts once however often it is sent.

A writer numbers its chunks from zero in each of its lives (incarnations). Per life one high-water
mark and the few chunks that came out of order are enough, for ever: they outlive the steps, which
are evicted, and the process, since every journal segment begins with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, str, int]  # writer, incarnation, seq

MAX_LATE = 64  # chunks of one writer that may overtake a missing one before it is given up


@dataclass
class _Seen:
    """Chunks that have arrived from one life of a writer: all up to `mark`, and some beyond it."""

    mark: int = -1
    late: set[int] = field(default_factory=set)

    def settle(self) -> None:
        """Move the mark over what has arrived, and over a chunk that will not arrive any more."""
        self.late = {seq for seq in self.late if seq > self.mark}
        if len(self.late) > MAX_LATE:
            self.mark = min(self.late) - 1
        while self.mark + 1 in self.late:
            self.mark += 1
            self.late.remove(self.mark)


class Marks:
    """The set of keys that have arrived; a lost chunk costs no memory."""

    def __init__(self, saved: Any = ()) -> None:
        self._lives: dict[tuple[str, str], _Seen] = {}
        self.merge(saved)

    def add(self, key: Key) -> bool:
        """Note a chunk; false where it is known already."""
        life, seq = key[:2], key[2]
        seen = self._lives.get(life)
        if seen is None:
            seen = self._lives[life] = _Seen()
        elif seq <= seen.mark or seq in seen.late:
            return False
        if seq == seen.mark + 1 and not seen.late:
            seen.mark = seq
        else:
            seen.late.add(seq)
            seen.settle()
        return True

    def __contains__(self, key: Key) -> bool:
        seen = self._lives.get((key[0], key[1]))
        return seen is not None and (key[2] <= seen.mark or key[2] in seen.late)

    def merge(self, saved: Any) -> None:
        """Know also what `state` of another shard knew: the higher mark of the two counts."""
        for writer, incarnation, mark, late in saved:
            seen = self._lives.setdefault((writer, incarnation), _Seen())
            seen.mark = max(seen.mark, mark)
            seen.late |= set(late)
            seen.settle()

    def state(self) -> list[tuple[str, str, int, list[int]]]:
        """Everything as JSON: (writer, incarnation, mark, chunks beyond it)."""
        return [(*life, seen.mark, sorted(seen.late)) for life, seen in self._lives.items()]
