"""The driver's side of a group of learners: ranks that share every batch and have the same weights.

A rank that dies takes the others with it, since they wait for it in the middle of a step. The group
is then restarted (learners.py) with the next generation; what the old one may still want to
publish is refused. References and metrics pass through here, never data.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayError

from worldflux_dist.config import Config
from worldflux_dist.distributed.feed import Source, done_of
from worldflux_dist.distributed.rank import BESIDE, LearnerActor
from worldflux_dist.distributed.supervision import Driver
from worldflux_dist.distributed.weights import WEIGHTS, Publications, error_of
from worldflux_dist.spaces import Spaces

if TYPE_CHECKING:
    from upath import UPath

SAMPLES_AHEAD = 2  # steps whose batches are being gathered beside those under way
STEPS_AHEAD = 2  # steps given to learners and not finished: one in work, one waiting


class GroupLostError(RuntimeError):
    """A rank died; the message says what is known of it."""


class LearnerGroup:
    """The ranks that train one part, as the driver sees them. Owns the steps under way.

    `ranks` are actors or one learner of this process, with Rank's `begin`, `finish` and `weights`;
    `generation` counts how often they have been replaced. Publishes by itself after `publish_every`
    gradient steps.
    """

    source: Source
    published: ObjectRef  # done when the last publication is
    publish_every = 16

    def __init__(self, part: str, store: Any) -> None:
        self.part, self.store, self.driver = part, store, Driver()
        self.ranks: Sequence[Any] = []
        self.generation = self.gradient_steps = self.lost_steps = 0
        self.publications = Publications()
        self.wanted = 0
        self.taken: list[dict[str, float]] = []
        self._calls: deque[list[ObjectRef]] = deque()
        self._begun = 0  # steps given to the ranks whose metrics have not come

    @property
    def effective_steps(self) -> int:
        """Gradient steps behind the weights: those taken less those lost with dead ranks."""
        return self.gradient_steps - self.lost_steps

    @property
    def stepping(self) -> bool:
        return self._begun > 0

    @property
    def done(self) -> bool:
        return len(self.taken) >= self.wanted and not self.stepping

    def renew(self) -> None:
        """The ranks are replaced by others, from here on."""
        self.generation += 1
        self._forget()
        self.publications.forget()

    def begin(self, num: int) -> None:
        """`num` steps are to be taken."""
        self.wanted, self.taken = num, []

    def pump(self) -> None:
        """Take in finished steps, and begin more unless the run is stopping. Does not wait.

        Raises GroupLostError, or an error of our own; the steps under way are forgotten then.
        """
        while self._calls:
            refs = self._calls[0]
            done = done_of(refs)
            if len(done) < len(refs) and not any(map(error_of, done)):
                break
            self._calls.popleft()
            try:
                metrics = results(refs)[0]
            except BaseException:
                self._forget()
                raise
            if metrics is not None:  # else it began the first step
                self._take_in(metrics)
        self.keep_published()  # before the next steps begin, which would delay it
        if not self.driver.stopping():
            self._begin_steps()
        if self.stepping and not self._calls:  # no next step will tell of this one
            self._calls.append([call(rank, "finish") for rank in self.ranks])

    def _begin_steps(self) -> None:
        """Give the ranks what has come for them; each call tells of the step before its own."""
        if self.wanted:
            self.source.pump(SAMPLES_AHEAD * len(self.ranks))
        left = self.wanted - len(self.taken) - self._begun
        for _ in range(min(left, STEPS_AHEAD - self._begun)):
            if (taken := self.source.take(len(self.ranks))) is None:
                return
            given = zip(self.ranks, taken, strict=True)
            self._calls.append([call(rank, "begin", *fed) for rank, fed in given])
            self._begun += 1

    def _take_in(self, metrics: dict[str, Any]) -> None:
        self._begun -= 1
        self.gradient_steps += 1
        self.taken.append(metrics)
        if said := metrics.pop("said", ""):
            self.driver.say(said)

    def _forget(self) -> None:
        self._calls.clear()
        self._begun = 0

    def waiting(self) -> list[ObjectRef]:
        """What has to come before `pump` can do more."""
        return [*(self._calls[0] if self._calls else ()), *self.source.waiting()]

    def restart_stuck(self) -> None:
        """Nothing has come for too long: restart what is waited for.

        Raises GroupLostError where that is the group.
        """
        self.source.restart_stuck()
        if self.stepping:
            self._forget()
            raise GroupLostError("no step was finished for scale.patience seconds")

    def publish(self) -> None:
        """Have the newest weights published."""
        self.store.fence.remote(self.part, self.generation)  # it may have been restarted
        version, weights = call(self.ranks[0], "weights", num_returns=2)
        self.published = self.store.publish.remote(self.part, version, [weights])
        self.publications.begun(version, self.published, self.gradient_steps)

    def keep_published(self) -> None:
        """Publish where it is time to, and again where it failed. Does not wait."""
        if why := self.publications.look():
            self.driver.say(
                f"the newest weights of {self.part} are not published, trying again: {why}"
            )
        if self.publications.due(self.gradient_steps, self.publish_every):
            self.publish()

    def compiling(self) -> bool:
        """Whether ranks are silent because they compile."""
        with suppress(RayError):
            ref: Any = self.store.compiling.remote(self.part, self.generation)
            return bool(ray.get(ref, timeout=5))
        return False


class ActorGroup(LearnerGroup):
    """Starts its ranks, as actors of `kind`; `options` are what Ray is told of each one."""

    kind: type = LearnerActor

    def __init__(
        self, config: Config, spaces: Spaces, part: str, options: Sequence[dict[str, Any]]
    ) -> None:
        super().__init__(part, ray.get_actor(WEIGHTS))
        self.config, self.spaces, self.options = config, spaces, options
        self._loading: list[ObjectRef] = []

    def start(self, folder: UPath | None, gradient_steps: int) -> None:
        """Start all ranks, from a checkpoint where there is one; `meet` waits for them."""
        self.kill()
        self.renew()
        self.gradient_steps = gradient_steps
        self.store.fence.remote(self.part, self.generation)
        remote: Any = ray.remote
        make = remote(concurrency_groups=BESIDE)(self.kind)
        self.ranks = [
            make.options(**options).remote(
                self.config, self.spaces, self.part, rank, self.generation
            )
            for rank, options in enumerate(self.options)
        ]
        self._loading = [
            rank.count_from.remote(gradient_steps)
            if folder is None
            else rank.load.remote(folder, gradient_steps)
            for rank in self.ranks
        ]

    def meet(
        self, stopping: Callable[[], bool] = lambda: False, patience: float | None = None
    ) -> None:
        """Wait until all ranks have started and met; `patience` (seconds) is how long they may then
        wait for each other, by default scale.patience.

        Raises GroupLostError where one of them dies on the way, or when told to stop.
        """
        results(self._loading, stopping)
        if len(self.ranks) > 1:
            nodes = results([rank.node.remote() for rank in self.ranks], stopping)
            (meeting,) = results([self.ranks[0].open.remote(len(set(nodes)) == 1)], stopping)
            # The driver loses its patience first, and then says so.
            given = meeting, len(self.ranks), 2 * (patience or self.config.scale.patience)
            results([rank.join.remote(*given) for rank in self.ranks], stopping)

    def agent_arrays(self) -> ObjectRef:
        """All weights of the part."""
        return self.ranks[0].agent_arrays.remote()

    def save(self, folder: UPath) -> list[ObjectRef]:
        """Have every rank write its files, as they are now; does not wait, nor do the steps."""
        return [rank.write.remote(rank.note.remote(), folder) for rank in self.ranks]

    def kill(self) -> None:
        """End all ranks, also those that wait for a dead one."""
        for rank in self.ranks:
            with suppress(RayError):
                ray.kill(rank, no_restart=True)
        self.ranks = []


def call(rank: Any, method: str, *given: Any, num_returns: int = 1) -> Any:
    """Begin a method of a rank; its reference, or a list of them. This process owns what the method
    gives. A rank of this process has done it when this returns, and raises."""
    if isinstance(rank, ActorHandle):
        return getattr(rank, method).options(num_returns=num_returns).remote(*given)
    arguments = [ray.get(x) if isinstance(x, ObjectRef) else x for x in given]
    result = getattr(rank, method)(*arguments)
    return ray.put(result) if num_returns == 1 else [ray.put(each) for each in result]


def results(refs: Sequence[ObjectRef], stopping: Callable[[], bool] = lambda: False) -> list[Any]:
    """What ranks give. Raises GroupLostError where one died, or the first error of our own: the
    survivors of either only know that a connection broke."""
    waiting = list(refs)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
        if not done and stopping():
            raise GroupLostError("told to stop before the learners had started")
        if done and (error := error_of(done[0])) is not None:
            time.sleep(0.2)  # what the others say comes at about the same time
            others = done_of(refs)
            errors = [error, *filter(None, map(error_of, others))]
            own = next((each for each in errors if not _is_loss(each)), None)
            if own is not None:
                raise own
            raise GroupLostError(str(errors[0])) from error
    return ray.get(list(refs))


def _is_loss(error: Exception) -> bool:
    """Whether a process or what it was sent is gone, or its connection to another rank broke."""
    if "creation task" in str(error):
        return False  # it could not start, and would not another time
    cause = getattr(error, "cause", error)
    lost = (RayActorError, ObjectLostError)
    if isinstance(error, lost) or isinstance(cause, (*lost, torch.distributed.DistError)):
        return True
    return isinstance(cause, RuntimeError) and "gloo" in str(cause)  # its own errors have no class
