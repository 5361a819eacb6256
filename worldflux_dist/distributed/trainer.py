"""Training through Ray, from one command: the driver's loop.

The driver works in rounds (see flow.py) and never touches a tensor: it holds references, reports
and numbers. Running the same command again resumes from the newest good checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path

from worldflux_dist.config import Config
from worldflux_dist.distributed.collect import RayCollector
from worldflux_dist.distributed.ending import Outcome, StoppedError
from worldflux_dist.distributed.evaluator import Evaluator
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.flow import Flow, Round
from worldflux_dist.distributed.learners import Learners
from worldflux_dist.distributed.recording import Record
from worldflux_dist.distributed.saving import LAST_SAVE_S, Saver
from worldflux_dist.distributed.session import Session, opened
from worldflux_dist.distributed.start import start_processes
from worldflux_dist.distributed.supervision import Driver, is_gone
from worldflux_dist.learner import NonFiniteLossError
from worldflux_dist.replay.limiter import Limiter

SAVE_AGAIN_S = 5.0  # after a checkpoint that could not be written
DRAIN_S = 3.0  # how long the last one waits for steps that are being collected


def train(config: Config, run_dir: Path, plain: bool | None = None) -> Outcome | None:
    """Train, or go on training, in `run_dir`; None where it was stopped on the way.

    Raises ConfigError before anything starts; RuntimeError (of an environment), NonFiniteLossError,
    RoleLostError, CheckpointError or StoppedError with the reason it could not go on or save; what
    is in the run directory stays good.
    """
    with opened(config, run_dir, plain) as session:
        if session.stop.stopping:
            return None
        trainer = Trainer(session)
        try:
            while trainer.going():
                trainer.take_in(trainer.flow.round(trainer.collects))
                trainer.evaluate_when_due()
                trainer.record.log_when_due()
                trainer.save_when_due()
        except NonFiniteLossError:
            trainer.saver.settle()  # a checkpoint that is being written is of before
            raise
        trainer.save_everything()
        if session.stop.stopping:
            return None
        session.stop.all_is_saved()
        return trainer.evaluator.finish(trainer.limiter.env_steps)


class Trainer:
    """The parts of one run, tied together, and the decisions of when to do what."""

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        config, say = self.config, session.progress.print
        self._per_call = config.env.num_envs * config.scale.chunk_length
        steps = config.scale.num_runners * self._per_call
        batch_steps = config.replay.batch_size * config.replay.batch_length
        self.limiter = Limiter(config.train.train_ratio, batch_steps, config.train.prefill)
        newest = session.run.resume(self.limiter, 2 * steps)
        if newest:
            say(
                f"resumed from {newest[0]}: {self.limiter.env_steps:,} env steps, "
                f"{self.limiter.gradient_steps:,} gradient steps"
            )
        run, spaces = session.run, session.task.spaces
        started = start_processes(config, spaces, run.storage, newest, session.options)
        self.processes = started  # until the run ends: handles keep actors alive
        stop = session.stop
        driver = Driver(say, lambda: stop.stopping, lambda: stop.seconds)
        self.shards = Shards(started.shards)
        self.learners = Learners(
            config, started.groups, self.shards, started.imaginers, run.checkpoints, driver
        )
        self.collector = RayCollector(config, started.runners, self.shards, self.learners, driver)
        self.flow = Flow(self.limiter, self.collector, self.learners, steps)
        last, episodes = (newest[0], newest[1]["episodes"]) if newest else (None, 0)
        self.saver = Saver(started.groups, self.shards, self.limiter, run.checkpoints, driver, last)
        self.record = Record(session, self.limiter, self.collector, episodes)
        self.evaluator = Evaluator(session, started.groups)
        self._saved = time.monotonic()

    def going(self) -> bool:
        """Whether there is another round: until all is collected and learned, or until stopped.
        `collects` then says whether the round begins to collect more."""
        train, under_way = self.config.train, self.collector.num_under_way
        self.collects = self.limiter.env_steps + under_way * self._per_call < train.env_steps
        busy = under_way or self.limiter.owed or self.learners.policy_behind
        if self.session.stop.stopping or not (self.collects or busy):
            return False
        filling = self.limiter.env_steps < train.prefill
        self.session.progress.phase("prefill" if filling else "train")
        return True

    def take_in(self, done: Round) -> None:
        """Count and record the results of a round. Raises RuntimeError where replay was lost."""
        self.limiter.redo(self.learners.take_redo())
        self.record.take_in(done.reports, done.updates)
        if self.collects or self.collector.num_under_way:
            return
        if not self.shards.wait_ready(lambda: self.session.stop.stopping):
            raise RuntimeError("replay was lost: run the same command again to go on")

    def evaluate_when_due(self) -> None:
        if self.limiter.env_steps < self.config.train.env_steps:
            self.evaluator.maybe_evaluate(self.limiter.env_steps)

    def save_when_due(self) -> None:
        """Begin a checkpoint when one is due, and put it in place once all have written.

        One that fails is tried again: a full disk, a storage that does not answer or a shard that
        died must not end the training.
        """
        every = self.config.train.checkpoint_every
        try:
            if self.saver.writing is not None:
                self.saver.finish(wait=False)
            elif time.monotonic() - self._saved > every:
                self._saved = time.monotonic()
                self.record.log()
                self.saver.begin(self.record.episodes)
        except (NonFiniteLossError, StoppedError):
            raise
        except Exception as error:  # storages raise errors of any kind
            self.saver.fail(error)
            self._saved = time.monotonic() - every + min(SAVE_AGAIN_S, every)

    def save_everything(self) -> None:
        """The last checkpoint, taken while nothing moves; tried again where a shard dies."""
        self.session.progress.phase("save")
        reports = self.collector.drain(DRAIN_S)
        self.limiter.inserted(sum(report.env_steps for report in reports))
        self.record.take_in(reports, [])
        self.shards.ask()
        self.record.log()
        deadline = time.monotonic() + LAST_SAVE_S
        self.saver.settle()  # of an earlier moment: this one is to be saved
        while True:
            try:
                self.saver.begin(self.record.episodes)
                self.saver.finish(wait=True)
                return
            except (NonFiniteLossError, StoppedError):
                raise
            except Exception as error:  # storages raise errors of any kind
                self.saver.give_up()
                self.saver.check_stop(error)
                if time.monotonic() > deadline or is_gone(error):
                    raise
                time.sleep(1)
