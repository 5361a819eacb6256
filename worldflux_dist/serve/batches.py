"""Calls that wait meet in one batch: those of one key, as many as there is room for.

One batch at a time, in a thread of its own. While it runs the next one gathers by itself, so a
call alone waits for nothing. After a batch of several calls there is a pause, a fifth of the time
that it took: its callers call again by then and join those that wait, where otherwise they would
take turns in two smaller batches for ever. A batch whose callers are all gone is ended between two
steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from worldflux_dist.serve.dreams import Arrays, Dreams, Encode, Imagine

PAUSE = 1 / 5  # of the time that a batch of several calls took
Answer = tuple[tuple[int, int], int, Arrays]  # the version, the first step, and what came out


class FullError(RuntimeError):
    """There is no room for another call."""


@dataclass(eq=False)
class _Waiting:
    call: Any
    size: int
    answers: asyncio.Queue[Answer | Exception | None] = field(default_factory=asyncio.Queue)
    gone: bool = False


class Batches:
    """Owns the thread that uses `dreams`; may be given others between two batches.

    `lanes` and `size` bytes are the most of a batch, `room` bytes those of all calls together.
    """

    def __init__(self, dreams: Dreams, lanes: int, size: int, room: int) -> None:
        self.dreams, self.lanes, self.size, self.room = dreams, lanes, size, room
        self.held = self.num_calls = 0  # bytes and calls under way
        self.num_batches = 0
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, "dreams")
        self._work: asyncio.Task[None] | None = None

    async def answers(self, call: Any, size: int) -> AsyncIterator[Answer]:
        """What comes out of a call whose answer takes `size` bytes. Raises FullError."""
        if self.held + size > self.room:
            raise FullError(f"{self.held >> 20} MB of answers are under way: ask again later")
        mine = _Waiting(call, size)
        self.held, self.num_calls = self.held + size, self.num_calls + 1
        self._waiting.append(mine)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run_all())
        try:
            while (answer := await mine.answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            mine.gone = True
            self.held, self.num_calls = self.held - size, self.num_calls - 1

    async def close(self) -> None:
        """Wait for the batch that runs, and begin no other."""
        for each in self._waiting:
            each.gone = True
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _run_all(self) -> None:
        loop, pause = asyncio.get_running_loop(), 0.0
        while self._waiting:
            if pause:
                await asyncio.sleep(pause)
            batch = self._next()
            if not batch:
                continue

            def give(number: int, answer: Any, batch: list[_Waiting] = batch) -> None:
                loop.call_soon_threadsafe(batch[number].answers.put_nowait, answer)

            begun = loop.time()
            try:
                await loop.run_in_executor(self._thread, self._run, batch, give)
            except Exception as error:
                for each in batch:
                    each.answers.put_nowait(error)
            for each in batch:
                each.answers.put_nowait(None)
            pause = PAUSE * (loop.time() - begun) * (len(batch) > 1)

    def _next(self) -> list[_Waiting]:
        """The oldest that waits and those that can join it."""
        waiting = [each for each in self._waiting if not each.gone]
        batch: list[_Waiting] = []
        lanes = size = 0
        for each in waiting:
            lanes, size = lanes + each.call.rows, size + each.size
            if batch and (
                each.call.key != batch[0].call.key or lanes > self.lanes or size > self.size
            ):
                lanes, size = lanes - each.call.rows, size - each.size
                continue
            batch.append(each)
        taken = set(batch)
        self._waiting = [each for each in waiting if each not in taken]
        return batch

    def _run(self, batch: list[_Waiting], give: Callable[[int, Any], None]) -> None:
        """In the thread."""
        self.num_batches += 1
        dreams, calls = self.dreams, [each.call for each in batch]
        if isinstance(calls[0], Imagine):

            def going() -> bool:
                return not all(each.gone for each in batch)

            for first, parts in dreams.imagine(calls, going):
                for number, part in enumerate(parts):
                    give(number, (dreams.version, first, part))
            return
        answer = dreams.encode if isinstance(calls[0], Encode) else dreams.act
        for number, result in enumerate(answer(calls)):
            give(number, (dreams.version, 0, result))
