"""A process that dies at any change it makes to the storage leaves what `newest` finds intact.

On a disk the process is a real one, ended by `os._exit` before its n-th open, fsync, rename,
mkdir or removal. In memory, which stands for an object store, every change from the n-th on fails
as in a process that is gone.
"""

import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from upath import UPath

from worldflux_dist import checkpoint, storage
from worldflux_dist.storage import CheckpointError

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class Dead(BaseException):
    """This process is gone; nothing it does from here on takes effect."""


def serve() -> None:
    """Fork for each task on standard input: quick, and free of this process's threads."""
    while True:
        task = pickle.load(sys.stdin.buffer)
        if (child := os.fork()) == 0:
            _end_at(*task)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@functools.cache
def server() -> subprocess.Popen[bytes]:
    """Ends with this process, when its standard input does."""
    start = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {__name__} as t"
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"{start}; t.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _end_at(moment: int, root: str, action: Callable[..., object], args: tuple) -> None:
    left, fsync = moment, os.fsync

    def change(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)

    def hook(event: str, about: tuple) -> None:
        if event in CHANGES or (event == "open" and str(about[0]).startswith(root)):
            change()

    os.fsync = lambda descriptor: change() or fsync(descriptor)
    sys.addaudithook(hook)
    action(*args)
    os._exit(0)


def dies(moment: int, root: Path | UPath, action: Callable[..., object], *args: Any) -> bool:
    """Run the action in a process that dies at its `moment`-th change, if it gets there."""
    if isinstance(root, Path):
        process = server()
        assert process.stdin is not None and process.stdout is not None
        pickle.dump((moment, str(root), action, args), process.stdin)
        process.stdin.flush()
        status = int(process.stdout.readline())
        assert status in (0, 9)
        return status == 9
    left = moment

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def call(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> object:
            nonlocal left
            if change.__name__ != "_open" or kwargs.get("mode", "rb") == "wb" or "wb" in args:
                left -= 1
                if left < 0:
                    raise Dead
            return change(self, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_open", "rm_file", "rmdir"):
            patch.setattr(MemoryFileSystem, name, counted(getattr(MemoryFileSystem, name)))
        try:
            action(*args)
        except Dead:
            return True
    return False


def fill(folder: Path | UPath, value: int) -> None:
    """Two files whose content is `value`, one of them written over."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for content in (-1, value):
        (folder / "sub" / "b").write_bytes(b"%d" % content)
    storage.write_json(folder / "a", value)


def write(root: Path | UPath, step: int, value: int, keep: int = 2) -> None:
    folder = checkpoint.begin(root, step)
    fill(folder, value)
    checkpoint.commit(root, folder, step, keep, {"value": value})


def value_in(folder: Path | UPath) -> int:
    value = storage.read_json(folder / "a")
    assert (folder / "sub" / "b").read_bytes() == b"%d" % value
    assert checkpoint.verify(folder)["counters"] == {"value": value}
    return value


def places(root: Path | UPath) -> dict[int, Path | UPath]:
    """Folders of checkpoints in place, by step; of two for one step the one put there last."""
    if isinstance(root, Path):
        found = [path for path in root.glob("*") if re.fullmatch(r"\d{10}(\.old)?", path.name)]
        found.sort(key=lambda path: path.name, reverse=True)
    else:
        found = [path.parent for path in root.glob("*/manifest.json")]
    return {int(path.stem): path for path in found}


@pytest.fixture(params=["file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path | UPath:
    return tmp_path if request.param == "file" else UPath(f"memory://{uuid.uuid4()}")


@pytest.mark.parametrize("step", [30, 20])
def test_every_moment(root: Path | UPath, step: int) -> None:
    """The next checkpoint, and one that replaces the newest (as after a resume)."""
    found_values = []
    for moment in range(200):
        here = root / str(moment)
        for earlier in (10, 20):
            write(here, earlier, earlier)
        died = dies(moment, here, write, here, step, 99)
        found = checkpoint.newest(here)
        assert found is not None
        found_values.append(value_in(found[0]))
        assert {saved["step"] for saved in checkpoint.kept(here)} >= {found[1]["step"]}
        write(here, 40, 40)
        assert sorted(places(here)) == [int(found[1]["step"]), 40]
        left = {path.relative_to(here).parts[0] for path in here.rglob("*") if path.is_file()}
        assert left == {f"{found[1]['step']:010d}", "0000000040"}, "what died was not tidied up"
        if not died:
            break
    assert moment > 8
    # On an object store the old one of the same step goes first, and the one before it is found.
    between = [10] if step == 20 and isinstance(root, UPath) else []
    unique = list(dict.fromkeys(found_values))
    assert unique == [20, *between, 99], found_values


class Checkpoints(RuleBasedStateMachine):
    """Model: for each step in place its value and what was done to it; `None` is nothing."""

    def make_root(self) -> Path | UPath:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.root = self.make_root()
        self.local = isinstance(self.root, Path)
        self.have: dict[int, tuple[int, str]] = {}
        self.writing: tuple[Path | UPath, int, int] | None = None
        self.value = 0

    steps = st.integers(0, 5)
    moments = st.integers(0, 25)

    @precondition(lambda self: self.writing is None)
    @rule(step=steps)
    def begin(self, step: int) -> None:
        self.value += 1
        folder = checkpoint.begin(self.root, step)
        fill(folder, self.value)
        self.writing = folder, step, self.value
        if not self.local:
            self.have.pop(step, None)

    @precondition(lambda self: self.writing is not None)
    @rule(keep=st.integers(1, 3))
    def commit(self, keep: int) -> None:
        folder, step, value = self.writing
        final = checkpoint.commit(self.root, folder, step, keep, {"value": value})
        assert value_in(final) == value
        self.have[step] = value, "good"
        self.have = {s: self.have[s] for s in sorted(s for s in self.have if s <= step)[-keep:]}
        assert sorted(places(self.root)) == sorted(self.have)
        self.writing = None

    @precondition(lambda self: self.writing is not None)
    @rule()
    def abandon(self) -> None:
        checkpoint.abandon(self.writing[0])
        self.writing = None

    @precondition(lambda self: self.writing is not None)
    @rule()
    def die_while_roles_write(self) -> None:
        self.writing = None

    @precondition(lambda self: self.writing is None)
    @rule(step=steps, moment=moments)
    def die_in_begin(self, step: int, moment: int) -> None:
        dies(moment, self.root, checkpoint.begin, self.root, step)
        if not self.local and step not in places(self.root):
            self.have.pop(step, None)

    @precondition(lambda self: self.writing is not None)
    @rule(moment=moments)
    def die_in_abandon(self, moment: int) -> None:
        dies(moment, self.root, checkpoint.abandon, self.writing[0])
        self.writing = None

    @precondition(lambda self: self.writing is not None)
    @rule(keep=st.integers(1, 3), moment=moments)
    def die_in_commit(self, keep: int, moment: int) -> None:
        (folder, step, value), before = self.writing, self.have
        counters = {"value": value}
        died = dies(moment, self.root, checkpoint.commit, self.root, folder, step, keep, counters)
        found = places(self.root)
        with suppress(CheckpointError, KeyError):
            if storage.read_json(found[step] / "manifest.json")["counters"] == counters:
                self.have = before | {step: (value, "good")}
        done = self.have.get(step) == (value, "good")
        stays = set(sorted(s for s in self.have if s <= step)[-keep:]) if done else set(before)
        assert stays <= set(found) <= set(self.have)
        assert died or stays == set(found)
        self.have = {s: self.have[s] for s in found}
        self.writing = None

    @precondition(lambda self: self.have and self.writing is None)
    @rule(what=st.sampled_from(["flip", "cut", "remove", "manifest", "no manifest"]))
    def corrupt_newest(self, what: str) -> None:
        step = max(self.have)
        folder = places(self.root)[step]
        path = folder / ("manifest.json" if "manifest" in what else "sub/b")
        if what in ("remove", "no manifest"):
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(b"-" if what == "cut" else b"[]" * 50)
        if what == "no manifest" and not self.local:
            del self.have[step]  # there a folder without one is none
        else:
            value, state = self.have[step]
            unread = "manifest" in what or state == "unread"
            self.have[step] = value, "unread" if unread else "bad"

    @invariant()
    def finds_what_it_must(self) -> None:
        readable = {s for s, (_, state) in self.have.items() if state != "unread"}
        assert {saved["step"] for saved in checkpoint.kept(self.root)} == readable
        good = [s for s, (_, state) in self.have.items() if state == "good"]
        if not good and self.have:
            with pytest.raises(CheckpointError, match="move the folder away"):
                checkpoint.newest(self.root)
            return
        found = checkpoint.newest(self.root)
        if not good:
            assert found is None
            return
        assert found is not None
        assert found[1]["step"] == max(good)
        assert value_in(found[0]) == self.have[max(good)][0]


class OnDisk(Checkpoints):
    def make_root(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="checkpoints-"))

    def teardown(self) -> None:
        shutil.rmtree(self.root)


class InMemory(Checkpoints):
    def make_root(self) -> UPath:
        return UPath(f"memory://{uuid.uuid4()}")


def budget(examples: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples,
        stateful_step_count=15,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


TestOnDisk = OnDisk.TestCase
TestOnDisk.settings = budget(20)
TestInMemory = InMemory.TestCase
TestInMemory.settings = budget(40)
