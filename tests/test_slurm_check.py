"""What launch slurm looks at before it submits: partitions as sinfo prints them, and the mistakes that they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrib.config import UserError
from launch.record import Record
from launch.slurm.check import NodeType, check_alone, check_fits, check_writable, choose, read_partitions
from launch.slurm.options import Request
from launch.slurm.profile import Profile

PRINTED = """\
gpu*|20|96|gpu:h100:8(S:0-1)|2-00:00:00|up
gpu*|4|128+|gpu:h200:4,gpu:h100:4|2-00:00:00|up
cpu|50|64|(null)|infinite|up
old|2|32|gpu:4|n/a|down
mps|1|8|gpu:1,mps:100|30:00|up
a line that is none
"""


def request(**values: object) -> Request:
    return Request(Profile.model_validate(values), "")


def test_reads_partitions() -> None:
    assert read_partitions(PRINTED) == [
        NodeType("gpu", 20, 96, 8, 2880, True, True),
        NodeType("gpu", 4, 128, 8, 2880, True, True),
        NodeType("cpu", 50, 64, 0, float("inf"), True),
        NodeType("old", 2, 32, 4, float("inf"), False),
        NodeType("mps", 1, 8, 1, 30, True),
    ]


def test_chooses_the_default_partition() -> None:
    kinds = read_partitions(PRINTED)
    assert {kind.partition for kind in choose(kinds, request())} == {"gpu"}
    assert {kind.partition for kind in choose(kinds, request(partition="cpu,mps"))} == {"cpu", "mps"}
    assert choose([], request(partition="x")) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"partition": "gpus"}, "--partition gpus: the cluster has no such partition; did you mean gpu?"),
        ({"partition": "zzz"}, "no such partition; there are cpu, gpu, mps, old"),
        ({"partition": "old"}, "--partition old is down: choose another"),
        ({"nodes": 25}, "--nodes 25: partition gpu has 24; ask for fewer"),
        (
            {"gpus_per_node": 9},
            "--gpus-per-node 9: partition gpu has fewer than 1 such nodes; the most that a node has is 8",
        ),
        ({"partition": "cpu", "gpus_per_node": 1}, "the most that a node has is 0"),
        (
            {"nodes": 5, "cpus_per_node": 100},
            "--cpus-per-node 100: partition gpu has fewer than 5 such nodes; the most is 128",
        ),
        ({"time": "3-0"}, "--time 3-0: partition gpu allows 2880 minutes; ask for that"),
    ],
)
def test_mistakes_that_the_partition_shows(values: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as error:
        check_fits(choose(read_partitions(PRINTED), request(**values)), request(**values))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_fits() -> None:
    kinds = read_partitions(PRINTED)
    for asked in (request(nodes=24, gpus_per_node=8, time="2-0"), request(nodes=4, cpus_per_node=128)):
        check_fits(choose(kinds, asked), asked)
    check_fits([], request(nodes=1000))  # sinfo does not answer


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*/file/run: .*: set run.dir to a shared disk"):
        check_writable(Record(tmp_path / "file" / "run"))
    check_writable(Record(tmp_path / "run"))
    assert list((tmp_path / "run" / "launch").iterdir()) == []
    with pytest.raises(UserError, match="line break"):
        check_writable(Record(tmp_path / "a\nb"))


@pytest.mark.parametrize(
    ("squeue", "expected"),
    [
        (
            "echo '12|RUNNING|N/A|N/A|n1|None'",
            "job 12 of .*/run is running already: `python -m launch stop .*` stops it",
        ),
        ("echo '12|PENDING|N/A|N/A||Priority'", "job 12 of .*/run is pending already"),
        ("echo '12|COMPLETED|N/A|N/A|n1|None'", None),
        ("echo '13|RUNNING|N/A|N/A|n1|None'", None),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "nobody can tell whether job 12 is over .*try again"),
    ],
)
def test_a_job_of_the_run_is_there(
    squeue: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path / "run")
    check_alone(record)  # without jobs nobody is asked
    record.add("submitted", {"job": "12"})
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if expected is None:
        check_alone(record)
    else:
        with pytest.raises(UserError, match=expected):
            check_alone(record)


def test_one_of_several_partitions_must_fit() -> None:
    kinds = [NodeType(name, 4, 8, gpus, 60, True) for name, gpus in (("a", 0), ("b", 8))]
    for asked in (request(partition="a,b", nodes=4, gpus_per_node=8), request(partition="a,b", nodes=4)):
        check_fits(choose(kinds, asked), asked)
    with pytest.raises(UserError, match="partition a has 4;"):
        check_fits(kinds, request(partition="a,b", nodes=8))
    check_fits([*kinds, NodeType("c", 9, 8, 0, 60, False)], request(nodes=4))
    with pytest.raises(UserError):  # it is down
        check_fits([*kinds, NodeType("c", 9, 8, 0, 60, False)], request(nodes=9))
