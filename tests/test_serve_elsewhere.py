"""Clients that are not ours: tritonclient, in an environment of its own, and Node."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from serving import WAIT_S, address, serving
from small import look, make_case, same_sums

from worldflux_dist.serve import wire
from worldflux_dist.serve.client import Client

REPOSITORY = Path(__file__).parents[1]
PROTO = REPOSITORY / "worldflux_dist/serve/imagination.proto"


@pytest.fixture(scope="module")
def agent() -> Any:
    return make_case(("dreamerv3", "dict", "discrete"))


@pytest.fixture(scope="module")
def server(agent: Any) -> Iterator[Any]:
    with serving(agent) as found:
        yield found


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has tritonclient, which wants an older protobuf than we have."""
    folder = tmp_path_factory.mktemp("triton")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "tritonclient[grpc]"]
    if (done := subprocess.run(install, capture_output=True, text=True)).returncode:
        pytest.skip(f"tritonclient cannot be installed here: {done.stderr[-200:]}")
    return python


TRITON = """
import sys
import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("act")
assert not client.is_model_ready("nothing")
print(client.get_server_metadata().name)
metadata = client.get_model_metadata("imagine")
print([(t.name, t.datatype, list(t.shape)) for t in metadata.inputs][:2])
inputs = []
for name, value in np.load(sys.argv[2]).items():
    kind = {"uint8": "UINT8", "float32": "FP32"}[str(value.dtype)]
    inputs.append(triton.InferInput(name, value.shape, kind))
    inputs[-1].set_data_from_numpy(value)
acted = client.infer("act", inputs, parameters={"greedy": True})
carry = {o.name: acted.as_numpy(o.name) for o in acted.get_response().outputs}
again = list(inputs)
for name, value in carry.items():
    if name.startswith("carry/"):
        again.append(triton.InferInput(name, value.shape, "FP32"))
        again[-1].set_data_from_numpy(value)
after = client.infer("act", again, parameters={"greedy": True})
outputs = [triton.InferRequestedOutput(name) for name in ("reward", "continue", "obs/vector")]
rolled = client.infer("imagine", inputs, outputs=outputs, parameters={"horizon": 4, "seed": 5})
found = {name: rolled.as_numpy(name) for name in ("reward", "continue", "obs/vector")}
found |= {"action": acted.as_numpy("action"), "after": after.as_numpy("action")}
np.savez(sys.argv[3], **found)
try:
    client.infer("imagine", inputs, parameters={"horizon": 10**9})
except triton.InferenceServerException as error:
    print(error)
"""


@pytest.mark.slow
def test_tritonclient_acts_and_imagines(
    agent: Any, server: Any, triton: str, tmp_path: Path
) -> None:
    obs = look(agent)
    np.savez(tmp_path / "obs.npz", **obs)
    script = tmp_path / "ask.py"
    script.write_text(TRITON)
    files = [str(tmp_path / "obs.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(
        [triton, "-I", str(script), address(server), *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "worldflux_dist" in done.stdout and "('image', 'UINT8', [-1, 16, 16, 3])" in done.stdout
    assert "1000000000 are more than" in done.stdout
    got = np.load(tmp_path / "out.npz")
    with Client(address(server)) as client:
        action, carry = client.act(obs)
        after, _ = client.act(obs, carry=carry)
        want = client.rollout(obs=obs, horizon=4, seed=5, heads=("reward", "continue", "obs"))
    assert np.array_equal(got["action"], action) and np.array_equal(got["after"], after)
    same_sums(got["reward"][1:], want.rewards)
    same_sums(got["continue"][1:], want.continues)
    assert want.obs is not None
    same_sums(got["obs/vector"], want.obs["vector"])


def test_what_is_wrong_by_that_protocol_is_named(agent: Any, server: Any) -> None:
    made = wire.inference
    with grpc.insecure_channel(address(server)) as channel:
        methods = wire.calls(wire.INFERENCE, channel)
        wrong = {
            "no model 'other'": made.ModelInferRequest(model_name="other"),
            "raw contents": made.ModelInferRequest(model_name="act", inputs=[{"name": "image"}]),
            "start is missing": made.ModelInferRequest(model_name="imagine"),
            "no parameter 'sed'": made.ModelInferRequest(
                model_name="act", parameters={"sed": made.InferParameter(int64_param=1)}
            ),
            "cannot be used": made.ModelInferRequest(
                model_name="act", parameters={"horizon": made.InferParameter(int64_param=1)}
            ),
            "parameters seed cannot be used": made.ModelInferRequest(
                model_name="act", parameters={"seed": made.InferParameter(double_param=1.5)}
            ),
            "must be image, vector": made.ModelInferRequest(model_name="act"),
        }
        for why, request in wrong.items():
            with pytest.raises(grpc.RpcError) as error:
                methods["ModelInfer"](request, timeout=WAIT_S)
            assert why in error.value.details()
            assert error.value.code().name in ("INVALID_ARGUMENT", "NOT_FOUND")
        for name in ("act", "imagine"):
            found = methods["ModelMetadata"](made.ModelMetadataRequest(name=name))
            assert found.name == name and found.inputs and found.outputs


@pytest.mark.slow
def test_node_acts_and_imagines(agent: Any, server: Any, tmp_path: Path) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no Node here")
    shutil.copy(REPOSITORY / "examples/node/imagine.mjs", tmp_path)
    install = ["npm", "install", "--silent", "@grpc/grpc-js", "@grpc/proto-loader"]
    if subprocess.run(install, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("npm cannot install here")
    done = subprocess.run(
        ["node", "imagine.mjs", PROTO, address(server)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "model dreamerv3:size1m version 0"
    blank = {
        name: np.zeros((1, *spec.shape), spec.dtype) for name, spec in agent.spaces.obs.items()
    }
    with Client(address(server)) as client:
        action, _ = client.act(blank)
        want = client.rollout(obs=blank, horizon=5, seed=7)
    assert json.loads(lines[1].removeprefix("action ")) == action[0].tolist()
    steps = [line.split() for line in lines[2:]]
    assert [step[1] for step in steps] == [str(n) for n in range(6)]
    same_sums(np.array([float(step[3]) for step in steps[1:]], np.float32), want.rewards[:, 0])
    same_sums(np.array([float(step[5]) for step in steps[1:]], np.float32), want.continues[:, 0])
