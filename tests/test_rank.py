"""A learner rank takes its steps back to back, whatever lies between the calls for them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from worldflux_dist.distributed.rank import Rank
from worldflux_dist.learner import LearnerConfig, Ready

PATIENCE_S = 120.0


class Held:
    """A learner whose steps begin and end when the test says so; its batches are numbers."""

    config, rows, part, rank = LearnerConfig(compile=False), False, "agent", 0

    def __init__(self) -> None:
        self.begun = [threading.Event() for _ in range(3)]
        self.release = [threading.Event() for _ in range(3)]
        self.gradient_steps = 0
        self.agent = self

    def ahead(self, batch: Any) -> Ready:
        return Ready(batch, batch)

    def step(self, ready: Ready) -> dict[str, float]:
        batch: Any = ready.arrays
        self.begun[batch].set()
        assert self.release[batch].wait(PATIENCE_S)
        if batch == 2:
            raise ValueError("step 2 failed")
        self.gradient_steps += 1
        return {"number": float(batch)}

    def inference_state(self, part: str) -> dict[str, Any]:
        return {}


def test_a_step_begins_when_the_one_before_it_ends_and_is_told_by_the_next_call() -> None:
    learner: Any = Held()
    rank = Rank(learner, None, [], 7)
    batches: list[Any] = [0, 1, 2]
    assert rank.begin(0, batches[0]) is None  # though the step has not ended
    assert learner.begun[0].wait(PATIENCE_S)
    with ThreadPoolExecutor(1) as caller:  # as an actor has one thread
        handed, submit = threading.Event(), rank._steps.submit

        def note(*given: Any) -> Any:
            future = submit(*given)
            handed.set()
            return future

        rank._steps.submit = note  # type: ignore[method-assign]
        second = caller.submit(rank.begin, 0, batches[1])
        assert handed.wait(PATIENCE_S)  # while step 0 is in work
        assert not learner.begun[1].is_set() and not second.done()
        weights = caller.submit(rank.weights)
        learner.release[0].set()
        assert learner.begun[1].wait(PATIENCE_S)  # without any further call
        told = second.result(PATIENCE_S)
        assert told is not None and told["number"] == 0
        learner.release[1].set()
        assert weights.result(PATIENCE_S) == ((7, 2), {})  # after the steps that were begun
        learner.release[2].set()
        told = caller.submit(rank.begin, 0, batches[2]).result(PATIENCE_S)
        assert told is not None and told["number"] == 1
        with pytest.raises(ValueError, match="step 2 failed"):
            caller.submit(rank.finish).result(PATIENCE_S)
        assert rank.finish() is None
