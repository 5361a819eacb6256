"""What every test stands on: one thread per process, a small local Ray, and the shared fixtures.

The environment is set before torch and Ray are first imported, because both read it only then.
"""

from __future__ import annotations

import os
import secrets

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AUTH_MODE"] = "token"  # as on a cluster: clusters without one are refused
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # but for the tests of it: see `compiling`
# At Ray's own 15 the load of others makes workers starve.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The same examples every time, however slow the machine is.
slow_machine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, **slow_machine)
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).parents[1]
PATH = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
os.environ["PYTHONPATH"] = PATH  # processes that are started find the tests' modules


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--convolve",
        choices=["on", "off"],
        help="take large products as convolutions, or not, whatever the CPU (nn/products.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if choice := config.getoption("--convolve"):
        from worldflux_dist.nn import products

        products.CONVOLVE = choice == "on"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of parity values: $WORLDFLUX_SHARED, or `shared` beside the repository.

    A test that asks for it is skipped where the folder is absent.
    """
    folder = Path(os.environ.get("WORLDFLUX_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared fixtures at {folder}; set WORLDFLUX_SHARED to their folder")
    return folder


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile works in this test's process, and in those that it starts."""
    import torch._dynamo

    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        yield


@contextmanager
def a_ray(num_cpus: int, megabytes: int) -> Iterator[None]:
    """A Ray of its own, without a dashboard, whose workers find the tests' modules."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=megabytes * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray for all tests of RLlib, which come last: 4 logical CPUs, 200 MB of object store."""
    from ray import tune

    from worldflux_dist.rllib import WorldFlux

    with a_ray(4, 200):
        tune.register_trainable("WorldFlux", WorldFlux)  # Tune has told the Ray before this one
        yield


# Files that take longest, in the order in which processes take them; the others follow.
LONGEST = ("faults", "resume", "distributed", "weights", "jobs", "one_machine", "cluster")
LONGEST += (
    "families_ray",
    "serve_replicas",
    "rllib",
    "rllib_tune",
    "rllib_apart",
    "rllib_examples",
    "rllib_episodes",
)
LONGEST += ("learner_options", "jepa", "families_learning", "model_gates", "spaces_train", "token")
LONGEST += ("serve_elsewhere", "serve_process", "export", "dream_page")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start and end a Ray of their own come first, then those that share one,
    which stays, and at last those without: they are short, so that all processes end together."""
    shared = {item.path for item in items if "ray_local" in getattr(item, "fixturenames", ())}
    own = {item.path for item in items if item.get_closest_marker("ray")} - shared
    longest = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}

    def order(item: pytest.Item) -> tuple[int, int]:
        turn = 0 if item.path in own else 1 if item.path in shared else 2
        return turn, longest.get(item.path.name, len(longest))

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes take files, in their order; the tests of parity are one, since the last of them
    counts what the others read."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "parity" if Path(file).name.startswith("test_parity") else file

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    """A Ray for the module, with the smallest object store it can have: 80 MB."""
    with a_ray(4, 80):
        yield


@pytest.fixture
def built(ray_local: None) -> Iterator[Callable[[Any], Any]]:
    """Builds algorithms from RLlib's configurations, and stops them afterwards."""
    algos: list[Any] = []

    def build(config: Any) -> Any:
        algos.append(config.build_algo())
        return algos[-1]

    yield build
    for algo in algos:
        algo.stop()


@pytest.fixture
def started(small_ray: None) -> Iterator[list[Any]]:
    """Actors put in here are killed afterwards, and their names free again."""
    import ray

    handles: list[Any] = []
    yield handles
    for handle in handles:
        ray.kill(handle)
