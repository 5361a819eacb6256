"""The strict schema of what the files under deploy/ use of KubeRay, Kubernetes and `ray up`.

A key that is not here is an error: a typo of an optional key would otherwise be ignored by the
cluster and be found out in production.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
BYTES: Schema = {"type": "string", "pattern": r"^[0-9]+$"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(Mi|Gi|m)?$"}
TEXTS: Schema = {"type": "array", "items": TEXT, "minItems": 1}


def of(*values: Any) -> Schema:
    return {"enum": list(values)}


def every(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def mapping(optional: tuple[str, ...] = (), **keys: Schema) -> Schema:
    """An object with exactly these keys, all wanted but the optional ones.

    Two underscores stand for a dash, a trailing one for nothing.
    """
    named = {key.replace("__", "-").rstrip("_"): value for key, value in keys.items()}
    return {
        "type": "object",
        "properties": named,
        "required": [key for key in named if key not in optional],
        "additionalProperties": False,
    }


def labels(*names: str) -> Schema:
    return {
        "type": "object",
        "properties": dict.fromkeys(names, TEXT),
        "minProperties": 1,
        "additionalProperties": False,
    }


HARDWARE = {
    "type": "object",
    "properties": {"cpu": QUANTITY, "memory": QUANTITY, "nvidia.com/gpu": QUANTITY},
    "required": ["cpu", "memory"],
    "additionalProperties": False,
}
CONTAINER = mapping(
    ("env",),
    name=TEXT,
    image=TEXT,
    env=every(mapping(name=TEXT, value=TEXT)),
    ports=every(mapping(name=TEXT, containerPort=COUNT)),
    resources=mapping(limits=HARDWARE, requests=HARDWARE),
    lifecycle=mapping(preStop=mapping(exec=mapping(command=TEXTS))),
    volumeMounts=every(mapping(name=TEXT, mountPath=TEXT)),
)
VOLUME = mapping(
    ("emptyDir", "persistentVolumeClaim", "secret"),
    name=TEXT,
    emptyDir=mapping(medium=of("Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=mapping(claimName=TEXT),
    secret=mapping(secretName=TEXT, optional_=of(True)),
)
POD = mapping(
    ("tolerations",),
    terminationGracePeriodSeconds={"type": "integer", "minimum": 60},
    securityContext=mapping(runAsNonRoot=of(True), runAsUser=COUNT, fsGroup=COUNT),
    tolerations=every(mapping(key=TEXT, operator=of("Exists"), effect=TEXT)),
    containers=every(CONTAINER) | {"maxItems": 1},
    volumes=every(VOLUME),
)
TEMPLATE = mapping(spec=POD)
CLUSTER = mapping(
    rayVersion=TEXT,
    authOptions=mapping(mode=of("token")),
    headGroupSpec=mapping(
        serviceType=of("ClusterIP"),
        rayStartParams=mapping(num__cpus=of("0"), object__store__memory=BYTES),
        template=TEMPLATE,
    ),
    workerGroupSpecs=every(
        mapping(
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=mapping(object__store__memory=BYTES),
            template=TEMPLATE,
        )
    ),
)
NAMED = mapping(name={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"})


def kubernetes(version: str, kind: str, spec: Schema) -> Schema:
    return mapping(apiVersion=of(version), kind=of(kind), metadata=NAMED, spec=spec)


SCHEMAS: dict[str, Schema] = {
    "kuberay/raycluster.yaml": kubernetes("ray.io/v1", "RayCluster", CLUSTER),
    "kuberay/rayjob.yaml": kubernetes(
        "ray.io/v1",
        "RayJob",
        mapping(
            submissionMode=of("K8sJobMode"),
            backoffLimit={"type": "integer", "minimum": 1},
            shutdownAfterJobFinishes=of(True),
            ttlSecondsAfterFinished=COUNT,
            entrypoint=TEXT,
            rayClusterSpec=CLUSTER,
        ),
    ),
    "kuberay/runs.yaml": kubernetes(
        "v1",
        "PersistentVolumeClaim",
        mapping(
            accessModes={"const": ["ReadWriteMany"]},
            resources=mapping(requests=mapping(storage=QUANTITY)),
        ),
    ),
    "imagination_service.yaml": kubernetes(
        "v1",
        "Service",
        mapping(
            type=of("ClusterIP"),
            clusterIP=of("None"),
            selector=labels("ray.io/cluster", "ray.io/node-type"),
            ports=every(mapping(name=of("grpc"), port=COUNT, targetPort=of("grpc"))),
        ),
    ),
    "ray_cluster.yaml": mapping(
        cluster_name=TEXT,
        provider=mapping(type=of("local"), head_ip=TEXT, worker_ips=TEXTS),
        auth=mapping(ssh_user=TEXT, ssh_private_key=TEXT),
        docker=mapping(
            image=TEXT, container_name=TEXT, pull_before_run={"type": "boolean"}, run_options=TEXTS
        ),
        file_mounts={
            "type": "object",
            "properties": {"/home/ray/auth_token": TEXT},
            "required": ["/home/ray/auth_token"],
            "additionalProperties": False,
        },
        head_start_ray_commands=TEXTS,
        worker_start_ray_commands=TEXTS,
    ),
}
