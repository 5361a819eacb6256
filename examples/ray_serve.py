"""The imagination service behind Ray Serve, for its autoscaling, inside a private network.

    pip install 'ray[serve]'
    worldflux-dist train configs/demo.yaml --run-dir runs/demo
    python examples/ray_serve.py runs/demo            # gRPC on 127.0.0.1:9000, until Ctrl-C

Serve's ingress has neither TLS nor a token and opens more ports than the server of
`worldflux-dist serve`, which is why that one does not use it. Clients are the same.
"""

import os
import sys
import time

os.environ.setdefault("RAY_AUTH_MODE", "token")

import grpc
from ray import serve
from ray.serve.config import gRPCOptions

from worldflux_dist import storage
from worldflux_dist.serve import wire
from worldflux_dist.serve.requests import Limits
from worldflux_dist.serve.run import ServedRun
from worldflux_dist.serve.server import Answers


def add_service(servicer, server):
    """Names the methods to Serve's ingress, which hands their requests on as bytes."""
    made = {}
    for name, (_, _, many) in wire.methods(wire.IMAGINATION).items():
        kind = grpc.unary_stream_rpc_method_handler if many else grpc.unary_unary_rpc_method_handler
        made[name] = kind(None)
    handler = grpc.method_handlers_generic_handler(wire.IMAGINATION, made)
    server.add_generic_rpc_handlers((handler,))


class Refusal:
    """What the service's methods call where they refuse a request."""

    def __init__(self, context):
        self.context = context

    async def abort(self, code, said):
        self.context.set_code(code)
        self.context.set_details(said)
        raise RuntimeError(said)


@serve.deployment(autoscaling_config={"min_replicas": 1, "max_replicas": 2})
class Imagination:
    def __init__(self, run):
        dreams = ServedRun(storage.as_path(run)).dreams()
        self.answers, self.read = Answers(dreams, Limits()), wire.methods(wire.IMAGINATION)

    async def GetModel(self, request, grpc_context):
        return await self.answers.GetModel(self.parsed("GetModel", request), Refusal(grpc_context))

    async def Encode(self, request, grpc_context):
        return await self.answers.Encode(self.parsed("Encode", request), Refusal(grpc_context))

    async def Act(self, request, grpc_context):
        return await self.answers.Act(self.parsed("Act", request), Refusal(grpc_context))

    async def Imagine(self, request, grpc_context):
        asked = self.parsed("Imagine", request)
        async for answer in self.answers.Imagine(asked, Refusal(grpc_context)):
            yield answer

    def parsed(self, method, request):
        return self.read[method][0].FromString(request)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    options = gRPCOptions(port=9000, grpc_servicer_functions=["ray_serve.add_service"])
    serve.start(grpc_options=options, http_options={"host": "127.0.0.1"})
    serve.run(Imagination.bind(os.path.abspath(sys.argv[1])), name="imagination")
    print("serving on 127.0.0.1:9000", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        serve.shutdown()
