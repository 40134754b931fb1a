"""``launch.yaml``: what is always the same on a cluster. Options on the command line win over it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distrib.config import UserError

NAME = "launch.yaml"
HOME = Path("~/.config/distrib")
NULL = ("", "null", "~")

Count = Annotated[int, Field(ge=1)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]  # what a shell can export


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Container(_Part):
    """An image for ``srun --container-image`` (enroot with pyxis), which the nodes' ranks run in."""

    image: str
    """What --container-image takes: registry#name:tag, or a .sqsh file."""
    mounts: tuple[str, ...] = ()
    """HOST:CONTAINER[:ro] folders, for --container-mounts; code and run folder are mounted in any case."""


class Profile(_Part):
    """All keys of ``launch.yaml``; none must be there."""

    nodes: Count | None = None
    """Nodes of a job."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a node, one rank each; 0: none."""
    procs_per_node: Count | None = None
    """Ranks of a node, where that is not its number of GPUs."""
    cpus_per_node: Count | None = None
    """Cores of a node; null: its share of them, as sinfo tells, or what Slurm gives."""
    mem: str | None = None
    """Memory of a node, as sbatch takes it: 200G; 0: all."""
    time: str | None = None
    """Time limit, as sbatch takes it: minutes, H:M:S, D-H; null: the partition's."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes that are not to be used."""
    tasks: Literal["node", "gpu"] = "node"
    """node: one torchrun a node; gpu: one task a rank, without torchrun."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often torchrun may start a node's workers again within an allocation."""
    failures: Count = 3
    """Starts that may fail at one step, before the job is not queued again."""
    exclude_failed: bool = False
    """Whether a node on which a rank failed is left out from then on."""
    signal_seconds: Annotated[int, Field(ge=1, le=65535)] = 120
    """How long before the time limit the ranks are asked to save: a step, a save and 60 s, at least."""
    numa: bool = False
    """torchrun --numa-binding=node: each rank on the cores and memory beside its GPU."""
    modules: tuple[str, ...] = ()
    """For `module load`, in this order."""
    setup: tuple[str, ...] = ()
    """Shell lines of the batch script before the start, on the first node."""
    environment: dict[Variable, str] = {}
    """Variables of all ranks."""
    nccl: dict[Variable, str] = {}
    """NCCL's variables without their NCCL_: {ib_hca: mlx5, socket_ifname: ib0}."""
    container: Container | None = None
    """Image and mounts."""
    python: str | None = None
    """The nodes' interpreter; null: the one that submits, or python3 in a container."""
    slurm: dict[str, str] = {}
    """Any other option of sbatch: {reservation: maint, exclusive: true}; true is an option without a value."""
    srun: dict[str, str] = {}
    """Any other option of srun."""
    data_on_nodes: bool = False
    """The data lies on the nodes only: it is not looked for where the job is submitted."""

    def variables(self) -> dict[str, str]:
        """What goes to the ranks' environment."""
        nccl = {f"NCCL_{key.upper().removeprefix('NCCL_')}": value for key, value in self.nccl.items()}
        return nccl | self.environment


def words(options: Mapping[str, str]) -> list[str]:
    """Options as Slurm's commands take them."""
    given = {key.replace("_", "-"): value for key, value in options.items() if value != "false"}
    return [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in given.items()]


@dataclass(frozen=True)
class Found:
    """A profile and the file that it stands in; None where there is no file."""

    profile: Profile
    path: Path | None = None


def find_profile(config: str, asked: str | None = None) -> Found:
    """The file ``asked`` for, else the first launch.yaml beside ``config``, here, or in ~/.config/distrib.

    Raises:
        UserError: the file is not there, is no YAML or has a key or value that it cannot have.
    """
    folders = (Path(config).parent, Path(), HOME)
    paths = [Path(asked)] if asked is not None else [folder / NAME for folder in folders]
    for path in (Path(os.path.expanduser(path)) for path in paths):
        if asked is not None or path.is_file():
            return Found(_read(path), path)
    return Found(Profile())


def changed(profile: Profile, values: Mapping[str, Any], where: str) -> Profile:
    """``profile`` with other values.

    Raises:
        UserError: a value that a key cannot have.
    """
    return _validated({**profile.model_dump(exclude_unset=True), **values}, where)


def _read(path: Path) -> Profile:
    try:
        # All values as they are written: YAML would make 43200 of 12:00:00. null is as if the key were not there.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a profile is a mapping (partition:, account:, …)")
    return _validated({key: value for key, value in (values or {}).items() if value not in NULL}, str(path))


def _validated(values: Mapping[str, Any], where: str) -> Profile:
    try:
        return Profile.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = Container.model_fields if key.startswith("container.") else Profile.model_fields
            near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key}; {hint}") from None
        raise UserError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from None
