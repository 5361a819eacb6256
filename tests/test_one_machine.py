"""What a run on one machine shows to others, leaves behind and prints, faults included."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fault_runs import FaultRun, kill

from worldflux_dist.config import ConfigError
from worldflux_dist.distributed.cluster import LONGEST_PATH, local_ray
from worldflux_dist.distributed.rank import interface_of

TORCHS_OWN = re.compile("torchinductor_.*")  # torch's cache of compiled code, which stays
PROCESSES = ("scale.num_learners=2", "scale.num_runners=1", "scale.num_shards=1")
FOREIGN = re.compile(r'Traceback|File "|ray::|raylet|Ray\w*Error|\[\d{4}-\d\d-\d\d|\w+\.cc:\d')


def listening(run: FaultRun) -> list[tuple[str, str]]:
    """The names of a run's processes and the addresses on which they accept TCP connections."""
    found = []
    for process in [run.driver, *run.processes()]:
        with suppress(psutil.NoSuchProcess):  # a worker that was idle
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process.name(), connection.laddr.ip))
    return found


def folder_of(run: FaultRun) -> Path:
    """Where its workers put temporary files."""
    return Path(run.processes("ray::LearnerActor")[0].environ()["TMPDIR"])


@pytest.mark.ray
def test_a_run_keeps_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens off loopback, a TMPDIR too long for sockets is none for the run, processes
    that die are a sentence each, and nothing is left."""
    temporary = tmp_path / ("long" * 20)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with FaultRun(tmp_path, *PROCESSES) as run:
        run.wait_for_training()
        sockets = listening(run)
        folder = folder_of(run)
        assert folder.stat().st_mode & 0o077 == 0
        (meeting,) = folder.glob("ray/ranks-*/store")
        assert meeting.parent.stat().st_mode & 0o077 == 0
        for role, name in (
            ("runner", "EnvRunnerActor"),
            ("shard", "ReplayShard"),
            ("learner", "LearnerActor"),
        ):
            since = kill(run.started(name)[0])
            run.wait_for_line(role, lambda x, r=role: x[f"restarts/{r}"] > 0, since)
            run.wait_for_training(since)
        run.interrupt()
        assert run.wait() == 130, run.output
    names = {name.split(".")[0] for name, _ in sockets}
    assert {"gcs_server", "raylet", "ray::LearnerActor"} <= names, names
    assert {ip.removeprefix("::ffff:") for _, ip in sockets} == {"127.0.0.1"}, sockets
    assert "start again, since one was lost" in run.output
    print(run.output)
    assert not [line for line in run.output.splitlines() if FOREIGN.search(line)], run.output
    assert not folder.exists()
    assert not [name for name in os.listdir(temporary) if not TORCHS_OWN.fullmatch(name)]


def test_a_folder_for_rays_files_that_is_too_long_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * LONGEST_PATH)
    with pytest.raises(ConfigError, match="RAY_TMPDIR is too long"), local_ray(1, 80 * 2**20):
        pass


def test_ranks_know_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1").startswith("lo")
    with pytest.raises(RuntimeError, match=r"no network interface .* 192.0.2.77, .* --node-ip"):
        interface_of("192.0.2.77")
