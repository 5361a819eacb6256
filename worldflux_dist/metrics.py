"""What a run measures: every metric with its meaning, and the files that they go to.

METRICS is the one place where a metric is told: its name, unit, aggregation and meaning, and its
gauge in Prometheus. `Recorder` aggregates by it, and so do Ray's gauges, RLlib's results and
docs/metrics.md (tests/metrics_page.py). `RunLog` owns metrics.jsonl, scores.jsonl and
tb/ of one run directory. What must stay true: every line is valid JSON (a value that is not finite
is left out, never written), and env_steps never go back within a file, because a resumed run first
cuts what its lost life had written.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import AfterValidator, TypeAdapter, with_config
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from typing_extensions import TypedDict

from worldflux_dist import storage
from worldflux_dist.settings import STRICT, Limited, Text, Whole
from worldflux_dist.storage import CheckpointError

RECENT = 20  # how many of the last values the progress line shows the mean of

MAX_LINE = 2**20  # bytes


@with_config(STRICT)
class _Score(TypedDict):
    task: Text
    method: Text
    seed: Whole
    env_steps: Whole
    frames: Whole
    return_mean: float
    return_std: float
    episodes: Whole
    time: float


def _counted(line: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(line.get("env_steps"), int) or line["env_steps"] < 0 or "time" not in line:
        raise ValueError("env_steps and time are needed")
    return line


_SCORE: TypeAdapter[Any] = TypeAdapter(_Score)
_METRICS: TypeAdapter[Any] = TypeAdapter(
    Annotated[dict[str, Limited | float], AfterValidator(_counted)], config=STRICT
)

logger = logging.getLogger(__name__)

How = Literal["mean", "p50", "p95", "last", "rate", "total"]


@dataclass(frozen=True)
class Metric:
    """One metric. `<...>` in its name stands for what differs, such as a role.

    `how` the values since the last line become one: their mean, a percentile (of what is recorded
    under the name before the slash), the last one, their sum per second (rate), or the sum since
    the run began (total). `gauge` is its name in Prometheus, in units of 1 / `scale`, with the tag
    `role`; without one, the role is what stands for `<...>`.
    """

    name: str
    unit: str
    how: How
    meaning: str
    gauge: str = ""
    role: str = ""
    scale: float = 1.0

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"<\w+>", "(.+)", self.name))


def _rows(text: str) -> list[Metric]:
    """The rows of a table in text: name | unit | how | meaning [| gauge | role [| scale]]."""
    rows = []
    for line in text.strip().splitlines():
        name, unit, how, meaning, *more = (cell.strip() for cell in line.split("|"))
        gauge, role, scale = more + ["", "", "1"][len(more) :]
        gauge = f"worldflux_{gauge}" if gauge else ""
        rows.append(Metric(name, unit, cast(How, how), meaning, gauge, role, float(scale)))
    return rows


# name | unit | how | meaning [| gauge in Prometheus, without "worldflux_" | its role [| scale]]
METRICS = _rows("""
env_steps | steps | last | Environment steps, of all runners together.
time | s | last | Seconds since the epoch.
frames | frames | last | env_steps times the environment's action repeat.
episodes | episodes | last | Episodes that ended.
episode/return | reward | mean | Sum of rewards of an episode, as it was collected.
episode/length | steps | mean | Steps of an episode.
env_failures | failures | last | Environments that raised and were made anew.
gradient_steps | steps | last | Gradient steps taken.
gradient_steps/redone | steps | last | Those of them taken again after learners were lost.
gradient_steps/forgiven | steps | last | Steps that were owed and dropped at a resume.
train_ratio/achieved | 1 | last | Replayed steps per environment step so far.
train_ratio/asked | 1 | last | What train.train_ratio asks for.
rate/env_steps | 1/s | rate | Environment steps per second. | env_steps_per_s | runner
rate/gradient_steps | 1/s | rate | Gradient steps per second. | gradient_steps_per_s | learner
rate/imagined_steps | 1/s | rate | Imagined steps per second. | imagined_steps_per_s | imaginer
time/learner_step | s | mean | Time of a gradient step. | learner_step_ms | learner | 1000
time/learner_wait | s | mean | Time without a batch before a step; publishing and saving are none.
time/learner_wall | s | mean | Time from the end of a step to the end of the next one.
stall/learner | 1 | last | Share of its time that a learner has no batch. | input_stall | learner
busy/<role> | 1 | rate | Fraction of the time that a role's processes work.
restarts/<role> | processes | last | Processes that died and were started again. | restarts |
weights/failed_publications | publications | last | Weights that the store did not get.
weights_version | steps | last | Gradient steps behind the newest weights that act.
staleness | steps | mean | Gradient steps that acting weights are behind. | weight_lag | runner
staleness/p50 | steps | p50 | Its median.
staleness/p95 | steps | p95 | Its 95th percentile.
imagination/stale | batches | last | Imagined batches thrown away for being too far behind.
replay/shard<index>_steps | steps | last | Steps that a shard holds. | replay_steps | shard
replay/shard<index>_bytes | bytes | last | Bytes that a shard holds. | replay_bytes | shard
replay/shard<index>_duplicates | chunks | last | Chunks that came again and were not stored twice.
replay/shard<index>_dropped_steps | steps | last | Steps that were lost with a shard's process.
replay/not_durable | 1 | last | Whether replay cannot be written to disk. | not_durable | shard
loss | 1 | mean | The weighted sum of all losses of the first optimizer.
loss/rec/<key> | 1 | mean | Reconstruction of an observation: squared error, summed over it.
loss/tokens/<key> | nats | mean | Cross-entropy of the next tokens of an observation, their mean.
loss/commit/<key> | 1 | mean | Squared distance of latents and codes, summed over an observation.
perplexity/<key> | tokens | mean | How many tokens of an observation occur: exp of their entropy.
loss/dyn | nats | mean | KL divergence that trains the prior, at least the free nats.
loss/rep | nats | mean | KL divergence that trains the posterior, at least the free nats.
loss/reward | nats | mean | Cross-entropy of the predicted reward.
loss/continue | nats | mean | Cross-entropy of the predicted continuation.
loss/denoise | 1 | mean | Denoising of the next vectors: squared error, their mean.
loss/denoise/<key> | 1 | mean | Denoising of the next image: squared error, the mean of its pixels.
loss/consistency | 1 | mean | Squared error of predicted latents.
loss/prediction | 1 | mean | Squared error of predicted embeddings.
loss/masked | 1 | mean | Squared error of the embeddings of what was hidden.
loss/regularizer | 1 | mean | What keeps embeddings from collapsing: how far they are from it.
loss/barlow | 1 | mean | How far features and tokens are from correlating dimension by dimension.
loss/termination | nats | mean | Cross-entropy of the predicted end of an episode.
loss/value | nats | mean | Cross-entropy of the values (of imagined steps, or of the Qs).
loss/replay_value | nats | mean | Cross-entropy of the values of replayed steps.
loss/policy | 1 | mean | The policy's.
grad_norm/<optimizer> | 1 | mean | L2 norm of an optimizer's gradients before they are clipped.
learning_rate/<optimizer> | 1 | last | Learning rate of an optimizer, warm-up included.
kl | nats | mean | KL divergence of posterior and prior.
prior_entropy | nats | mean | Entropy of the prior.
posterior_entropy | nats | mean | Entropy of the posterior.
emb_std | 1 | mean | Mean standard deviation of the dimensions of embeddings; near 0 is a collapse.
emb_rank | 1 | mean | How many dimensions of embeddings vary on their own (participation ratio).
policy_entropy | nats | mean | Entropy of the policy.
policy_entropy_scaled | nats | mean | The same, scaled by the number of action dimensions.
return_imagined | reward | mean | lambda-returns of imagined steps.
return_scale | reward | mean | What advantages are divided by: the spread of returns.
reward_imagined | reward | mean | Rewards of imagined steps.
value | reward | mean | Values of imagined steps.
value_target | reward | mean | What the Qs are trained towards.
q | reward | mean | Qs of the policy's actions.
q_scale | reward | mean | What Qs are divided by in the policy's loss: their spread.
policy/<metric> | 1 | mean | As the metric, of policy learners, where model learners have it too.
score/return_mean | reward | last | Mean return of an evaluation (in TensorBoard).
weights/staleness | steps | mean | RLlib's results: as staleness.
weights/staleness_p50 | steps | last | RLlib's results: its median.
weights/staleness_p95 | steps | last | RLlib's results: its 95th percentile.
env_failures_lifetime | failures | total | RLlib's results: as env_failures.
num_imagined_steps_lifetime | steps | total | RLlib's results: imagined steps.
replay/env_steps | steps | last | RLlib's results: as env_steps.
replay/num_steps | steps | last | RLlib's results: steps that all shards hold.
replay/nbytes | bytes | last | RLlib's results: bytes that all shards hold.
replay/duplicates | chunks | last | RLlib's results: chunks of all shards that came again.
""")
_EXACT = {row.name: row for row in METRICS}
AGGREGATES: dict[How, Callable[[list[float], float], float]] = {
    "mean": lambda values, seconds: sum(values) / len(values),
    "p50": lambda values, seconds: float(np.percentile(values, 50)),
    "p95": lambda values, seconds: float(np.percentile(values, 95)),
    "last": lambda values, seconds: values[-1],
    "rate": lambda values, seconds: sum(values) / seconds,
}


@functools.cache
def find(name: str) -> Metric:
    """The row of a metric. One that METRICS does not tell, of a family or a behavior from outside,
    is a mean without unit and meaning."""
    patterns = (row for row in METRICS if row.pattern.fullmatch(name))
    return _EXACT.get(name) or next(patterns, Metric(name, "", "mean", ""))


def family(line: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values of a line whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in line.items() if name.startswith(prefix)}


class Recorder:
    """Takes in values, and gives a line of metrics of what came since the last one."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._recent: dict[str, deque[float]] = {}
        self._since = time.monotonic()

    def add(self, name: str, value: float) -> None:
        """Take in one value; one that is not finite is left out."""
        value = float(value)
        if math.isfinite(value):
            self._values.setdefault(name, []).append(value)
            self._recent.setdefault(name, deque(maxlen=RECENT)).append(value)

    def recent(self) -> dict[str, float]:
        """The means of the last RECENT values of every metric."""
        return {name: sum(values) / len(values) for name, values in self._recent.items()}

    def line(self) -> dict[str, float]:
        """Every metric that had a value since the last line, aggregated as METRICS says."""
        seconds = max(time.monotonic() - self._since, 1e-3)
        line: dict[str, float] = {}
        for name, values in self._values.items():
            for key in (name, f"{name}/p50", f"{name}/p95"):
                if key == name or key in _EXACT:
                    line[key] = AGGREGATES[find(key).how](values, seconds)
        self._values, self._since = {}, time.monotonic()
        return line


class RunLog:
    """Writes the measurements of one run directory; one process at a time.

    Owns metrics.jsonl (lines with env_steps and time), the same as scalars under tb/, and
    scores.jsonl. Times are seconds since the epoch. Raises OSError when the disk refuses.
    """

    def __init__(self, run_dir: Path) -> None:
        self._metrics, self._scores = run_dir / "metrics.jsonl", run_dir / "scores.jsonl"
        self._tb_dir = run_dir / "tb"
        self._tb: EventFileWriter | None = None
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in (self._metrics, self._scores):
            _drop_torn_line(path)

    def log(self, env_steps: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics. Values that are not finite are left out."""
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        _append(self._metrics, {"env_steps": int(env_steps), "time": now, **finite})
        self._scalars(int(env_steps), now, finite)

    def score(
        self,
        env_steps: int,
        frames: int,
        returns: Iterable[float],
        *,
        task: str,
        method: str,
        seed: int,
    ) -> dict[str, Any]:
        """Append one evaluation (episode returns, at least one and all finite); gives its line."""
        values = np.asarray(list(returns), np.float64)
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"a score needs finite episode returns, got {values.tolist()}")
        mean, now = float(values.mean()), time.time()
        line = {
            "task": task,
            "method": method,
            "seed": int(seed),
            "env_steps": int(env_steps),
            "frames": int(frames),
            "return_mean": mean,
            "return_std": float(values.std()),
            "episodes": int(values.size),
            "time": now,
        }
        _append(self._scores, line)
        self._scalars(int(env_steps), now, {"score/return_mean": mean})
        return line

    def truncate_after(self, env_steps: int, gradient_steps: int) -> None:
        """Drop what was logged later, where a resumed run goes on: while learners catch up, lines
        differ in gradient steps alone."""
        for path in (self._metrics, self._scores):
            if path.exists():
                kept = (
                    line
                    for line in read_lines(path)
                    if line["env_steps"] <= env_steps
                    and line.get("gradient_steps", 0) <= gradient_steps
                )
                storage.write(path, "".join(json.dumps(x) + "\n" for x in kept).encode())
        if self._tb_dir.exists():
            # TensorBoard forgets the points of an earlier file from this step on.
            start = SessionLog(status=SessionLog.START)
            self._write_event(Event(step=env_steps + 1, wall_time=time.time(), session_log=start))

    def close(self) -> None:
        if self._tb is not None:
            self._tb.close()
            self._tb = None

    def _scalars(self, env_steps: int, now: float, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write_event(Event(step=env_steps, wall_time=now, summary=Summary(value=scalars)))

    def _write_event(self, event: Any) -> None:
        if self._tb is None:
            self._tb = EventFileWriter(str(self._tb_dir))
        self._tb.add_event(event)
        self._tb.flush()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl file; one torn by a killed process is left out, and said.

    Raises CheckpointError naming file, line and field where one says something else.
    """
    form = _SCORE if path.name == "scores.jsonl" else _METRICS
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            try:
                line = storage.parse_json(text, path)
            except CheckpointError:
                logger.warning("line %d of %s is torn and left out", number, path)
                continue
            yield storage.in_form(line, form, path, f"line {number}")


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
