"""What no schema can say of the files under deploy/: that they agree with each other and the code.

`lint` gives one sentence for each thing that would fail, or be open, on a real cluster.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from ray_cluster import SHIPPED

from worldflux_dist import config
from worldflux_dist.distributed.cluster import Node, Plan, make_plan
from worldflux_dist.envs import make_envs
from worldflux_dist.serve.replicas import Serving

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "deploy"
IN_IMAGE = "/opt/worldflux-dist/"
IMAGES = ("Dockerfile", "Dockerfile.gpu")
UP, CLUSTER, JOB = "ray_cluster.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"
CLAIM, SERVICE, BOARD = "kuberay/runs.yaml", "imagination_service.yaml", "grafana/worldflux.json"
UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "g": 2**30}
HEALTH = {f"RAY_{name}" for name in SHIPPED}

Files = dict[str, Any]  # text of Dockerfiles, else what was parsed; by the path under deploy/


def read() -> Files:
    files: Files = {name: (DEPLOY / name).read_text() for name in IMAGES}
    for name in (UP, CLUSTER, JOB, CLAIM, SERVICE):
        # Through JSON, so that no two parts of a file are one object where YAML has an anchor.
        files[name] = json.loads(json.dumps(yaml.safe_load((DEPLOY / name).read_text())))
    return files | {BOARD: json.loads((DEPLOY / BOARD).read_text())}


def lint(files: Files) -> list[str]:
    """Every problem as a sentence; none is what the shipped files must have."""
    found = [*_versions(files), *_up(files), *_service(files), *_job(files)]
    for name, spec in _specs(files):
        for where, group in _groups(spec):
            found += [f"{name}, {where}: {what}" for what in _pod(files, spec, group)]
    for name, nodes in _offers(files):
        found += [f"{name}: {what}" for what in _room(files, nodes)]
    return found


def quantity(text: str) -> float:
    """A number of Kubernetes or docker, such as 500m, 8Gi or 10g."""
    number, unit = re.fullmatch(r"([0-9]+)(\w*)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{name}==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert found, name
    return found[1]


def _specs(files: Files) -> list[tuple[str, Any]]:
    return [(CLUSTER, files[CLUSTER]["spec"]), (JOB, files[JOB]["spec"]["rayClusterSpec"])]


def _groups(spec: Any) -> Iterator[tuple[str, Any]]:
    yield "head", spec["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group


def _container(group: Any) -> Any:
    return group["template"]["spec"]["containers"][0]


# ------------------------------------------------------------------------------------ versions


def _versions(files: Files) -> Iterator[str]:
    ray, project = pinned("ray"), (REPOSITORY / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', project, re.M)
    low, high = re.search(r'"ray\[.*\]>=([\d.]+),<([\d.]+)"', project).groups()  # type: ignore
    parts = [tuple(map(int, v.split(".")[:2])) for v in (low, ray, high)]
    if not parts[0] <= parts[1] < parts[2]:
        yield f"constraints.txt has ray {ray} and pyproject.toml wants {low} up to {high}"
    for name, device in zip(IMAGES, ("cpu", "gpu"), strict=True):
        if f"FROM rayproject/ray:{ray}-py311-{device}\n" not in files[name]:
            yield f"{name} is not based on ray {ray} for {device}"
        if "-c constraints.txt" not in files[name]:
            yield f"{name} installs other versions than constraints.txt"
        if files[name].rfind("USER ray") < files[name].rfind("USER root"):
            yield f"{name} runs as root"
    images = [(UP, files[UP]["docker"]["image"])]
    for name, spec in _specs(files):
        images += [(name, _container(group)["image"]) for _, group in _groups(spec)]
        if spec["rayVersion"] != ray:
            yield f"{name} has rayVersion {spec['rayVersion']} and constraints.txt ray {ray}"
    for name, image in images:
        if not re.search(rf":{version and version[1]}-ray{re.escape(ray)}-(cpu|gpu)$", image):
            yield f"{name} runs image {image}, which is not of ray {ray} and this package"


# --------------------------------------------------------------------------------------- pods


def _pod(files: Files, spec: Any, group: Any) -> Iterator[str]:
    """One group of KubeRay: authentication, exposure, memory, storage, and time to save."""
    pod, container = group["template"]["spec"], _container(group)
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "asks for no token: set authOptions.mode to token"
    if group.get("serviceType", "ClusterIP") != "ClusterIP" or group.get("enableIngress"):
        yield "shows the dashboard to the outside"
    if pod.get("hostNetwork") or any("hostPort" in port for port in container["ports"]):
        yield "opens ports on its host"
    if container["resources"]["limits"] != container["resources"]["requests"]:
        yield "requests are not the limits"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    shm = volumes.get(mounts.get("/dev/shm"), {}).get("emptyDir", {})
    room = quantity(shm.get("sizeLimit", "0")) if shm.get("medium") == "Memory" else 0
    if room < int(group["rayStartParams"]["object-store-memory"]):
        yield "/dev/shm is smaller than the object store"
    if quantity(container["resources"]["limits"]["memory"]) < 2 * room:
        yield "half of the memory is not enough for /dev/shm"
    run_dir = _train(files)[2]
    claims = {
        path
        for path, name in mounts.items()
        if volumes.get(name, {}).get("persistentVolumeClaim", {}).get("claimName")
        == files[CLAIM]["metadata"]["name"]
    }
    if not any(run_dir.startswith(path + "/") for path in claims):
        yield f"no claim of {CLAIM} is mounted where {run_dir} lies"
    stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    waits = re.search(r"(\d+)\W*$", " ".join(stop))
    if not waits or int(waits[1]) >= pod["terminationGracePeriodSeconds"]:
        yield "preStop does not leave time to save within terminationGracePeriodSeconds"
    if group is spec["headGroupSpec"]:
        if not {entry["name"] for entry in container.get("env", [])} >= HEALTH:
            yield f"the health checks are not set: {', '.join(sorted(HEALTH))}"
        if "submit.stop_all(" not in " ".join(stop):
            yield "preStop does not stop the jobs of the head"


# --------------------------------------------------------------------------------- other files


def _up(files: Files) -> Iterator[str]:
    """`ray up`: the same, in the flags of docker and of ray start."""
    up = files[UP]
    options = " ".join(up["docker"]["run_options"])
    token = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)
    if "RAY_AUTH_MODE=token" not in options or not token or not up["file_mounts"].get(token[1]):
        yield f"{UP} asks for no token: set RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH and file_mounts"
    shm = re.search(r"--shm-size=(\w+)", options)
    starts = up["head_start_ray_commands"][-1], up["worker_start_ray_commands"][-1]
    if not shm or quantity(shm[1]) < max(_flag(start, "object-store-memory") for start in starts):
        yield f"{UP}: --shm-size is smaller than the object store"
    if "--dashboard-host=127.0.0.1" not in starts[0]:
        yield f"{UP} shows the dashboard to the outside: set --dashboard-host=127.0.0.1"
    if re.search(r"(^| )(-p|--publish)\b", options):
        yield f"{UP} publishes ports of its containers"
    if "-v /runs:/runs" not in options:
        yield f"{UP}: /runs is not mounted"
    if not all(name in options for name in HEALTH):
        yield f"{UP}: the health checks are not set"


def _flag(command: str, name: str) -> float:
    found = re.search(rf"--{name}=(\d+)", command)
    return float(found[1]) if found else 0


def _service(files: Files) -> Iterator[str]:
    """All pods that replicas of the imagination server may be on are those its service selects."""
    service, cluster = files[SERVICE]["spec"], files[CLUSTER]
    # Set by the operator.
    own = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "worker"}
    if not service["selector"].items() <= own.items():
        yield f"{SERVICE} selects no pod of {CLUSTER}"
    for where, group in _groups(cluster["spec"]):
        ports = {port["name"]: port["containerPort"] for port in _container(group)["ports"]}
        wanted = all(ports.get(port["targetPort"]) == port["port"] for port in service["ports"])
        if where != "head" and not wanted:
            yield f"{SERVICE} wants a port that the pods of group {where} do not have"
    if any(port["port"] != Serving("").port for port in service["ports"]):
        yield f"{SERVICE} is not of the port that replicas serve on"


def _job(files: Files) -> Iterator[str]:
    """The entrypoint can be run again, and reads settings that are in the image."""
    job = files[JOB]
    if job["spec"]["rayClusterSpec"] != files[CLUSTER]["spec"]:
        yield f"the clusters of {JOB} and {CLUSTER} differ"
    if Path(_train(files)[2]).name != job["metadata"]["name"]:
        yield f"{JOB}: the run directory is not named after the job"


def _train(files: Files) -> tuple[list[str], list[str], str]:
    """Settings files, overrides and run directory of the job's entrypoint."""
    words = shlex.split(files[JOB]["spec"]["entrypoint"])
    assert words[:2] == ["worldflux-dist", "train"] and words[-2] == "--run-dir", words
    settings = words[2:-2]
    return (
        [word for word in settings if "=" not in word],
        [word for word in settings if "=" in word],
        words[-1],
    )


# ---------------------------------------------------------------------------------- resources


def _offers(files: Files) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """What the nodes of each cluster offer to Ray."""
    for name, spec in _specs(files):
        nodes: list[Node] = []
        for group in spec["workerGroupSpecs"]:
            limits = {k: quantity(v) for k, v in _container(group)["resources"]["limits"].items()}
            store = int(group["rayStartParams"]["object-store-memory"])
            node = {
                "CPU": limits["cpu"],
                "GPU": limits.get("nvidia.com/gpu", 0),
                "memory": limits["memory"] - store,
                "object_store_memory": store,
            }
            nodes += [node] * group["minReplicas"]
        yield name, tuple(nodes)
    start = files[UP]["worker_start_ray_commands"][-1]
    flags = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory"}
    flags["object_store_memory"] = "object-store-memory"
    node = {kind: _flag(start, flag) for kind, flag in flags.items()}
    yield UP, (node,) * len(files[UP]["provider"]["worker_ips"])


def _room(files: Files, nodes: tuple[Node, ...]) -> Iterator[str]:
    """What the code itself says of these nodes."""
    settings, overrides, _ = _train(files)
    has = {kind: sum(node[kind] for node in nodes) for kind in nodes[0]} if nodes else {}
    gpus = int(has.get("GPU", 0))
    plan = replace(
        _plan(tuple(settings), tuple(overrides), gpus),
        nodes=nodes,
        cores=has.get("CPU", 0),
        available=int(has.get("memory", 0)),
    )
    try:
        plan.check()
    except config.ConfigError as error:
        yield str(error)
    if not gpus:
        yield "no node has a GPU for the learner"


@functools.cache
def _plan(settings: tuple[str, ...], overrides: tuple[str, ...], gpus: int) -> Plan:
    """What the run of the job asks for where there are so many GPUs. Counting takes a second."""
    asked = config.load([REPOSITORY / s.removeprefix(IN_IMAGE) for s in settings], overrides)
    envs = make_envs(asked.env, 0, num_envs=1)
    envs.close()
    return make_plan(asked, envs.spaces, ({"GPU": gpus},))
