"""The command line. Every mistake of a user ends in one sentence, never in a stack trace."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Distributed reinforcement learning with world models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

envs_app = typer.Typer(help="Look at environments.", no_args_is_help=True)
app.add_typer(envs_app, name="envs")

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="YAML files, merged from left to right, and overrides like env.id=Pendulum-v1",
        show_default=False,
    ),
]


def _load(settings: list[str] | None) -> Any:
    from worldflux_dist import config

    settings = settings or []
    files = [item for item in settings if "=" not in item]
    return config.load(files, [item for item in settings if "=" in item])


@app.command()
def train(
    settings: Settings = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run lives; an existing run goes on.")
    ] = None,
    plain: Annotated[bool, typer.Option(help="Plain log lines, on a terminal too.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run asks for.")] = False,
) -> None:
    """Train an agent through Ray. The same command again resumes."""
    from worldflux_dist.distributed import session, trainer

    config = _load(settings)
    if plan:
        session.show_plan(config)
        return
    name = f"{config.env.id}-{config.model}-seed{config.seed}"
    run_dir = run_dir or Path("runs") / name.replace("/", "_").replace(":", "_")
    outcome = trainer.train(config, run_dir, plain or None)
    if outcome is None:
        print(f"stopped; everything is saved in {run_dir}, and the same command goes on")
        raise typer.Exit(130)
    pictures = [*run_dir.glob("curve.png"), *sorted((run_dir / "video").glob("*.gif"))]
    print("pictures: " + "   ".join(map(str, pictures)))
    if outcome.passed is False:
        raise typer.Exit(1)


@app.command()
def submit(
    settings: Settings = None,
    run_dir: Annotated[
        Path, typer.Option(help="Where the run lives: an absolute path that all nodes see.")
    ] = Path(),
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS.")
    ] = None,
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends.")] = True,
) -> None:
    """Train as a job of a Ray cluster. The same command again resumes."""
    from worldflux_dist.distributed import submit as jobs

    arguments = [*(settings or []), "--run-dir", str(run_dir)]
    raise typer.Exit(jobs.submit(arguments, address, Path.cwd(), follow))


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Say how a run is doing, and what holds it up."""
    from worldflux_dist.distributed import status as view

    print(*view.lines(run_dir), sep="\n")


@app.command("eval")
def evaluate_run(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the environments.")] = 1000,
    video: Annotated[
        Path | None, typer.Option(help="Also write an episode, as .gif or .mp4.")
    ] = None,
) -> None:
    """Evaluate the newest good checkpoint of a run, greedily, next to a random policy."""
    from worldflux_dist import evaluate, figures

    agent, settings = _agent_of(run_dir, seed)
    print(f"agent:  {evaluate.evaluate(agent, settings.env, episodes, seed)}")
    print(f"random: {evaluate.evaluate(None, settings.env, episodes, seed)}")
    if video is not None:
        figures.video(evaluate.episode_frames(agent, settings.env, seed), video, fps=30)
        print(f"video:  {video}")


@app.command("inspect")
def inspect_run(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    episodes: Annotated[int, typer.Option(min=1, help="How many held-out episodes.")] = 10,
    horizon: Annotated[int, typer.Option(min=1, max=1000, help="Steps of an open loop.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of the environments.")] = 2000,
    out: Annotated[
        Path | None, typer.Option(help="The picture, report_card.png in the run by default.")
    ] = None,
) -> None:
    """Say how good a run's world model is and where it fails, on episodes it has not seen."""
    from worldflux_dist import evaluate, figures

    agent, settings = _agent_of(run_dir, seed)
    steps = evaluate.held_out(agent, settings.env, episodes, seed)
    card = evaluate.report_card(agent, [steps], horizon)
    print(*card.lines(), sep="\n")
    out = out or run_dir / "report_card.png"
    figures.report_card(card, out)
    print(f"picture: {out}")


@app.command()
def serve(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on with newer weights.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
    host: Annotated[
        str | None,
        typer.Option(
            help="127.0.0.1 unless given, of replicas their nodes'; others want TLS and a token."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 50051,
    token_file: Annotated[
        Path | None, typer.Option(help="Holds the token; or WORLDFLUX_SERVE_TOKEN does.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The server's key, PEM.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The server's certificate, PEM.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Clients must have a certificate of this one, PEM (mTLS).")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="A limit, such as horizon=64; may be repeated.")
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=0, help="As so many actors of the cluster RAY_ADDRESS names.")
    ] = 0,
    status: Annotated[bool, typer.Option("--status", help="Say where replicas serve.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the replicas.")] = False,
) -> None:
    """Serve a run's world model over gRPC: encode, imagine, act."""
    from worldflux_dist.serve import process

    folder = _storage_of(run_dir)
    security = process.security(token_file, tls_key, tls_cert, tls_ca)
    limits = process.limits(limit or [])
    if not (replicas or status or stop):
        process.serve(folder, device, threads, follow, host or "127.0.0.1", port, security, limits)
        return
    _join_for_replicas()
    from worldflux_dist.serve import replicas as actors

    name = str(folder)
    if stop:
        print(f"stopped {len(actors.stop(name))} replicas of {run_dir}")
        return
    if replicas:
        how = actors.Serving(name, device, threads, follow, host or "", port, security, limits)
        actors.start(name, how, replicas)
    lines = actors.status(name)
    print(*(f"replica {index}: {line}" for index, line in lines.items()), sep="\n")
    if not lines:
        print(f"no replicas of {run_dir} are serving")


def _join_for_replicas() -> None:
    """Join the cluster where replicas live."""
    from worldflux_dist.distributed.auth import check_auth, explained
    from worldflux_dist.distributed.cluster import join_cluster

    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ValueError(
            "replicas live in a Ray cluster: set RAY_ADDRESS, for example to auto, or leave "
            "--replicas out to serve from this process"
        )
    with explained(address):
        join_cluster()
    check_auth()


@app.command("play")
def play_run(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the first episode.")] = 3000,
    export: Annotated[
        Path | None, typer.Option(help="Write a page that needs no server instead: as export does.")
    ] = None,
) -> None:
    """Play inside the dream of a run's newest good checkpoint, on a page of this machine."""
    if export is not None:
        export_run(run_dir, html=export)
        return
    try:
        from worldflux_dist.serve.play import app as page
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the page needs {error.name}: run `pip install 'worldflux_dist[serve]'`"
        ) from error

    agent, settings = _agent_of(run_dir, seed)
    page.play(agent, settings.env, seed, f"{settings.model} in {settings.env.id}", port)


@app.command("export")
def export_run(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    onnx: Annotated[
        Path | None, typer.Option(help="Folder for the ONNX graphs and dream.json.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page that plays the dream, in one file.")
    ] = None,
    ort: Annotated[
        Path | None,
        typer.Option(help="Folder that holds onnxruntime-web; default: where npm put it here."),
    ] = None,
) -> None:
    """Write a run's newest good checkpoint for programs without torch, or as a page."""
    from worldflux_dist.serve import dream_page, export

    if onnx is None and html is None:
        raise ValueError("nothing to export: say where to with --onnx DIR or --html FILE")
    agent, settings = _agent_of(run_dir, seed=0)
    files = [] if onnx is None else export.write_graphs(agent, onnx)
    if html is not None:
        dream_page.write_page(agent, settings, html, ort)
        files.append(html)
    for path in files:
        print(f"{path}  {path.stat().st_size / 2**10:,.0f} kB")


def _agent_of(run_dir: Path, seed: int) -> tuple[Any, Any]:
    """The agent of a run's newest good checkpoint, on one thread, and the run's config."""
    import torch

    from worldflux_dist.agent import Agent
    from worldflux_dist.distributed.run import saved_config

    folder = _storage_of(run_dir)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return Agent.load(folder), saved_config(run_dir)


def _storage_of(run_dir: Path) -> Any:
    """Where a run keeps its checkpoints."""
    from worldflux_dist.distributed.run import saved_config, storage_of

    if not (run_dir / "config.yaml").exists():
        raise FileNotFoundError(f"{run_dir} is no run directory: it has no config.yaml")
    return storage_of(saved_config(run_dir), run_dir)


@envs_app.command("check")
def check_env(
    env_id: Annotated[
        str,
        typer.Argument(
            metavar="ID_OR_FACTORY",
            help="A Gymnasium id, dmc/<domain>-<task>, or module:factory of your own.",
        ),
    ],
    settings: Settings = None,
) -> None:
    """Say how an environment is read, how fast it steps, and what is wrong with it."""
    from worldflux_dist.envs import report

    found = report.check(replace(_load(settings).env, id=env_id))
    print(*found.lines(), sep="\n")
    if not found.usable:
        raise typer.Exit(1)


@app.command("config")
def show_config(settings: Settings = None) -> None:
    """Print the resolved configuration as YAML."""
    from worldflux_dist import config

    print(config.to_yaml(_load(settings)), end="")


@app.command()
def doctor() -> None:
    """Check what a run needs on this machine, and say what to do about what is missing."""
    problems = 0
    for name, check in _CHECKS.items():
        try:
            print(f"ok       {name:<14} {check()}")
        except Exception as error:  # whatever is wrong is this command's result
            problems += 1
            print(f"problem  {name:<14} {type(error).__name__}: {error}")
    print("all good" if not problems else f"{problems} problem(s)")
    if problems:
        raise typer.Exit(1)


def _check_torch() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {gpu}"


def _check_memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GB available"


def _check_shm() -> str:
    if not Path("/dev/shm").exists():
        return "no /dev/shm: Ray keeps its objects in files"
    free = shutil.disk_usage("/dev/shm").free
    if free < 200 * 2**20:
        raise RuntimeError(
            f"/dev/shm has {free / 2**20:.0f} MB free: start the container with --shm-size=2g"
        )
    return f"{free / 2**30:.1f} GB free"


def _check_env(env_id: str) -> Callable[[], str]:
    def check() -> str:
        import numpy as np

        from worldflux_dist.envs import EnvConfig, make_envs

        envs = make_envs(EnvConfig(id=env_id), 0, num_envs=1)
        envs.step(np.zeros((1, envs.spaces.action_dim), np.float32))
        envs.close()
        return "resets"

    return check


def _check_ray() -> str:
    import ray

    from worldflux_dist.distributed.cluster import local_ray

    with local_ray(num_cpus=1, object_store=100 * 2**20):
        answer = ray.get(ray.remote(lambda: "a worker answers").remote())
    return f"{ray.__version__}, {answer}"


_CHECKS: dict[str, Callable[[], str]] = {
    "python": lambda: f"{platform.python_version()} on {platform.machine()}",
    "cores": lambda: str(os.cpu_count()),
    "memory": _check_memory,
    "shared memory": _check_shm,
    "torch": _check_torch,
    "CartPole-v1": _check_env("CartPole-v1"),
    "ALE/Pong-v5": _check_env("ALE/Pong-v5"),
    "HalfCheetah-v5": _check_env("HalfCheetah-v5"),
    "ray": _check_ray,
}


def main() -> None:
    """Run the command line; known errors become one sentence on stderr and exit code 2."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        # An error raised in another process comes with its traceback; its cause is the sentence.
        print(f"error: {getattr(error, 'cause', None) or error}", file=sys.stderr)
        if os.environ.get("WORLDFLUX_TRACEBACK"):
            raise
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
