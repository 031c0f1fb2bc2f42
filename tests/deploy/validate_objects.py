"""Validates Kubernetes objects, a JSON list on stdin, with the JSON Schemas of kubernetes-validate, strictly."""

import json
import sys

import kubernetes_validate


def main() -> None:
    objects = json.load(sys.stdin)
    version = kubernetes_validate.latest_version()
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)
        print(f"{one['kind']} {one['metadata']['name']}: valid in Kubernetes {version}")
    assert objects, "no objects to validate"


if __name__ == "__main__":
    main()
