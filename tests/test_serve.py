"""The imagination service over loopback: what comes back is what the model gives in one's own
process, whoever else asks, and whichever server answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from serving import WAIT_S, address, serving
from small import CASES, FAMILY, family_batch, look, make_case, make_small, perturbed, same_sums

from worldflux_dist import draws
from worldflux_dist.data import Chunk
from worldflux_dist.models.base import State
from worldflux_dist.serve import wire
from worldflux_dist.serve.client import AsyncClient, Client, ImaginationError
from worldflux_dist.serve.dreams import ActOn, Dreams, Encode, Imagine
from worldflux_dist.serve.requests import Limits

H, N = 5, 3
CASE = ("dreamerv3", "dict", "discrete")


def actions_of(agent: Any, horizon: int = H, num: int = N) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([agent.spaces.random_action(rng, num) for _ in range(horizon)])


def noise_of(model: Any, seed: int, stream: str, *lead: int) -> Any:
    shape = model.noise_shape if stream == "transition" else model.update_noise_shape
    return None if shape is None else torch.tensor(draws.uniform(seed, stream, *lead, *shape))


def tensors_of(state: dict[str, np.ndarray]) -> State:
    return State({name: torch.tensor(value) for name, value in state.items()})


@CASES
@torch.no_grad()
def test_a_rollout_is_the_models_own(case: tuple[str, str, str]) -> None:
    agent, actions = make_case(case), None
    model, behavior = agent.world_model, agent.behavior
    actions = actions_of(agent)
    with serving(agent) as server, Client(address(server)) as client:
        heads = client.model().heads
        state = client.encode(look(agent), seed=7)
        got = client.rollout(state, actions, seed=9, heads=heads)
    start = model.initial(N)
    first = torch.ones(N, dtype=torch.bool)
    draw = noise_of(model, 7, "look", 1, N)
    obs = model.tensors(look(agent))
    blank = torch.zeros(N, agent.spaces.action_dim)
    seen = model.update(start, blank, obs, first, None if draw is None else draw[0])
    for name, value in seen.tensors.items():
        torch.testing.assert_close(torch.tensor(state[name]), value, rtol=1e-6, atol=1e-6)
    noise = noise_of(model, 9, "transition", H, N)
    want = model.rollout(seen, torch.tensor(actions), noise=noise)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(torch.tensor(got.rewards), want.rewards, **close)
    torch.testing.assert_close(torch.tensor(got.continues), want.continues, **close)
    torch.testing.assert_close(torch.tensor(got.start_continue), want.start_continue, **close)
    features = model.features(want.states)
    same_sums(got.features, features)
    same_sums(got.values, behavior.expected_value(features))
    assert np.array_equal(got.actions, actions)
    assert got.state.keys() == model.essential(seen).tensors.keys()
    if model.decodes_obs:
        drawn = model.decode(want.states, ("obs",)).preds["obs"]
        drawn = drawn if isinstance(drawn, dict) else {"obs": drawn}
        for name, value in drawn.items():
            if agent.spaces.obs[name].kind == "image":  # levels, of which one may be rounded apart
                assert np.abs(got.obs[name].astype(int) - value.numpy()).max() < 0.51
            else:
                same_sums(got.obs[name], value)


@FAMILY
@torch.no_grad()
def test_a_policy_acts_by_the_seed(family: str) -> None:
    agent = make_case((family, "dict", "discrete"))
    model = agent.world_model
    with serving(agent) as server, Client(address(server)) as client:
        state = client.encode(look(agent))
        how: dict[str, Any] = {"heads": ("action", "reward", "features"), "samples": 2}
        got, again, other = (client.rollout(state, horizon=H, seed=s, **how) for s in (4, 4, 5))
        sure = client.rollout(state, horizon=H, seed=4, greedy=True, **how)
    assert np.array_equal(got.actions, again.actions)
    assert not np.array_equal(got.features, other.features)
    start = tensors_of(state).map(lambda value: value.repeat_interleave(2, 0))
    noise = noise_of(model, 4, "transition", H, 2 * N)
    moves = torch.tensor(draws.action_noise(4, agent.spaces.action_parts, H, 2 * N))
    for result, greedy in ((got, False), (sure, True)):
        each = iter(moves)
        want = model.rollout(
            start, lambda f, e=each, g=greedy: agent.behavior.act(f, g, next(e)), H, noise
        )
        torch.testing.assert_close(torch.tensor(result.actions), want.actions, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(result.rewards), want.rewards, rtol=1e-6, atol=1e-6)


@FAMILY
def test_encoding_goes_on_where_it_stopped(family: str) -> None:
    """A sequence at once, and in two parts with the state in between."""
    agent = make_case((family, "vector", "continuous"))
    batch = family_batch(agent)
    obs, action, first = batch.obs, batch.action, batch.is_first
    with serving(agent) as server, Client(address(server)) as client:
        whole = client.encode(obs, action, first, seed=2)
        left = {name: value[:, :7] for name, value in obs.items()}
        right = {name: value[:, 7:] for name, value in obs.items()}
        half = client.encode(left, action[:, :7], first[:, :7], seed=2)
        rest = client.encode(right, action[:, 7:], first[:, 7:], state=half, seed=3)
        with pytest.raises(ImaginationError, match="action is missing"):
            client.encode(right, state=half)
    for name, value in whole.items():
        if agent.world_model.update_noise_shape is None:  # else other draws
            same_sums(rest[name], value)
        assert rest[name].shape == value.shape
    assert any((rest[name] != half[name]).any() for name in rest)


@FAMILY
def test_acting_is_the_agents_own(family: str) -> None:
    agent = make_case((family, "vector", "discrete"))
    obs = [look(agent, t) for t in range(3)]
    first = np.array([False, True, False])
    with serving(agent) as server, Client(address(server)) as client:
        _, carry = client.act(obs[0], seed=1)
        _, carry = client.act(obs[1], carry=carry, seed=2)
        after, _ = client.act(obs[2], first, carry, seed=3)
        again, _ = client.act(obs[2], first, carry, seed=3)
        anew, _ = client.act(obs[2], seed=3)
    assert np.array_equal(after, again)
    same_sums(anew[1], after[1])  # of row 1 an episode began: nothing is remembered
    if agent.planner is None and agent.world_model.update_noise_shape is None:
        want = agent.act_batch(obs[0], np.ones(N, bool), greedy=True)
        want = agent.act_batch(obs[1], np.zeros(N, bool), want[1], greedy=True)
        want = agent.act_batch(obs[2], first, want[1], greedy=True)
        assert np.array_equal(want[0], after)


@FAMILY
def test_rows_of_a_batch_are_independent(family: str) -> None:
    """Calls of other seeds and sizes in one batch, and each by itself."""
    dreams = Dreams(make_case((family, "dict", "continuous")))
    agent = dreams.agent
    seen = dreams.encode([_first_look(agent, t) for t in range(3)])
    alone = [dreams.encode([_first_look(agent, t)])[0] for t in range(3)]
    calls = [
        Imagine(4, state=_rows(state, size), samples=samples, seed=seed, heads=("features",))
        for state, size, samples, seed in zip(seen, (3, 1, 2), (1, 3, 2), (5, 6, 5), strict=True)
    ]
    together = [part for _, part in dreams.imagine(calls)]
    each = [next(iter(dreams.imagine([call])))[1][0] for call in calls]
    for one, other in zip(seen, alone, strict=True):
        assert all(_close(one[name], other[name]) for name in one)
    for got, want in zip(together[0], each, strict=True):
        assert _close(got["features"], want["features"])
    acts = [ActOn(look(agent, t), np.ones(N, bool), seed=t) for t in range(3)]
    for got, act in zip(dreams.act(acts), acts, strict=True):
        assert _close(got["action"], dreams.act([act])[0]["action"])


def _first_look(agent: Any, t: int) -> Encode:
    obs = {name: value[:, None] for name, value in look(agent, t).items()}
    blank = np.zeros((N, 1, agent.spaces.action_dim), np.float32)
    return Encode(obs, blank, np.ones((N, 1), bool), seed=t)


def _rows(state: dict[str, np.ndarray], num: int) -> dict[str, np.ndarray]:
    return {name: value[:num] for name, value in state.items()}


def _close(got: np.ndarray, want: np.ndarray) -> bool:
    same_sums(got, want)
    return True


def test_steps_come_one_by_one_and_are_the_whole() -> None:
    agent = make_case(CASE)
    heads = ("reward", "continue", "value", "obs", "features", "action", "state")
    with serving(agent) as server, Client(address(server)) as client:
        state = client.encode(look(agent))
        whole = client.rollout(state, horizon=H, seed=1, heads=heads)
        steps = [outputs for _, outputs in client.steps(state, horizon=H, seed=1, heads=heads)]
        start = client.rollout(state, heads=("obs", "continue", "state"))
    assert len(steps) == H + 1
    same_sums(np.concatenate([s["reward"] for s in steps])[1:], whole.rewards)
    same_sums(np.concatenate([s["features"] for s in steps]), whole.features)
    assert not steps[0]["reward"].any() and not steps[0]["action"].any()  # nothing led to a start
    named = {"state/deter", "state/stoch"}
    assert all(not named & step.keys() for step in steps[:-1]) and named <= steps[-1].keys()
    same_sums(start.start_continue, whole.start_continue)
    assert start.obs["vector"].shape == (1, N, 4)  # a horizon of 0 is the start alone
    assert np.array_equal(start.state["deter"], state["deter"])


def test_clients_at_a_time_get_what_each_would_get_alone() -> None:
    agent = make_case(CASE)
    with serving(agent) as server:
        with Client(address(server)) as client:
            states = [client.encode(look(agent, t), seed=t) for t in range(4)]
            alone = [client.rollout(states[s % 4], horizon=H, seed=s) for s in range(64)]
        before = server.answers.batches.num_batches

        async def ask(seed: int) -> Any:
            async with AsyncClient(address(server)) as client:
                return await client.rollout(states[seed % 4], horizon=H, seed=seed)

        async def ask_all() -> list[Any]:
            return await asyncio.gather(*(ask(seed) for seed in range(64)))

        together = asyncio.run(ask_all())
        shared = server.answers.batches.num_batches - before
    for got, want in zip(together, alone, strict=True):
        same_sums(got.rewards, want.rewards)
        same_sums(got.continues, want.continues)
    assert shared < 64  # some calls met in one batch


def test_from_replay_are_states_behind_steps_of_replay() -> None:
    agent = make_case(("diffusion", "vector", "discrete"))  # whose looks are not drawn
    batch = family_batch(agent)
    chunk = Chunk.from_columns(batch.columns(), streams=np.arange(N))
    dreams = Dreams(agent, [chunk])
    with torch.no_grad():
        states, steps = agent.world_model.observe(batch.map(torch.tensor))
    last = steps.is_last.numpy()[:, 6:]
    want = states.tensors["obs/obs"][:, 6:].numpy()[~last]
    assert dreams.num_starts == (~last).sum()
    with serving(dreams) as server, Client(address(server)) as client:
        assert client.model().num_starts == len(want)
        got = client.rollout(from_replay=200, heads=("obs", "state"), seed=1)
        same = client.rollout(from_replay=200, heads=("obs",), seed=1)
        more = client.rollout(from_replay=200, heads=("obs",), seed=2)
    assert np.array_equal(got.obs["obs"], same.obs["obs"])
    assert not np.array_equal(got.obs["obs"], more.obs["obs"])
    rows = {row.tobytes() for row in want}
    assert {row.tobytes() for row in got.obs["obs"][0]} == rows  # 200 of 16 draw each
    refused = pytest.raises(ImaginationError, match="no replay")
    with serving(agent) as server, Client(address(server)) as client, refused:
        client.rollout(from_replay=1)


def test_newer_weights_are_served_and_every_answer_names_its_own() -> None:
    old, new = make_case(CASE), perturbed(make_case(CASE), seed=1)
    published, version = threading.Event(), (0, 20)

    def newer(than: tuple[int, int]) -> Dreams | None:
        if not published.is_set() or than >= version:
            return None
        chunk = Chunk.from_columns(family_batch(new).columns(), streams=np.arange(N))
        return Dreams(new, [chunk], version)

    with (
        serving(Dreams(old, version=(0, 10)), newer=newer, follow_s=0.05) as server,
        Client(address(server)) as client,
    ):
        state = client.encode(look(old))
        before = after = client.rollout(state, horizon=2, seed=1)
        published.set()
        while after.version == (0, 10):
            after = client.rollout(state, horizon=2, seed=1)
        assert client.model().version == after.version == version
        assert client.model().num_starts and client.rollout(from_replay=2).version == version
    assert before.version == (0, 10)
    assert not np.allclose(before.rewards, after.rewards)


class Stuck(Dreams):
    """Sends `steps` steps of a rollout and then none until its server is gone."""

    steps, gone = 3, threading.Event()

    def imagine(self, calls: Any, going: Any = lambda: True) -> Iterator[Any]:
        for first, parts in super().imagine(calls, going):
            if first == self.steps:
                self.gone.wait(WAIT_S)
            yield first, parts


def test_a_call_goes_elsewhere_when_a_server_stops_in_mid_stream() -> None:
    agent = make_case(CASE)
    state = Dreams(agent).encode([_first_look(agent, 0)])[0]
    with serving(agent) as two, serving(Stuck(agent)) as one:
        with Client(address(two)) as client:
            want = client.rollout(state, horizon=20, seed=3, heads=("reward",))
        with Client([address(one), address(two)]) as client:
            steps = []
            for _, outputs in client.steps(state, horizon=20, seed=3, heads=("reward",)):
                steps.append(outputs["reward"])
                if len(steps) == Stuck.steps:
                    one.halt()
                    Stuck.gone.set()
            rest = client.rollout(state, horizon=2, seed=3)
    assert len(steps) == 21
    same_sums(np.concatenate(steps)[1:], want.rewards)
    assert rest.rewards is not None and rest.rewards.shape == (2, N)


def test_a_stream_does_not_go_on_with_other_weights() -> None:
    agent = make_case(CASE)
    state = Dreams(agent).encode([_first_look(agent, 0)])[0]
    stuck = Stuck(agent, version=(0, 1))
    Stuck.gone.clear()
    with (
        serving(Dreams(agent, version=(0, 2))) as two,
        serving(stuck) as one,
        Client([address(one), address(two)]) as client,
    ):
        steps = client.steps(state, horizon=20)
        for _ in range(Stuck.steps):
            next(steps)
        one.halt()
        Stuck.gone.set()
        with pytest.raises(ImaginationError, match="other weights"):
            next(steps)


def test_a_client_loads_neither_torch_nor_ray() -> None:
    imports = "import sys; from worldflux_dist.serve import client, places"
    code = f"{imports}; print({{'torch', 'ray'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_compiled_messages_are_those_of_the_proto_files(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    folder = Path(wire.__file__).parent
    files = ["imagination.proto", "open_inference.proto"]
    out = tmp_path / "made.binpb"
    assert protoc.main(["", f"-I{folder}", f"--descriptor_set_out={out}", *files]) == 0
    assert out.read_bytes() == (folder / "protocol.binpb").read_bytes()  # else: make protocol


@pytest.mark.parametrize("reflects", [True, False])
def test_health_and_reflection(reflects: bool) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with serving(make_small("jepa"), reflect=reflects) as server:
        channel = grpc.insecure_channel(address(server))
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = check(health_pb2.HealthCheckRequest(service=wire.IMAGINATION))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        if reflects:
            found = next(ask(iter([asked]))).list_services_response.service
            assert wire.IMAGINATION in {service.name for service in found}
        else:
            with pytest.raises(grpc.RpcError) as error:
                next(ask(iter([asked])))
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        channel.close()


def test_of_a_name_those_that_are_ready_are_taken() -> None:
    """As a name in a cluster resolves to several pods: here to one server, watched by its health
    service, which does not count as a call."""
    few = Limits(calls=1)
    with (
        serving(make_small("jepa"), limits=few) as server,
        Client(f"dns:///localhost:{server.port}") as client,
    ):
        assert client.model().name == "jepa:tiny"
        client.encode(np.zeros((2, 5), np.float32))
        client.encode(np.zeros((2, 5), np.float32))
