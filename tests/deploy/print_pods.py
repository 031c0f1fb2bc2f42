"""Prints the Kubernetes objects of all deployments of specs/deploy as a JSON list, for validate_objects.py.

Kubernetes has no schema of a LeaderWorkerSet, which is a custom resource: its pods are printed as PodTemplates.
"""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from sageLLM.codegen import driver
from sageLLM.runtime.cli.deploy import render_target
from sageLLM.runtime.cli.deploy_file import find_placement
from sageLLM.runtime.deploy.placement import DeployError


def objects() -> Iterator[dict[str, Any]]:
    for path in sorted((driver.BASE_SPECS / "deploy").glob("*.yaml")):
        placement, source = find_placement(path.stem)
        try:
            text = render_target(placement, "kubernetes", source)
        except DeployError:
            continue
        for one in yaml.safe_load_all(text):
            yield from pods_of(one) if one["kind"] == "LeaderWorkerSet" else [one]


def pods_of(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    template = group["spec"]["leaderWorkerTemplate"]
    for name in ("leaderTemplate", "workerTemplate"):
        if name in template:
            head = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": group["metadata"]}
            yield head | {"template": template[name]}


if __name__ == "__main__":
    print(json.dumps(list(objects())))
