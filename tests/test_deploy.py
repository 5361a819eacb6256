"""The files under deploy/ are accepted by every schema there is, agree with the code, and files
with mistakes in them are not accepted."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deploy_lint
import jsonschema
import pytest
from deploy_lint import CLAIM, CLUSTER, JOB, SERVICE, UP, Files, lint
from deploy_schema import SCHEMAS
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.autoscaler._private.util import prepare_config, validate_config

from worldflux_dist.distributed import submit
from worldflux_dist.metrics import METRICS

GOOD = deploy_lint.read()
VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in SCHEMAS.items()}


def mistakes(files: Files) -> list[str]:
    """What the strict schema says; where it is silent, what the lint says."""
    found = [
        error.message for name, v in VALIDATORS.items() for error in v.iter_errors(files[name])
    ]
    return found or lint(files)


# ------------------------------------------------------------------------------ shipped files


def test_the_shipped_files_have_no_mistakes() -> None:
    assert mistakes(GOOD) == []


def test_every_shipped_file_is_looked_at() -> None:
    shipped = {str(p.relative_to(deploy_lint.DEPLOY)) for p in deploy_lint.DEPLOY.rglob("*.*")}
    assert shipped - {"README.md"} == set(GOOD) - {"Dockerfile"}
    assert {name for name in shipped if name.endswith("yaml")} == set(SCHEMAS)


@pytest.mark.parametrize(("name", "kind"), [(CLUSTER, "rayclusters"), (JOB, "rayjobs")])
def test_the_schemas_of_kuberay_accept_them(shared: Path, name: str, kind: str) -> None:
    schema = json.loads((shared / f"schemas/{kind}.schema.json").read_text())
    jsonschema.validate(GOOD[name], schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(GOOD[name] | {"specs": {}}, schema)


def test_ray_up_accepts_its_file() -> None:
    validate_config(prepare_config(copy.deepcopy(GOOD[UP])))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(copy.deepcopy(GOOD[UP]) | {"dockers": {}}))


def test_both_images_are_made_the_same_way() -> None:
    def neutral(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if not line.startswith(("#", "ARG"))]
        return [re.sub(r"cpu|gpu|egl$|osmesa$", "", line) for line in lines]

    assert neutral(GOOD["Dockerfile"]) == neutral(GOOD["Dockerfile.gpu"])
    assert f"RAY_JOB_STOP_WAIT_TIME_S={submit.STOP_WAIT_S}" in GOOD["Dockerfile"]


def test_the_dashboard_shows_every_gauge_that_is_exported_and_no_other() -> None:
    shown = set()
    for panel in GOOD[deploy_lint.BOARD]["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"ray_(\w+)\{", target["expr"])
            assert names, target["expr"]
            shown |= set(names)
    assert shown == {row.gauge for row in METRICS if row.gauge}


def test_the_commands_of_the_readme_name_files_that_are_there() -> None:
    text = (deploy_lint.DEPLOY / "README.md").read_text()
    named = set(re.findall(r"(?:deploy|configs)/[\w/]+(?:\.\w+)*", text))
    assert {f"deploy/{name}" for name in (*SCHEMAS, "Dockerfile", "Dockerfile.gpu")} <= named
    assert [name for name in named if not (deploy_lint.REPOSITORY / name).exists()] == []


# ----------------------------------------------------------------------------- mistaken files


def at(name: str, *path: Any) -> Callable[[Files], Any]:
    """The part of a file where `path` leads."""

    def find(files: Files) -> Any:
        part = files[name]
        for key in path:
            part = part[key]
        return part

    return find


HEAD = ("spec", "headGroupSpec")
LEARNER = ("spec", "workerGroupSpecs", 0)
POD = ("template", "spec")
BOX = (*POD, "containers", 0)
both = ("spec", "rayClusterSpec")
Mutation = tuple[str, Callable[[Files], Any], Any, Any]

# What is wrong, where, which key, and its new value (None: the key is gone).
MUTATIONS: list[Mutation] = [
    ("'authOptions' is a required", at(CLUSTER, "spec"), "authOptions", None),
    ("'disabled' is not one of", at(JOB, *both, "authOptions"), "mode", "disabled"),
    ("'LoadBalancer' is not one", at(CLUSTER, *HEAD), "serviceType", "LoadBalancer"),
    ("'enableIngress' was unexp", at(CLUSTER, *HEAD), "enableIngress", True),
    ("'hostNetwork' was unexpec", at(CLUSTER, *LEARNER, *POD), "hostNetwork", True),
    ("'hostPort' was unexpected", at(CLUSTER, *HEAD, *BOX, "ports", 1), "hostPort", 8265),
    ("rayVersion 2.59.0", at(CLUSTER, "spec"), "rayVersion", "2.59.0"),
    (
        "which is not of ray",
        at(CLUSTER, *HEAD, *BOX),
        "image",
        "worldflux-dist:0.1.0-ray2.59.0-cpu",
    ),
    ("which is not of ray", at(CLUSTER, *HEAD, *BOX), "image", "worldflux-dist:latest"),
    ("which is not of ray", at(UP, "docker"), "image", "worldflux-dist:0.1.0-ray2.61.0-gpu"),
    (
        "/dev/shm is smaller than the object store",
        at(CLUSTER, *LEARNER, *POD, "volumes", 0, "emptyDir"),
        "sizeLimit",
        "4Gi",
    ),
    (
        "/dev/shm is smaller than the object store",
        at(CLUSTER, *LEARNER, "rayStartParams"),
        "object-store-memory",
        "20000000000",
    ),
    (
        "/dev/shm is smaller than the object store",
        at(CLUSTER, *LEARNER, *BOX, "volumeMounts", 0),
        "mountPath",
        "/shm",
    ),
    ("half of the memory", at(CLUSTER, *LEARNER, *BOX, "resources", "limits"), "memory", "12Gi"),
    ("requests are not", at(CLUSTER, *LEARNER, *BOX, "resources", "requests"), "cpu", "1"),
    ("is mounted where", at(CLUSTER, *LEARNER, *BOX, "volumeMounts", 1), "mountPath", "/data"),
    (
        "is mounted where",
        at(CLUSTER, *LEARNER, *POD, "volumes", 1, "persistentVolumeClaim"),
        "claimName",
        "runs",
    ),
    ("is mounted where", at(CLAIM, "metadata"), "name", "other"),
    ("CPUs and the cluster has", at(CLUSTER, *LEARNER), "minReplicas", 0),
    ("CPUs and the cluster has", at(CLUSTER, "spec", "workerGroupSpecs", 1), "minReplicas", 0),
    ("CPUs and the cluster has", at(UP, "provider"), "worker_ips", ["192.0.2.11"]),
    (
        "no node has a GPU",
        at(CLUSTER, *LEARNER, *BOX, "resources"),
        "limits",
        {"cpu": "8", "memory": "48Gi"},
    ),
    ("less than the minimum", at(CLUSTER, *LEARNER, *POD), "terminationGracePeriodSeconds", 30),
    (
        "preStop does not leave time",
        at(CLUSTER, *LEARNER, *BOX, "lifecycle", "preStop", "exec"),
        "command",
        ["sleep", "60"],
    ),
    ("'lifecycle' is a required", at(CLUSTER, *LEARNER, *BOX), "lifecycle", None),
    (
        "does not stop the jobs",
        at(CLUSTER, *HEAD, *BOX, "lifecycle", "preStop", "exec"),
        "command",
        ["sleep", "45"],
    ),
    ("health checks are not set", at(CLUSTER, *HEAD, *BOX), "env", None),
    ("'2' is not one of", at(CLUSTER, *HEAD, "rayStartParams"), "num-cpus", "2"),
    ("'backoffLimit' is a requi", at(JOB, "spec"), "backoffLimit", None),
    ("differ", at(JOB, *both, "workerGroupSpecs", 1), "maxReplicas", 9),
    ("not named after the job", at(JOB, "metadata"), "name", "breakout"),
    ("selects no pod", at(SERVICE, "spec", "selector"), "ray.io/cluster", "other"),
    ("wants a port", at(SERVICE, "spec", "ports", 0), "port", 8265),
    ("'http' is not one of", at(SERVICE, "spec", "ports", 0), "name", "http"),
    ("should be non-empty", at(UP), "file_mounts", {"/home/ray/auth_token": ""}),
]


def changed(find: Callable[[Files], Any], key: Any, value: Any) -> Files:
    files = copy.deepcopy(GOOD)
    part = find(files)
    if value is None:
        del part[key]
    else:
        part[key] = value
    return files


@pytest.mark.parametrize(("why", "find", "key", "value"), MUTATIONS)
def test_a_mistake_is_found(why: str, find: Callable[[Files], Any], key: Any, value: Any) -> None:
    found = mistakes(changed(find, key, value))
    assert any(why in mistake for mistake in found), found


@pytest.mark.parametrize(
    ("why", "old", "new"),
    [
        ("asks for no token", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        ("asks for no token", "RAY_AUTH_TOKEN_PATH=/home/ray", "RAY_AUTH_TOKEN_PATH=/home"),
        ("shows the dashboard", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ("publishes ports", "-v /runs:/runs", "-v /runs:/runs -p 8265:8265"),
        ("is not mounted", "-v /runs:/runs", "-v /data:/data"),
        ("smaller than the object", "--shm-size=10g", "--shm-size=4g"),
        ("no node has a GPU", " --num-gpus=1", ""),
        ("MB are available", "--memory=30000000000", "--memory=3000000000"),
        ("health checks", "RAY_health_check_timeout_ms", "RAY_health_timeout_ms"),
        ("keeps", "--object-store-memory=8000000000", "--object-store-memory=80000000"),
    ],
)
def test_a_mistake_in_a_command_of_ray_up_is_found(why: str, old: str, new: str) -> None:
    text = json.dumps(GOOD[UP])
    assert old in text
    found = mistakes(GOOD | {UP: json.loads(text.replace(old, new))})
    assert any(why in mistake for mistake in found), found


@pytest.mark.parametrize(
    ("why", "old", "new"),
    [
        ("is not based on ray", "ray:2.60.0", "ray:2.59.0"),
        ("runs as root", "USER ray\n", "\n"),
        ("other versions than constraints", "-c constraints.txt", ""),
    ],
)
def test_a_mistake_in_an_image_is_found(why: str, old: str, new: str) -> None:
    found = lint(GOOD | {"Dockerfile": GOOD["Dockerfile"].replace(old, new)})
    assert any(why in mistake for mistake in found), found


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from parts(part, (*path, key))


EVERYWHERE = [(name, path) for name in SCHEMAS for path in parts(GOOD[name])]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(EVERYWHERE), st.integers(0, 30), st.sampled_from("xX_-"))
def test_a_misspelt_key_is_found_anywhere(
    where: tuple[str, tuple[Any, ...]], place: int, letter: str
) -> None:
    name, path = where
    if isinstance(path[-1], int):
        return
    files = copy.deepcopy(GOOD)
    part = at(name, *path[:-1])(files)
    cut = place % (len(path[-1]) + 1)
    part[path[-1][:cut] + letter + path[-1][cut:]] = part.pop(path[-1])
    assert list(VALIDATORS[name].iter_errors(files[name]))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(EVERYWHERE), st.sampled_from([None, 3.5, {"a": 1}, [[]], ""]))
def test_a_value_of_a_wrong_type_is_found_anywhere(
    where: tuple[str, tuple[Any, ...]], value: Any
) -> None:
    name, path = where
    files = copy.deepcopy(GOOD)
    at(name, *path[:-1])(files)[path[-1]] = value
    assert list(VALIDATORS[name].iter_errors(files[name]))
