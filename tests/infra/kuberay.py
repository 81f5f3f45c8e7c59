"""A reduced schema of KubeRay's RayCluster and RayJob, written by hand from its API reference.

jsonschema.validate(manifest, KINDS["RayCluster"])

No package carries the real one. Pod templates are left to Kubernetes' own schema; fields that our
recipes do not use are left out, so that adding one here is a look at the reference.
"""

from typing import Any

Schema = dict[str, Any]
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string", "minLength": 1}
PARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(properties: Schema, *required: str) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


POD_TEMPLATE: Schema = {
    "type": "object",
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
    "required": ["spec"],
    "additionalProperties": False,
}
HEAD_GROUP = fields(
    {
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        "enableIngress": BOOLEAN,
        "rayStartParams": PARAMETERS,
        "template": POD_TEMPLATE,
    },
    "rayStartParams",
    "template",
)
WORKER_GROUP = fields(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "idleTimeoutSeconds": COUNT,
        "numOfHosts": COUNT,
        "rayStartParams": PARAMETERS,
        "template": POD_TEMPLATE,
    },
    "groupName",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
)
CLUSTER = fields(
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "authOptions": fields({"mode": {"enum": ["disabled", "token"]}}),
        "enableInTreeAutoscaling": BOOLEAN,
        "autoscalerOptions": fields(
            {
                "idleTimeoutSeconds": COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "version": {"enum": ["v1", "v2"]},
            }
        ),
        "headGroupSpec": HEAD_GROUP,
        "workerGroupSpecs": {"type": "array", "items": WORKER_GROUP},
    },
    "headGroupSpec",
)
JOB = fields(
    {
        "entrypoint": TEXT,
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "shutdownAfterJobFinishes": BOOLEAN,
        "ttlSecondsAfterFinished": COUNT,
        "suspend": BOOLEAN,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterPodTemplate": POD_TEMPLATE,
        "rayClusterSpec": CLUSTER,
    }
)
KINDS: dict[str, Schema] = {
    kind: fields(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": spec,
        },
        "apiVersion",
        "kind",
        "metadata",
        "spec",
    )
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB))
}
