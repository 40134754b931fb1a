"""docker/: its files fit the project's versions, its parsers, each other and docker/README.md.

docker/check.sh lints, checks schemas and builds; here is what needs none of its tools.
"""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from docker_scripts import DOCKER, load

from distrib import __version__
from distrib.cli import load_config
from distrib.options import parse_args
from launch.__main__ import main as launch
from launch.command import FINISHED, STOPPED, USER_ERROR, build_torchrun

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE, DEFINITION, COMPOSE, README = (
    (DOCKER / name).read_text(encoding="utf-8") for name in ("Dockerfile", "distrib.def", "compose.yaml", "README.md")
)
MANIFESTS = {file.name: file.read_text(encoding="utf-8") for file in sorted((DOCKER / "kubernetes").glob("*.yaml"))}
JOBS = {"job.yaml": "Job", "trainjob.yaml": "TrainJob", "pytorchjob.yaml": "PyTorchJob"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


entrypoint, requirements, validate = load("entrypoint"), load("requirements"), load("validate")


# The Dockerfile, the definition, and what the build sees


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: their names and their words, on one line each."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, words.strip()) for name, _, words in (line.partition(" ") for line in joined.splitlines() if line)]


def copied() -> list[str]:
    """What the Dockerfile copies out of the repository."""
    words = [words.split() for name, words in instructions() if name == "COPY" and "--from" not in words]
    return [source for *sources, _ in words for source in sources]


def argument(name: str) -> str:
    return next(
        words.partition("=")[2] for kind, words in instructions() if kind == "ARG" and words.startswith(f"{name}=")
    )


def ignored(path: str) -> bool:
    """As Docker reads its file: the last line that fits the path, or a folder above it, decides."""
    parts = path.split("/")
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    result = False
    for line in (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        deep = pattern.startswith("**/")
        fits = any(
            len(part.split("/")) == len(pattern.split("/")) and fnmatch.fnmatchcase(part, pattern)
            if not deep
            else fnmatch.fnmatchcase(part.rpartition("/")[2], pattern.removeprefix("**/"))
            for part in above
        )
        if fits:
            result = not line.startswith("!")
    return result


def test_the_build_sees_what_it_copies_and_no_more() -> None:
    sources = copied()
    assert {"pyproject.toml", "constraints.txt", "train.py", "distrib", "launch", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        files = [file for file in (ROOT / source).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        for file in files or [ROOT / source]:
            assert not ignored(str(file.relative_to(ROOT))), file
    for other in (
        ".git/config",
        "runs/a/config.yaml",
        ".venv/bin/python",
        "wandb/a",
        "tests/test_docker.py",
        "docs/a.md",
    ):
        assert ignored(other), other
    assert ignored("distrib/__pycache__/config.cpython-312.pyc")
    assert ignored("distrib/data/__pycache__/index.cpython-312.pyc")


def test_the_wheel_is_built_from_all_that_setup_reads() -> None:
    """setup.py, the licences and the text that pyproject.toml names are copied, or the build in the image fails."""
    named = {PROJECT["readme"], "setup.py", "LICENSE", "pyproject.toml", "train.py", "configs", "distrib", "launch"}
    assert named <= set(copied())
    files = re.search(r"%files\n(.*?)\n\n", DEFINITION, re.DOTALL)
    assert files is not None
    of_definition = {line.split()[0] for line in files[1].splitlines()}
    assert of_definition == set(copied())


def test_every_package_has_a_pin() -> None:
    """What the image installs by itself is pinned; pip gets the pins wherever it installs."""
    wanted = requirements.requirements(PROJECT, argument("EXTRAS").split(","))
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in wanted}  # type: ignore[index]
    assert names <= {name.lower() for name in PINS}, names
    assert "nvidia-dali-cuda130" in names
    for text in (DOCKERFILE, DEFINITION):
        installs = re.findall(r"pip install (.*)", text)
        assert installs
        # Written over two lines where the wheel is installed, which has its packages already.
        assert all("--constraint" in line or "--no-deps" in line for line in installs), installs
        assert "==" not in text, "a version that constraints.txt does not know of"


def test_the_code_in_an_image_knows_its_revision() -> None:
    for text, revision in ((DOCKERFILE, "${REVISION}"), (DEFINITION, "{{ REVISION }}")):
        assert re.search(
            rf'echo "{re.escape(revision)}" > "\$\(\S*python -c \'from distrib.root import REVISION; ', text
        )
    at = DOCKERFILE.index
    assert at("FROM python AS image") < at("ARG REVISION") < at('echo "${REVISION}"') < at("\nUSER ")


def test_dockerfile_and_definition_agree() -> None:
    for name in ("BASE", "EXTRAS", "VERSION", "REVISION"):
        assert f"    {name}={argument(name)}\n" in DEFINITION, name
    packages = re.compile(r"--no-install-recommends ([a-z0-9 -]+)")
    assert {word for line in packages.findall(DOCKERFILE) for word in line.split()} == {
        word for line in packages.findall(DEFINITION) for word in line.split()
    }
    said = dict(re.findall(r"\b([A-Z_]+)=(\S+)", next(w for n, w in instructions() if n == "ENV" and "NCCL" in w)))
    for name in said.keys() - {"IMAGENET_DIR"}:  # the host's is seen in Apptainer
        assert f"{name}={said[name]}" in DEFINITION, name
    ours = build_torchrun(1, "c.yaml", [], {}, 1).env
    assert {name: said[name] for name in ours if name != "OMP_NUM_THREADS"} == {
        name: value for name, value in ours.items() if name != "OMP_NUM_THREADS"
    }


def test_versions() -> None:
    assert argument("VERSION") == __version__
    cuda = re.search(r"nvidia/cuda:(\d+)", argument("BASE"))
    assert cuda is not None
    assert f"cuda{cuda[1]}" in argument("EXTRAS").split(",")
    images = re.findall(r"(?<![.\w])distrib:([\w.]+)", "".join([DOCKERFILE, COMPOSE, README, *MANIFESTS.values()]))
    assert set(images) == {__version__}
    assert not re.search(r":latest|image: *\w+$", "".join([DOCKERFILE, DEFINITION, COMPOSE, *MANIFESTS.values()]))


def test_the_image_is_not_root_and_keeps_its_entrypoint() -> None:
    made = dict(instructions()[-6:])
    assert made["USER"] == "${USER_ID}:${USER_ID}"
    assert argument("USER_ID").isdecimal()
    assert argument("USER_ID") != "0"
    assert made["ENTRYPOINT"] == '["tini", "-s", "--", "python", "/opt/entrypoint.py"]'
    assert "HEALTHCHECK" in made
    for name in JOBS:
        for container in containers(name):
            assert "command" not in container, "it would replace the entrypoint, and torchrun would say 1 for all"


# Requirements


def test_requirements() -> None:
    project = {"dependencies": ["torch>=2", "Some_Thing>1"], "optional-dependencies": {"a": ["x; python_version>'3'"]}}
    assert requirements.requirements(project, []) == ["torch>=2", "Some_Thing>1"]
    assert requirements.requirements(project, ["a"], ["some.thing"]) == ["torch>=2", "x; python_version>'3'"]
    with pytest.raises(SystemExit, match="EXTRAS: there is no extra b; there are a"):
        requirements.requirements(project, ["b"])
    with pytest.raises(SystemExit, match="PROVIDED: nothing requires y"):
        requirements.requirements(project, ["a"], ["y"])


# What the manifests run


def objects(name: str) -> dict[str, dict[str, Any]]:
    return {item["kind"]: item for item in yaml.safe_load_all(MANIFESTS[name])}


def containers(name: str) -> list[dict[str, Any]]:
    return [c for item in objects(name).values() for pod in validate.pods(item) for c in pod["spec"]["containers"]]


def words(name: str) -> list[str]:
    """What the job's containers run."""
    job = objects(name)[JOBS[name]]
    args = job["spec"]["trainer"]["args"] if name == "trainjob.yaml" else containers(name)[0]["args"]
    assert args[0] == "torchrun"
    return list(args[1:])


@pytest.mark.parametrize("name", JOBS)
def test_torchrun_and_our_parser_take_the_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import parse_args as parse_torchrun

    monkeypatch.setenv("IMAGENET_DIR", "/data")
    for entry in containers(name)[0].get("env", []):
        if "value" in entry and entry["name"].startswith("PET_"):
            monkeypatch.setenv(entry["name"], entry["value"])
    args = parse_torchrun(words(name))
    assert args.training_script == "train.py"
    if name != "pytorchjob.yaml":  # there the operator sets the variables
        assert args.rdzv_backend == "c10d"
        assert args.max_restarts == 3
        assert args.rdzv_conf == "join_timeout=1800"
    if name == "job.yaml":
        job, service = objects(name)["Job"], objects(name)["Service"]
        pod = job["spec"]["template"]
        host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert args.rdzv_endpoint.rpartition(":")[0] == host
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        assert args.nnodes == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
        assert args.nproc_per_node == containers(name)[0]["resources"]["limits"]["nvidia.com/gpu"]
    ours = parse_args(args.training_script_args)
    assert load_config(ours.config, ours.overrides).data.root == "/data"


def test_the_launcher_takes_composes_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("IMAGENET_DIR", "/data")
    command = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE))["services"]["train"]["command"].split()
    assert command[:2] == ["distrib", "launch"]
    assert launch([*command[2:], "--dry-run"]) == FINISHED
    assert "--nproc-per-node=1" in capsys.readouterr().out


def test_data_is_read_only_and_memory_is_shared() -> None:
    for name in JOBS:
        (container,) = containers(name)
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/data"]["readOnly"] is True
        assert "readOnly" not in mounts["/workspace/runs"]
        (pod,) = [pod for item in objects(name).values() for pod in validate.pods(item)]
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert str(pod["spec"]["securityContext"]["runAsUser"]) == argument("USER_ID")
    service = yaml.safe_load(COMPOSE)["services"]["train"]
    assert {volume["target"]: volume.get("read_only", False) for volume in service["volumes"]} == {
        "/data": True,
        "/workspace/runs": False,
        "/home/distrib/.cache": False,
    }


def test_a_save_fits_between_the_signal_and_the_kill() -> None:
    needed = int(build_torchrun(1, "c.yaml", [], {}, 1).env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    for name in JOBS:
        for item in objects(name).values():
            for pod in validate.pods(item):
                assert pod["spec"]["terminationGracePeriodSeconds"] > needed
    service = yaml.safe_load(COMPOSE)["services"]["train"]
    assert int(service["stop_grace_period"].removesuffix("s")) > needed
    given = [int(seconds) for seconds in re.findall(r"--stop-timeout ([0-9]+)", README)]
    assert given
    assert min(given) > needed


# Who starts again: the files, against the table in docker/README.md

EVICTED = "evicted"


def action(policy: dict[str, Any], end: int | str) -> str:
    """What a Job's podFailurePolicy says of a pod that ended so: the first rule that fits decides."""
    for rule in policy["rules"]:
        conditions = [condition["type"] for condition in rule.get("onPodConditions", [])]
        codes = rule.get("onExitCodes", {"values": []})
        assert codes.get("operator", "In") == "In"
        if (end == EVICTED and "DisruptionTarget" in conditions) or end in codes["values"]:
            return str(rule["action"])
    return "Count"


def of_job(end: int | str) -> str:
    spec = objects("job.yaml")["Job"]["spec"]
    assert spec["maxFailedIndexes"] == 0
    again = {
        "Ignore": "a new pod",
        "FailJob": "the job fails",
        "Count": f"a new pod, {spec['backoffLimitPerIndex']} times",
    }
    return again[action(spec["podFailurePolicy"], end)]


def of_trainjob(end: int | str) -> str:
    jobs = objects("trainjob.yaml")["TrainingRuntime"]["spec"]["template"]["spec"]
    (node,) = jobs["replicatedJobs"]
    spec = node["template"]["spec"]
    assert spec["backoffLimit"] == 0
    (rule,) = jobs["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    again = f"all pods anew, {jobs['failurePolicy']['maxRestarts']} times"
    return {"Ignore": "a new pod", "FailJob": "the job fails", "Count": again}[action(spec["podFailurePolicy"], end)]


def of_pytorchjob(end: int | str) -> str:
    worker = objects("pytorchjob.yaml")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "ExitCode"
    environ = {entry["name"]: entry["value"] for entry in worker["template"]["spec"]["containers"][0]["env"]}
    code = 0xBEEF if end == EVICTED else entrypoint.translate(end, environ)  # the operator's own, where there is none
    return "a new pod" if code >= 128 else "the job fails"


def of_compose(end: int | str) -> str:
    restart = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", yaml.safe_load(COMPOSE)["services"]["train"]["restart"])
    kind, _, times = restart.partition(":")
    assert kind == "on-failure"
    return "" if end == EVICTED else f"again, {times} times"


@pytest.mark.parametrize(
    ("row", "end"),
    [("75: stopped", STOPPED), ("2: the user", USER_ERROR), ("1: failed", 1), ("the node was drained", EVICTED)],
)
def test_who_starts_again_is_what_the_text_says(row: str, end: int | str) -> None:
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    _, *said = [cell.strip() for cell in line.strip("|").split("|")]
    assert said == [of_job(end), of_trainjob(end), of_pytorchjob(end), of_compose(end)]


# Schemas


def test_keys_that_a_model_does_not_know_are_found() -> None:
    before = {"a": [{"b": 1, "c": 2}], "d": {"e": None}}
    assert list(validate.lost(before, {"a": [{"b": 1}], "d": {}})) == [".a[0].c: unknown", ".d.e: unknown"]
    assert list(validate.lost(before, before)) == []
    tables = {"Job": {"n": "int", "inner": "dict(str, Job)", "all": "list[Job]", "pod": "K8sIoApiCoreV1Pod", "x": "Y"}}
    assert (
        list(validate.unfit({"n": 1, "inner": {"a": {"n": 2}}, "all": [{"n": 3}], "pod": {}}, "Job", tables, "j")) == []
    )
    bad = {"n": "1", "inner": {"a": {"m": 2}}, "all": [{"n": True}], "x": 1}
    assert list(validate.unfit(bad, "Job", tables, "j")) == [
        "j.n: '1' is no int",
        "j.inner.a.m: unknown",
        "j.all[0].n: True is no int",
        "j.x: of the unknown kind Y",
    ]


def test_every_object_is_checked() -> None:
    """By Kubernetes' schema or by Kubeflow's; the pods within Kubeflow's objects by Kubernetes' too."""
    names = [name for name, _, _ in validate.checks(DOCKER)]
    assert "compose.yaml" in names
    for file, text in MANIFESTS.items():
        for item in yaml.safe_load_all(text):
            assert f"{file} {item['kind']}" in names
    assert {"pytorchjob.yaml PyTorchJob's pod", "trainjob.yaml TrainingRuntime's pod"} <= set(names)
    script = (DOCKER / "check.sh").read_text(encoding="utf-8")
    assert all(package in script and package in PINS for _, package, _ in validate.checks(DOCKER))


def test_the_script_takes_its_words_alone() -> None:
    done = subprocess.run(["bash", str(DOCKER / "check.sh"), "--buidl"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: docker/check.sh takes --all or --lint, not --buidl\n"
