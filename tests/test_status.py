"""What a run says of itself: its directory in lines, its bottleneck in one, its gauges."""

from __future__ import annotations

import fcntl
import re
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import ray

from worldflux_dist import checkpoint, config
from worldflux_dist.distributed import status, telemetry
from worldflux_dist.metrics import METRICS, RunLog

LINE = {
    "gradient_steps": 250,
    "episodes": 12,
    "rate/env_steps": 812.5,
    "rate/gradient_steps": 2.5,
    "rate/imagined_steps": 40_000.0,
    "time/learner_step": 0.125,
    "stall/learner": 0.43,
    "staleness": 17.5,
    "staleness/p95": 30.0,
    "busy/runner": 0.97,
    "busy/replay": 0.02,
    "busy/learner": 0.57,
    "restarts/runner": 2,
    "restarts/shard": 0,
    "replay/shard0_steps": 600,
    "replay/shard1_steps": 400,
    "replay/shard0_bytes": 3 * 1024**2,
    "replay/not_durable": 0,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    settings = config.load([], ["env.id=CartPole-v1", "train.env_steps=10000", "seed=3"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(settings))
    return tmp_path


def test_a_run_is_read_from_its_directory(run_dir: Path) -> None:
    with closing(RunLog(run_dir)) as log:
        log.log(500, {})
        log.log(1000, LINE)
        for returns, method in (([9.0, 11.0], "dreamerv3:size12m"), ([1.0], "random")):
            log.score(1000, 1000, returns, task="CartPole-v1", method=method, seed=3)
    for step in (100, 250):
        root = run_dir / "checkpoints"
        checkpoint.commit(root, checkpoint.begin(root, step), step)
    (run_dir / "checkpoints" / "0000000300").mkdir()  # was never finished
    text = "\n".join(status.lines(run_dir))
    for part in (
        "dreamerv3:size12m on CartPole-v1, seed 3",
        "last line 0 s ago",
        "1,000 of 10,000 env steps (10%), 250 gradient steps, 12 episodes",
        "812.5 env steps, 2.5 gradient steps, 40,000.0 imagined steps",
        "shard 0 600 steps (3 MB), shard 1 400 steps",
        "replay is kept on disk",
        "restarts    runner 2\n",
        "17.5 gradient steps behind when acting, p95 30.0",
        "checkpoint  250 gradient steps, 0 s ago",
        "10.0 +- 1.0 over 2 episodes at 1,000 env steps",
        "bottleneck: env runners (busy 97% of the time, learners wait 43% of it): raise scale.n",
    ):
        assert part in text, text


def test_who_holds_the_lock_is_training(run_dir: Path) -> None:
    assert "no process of this machine is training" in status.lines(run_dir)[1]
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "a process of this machine is training" in status.lines(run_dir)[1]
    assert "no process of this machine is training" in status.lines(run_dir)[1]
    with (run_dir / ".lock").open("w") as lock:  # looking has left it free
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_that_has_written_nothing_yet_is_shown(run_dir: Path) -> None:
    text = "\n".join(status.lines(run_dir))
    assert "no line of metrics yet" in text
    assert "bottleneck: not known yet" in text


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run directory: it has no config"):
        status.lines(tmp_path)


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ({"learner": 0.99, "runner": 0.2}, "learners (busy 99% of the time): raise scale.num_lear"),
        ({"learner": 0.1, "imaginer": 0.9}, "imaginers (busy 90% of the time, learners wait 90% o"),
        ({"learner": 0.3, "policy": 0.8}, "policy learners (busy 80%"),
        ({"learner": 0.3, "replay": 0.8, "else": 2.0}, "replay (busy 80%"),
        ({"learner": 0.3, "runner": 0.4}, "none; the busiest, env runners, works 40% of the time"),
        ({}, "not known yet"),
    ],
)
def test_the_bottleneck_is_the_busiest_role(busy: dict[str, float], expected: str) -> None:
    assert status.bottleneck(busy).startswith(f"bottleneck: {expected}")


@pytest.mark.ray
@pytest.mark.slow
def test_gauges_are_served_by_ray() -> None:
    pytest.importorskip("aiohttp_cors", reason="Ray's agent comes with ray[default]")
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=80_000_000,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:
        telemetry.Telemetry("demo").record(LINE | {"loss": 1.0})
        (node,) = ray.nodes()
        served = read_gauges(node["MetricsExportPort"], num=11)
    finally:
        ray.shutdown()
    assert served == {
        ("worldflux_env_steps_per_s", "runner", ""): 812.5,
        ("worldflux_gradient_steps_per_s", "learner", ""): 2.5,
        ("worldflux_imagined_steps_per_s", "imaginer", ""): 40_000,
        ("worldflux_learner_step_ms", "learner", ""): 125,
        ("worldflux_input_stall", "learner", ""): 0.43,
        ("worldflux_weight_lag", "runner", ""): 17.5,
        ("worldflux_restarts", "runner", ""): 2,
        ("worldflux_restarts", "shard", ""): 0,
        ("worldflux_replay_steps", "shard", "0"): 600,
        ("worldflux_replay_steps", "shard", "1"): 400,
        ("worldflux_replay_bytes", "shard", "0"): 3 * 1024**2,
        ("worldflux_not_durable", "shard", ""): 0,
    }
    assert {name for name, *_ in served} == {row.gauge for row in METRICS if row.gauge}


def read_gauges(port: int, num: int) -> dict[tuple[str, str, str], float]:
    """Ours, by name, role and shard, once there are more than `num` of them."""
    found: dict[tuple[str, str, str], float] = {}
    deadline = time.monotonic() + 120
    while len(found) <= num and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:  # the agent has not begun to listen
            continue
        for name, tags, value in re.findall(r"^ray_(worldflux\w+)\{(.*)\} (\S+)$", text, re.M):
            tag = dict(re.findall(r'(\w+)="([^"]*)"', tags))
            assert tag["run"] == "demo"
            found[name, tag["role"], tag["shard"]] = float(value)
    return found
