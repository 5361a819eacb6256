"""Gradient steps per second of our learners, and plans per second, next to peers in this minute.

    python benchmarks/systems/learner_step.py
    python benchmarks/systems/learner_step.py --task image --size size12m --precision bfloat16
    python benchmarks/systems/learner_step.py --peers all --jax-dreamer ~/dreamerv3
    python benchmarks/systems/learner_step.py --task tdmpc2 --peers all --tdmpc2 ~/tdmpc2

DreamerV3: batches of 16 x 64, horizon 15, at equal widths; not all build the same layers, hence the
numbers of parameters. TD-MPC2: 256 windows of 4, 24 observed numbers, 6 actions, plans of 512
samples and 6 iterations for one environment. All on the CPU.

Every side is a process of its own that stays alive; the sides' windows alternate and rates are
medians. Beside them stand the process's own CPU time and, as "unclean", what other processes took
of the cores meanwhile: such a row says little. Peers compute in float32 and step by step, with
--compiled-peers also as they compile themselves. Ratios are to the best peer that ran.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers.known import PEERS, NotRunError, Peer, Places
from peers.work import SIZES, TASKS, Work
from setting.windows import Row, Side, SideError, alternate, headline

GOALS = {
    ("vector", "update"): 2.5,
    ("image", "update"): 3.0,
    ("tdmpc2", "update"): 2.0,
    ("tdmpc2", "plan"): 3.0,
}
VENVS = Path(__file__).parents[1] / ".venvs"
OURS = "ours"


def candidates(
    work: Work, args: argparse.Namespace, places: Places
) -> Iterator[tuple[str, Callable[[], Side]]]:
    """The sides of a task by name, each with what starts it: SideError or NotRunError if not."""
    settings = {"profile_rows": args.profile}
    settings |= {} if args.compile is None else {"compile": args.compile}
    here = Path(sys.executable)
    for precision in args.precision:
        name, options = f"{OURS} {precision}", settings | {"precision": precision}
        yield name, partial(Side, name, "peers.ours", work, options, here, show=True)
    for peer in PEERS:
        if work.task in peer.tasks:
            yield peer.name, partial(start, peer, work, args, places)
            if args.compiled_peers and peer.compiles:
                yield f"{peer.name} compiled", partial(start, peer, work, args, places, True)


def start(
    peer: Peer, work: Work, args: argparse.Namespace, places: Places, compiled: bool = False
) -> Side:
    """A peer's process, when it is ready."""
    if not {"all", "installed", peer.key} & set(args.peers):
        raise NotRunError(f"not asked for: add --peers {peer.key}")
    options: dict[str, Any] = places.options(peer) | ({"compiled": True} if compiled else {})
    name = f"{peer.name} compiled" if compiled else peer.name
    return Side(name, peer.module, work, options, places.python(peer), args.show)


def compare(
    work: Work,
    given: Iterable[tuple[str, Callable[[], Side]]],
    windows: int,
    seconds: float,
    again: int = 0,
) -> bool:
    """Measure all sides that can be started, print a table of each measure and say which did not
    run and why; whether all of ours ran."""
    task, missing = work.what, list[str]()
    rows, length = task.batch
    print(f"\n{work.task} {work.size}, batches of {rows} x {length}", flush=True)

    def not_run(name: str, why: str) -> None:
        missing.append(name)
        print(f"  {name} not run: {why}", flush=True)

    with contextlib.ExitStack() as stack:
        sides = []
        for name, begin in given:
            try:
                side = begin()
            except (NotRunError, SideError) as error:
                not_run(name, str(error))
            else:
                stack.callback(side.stop)
                sides.append(side)
        found = alternate(sides, task.measures, windows, seconds, not_run, again)
    for measure, measured in found.items():
        print_table(measure, measured, GOALS[work.task, measure])
    return not any(name.startswith(OURS) for name in missing)


def print_table(measure: str, rows: Sequence[Row], goal: float) -> None:
    """Every side's figures, then what ours are to the best peer's."""
    print(f"  {measure + 's':30}{'per s':>9}{'CPU s each':>12}{'parameters':>13}")
    for row in rows:
        print(f"  {row.name:30}{row.rate:9.3f}{row.cpu:12.3f}{row.parameters:13,d}  {row.unclean}")
    peers = [row for row in rows if not row.name.startswith(OURS)]
    for row in rows:
        if row.name.startswith(OURS):
            print(f"  {row.name}: {verdict(row, peers, goal)}", flush=True)


def verdict(row: Row, peers: Sequence[Row], goal: float) -> str:
    """A rate of ours against the best peer's and the goal; of an unclean one nothing is judged."""
    if not peers:
        return f"no peer ran to compare with, goal {goal} times"
    best = max(peers, key=lambda peer: peer.rate)
    times = row.rate / best.rate
    judged = "met" if times >= goal else "missed"
    if row.unclean or best.unclean:
        judged = "not judged, unclean"
    return f"{times:.2f} times the best peer ({best.name}), goal {goal}: {judged}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = [size for names in SIZES.values() for size in names]
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--size", nargs="+", choices=sizes, default=["size1m", "1m", "5m"])
    add("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    add("--compile", type=value, help="learner.compile of ours, its default if not given")
    add("--threads", type=int, default=2, help="and cores, of every side")
    add("--windows", type=int, default=5)
    add("--seconds", type=float, default=2.0, help="of a window, one step at least")
    add("--again", type=int, default=0, help="how often an unclean window is taken once more")
    add("--profile", type=int, default=0, metavar="ROWS", help="of our steps, first")
    add(
        "--peers",
        nargs="+",
        default=["installed"],
        choices=["installed", "all", "none", *(peer.key for peer in PEERS)],
        help="all, or those named, are installed if need be: gigabytes",
    )
    for peer in PEERS:
        if peer.source:
            add(f"--{peer.key}", type=Path, metavar="DIR", help=f"a clone of {peer.name}")
    add("--venvs", type=Path, default=VENVS, metavar="DIR", help="where peers are installed")
    add("--compiled-peers", action="store_true", help="too; they take minutes to begin")
    add("--show", action="store_true", help="what peers print, their warnings too")
    return parser.parse_args()


def value(text: str) -> Any:
    """true, false, a number or a word, as in a configuration."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    args = arguments()
    sources = {peer.key: getattr(args, peer.key.replace("-", "_")) for peer in PEERS if peer.source}
    places = Places(
        args.venvs,
        frozenset(peer.key for peer in PEERS if "all" in args.peers or peer.key in args.peers),
        {key: path for key, path in sources.items() if path},
    )
    print(
        f"{headline(args.threads)}, torch {version('torch')}, "
        f"{args.windows} windows of about {args.seconds} s"
    )
    for peer in PEERS:
        if set(peer.tasks) & set(args.task):
            with contextlib.suppress(NotRunError):  # said where it is missing
                places.options(peer)
                places.python(peer)
    good = True
    for task in args.task:
        for size in SIZES[TASKS[task].family]:
            if size in args.size:
                work = Work(task, size, args.threads)
                given = candidates(work, args, places)
                good = compare(work, given, args.windows, args.seconds, args.again) and good
    sys.exit(not good)


if __name__ == "__main__":
    main()
