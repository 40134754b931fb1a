"""Checks compose.yaml and kubernetes/ against the schemas that PyPI's packages carry: ``python docker/validate.py``.

    kubernetes-validate     Kubernetes' own kinds, and the pods within Kubeflow's; unknown keys are errors
    kubeflow-trainer-api    TrainingRuntime and TrainJob
    kubeflow-training       PyTorchJob; only read, so that pip may install it with --no-deps
    compose-spec            compose.yaml

A package that is not installed leaves its check out, and is named. Exit code 1: something does not fit.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
KUBEFLOW = {
    "TrainingRuntime": "kubeflow-trainer-api",
    "TrainJob": "kubeflow-trainer-api",
    "PyTorchJob": "kubeflow-training",
}
Object = dict[str, Any]


def objects(file: Path) -> list[Object]:
    """What a manifest holds, an object a document."""
    return [found for found in yaml.safe_load_all(file.read_text(encoding="utf-8")) if found]


def pods(value: Any) -> Iterator[Object]:
    """Each pod template within an object: what has a pod's ``spec.containers``."""
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def by_kubernetes(item: Object) -> list[str]:
    """What Kubernetes' newest schema that the package has says against an object of its own."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def by_trainer(item: Object) -> list[str]:
    """What Trainer's models say, and which keys they do not know: those are lost on the way through them."""
    from kubeflow_trainer_api import models
    from pydantic import ValidationError

    model = getattr(models, f"TrainerV1alpha1{item['kind']}")
    try:
        read = model.from_dict(item)
    except (ValidationError, ValueError) as error:
        return [str(error)]
    return list(lost(item, read.to_dict()))


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Keys of ``before`` that ``after`` has not."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: unknown"
    elif isinstance(before, list) and isinstance(after, list):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")


def by_training(item: Object) -> list[str]:
    """What does not fit the tables of keys and types in the sources of the training operator's models."""
    tables = {}
    for file in metadata.files("kubeflow-training") or ():
        if file.match("kubeflow/training/models/kubeflow_org_v1_*.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    said = {
                        line.targets[0].id: ast.literal_eval(line.value)
                        for line in node.body
                        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
                    }
                    types, keys = said["openapi_types"], said["attribute_map"]
                    tables[node.name] = {keys[name]: types[name] for name in types}
    return list(unfit(item, "KubeflowOrgV1PyTorchJob", tables, item["kind"]))


def unfit(value: Any, kind: str, tables: dict[str, dict[str, str]], path: str) -> Iterator[str]:
    """What within ``value`` is not of ``kind``, in the words of OpenAPI's generator: ``dict(str, X)``, ``list[X]``."""
    plain = {"str": str, "int": int, "bool": bool}
    if inner := re.fullmatch(r"dict\(str, (\w+)\)", kind):
        for key, item in value.items():
            yield from unfit(item, inner[1], tables, f"{path}.{key}")
    elif inner := re.fullmatch(r"list\[(\w+)\]", kind):
        for number, item in enumerate(value):
            yield from unfit(item, inner[1], tables, f"{path}[{number}]")
    elif kind in plain:
        if type(value) is not plain[kind]:
            yield f"{path}: {value!r} is no {kind}"
    elif kind in tables:
        for key, item in value.items():
            if key in tables[kind]:
                yield from unfit(item, tables[kind][key], tables, f"{path}.{key}")
            else:
                yield f"{path}.{key}: unknown"
    elif not kind.startswith(("K8sIo", "V1")):  # Kubernetes' own, which another schema covers
        yield f"{path}: of the unknown kind {kind}"


def by_compose(text: str) -> list[str]:
    """What the specification's parser says against a compose file, once its variables have their defaults."""
    from compose_spec import PyCompose

    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    text = re.sub(r"\$\{\w+:\?[^}]*\}", "/set/by/the/user", text)
    text = text.replace("restart: on-failure:3", "restart: on-failure")  # in the specification; the parser lacks it
    try:
        PyCompose.from_yaml(text).validate()
    except ValueError as error:
        return [str(error)]
    return []


def checks(folder: Path) -> Iterator[tuple[str, str, Callable[[], list[str]]]]:
    """What is checked, the package that it takes, and the check, for the files in ``folder``."""
    compose = folder / "compose.yaml"
    yield compose.name, "compose-spec", lambda: by_compose(compose.read_text(encoding="utf-8"))
    for file in sorted((folder / "kubernetes").glob("*.yaml")):
        for item in objects(file):
            name = f"{file.name} {item['kind']}"
            package = KUBEFLOW.get(item["kind"], "kubernetes-validate")
            check = {"kubeflow-trainer-api": by_trainer, "kubeflow-training": by_training}.get(package, by_kubernetes)
            yield name, package, lambda check=check, item=item: check(item)
            if item["kind"] in KUBEFLOW:
                for pod in pods(item):
                    alone = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod}
                    yield f"{name}'s pod", "kubernetes-validate", lambda alone=alone: by_kubernetes(alone)


def main(folder: Path = HERE) -> int:
    """Runs the checks, a line each; returns 1 when something does not fit."""
    failed = False
    for name, package, check in checks(folder):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"not checked: {name}, which takes {package}")
            continue
        found = check()
        failed |= bool(found)
        print("\n".join(f"{name}: {line}" for line in found) or f"fits: {name} ({package} {version})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
