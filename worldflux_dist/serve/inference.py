"""The same answers by the Open Inference Protocol, for clients made for it, such as tritonclient.

Two models: `act` takes observations by their names, and gives `action` and `carry/<name>`, which go
into the next call; `imagine` takes observations, or `state/<name>`, and `action` (H, N, A) or the
parameter `horizon`, and gives heads (H + 1, N, ...), all or those asked for. Parameters of both are
`seed` and `greedy`, of `imagine` also `samples` and `from_replay`. Tensors come raw.
"""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np

import worldflux_dist
from worldflux_dist.serve import wire

MODELS = ("act", "imagine")
_READ = {"act": ("is_first",), "imagine": ("action",)}  # beside observations
BOOL, FLOAT = np.dtype(bool), np.dtype(np.float32)
PARAMETERS = ("greedy", "seed", "horizon", "samples", "from_replay")


class Inference:
    """The methods of GRPCInferenceService, for what `answers` gives."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return wire.inference.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return wire.inference.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return wire.inference.ModelReadyResponse(ready=request.name in MODELS)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return wire.inference.ServerMetadataResponse(
            name="worldflux_dist", version=worldflux_dist.__version__
        )

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        await self._known(request.name, context)
        requests, num = self._answers.requests, self._answers.requests.spaces.action_dim
        obs = [_meta(name, spec, 1) for name, spec in requests.obs.items()]
        if request.name == "act":
            carry = [_meta(f"carry/{name}", spec, 1) for name, spec in requests.carry.items()]
            inputs = [*obs, _meta("is_first", (BOOL, ()), 1), *carry]
            outputs = [_meta("action", (FLOAT, (num,)), 1), *carry]
        else:
            state = [_meta(f"state/{n}", spec, 1) for n, spec in requests.essential.items()]
            drawn = [_meta(f"obs/{n}", s, 2) for n, s in requests.obs.items()]
            shapes = {"features": (self._answers.dreams.model.feature_dim,), "action": (num,)}
            heads = [head for head in requests.heads if head not in ("obs", "state")]
            inputs = [*obs, *state, _meta("action", (FLOAT, (num,)), 2)]
            outputs = [_meta(head, (FLOAT, shapes.get(head, ())), 2) for head in heads]
            outputs += [*(drawn if "obs" in requests.heads else []), *state]
        version = str(self._answers.dreams.version[1])
        return wire.inference.ModelMetadataResponse(
            name=request.name,
            versions=[version],
            platform="worldflux_dist",
            inputs=inputs,
            outputs=outputs,
        )

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        await self._known(request.model_name, context)
        try:
            asked = _translated(request, self._answers.requests.heads)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if request.model_name == "act":
            answer = await self._answers.Act(asked, context)
            tensors = [answer.action, *answer.carry.tensors]
            for tensor in answer.carry.tensors:
                tensor.name = f"carry/{tensor.name}"
        else:
            async for whole in self._answers.Imagine(asked, context):
                answer = whole
            tensors = list(answer.outputs)
        wanted = {output.name for output in request.outputs}
        tensors = [tensor for tensor in tensors if not wanted or tensor.name in wanted]
        made = wire.inference.ModelInferResponse.InferOutputTensor
        return wire.inference.ModelInferResponse(
            model_name=request.model_name,
            model_version=str(answer.version.gradient_steps),
            id=request.id,
            outputs=[made(name=t.name, datatype=t.datatype, shape=t.shape) for t in tensors],
            raw_output_contents=[tensor.data for tensor in tensors],
        )

    async def _known(self, name: str, context: Any) -> None:
        if name not in MODELS:
            known = " and ".join(MODELS)
            said = f"there is no model {name!r:.80}: there are {known}"
            await context.abort(grpc.StatusCode.NOT_FOUND, said)


def _meta(name: str, spec: tuple[np.dtype, tuple[int, ...]], lead: int) -> Any:
    make = wire.inference.ModelMetadataResponse.TensorMetadata
    datatype = wire.NAMES[spec[0].newbyteorder("<")]
    return make(name=name, datatype=datatype, shape=[-1] * lead + list(spec[1]))


def _translated(request: Any, heads: tuple[str, ...]) -> Any:
    """The request in our own messages. Raises ValueError."""
    if len(request.raw_input_contents) != len(request.inputs):
        raise ValueError(
            f"{len(request.inputs)} inputs have {len(request.raw_input_contents)} raw contents: "
            "send each tensor as raw bytes, little-endian"
        )
    inputs = {}
    for given, data in zip(request.inputs, request.raw_input_contents, strict=True):
        prefix, _, name = given.name.partition("/")
        kept = prefix in ("carry", "state")
        tensor = wire.messages.Tensor(
            name=name if kept else given.name,
            datatype=given.datatype,
            shape=given.shape,
            data=data,
        )
        inputs[given.name] = tensor
    below = {
        prefix: [t for name, t in inputs.items() if name.startswith(f"{prefix}/")]
        for prefix in ("carry", "state")
    }
    own = _READ[request.model_name]
    rest = [t for n, t in inputs.items() if n not in own and not n.startswith(("carry/", "state/"))]
    single = {name: inputs[name] for name in own if name in inputs}
    values = {name: _parameter(name, value) for name, value in request.parameters.items()}
    if request.model_name == "act":
        known = wire.messages.ActRequest
        asked = {"observations": {"tensors": rest}, "carry": {"tensors": below["carry"]}} | single
    else:
        known = wire.messages.ImagineRequest
        outputs = [output.name.partition("/")[0] for output in request.outputs]
        asked = single | {"heads": dict.fromkeys(outputs) or heads}
        if below["state"]:
            asked["state"] = {"tensors": below["state"]}
        elif rest:
            asked["observations"] = {"tensors": rest}
    try:
        return known(**asked, **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the parameters {', '.join(values)} cannot be used: {error}") from None


def _parameter(name: str, value: Any) -> Any:
    kind = value.WhichOneof("parameter_choice")
    if name not in PARAMETERS or kind is None:
        known = ", ".join(PARAMETERS)
        raise ValueError(
            f"there is no parameter {name!r:.80} or it has no value: known are {known}"
        )
    return getattr(value, kind)
