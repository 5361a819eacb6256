"""Training as a job of a Ray cluster: submitted over its dashboard, followed, stopped, resumed.

What must stay true: a stopped job has saved everything, and the same submission again goes on. So
the run directory is one that every node sees, and stopping a job waits for its checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from pathlib import Path, PurePosixPath
from typing import Any

from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.job_submission import JobStatus, JobSubmissionClient

from worldflux_dist import config
from worldflux_dist.distributed.auth import explained

DASHBOARD = "http://127.0.0.1:8265"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Ray leaves out .git, .venv and what .gitignore names; these where there is no .gitignore.
EXCLUDES = ["/runs/", "/build/", "*.egg-info/", ".*_cache/", ".hypothesis/"]
STOP_WAIT_S = 120  # from SIGTERM to SIGKILL; Ray's own 3 s are too few for a checkpoint
STOPPED = 130
POLL_S = 0.5


def submit(run_args: list[str], address: str | None, working_dir: Path, follow: bool) -> int:
    """Run `worldflux-dist train <run_args>` as a job with the files of `working_dir`.

    `run_args` are those of train, with `--run-dir` and a path that every node sees. `address` is
    the dashboard, such as http://head:8265; None is what RAY_API_SERVER_ADDRESS or RAY_ADDRESS
    name, else the one of this machine. Gives the exit code: 0 succeeded (or, without `follow`,
    submitted), 1 failed, 130 stopped or no longer followed. Raises ValueError for arguments that
    cannot work, RuntimeError where the cluster cannot be reached or refuses.
    """
    _check(run_args, working_dir)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    address = _address(address)
    with explained(address):
        client = JobSubmissionClient(address)
        # As a module: the code of `working_dir` where it is there, else what the cluster installed.
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "worldflux_dist.cli", "train", *run_args]),
            runtime_env=job_environment(working_dir),
        )
        print(f"submission id: {job}", flush=True)
        if follow:
            return follow_job(client, job)
        print(_how(client, job))
        return 0


def job_environment(working_dir: Path) -> dict[str, Any]:
    """The runtime environment of a job: the files of `working_dir`, and time to save."""
    return {
        "working_dir": str(working_dir),
        "excludes": EXCLUDES,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
    }


def follow_job(client: JobSubmissionClient, job: str) -> int:
    """Print the log of a job until it ends; 0 succeeded, 1 failed, 130 stopped.

    Ctrl-C ends the following (130), not the job.
    """

    async def print_log() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(print_log())
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe job goes on\n{_how(client, job)}")
        return STOPPED
    stopped = info.status == JobStatus.STOPPED or info.driver_exit_code == STOPPED
    print(f"job {job}: {'stopped; the same command goes on' if stopped else info.status.value}")
    return STOPPED if stopped else int(info.status != JobStatus.SUCCEEDED)


def _how(client: JobSubmissionClient, job: str) -> str:
    return (
        f"follow it: ray job logs --follow --address {client.get_address()} {job}\n"
        f"stop it:   ray job stop --address {client.get_address()} {job}"
    )


def stop_all(address: str = DASHBOARD, patience_s: float = 45.0) -> None:
    """Stop every job of a cluster and wait until each has saved, `patience_s` at most.

    Kubernetes calls it on the head before it ends the pod.
    """
    with explained(address):
        client = JobSubmissionClient(_address(address))
        going = [
            job.submission_id
            for job in client.list_jobs()
            # A driver that was not submitted is listed without an id.
            if job.submission_id and not job.status.is_terminal()
        ]
        for job in going:
            client.stop_job(job)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if all(client.get_job_status(job).is_terminal() for job in going):
                return
            time.sleep(POLL_S)


def _check(run_args: list[str], working_dir: Path) -> None:
    """Find mistakes before anything is sent: the settings are read as the job will read them."""
    run_dir = None
    if "--run-dir" in run_args[:-1]:
        run_dir = run_args[run_args.index("--run-dir") + 1]
    if run_dir is None or not PurePosixPath(run_dir).is_absolute():
        raise ValueError(
            f"the run directory of a job is {run_dir}: set --run-dir to an absolute path on "
            "storage that every node of the cluster sees, such as /runs/pong"
        )
    settings = [arg for arg in run_args if not arg.startswith("--") and arg != run_dir]
    files = [working_dir / arg for arg in settings if "=" not in arg]
    config.load(files, [arg for arg in settings if "=" in arg])


def _address(address: str | None) -> str:
    """The dashboard's; what was asked for wins over the environment, which Ray would prefer."""
    if address is None:
        address = next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), DASHBOARD)
    if "://" not in address:
        raise ValueError(
            f"address {address!r} is not the one of a dashboard: name it like http://head:8265"
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    return address
