"""What only a GPU shows, in one command: that CUDA computes what a CPU does, and how fast.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --dry-run
    python benchmarks/gpu.py --only numbers steps --jax-dreamer ~/dreamerv3

Prints a dated table and writes it to a file. Without CUDA, and with --dry-run, it says what it
would do; `--device cpu --only numbers` tries the script itself. Nothing here needs Ray; Pong needs
ale-py. A check that fails is a row of the table and not the end of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "systems"))

import numpy as np
import torch
from gymnasium import spaces
from torch.distributed import FileStore
from torch.overrides import TorchFunctionMode

from peers.ours import as_batch, spaces_of
from peers.work import TASKS, Work, noise
from setting.windows import Side, SideError, alternate
from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.models.base import families
from worldflux_dist.spaces import Spaces

SMALL = {"dreamerv3": "size1m", "tdmpc2": "1m", "jepa": "tiny", "token": "tiny"}
SMALL |= {"diffusion": "tiny"}
MODES: tuple[Any, ...] = (False, "default", "reduce-overhead", "max-autotune")
# Float32 sums in another order, of some thousand terms; bfloat16 has 8 bits, and steps add up.
BOUNDS = {"float32": 2e-3, "bfloat16": 0.02}
PONG_S = 600.0


@dataclass(frozen=True)
class Check:
    """A part of the table: what it does, in words, and the lines that it found."""

    name: str
    what: str
    run: Callable[[argparse.Namespace], Iterator[str]]
    needs: tuple[str, ...] = ()  # packages


class CpuDraws(TorchFunctionMode):
    """Random numbers drawn on the CPU, wherever they are wanted: the same for every device."""

    DRAWN = (torch.rand, torch.randn, torch.randint, torch.randperm)
    LIKE = (torch.rand_like, torch.randn_like)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWN:
            device = kwargs.get("device")
            return func(*args, **kwargs | {"device": "cpu"}).to(device)
        if func in self.LIKE:
            return func(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        return func(*args, **kwargs)


def a_learner(family: str, device: str, precision: str = "float32", mode: Any = False) -> Learner:
    """A small agent of a family that sees an image and a vector, with fixed weights."""
    torch.manual_seed(0)
    image = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    seen = spaces.Dict({"image": image, "vector": spaces.Box(-np.inf, np.inf, (4,))})
    behavior = {"dropout": 0.0} if family == "tdmpc2" else {}
    both = Spaces(seen, spaces.Discrete(3))
    agent = Agent(f"{family}:{SMALL[family]}", both, behavior=behavior)
    config: Any = {"precision": precision, "device": device, "compile": mode}
    return Learner(agent, LearnerConfig(**config))


def a_batch() -> Batch:
    rng, shape = np.random.default_rng(0), (4, 16)
    is_first = np.zeros(shape, bool)
    is_first[:, 0] = True
    return Batch(
        obs={
            "image": rng.integers(256, size=(*shape, 32, 32, 3), dtype=np.uint8),
            "vector": rng.normal(size=(*shape, 4)).astype(np.float32),
        },
        action=np.eye(3, dtype=np.float32)[rng.integers(3, size=shape)] * ~is_first[..., None],
        reward=rng.normal(size=shape).astype(np.float32) * ~is_first,
        is_first=is_first,
        is_last=np.zeros(shape, bool),
        is_terminal=np.zeros(shape, bool),
    )


def losses(learner: Learner, steps: int = 3) -> np.ndarray:
    """The loss of each of so many steps on one batch, with the same draws on every device."""
    batch, found = a_batch(), []
    torch.manual_seed(1)
    with CpuDraws():
        for _ in range(steps):
            found.append(learner.step(batch)["loss"])
    return np.array(found)


def numbers(args: argparse.Namespace) -> Iterator[str]:
    """CUDA against the CPU's float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for family in families():
        want = losses(a_learner(family, "cpu"))
        for precision, bound in BOUNDS.items():
            got = losses(a_learner(family, args.device, precision))
            off = float(np.abs(got / want - 1).max())
            verdict = "ok" if off <= bound else "TOO FAR"
            yield f"{family:10} {precision:9} losses differ by {off:.1e} (bound {bound}) {verdict}"


def compiling(args: argparse.Namespace) -> Iterator[str]:
    """Each mode's losses against eager ones, and what compiling took."""
    for family in families():
        want = losses(a_learner(family, args.device))
        for mode in MODES[1:]:
            begun = time.perf_counter()
            got = losses(a_learner(family, args.device, mode=mode))
            off, took = float(np.abs(got / want - 1).max()), time.perf_counter() - begun
            verdict = "ok" if off <= BOUNDS["float32"] else "TOO FAR"
            yield f"{family:10} {mode:16} losses differ by {off:.1e} {verdict}, {took:.0f} s"


def steps(args: argparse.Namespace) -> Iterator[str]:
    """Gradient steps per second with images, ours next to peers', windows in turn."""
    here = Path(sys.executable)
    for size in ("size1m", "size12m"):
        work = Work("image", size, 1, device=args.device)
        given: list[tuple[str, str, dict[str, Any]]] = [
            (f"ours {precision} {mode or 'eager'}", "peers.ours", how)
            for precision in BOUNDS
            for mode in MODES
            for how in [{"precision": precision, "compile": mode}]
        ]
        if importlib.util.find_spec("torchrl"):
            given.append(("TorchRL", "peers.torchrl_dreamerv3", {"compiled": True}))
        if args.jax_dreamer and importlib.util.find_spec("jax"):
            given.append(("JAX", "peers.jax_dreamerv3", {"source": str(args.jax_dreamer)}))
        sides, missed = [], dict[str, str]()
        for name, module, options in given:
            try:
                sides.append(Side(name, module, work, options, here))
            except SideError as error:
                missed[name] = str(error)
        for row in alternate(sides, ["update"], 5, 2.0, missed.__setitem__)["update"]:
            yield f"{size:8} {row.name:32} {row.rate:9.2f} steps/s {row.parameters:12,d} parameters"
        for name, why in missed.items():
            yield f"{size:8} {name} not run: {why}"
        for side in sides:
            side.stop()


def memory(args: argparse.Namespace) -> Iterator[str]:
    """What a step takes of the GPU at most."""
    for size in ("size1m", "size12m"):
        task = TASKS["image"]
        agent = Agent(f"dreamerv3:{size}", spaces_of(task))
        learner = Learner(agent, LearnerConfig(device=args.device, compile=False))
        torch.cuda.reset_peak_memory_stats()
        learner.step(as_batch(noise(task)))
        yield f"{size:8} {torch.cuda.max_memory_allocated() / 2**20:,.0f} MB"
        del learner, agent


def ranks(args: argparse.Namespace) -> Iterator[str]:
    """DDP over NCCL on one GPU, eager and compiled, against no group."""
    want = losses(a_learner("dreamerv3", args.device))
    for number, mode in enumerate((False, "default")):
        learner = a_learner("dreamerv3", args.device, mode=mode)
        if number == 0:
            learner.join(FileStore(tempfile.mktemp(), 1), 0, 1)
        else:
            learner.share(0)
        off = float(np.abs(losses(learner) / want - 1).max())
        verdict = "ok" if off <= BOUNDS["float32"] else "TOO FAR"
        yield f"{mode or 'eager'}: losses differ by {off:.1e} {verdict}"


class TimeIsUpError(Exception):
    """Ends a training that has no number of steps."""


def pong(args: argparse.Namespace) -> Iterator[str]:
    """Ten minutes of Pong in one process, and what its returns were by then."""
    from worldflux_dist import config, local

    settings = config.load(
        [],
        [
            *("model=dreamerv3:size12m", "env.id=ALE/Pong-v5", "env.num_envs=8"),
            *(f"learner.device={args.device}", "learner.precision=bfloat16"),
            *("learner.compile=default", "train.train_ratio=128"),
        ],
    )
    begun, seen = time.monotonic(), {"env_steps": 0, "gradient_steps": 0}
    recent: list[float] = []

    def log(env_steps: int, metrics: dict[str, float]) -> None:
        seen.update(env_steps=env_steps, gradient_steps=seen["gradient_steps"] + 1)
        recent.append(metrics["loss/rec/obs"])
        if time.monotonic() - begun > PONG_S:
            raise TimeIsUpError

    with contextlib.suppress(TimeIsUpError):
        local.train(settings, log)
    shown = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in seen.items())
    yield f"{shown}; reconstruction {np.mean(recent[:50]):.3g} -> {np.mean(recent[-50:]):.3g}"


CHECKS = (
    Check("numbers", "losses of all families against the CPU's, float32 and bfloat16", numbers),
    Check("compile", "all families by each mode of torch.compile against eager CUDA", compiling),
    Check("ranks", "DDP over NCCL on one GPU, eager and compiled", ranks),
    Check("memory", "GPU memory of a step of size1m and size12m with images", memory),
    Check("steps", "size1m and size12m with images, next to TorchRL and JAX if installed", steps),
    Check("pong", "Pong for ten minutes with size12m", pong, ("ale_py",)),
)


def report(checks: Sequence[Check], args: argparse.Namespace, say: Callable[[str], None]) -> bool:
    """Run the checks one after the other; whether none failed."""
    good = True
    for check in checks:
        missing = [name for name in check.needs if not importlib.util.find_spec(name)]
        say(f"\n## {check.name}: {check.what}")
        if missing:
            say(f"not run: {', '.join(missing)} is not installed")
            continue
        try:
            for line in check.run(args):
                say(line)
                good &= "TOO FAR" not in line
        except Exception as error:
            good = False
            say(f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CHECKS], metavar="CHECK")
    parser.add_argument("--jax-dreamer", type=Path, metavar="DIR", help="a clone of the reference")
    parser.add_argument("--out", type=Path, help="default: gpu-<date>.md here")
    args = parser.parse_args()
    checks = [check for check in CHECKS if not args.only or check.name in args.only]
    missing = args.device.startswith("cuda") and not torch.cuda.is_available()
    if args.dry_run or missing:
        if missing:
            print("torch sees no CUDA here; on a machine with a GPU this would run:")
        for check in checks:
            print(f"  {check.name:8} {check.what}")
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else args.device
    lines = [f"# {time.strftime('%Y-%m-%d %H:%M')}, {name}, torch {torch.__version__}"]
    print(lines[0], flush=True)

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    good = report(checks, args, say)
    out = args.out or Path(f"gpu-{time.strftime('%Y-%m-%d')}.md")
    out.write_text("\n".join(lines) + "\n")
    print(f"\nwritten to {out}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
