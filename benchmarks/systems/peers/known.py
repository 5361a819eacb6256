"""Which peers there are, where their packages are installed and why one is not run.

A peer's packages go into a virtual environment of its own, made when it is asked for, with the
torch that we run. Repositories that are not packages are folders that the user names.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

TORCH = f"torch=={version('torch').split('+')[0]}"
DREAMER, TDMPC2 = ("vector", "image"), ("tdmpc2",)
TENSORDICT = "tensordict==0.14.3"


@dataclass(frozen=True)
class Peer:
    """A side that is not ours. `packages` without any means our own virtual environment; `source`
    says that a folder is needed; `compiles` that it offers to compile its update."""

    key: str
    name: str
    module: str
    tasks: tuple[str, ...]
    packages: tuple[str, ...] = ()
    source: bool = False
    compiles: bool = False


PEERS = (
    Peer("rllib", "RLlib", "peers.rllib_dreamerv3", DREAMER),
    Peer(
        "torchrl",
        "TorchRL",
        "peers.torchrl_dreamerv3",
        DREAMER,
        (TORCH, "torchrl==0.14.1", TENSORDICT),
        compiles=True,
    ),
    Peer(
        "sheeprl",
        "SheepRL",
        "peers.sheeprl_dreamerv3",
        DREAMER,
        (TORCH, "sheeprl==0.8.4"),
        compiles=True,
    ),
    Peer(
        "jax-dreamer",
        "danijar/dreamerv3",
        "peers.jax_dreamerv3",
        DREAMER,
        (
            *("jax==0.10.2", "chex==0.1.92", "ninjax==3.6.3", "optax==0.2.8"),
            *("elements==3.22.4", "portal==3.8.3", "granular==0.24.2"),
            *("einops", "jaxtyping", "ruamel.yaml", "tqdm", "cloudpickle"),
        ),
        source=True,
    ),
    Peer(
        "r2dreamer",
        "NM512/r2dreamer",
        "peers.r2dreamer",
        DREAMER,
        (TORCH, TENSORDICT, "omegaconf", "tensorboard"),
        source=True,
        compiles=True,
    ),
    Peer(
        "tdmpc2",
        "nicklashansen/tdmpc2",
        "peers.tdmpc2_official",
        TDMPC2,
        (TORCH, TENSORDICT, "hydra-core", "omegaconf"),
        source=True,
        compiles=True,
    ),
)


class NotRunError(Exception):
    """A peer cannot run; the message says why and what to do."""


@dataclass
class Places:
    """Where packages are, which peers may be installed now, and the folders the user named.

    What could not be installed is remembered: it is not tried again for the next task.
    """

    venvs: Path
    install: frozenset[str]
    sources: Mapping[str, Path]
    _failed: dict[str, str] = field(default_factory=dict)

    def options(self, peer: Peer) -> dict[str, str]:
        """What a peer's module is told of its folder. Raises NotRunError without one."""
        if not peer.source:
            return {}
        source = self.sources.get(peer.key)
        if source is None:
            raise NotRunError(f"give its source: --{peer.key} DIR")
        if not source.is_dir():
            raise NotRunError(f"--{peer.key} {source} is not a folder")
        return {"source": str(source.resolve())}

    def python(self, peer: Peer) -> Path:
        """The Python that has its packages, which are installed if they may be.

        Raises NotRunError where they are not there or could not be installed.
        """
        if not peer.packages:
            return Path(sys.executable)
        folder = self.venvs.absolute() / peer.key
        stamp, wanted = folder / ".installed", "\n".join(peer.packages)
        if not stamp.exists() or stamp.read_text() != wanted:
            if peer.key not in self.install:
                raise NotRunError(f"not installed: add --peers all, or --peers {peer.key}")
            if peer.key in self._failed:
                raise NotRunError(self._failed[peer.key])
            print(f"installing {', '.join(peer.packages)} in {folder}", flush=True)
            stamp.unlink(missing_ok=True)
            try:
                _make(folder, peer.packages)
            except NotRunError as error:
                self._failed[peer.key] = str(error)
                raise
            stamp.write_text(wanted)
        return folder / "bin" / "python"


def _make(folder: Path, packages: tuple[str, ...]) -> None:
    """A virtual environment with these packages. Raises NotRunError."""
    _run(sys.executable, "-m", "venv", str(folder))
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(packages))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet")
    if TORCH in packages:  # first and alone: what others ask for then finds it there
        _run(*pip, TORCH)
    _run(*pip, "-c", str(constraints), *packages)


def _run(*command: str) -> None:
    """Raises NotRunError with the last line that the command printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        printed = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in printed if line.startswith("ERROR")] or printed
        raise NotRunError(f"could not be installed: {errors[-1] if errors else command}")
