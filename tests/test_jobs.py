"""Runs as jobs of a real cluster that asks for a token: submitted, stopped, resumed, and refused to
whoever has no token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import toy_task

from worldflux_dist import checkpoint
from worldflux_dist.config import ConfigError
from worldflux_dist.distributed import auth, submit

TESTS = Path(__file__).parent
PATIENCE_S = 240.0
# The first ports have a name; workers take the others.
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "ray-client-server-port",
    "object-manager-port",
    "node-manager-port",
)
NUM_PORTS = 100
ENDLESS = (
    "train.env_steps=1_000_000",
    "train.eval_every=0",
    "train.checkpoint_every=1",
    "train.eval_episodes=4",
    "train.threshold=null",
    "train.prefill=128",
    "train.train_ratio=8",
    "learner.threads=1",
    "scale.num_runners=1",
    "scale.num_shards=1",
)


@dataclass(frozen=True)
class Head:
    """A head node of its own: what clients set to reach it, and its dashboard."""

    folder: Path
    environment: dict[str, str]
    dashboard: str

    def run(self, *command: str | Path, **changes: str) -> subprocess.Popen[str]:
        """A client's process, in the folder that is sent along with a job."""
        return subprocess.Popen(
            [*map(str, command)],
            cwd=self.folder / "work",
            env=self.environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ray(self, *arguments: str) -> subprocess.Popen[str]:
        return self.run(sys.executable, "-m", "ray.scripts.scripts", *arguments)

    def submit(self, run_dir: Path, *overrides: str, **changes: str) -> subprocess.Popen[str]:
        """`submit.submit` of the toy task, as the command line calls it."""
        call = "from worldflux_dist.distributed import submit as s; from pathlib import Path; "
        call += "import sys; sys.exit(s.submit(sys.argv[2:], sys.argv[1], Path(), True))"
        arguments = ["toy.yaml", *overrides, "--run-dir", str(run_dir)]
        return self.run(sys.executable, "-c", call, self.dashboard, *arguments, **changes)


def wait_until(true: Callable[[], bool], what: str, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert run.poll() is None, f"ended before {what}: {run.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited for {what} in vain"
        time.sleep(0.2)


def free_ports() -> int:
    """The first of NUM_PORTS ports in a row that nobody listens on."""
    for first in range(20_000 + secrets.randbelow(8_000), 32_000, NUM_PORTS):
        try:
            for port in range(first, first + len(PORTS)):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def end(process: psutil.Process) -> None:
    """End a process and all below it."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    pytest.importorskip("aiohttp", reason="the job server needs ray[default]")
    folder = tmp_path_factory.mktemp("head")
    (folder / "work").mkdir()
    toy_task.write(folder / "work")
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    first = free_ports()
    ports = [f"--{name}={first + i}" for i, name in enumerate(PORTS)]
    ports += [f"--min-worker-port={first + 20}", f"--max-worker-port={first + NUM_PORTS - 1}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{first + 1}",
        "RAY_TMPDIR": f"/tmp/wf{first}",  # the path of a socket in it is 107 bytes long at most
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *ports]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=8"]
    command += [f"--temp-dir=/tmp/wf{first}", "--object-store-memory=300000000"]
    with (folder / "head.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--disable-usage-stats"], env=environment, stdout=log, stderr=log
        )
    found = Head(folder, environment, environment["RAY_API_SERVER_ADDRESS"])
    try:
        deadline = time.monotonic() + PATIENCE_S
        while answer(found, "/api/jobs/", token.read_text()) != 200:
            assert process.poll() is None, (folder / "head.txt").read_text()
            assert time.monotonic() < deadline, (folder / "head.txt").read_text()
            time.sleep(0.2)
        yield found
    finally:
        end(psutil.Process(process.pid))
        shutil.rmtree(f"/tmp/wf{first}", ignore_errors=True)


def answer(head: Head, path: str, token: str | None) -> int:
    """The status with which the dashboard answers, 0 where it does not."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(head.dashboard + path, headers=headers), timeout=10
        ) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


# ---------------------------------------------------------------------------------- the token


@pytest.mark.ray
@pytest.mark.parametrize("path", ["/api/jobs/", "/api/version", "/nodes?view=summary"])
def test_the_dashboard_is_closed_without_the_token(head: Head, path: str) -> None:
    right = (head.folder / "token").read_text()
    assert [answer(head, path, token) for token in (None, "wrong", right)] == [401, 403, 200]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token and none was sent: set RAY_AUTH_MODE"),
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses this token: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "no token was found: set RAY_AUTH_MODE=token"),
    ],
)
def test_submit_says_what_is_wrong_with_the_token(
    head: Head, tmp_path: Path, changes: dict[str, str], sentence: str
) -> None:
    run = head.submit(tmp_path, **changes)
    output = run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode != 0
    last = output.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ") and sentence in last, output


@pytest.mark.parametrize(
    ("address", "refused"),
    [
        ("192.0.2.7:6379", True),
        ("head.example:6379", True),
        ("[2001:db8::1]:6379", True),
        ("127.0.0.1:6379", False),
        ("localhost:6379", False),
        ("[::1]:6379", False),
    ],
)
def test_no_run_on_a_cluster_that_lets_everybody_in(address: str, refused: bool) -> None:
    auth.refuse_open(address, token_auth=True)
    if refused:
        with pytest.raises(RuntimeError, match=r"asks for no token.*RAY_AUTH_MODE=token"):
            auth.refuse_open(address, token_auth=False)
    else:
        auth.refuse_open(address, token_auth=False)


# --------------------------------------------------------------------------------------- jobs


@pytest.mark.ray
def test_a_stopped_job_goes_on_where_it_was(head: Head) -> None:
    """Submitted by Ray's own command, stopped, and submitted again by ours."""
    run_dir = head.folder / "run"
    train = Path(sys.executable).with_name("worldflux-dist")
    entrypoint = ["worldflux-dist"] if train.exists() else ["python", "-m", "worldflux_dist.cli"]
    arguments = ["train", "toy.yaml", *ENDLESS, "--run-dir", str(run_dir)]
    job = ["--submission-id", "first", "--working-dir", ".", "--", *entrypoint, *arguments]
    run = head.ray("job", "submit", *job)
    wait_until(lambda: newest(run_dir) > 0, "a checkpoint", run)
    stopped = head.ray("job", "stop", "first")
    output = run.communicate(timeout=PATIENCE_S)[0]
    assert stopped.wait(PATIENCE_S) == 0
    assert "stopping: saving a checkpoint first" in output
    assert "Job 'first' was stopped" in output
    saved = newest(run_dir)

    run = head.submit(run_dir, *ENDLESS[1:], f"train.env_steps={env_steps(run_dir) + 256}")
    output = run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode == 0, output
    assert "submission id: " in output
    assert f"resumed from {run_dir}/checkpoints/{saved:010d}" in output
    assert "SUCCEEDED" in output
    assert newest(run_dir) > saved


# A job that needs longer to save than Ray waits for one by itself, and one that fails.
SAVES_SLOWLY = """
import signal, sys, time
def save(*_):
    time.sleep(5)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
print("started", flush=True)
time.sleep(600)
"""
FOLLOW = """
import signal, sys
from pathlib import Path
from ray.job_submission import JobSubmissionClient
from worldflux_dist.distributed import submit
signal.signal(signal.SIGINT, signal.default_int_handler)  # not so in a shell's background job
client = JobSubmissionClient()
environment = submit.job_environment(Path())
job, *entrypoint = sys.argv[1:]
if entrypoint:
    client.submit_job(submission_id=job, entrypoint=entrypoint[0], runtime_env=environment)
sys.exit(submit.follow_job(client, job))
"""


@pytest.mark.ray
def test_a_job_outlives_ctrl_c_and_has_time_to_save(head: Head) -> None:
    (head.folder / "work/saves_slowly.py").write_text(SAVES_SLOWLY)
    run = head.run(sys.executable, "-c", FOLLOW, "slow", "python saves_slowly.py")
    assert run.stdout is not None
    assert any("started" in line for line in run.stdout)
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode == submit.STOPPED, output
    assert "the job goes on" in output
    assert f"ray job stop --address {head.dashboard} slow" in output

    run = head.run(sys.executable, "-c", FOLLOW, "slow")
    assert any("started" in line for line in run.stdout or ())
    call = "import sys; from worldflux_dist.distributed import submit; submit.stop_all(sys.argv[1])"
    began = time.monotonic()
    assert head.run(sys.executable, "-c", call, head.dashboard).wait(PATIENCE_S) == 0
    assert time.monotonic() - began > 5  # it has waited for the job to save
    output = run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode == submit.STOPPED, output
    assert "saved" in output
    assert "job slow: stopped; the same command goes on" in output


@pytest.mark.ray
def test_a_failed_job_is_told_from_a_stopped_one(head: Head) -> None:
    run = head.run(sys.executable, "-c", FOLLOW, "failing", "python -c 'raise SystemExit(3)'")
    output = run.communicate(timeout=PATIENCE_S)[0]
    assert run.returncode == 1, output
    assert "job failing: FAILED" in output


def newest(run_dir: Path) -> int:
    """Gradient steps of the newest checkpoint, -1 where there is none."""
    found = checkpoint.newest(run_dir / "checkpoints")
    return int(found[0].name) if found else -1


def env_steps(run_dir: Path) -> int:
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found
    return int(found[1]["counters"]["limiter"]["env_steps"])


# ---------------------------------------------------------------------- before anything is sent


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (["toy.yaml"], ValueError, "run directory of a job is None: set --run-dir"),
        (["toy.yaml", "--run-dir", "runs/a"], ValueError, "is runs/a: set --run-dir to an absolut"),
        (["to.yaml", "--run-dir", "/runs/a"], ConfigError, "no config file"),
        (["toy.yaml", "sed=1", "--run-dir", "/runs/a"], ConfigError, "unknown config key 'sed'"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    tmp_path: Path, arguments: list[str], error: type[Exception], sentence: str
) -> None:
    toy_task.write(tmp_path)
    with pytest.raises(error, match=sentence):
        submit.submit(arguments, "http://127.0.0.1:9", tmp_path, follow=True)


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_task.write(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")  # what is asked for wins
    arguments = ["toy.yaml", "--run-dir", "/runs/a"]
    with pytest.raises(RuntimeError, match=r"no Ray cluster answers at http://127\.0\.0\.1:9"):
        submit.submit(arguments, "http://127.0.0.1:9", tmp_path, follow=True)
    with pytest.raises(ValueError, match="name it like http://head:8265"):
        submit.submit(arguments, "127.0.0.1:6379", tmp_path, follow=True)


CHECK = """
import ray
from worldflux_dist.distributed import auth
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
print("loopback" if auth.is_loopback(ray.get_runtime_context().gcs_address) else "seen")
auth.check_auth()
"""


@pytest.mark.ray
def test_the_head_is_asked_whether_it_lets_everybody_in() -> None:
    """Ray listens on every interface, even where it was started for one process. (Runs of other
    tests, which ask for a token, are not refused.)"""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    refused = "seen" in done.stdout
    assert ("asks for no token" in done.stderr) == refused == bool(done.returncode), done.stderr
