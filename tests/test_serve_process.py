"""`worldflux-dist serve` as users start it: from a run directory, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from serving import WAIT_S, process, write_run
from small import SIZES, perturbed, same_sums

from worldflux_dist import cli, storage
from worldflux_dist.agent import Agent
from worldflux_dist.replay.recent import recent_chunks
from worldflux_dist.serve.client import Client
from worldflux_dist.serve.run import ServedRun
from worldflux_dist.spaces import Spaces

pytestmark = pytest.mark.slow


def make_agent(seed: int = 0) -> Agent:
    """The same for the same seed."""
    torch.manual_seed(seed)
    env = gym.make("CartPole-v1")
    spaces = Spaces(env.observation_space, env.action_space)
    return perturbed(Agent("dreamerv3:size1m", spaces, SIZES), seed)


def test_a_run_is_served_and_followed(tmp_path: Path) -> None:
    write_run(tmp_path, make_agent(), gradient_steps=10)
    with process(tmp_path, "--follow", "--limit", "horizon=20") as (server, address):
        with Client(address) as client:
            model = client.model()
            assert (model.name, model.version) == ("dreamerv3:size1m", (0, 10))
            assert model.spaces.action == gym.spaces.Discrete(2)
            assert model.message.limits.horizon == 20
            before = client.rollout(from_replay=5, horizon=3, seed=1)
            write_run(tmp_path, make_agent(seed=1), gradient_steps=20)
            after = client.rollout(from_replay=5, horizon=3, seed=1)
            while after.version == (0, 10):
                after = client.rollout(from_replay=5, horizon=3, seed=1)
        assert after.version == (0, 20)
        assert not np.allclose(before.rewards, after.rewards)
        listening = [
            c for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"
        ]
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0


def test_a_server_is_killed_and_another_answers(tmp_path: Path) -> None:
    write_run(tmp_path, make_agent())
    with process(tmp_path) as (one, first), process(tmp_path) as (_, second):
        with Client(second) as client:
            want = client.rollout(from_replay=4, horizon=1000, seed=2)
        with Client([first, second]) as client:
            rewards = []
            for _, outputs in client.steps(from_replay=4, horizon=1000, seed=2):
                rewards.append(outputs["reward"])
                if len(rewards) == 2:
                    os.kill(one.pid, signal.SIGKILL)
    same_sums(np.concatenate(rewards)[1:], want.rewards)


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, make_agent())
    with process(tmp_path) as (_, address):
        port = address.rpartition(":")[2]
        command = [sys.executable, "-m", "worldflux_dist.cli", "serve", str(tmp_path)]
        done = subprocess.run([*command, "--port", port], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is it taken" in done.stderr and "Traceback" not in done.stderr


def test_a_broken_checkpoint_takes_nobody_back(tmp_path: Path) -> None:
    """The newest is damaged: the one before it is no newer than what is served."""
    write_run(tmp_path, make_agent(), gradient_steps=10)
    run = ServedRun(storage.as_path(tmp_path))
    assert run.newer((0, 9)) is not None and run.newer((0, 10)) is None
    write_run(tmp_path, make_agent(), gradient_steps=20)
    path = tmp_path / "checkpoints/0000000020/behavior.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run.newer((0, 10)) is None


def test_starts_are_read_of_all_shards_and_what_is_damaged_is_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path, make_agent())
    root = storage.as_path(tmp_path / "replay")
    chunks = recent_chunks(root, 10)
    assert sum(chunk.num_steps for chunk in chunks) == 128
    path = next((tmp_path / "replay").rglob("*.seg"))
    path.write_bytes(path.read_bytes()[:-3])
    assert recent_chunks(root, 10) == []
    assert ServedRun(storage.as_path(tmp_path)).dreams().num_starts == 0
    assert recent_chunks(storage.as_path(tmp_path / "none"), 10) == []


@pytest.mark.parametrize(
    ("why", "arguments"),
    [
        ("is no run directory", ["nowhere"]),
        ("has no checkpoint yet", ["."]),
        ("seen by other machines", [".", "--host", "0.0.0.0"]),
        ("it must be cpu or cuda", [".", "--device", "tpu"]),
        ("did you mean 'lanes'", [".", "--limit", "lans=3"]),
        ("is not of the form", [".", "--limit", "lanes"]),
        ("set RAY_ADDRESS", [".", "--replicas", "2"]),
    ],
)
def test_a_mistake_is_one_sentence(
    why: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["worldflux-dist", "serve", *arguments])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said: Any = capsys.readouterr().err
    assert ended.value.code == 2
    assert why in said and said.startswith("error: ") and said.count("\n") == 1
