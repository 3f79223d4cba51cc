"""The fields of Kubernetes and KubeRay objects that ray_configs/ uses, written down from their documentation.

KubeRay: RayCluster and RayJob of ray.io/v1, as in release 1.7. No installed package has them. A field that is not
here is refused, so a misspelt one is found, and a new one has to be looked up first.

A description is a type, a set of allowed words, a compiled pattern, a list of one description for each item, or a
mapping of keys, where "!" marks those that must be there and "*" stands for any key.
"""

from __future__ import annotations

import re
from typing import Any

NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # KubeRay's limit for a RayJob is 47 characters
QUANTITY = re.compile(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?")
IMAGE = re.compile(r"[a-z0-9.-]+(/[a-z0-9._-]+)*:[A-Za-z0-9._-]+")
PATH = re.compile(r"/.*")
WORDS = {"*": str}

METADATA = {"name!": NAME, "labels": WORDS, "annotations": WORDS}
RESOURCES = {"requests": {"*": QUANTITY}, "limits": {"*": QUANTITY}}
KEY_OF = {"name!": NAME, "key!": str, "optional": bool}
ENV = {"name!": str, "value": str, "valueFrom": {"secretKeyRef": KEY_OF, "configMapKeyRef": KEY_OF}}
PROBE = {
    "httpGet": {"path!": PATH, "port!": (str, int)},
    "exec": {"command!": [str]},
    "initialDelaySeconds": int,
    "periodSeconds": int,
    "failureThreshold": int,
    "timeoutSeconds": int,
}
CONTAINER = {
    "name!": NAME,
    "image!": IMAGE,
    "command": [str],
    "args": [str],
    "env": [ENV],
    "envFrom": [{"secretRef": {"name!": NAME, "optional": bool}}],
    "ports": [{"containerPort!": int, "name": NAME}],
    "resources": RESOURCES,
    "volumeMounts": [{"name!": NAME, "mountPath!": PATH, "readOnly": bool}],
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "startupProbe": PROBE,
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
}
EXPRESSION = {"key!": str, "operator!": {"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"}, "values": [str]}
POD = {
    "containers!": [CONTAINER],
    "volumes": [
        {
            "name!": NAME,
            "emptyDir": {"medium": {"Memory"}, "sizeLimit": QUANTITY},
            "persistentVolumeClaim": {"claimName!": NAME},
            "configMap": {"name!": NAME},
        }
    ],
    "tolerations": [
        {
            "key": str,
            "operator": {"Exists", "Equal"},
            "value": str,
            "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
        }
    ],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms!": [{"matchExpressions": [EXPRESSION]}]
            }
        }
    },
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "fsGroup": int,
        "seccompProfile": {"type!": {"RuntimeDefault", "Unconfined", "Localhost"}},
    },
    "serviceAccountName": NAME,
    "automountServiceAccountToken": bool,
    "enableServiceLinks": bool,
    "terminationGracePeriodSeconds": int,
}
TEMPLATE = {"metadata": {"labels": WORDS, "annotations": WORDS}, "spec!": POD}

RAY_CLUSTER_SPEC = {
    "rayVersion": str,
    "authOptions": {"mode": {"token", "disabled"}, "secretName": NAME},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "resources": RESOURCES,
    },
    "headGroupSpec!": {"rayStartParams": WORDS, "template!": TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName!": NAME,
            "replicas": int,
            "minReplicas!": int,
            "maxReplicas!": int,
            "idleTimeoutSeconds": int,
            "rayStartParams": WORDS,
            "template!": TEMPLATE,
        }
    ],
}
RAY_JOB_SPEC = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "preRunningDeadlineSeconds": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec!": RAY_CLUSTER_SPEC,
}
SELECTOR = {"matchLabels!": WORDS}
CLAIM_SPEC = {
    "accessModes!": [{"ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"}],
    "storageClassName": str,
    "resources!": {"requests!": {"storage!": QUANTITY}},
}
KINDS: dict[tuple[str, str], Any] = {
    ("ray.io/v1", "RayCluster"): {"spec!": RAY_CLUSTER_SPEC},
    ("ray.io/v1", "RayJob"): {"spec!": RAY_JOB_SPEC},
    ("v1", "PersistentVolumeClaim"): {"spec!": CLAIM_SPEC},
    ("v1", "ServiceAccount"): {},
    ("v1", "ConfigMap"): {"data!": WORDS},
    ("v1", "Service"): {
        "spec!": {
            "type": {"ClusterIP", "NodePort", "LoadBalancer"},
            "clusterIP": str,
            "selector!": WORDS,
            "ports!": [{"name": NAME, "port!": int, "targetPort": (str, int)}],
        }
    },
    ("apps/v1", "Deployment"): {
        "spec!": {
            "replicas": int,
            "strategy": {"type!": {"Recreate", "RollingUpdate"}},
            "selector!": SELECTOR,
            "template!": TEMPLATE,
        }
    },
    ("apps/v1", "StatefulSet"): {
        "spec!": {
            "replicas": int,
            "serviceName!": NAME,
            "selector!": SELECTOR,
            "template!": TEMPLATE,
            "volumeClaimTemplates": [{"metadata!": METADATA, "spec!": CLAIM_SPEC}],
        }
    },
}


def complaints_about(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object, with the path of each field."""
    kind = KINDS.get((document.get("apiVersion", ""), document.get("kind", "")))
    if kind is None:
        return [f"{document.get('apiVersion')} {document.get('kind')} is not described here"]
    return _check(document, {"apiVersion!": str, "kind!": str, "metadata!": METADATA, **kind}, "")


def _check(value: Any, asked: Any, path: str) -> list[str]:
    if isinstance(asked, dict):
        return _check_fields(value, asked, path)
    if isinstance(asked, list):
        if not isinstance(value, list):
            return [f"{path}: a list is wanted, not {value!r}"]
        return [each for number, item in enumerate(value) for each in _check(item, asked[0], f"{path}[{number}]")]
    if isinstance(asked, set):
        good = isinstance(value, str) and value in asked
    elif isinstance(asked, re.Pattern):
        good = isinstance(value, str) and asked.fullmatch(value) is not None
    else:
        good = isinstance(value, asked) and (asked is bool or not isinstance(value, bool))
    return [] if good else [f"{path}: {value!r} is not {asked}"]


def _check_fields(value: Any, asked: dict[str, Any], path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path}: fields are wanted, not {value!r}"]
    known = {name.removesuffix("!"): each for name, each in asked.items()}
    missing = [name[:-1] for name in asked if name.endswith("!") and name[:-1] not in value]
    found = [f"{path}.{name} is missing" for name in missing]
    for name, item in value.items():
        if name in known or "*" in known:
            found += _check(item, known.get(name, known.get("*")), f"{path}.{name}")
        else:
            found.append(f"{path}.{name}: no such field")
    return found
