"""Which rank a process is: torchrun's, srun's and mpirun's variables, whole, in part, and nonsense."""

from __future__ import annotations

import zlib

import pytest

from distrib.config import UserError
from distrib.place import Place, count_starts, find_place, first_host, publish

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
# What srun -N 2 -n 3 gives its last task.
SRUN = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"}
SRUN |= {"SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_STEP_NODELIST": "gpu[07,09]"}
MPIRUN = {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK")}
MPIRUN |= {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}


def port(job: str = "", step: str = "") -> int:
    return 20000 + zlib.crc32(f"{job} {step}  ".encode()) % 10000


def refused(environ: dict[str, str]) -> str:
    with pytest.raises(UserError) as error:
        find_place(environ)
    assert "\n" not in str(error.value)
    assert not error.value.everywhere  # nobody knows who is rank 0
    return str(error.value)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 4, 1, 2, ("node0", 29400))),
        ({**TORCHRUN, **SRUN}, Place(3, 4, 1, 2, ("node0", 29400))),  # torchrun within a job
        ({**SRUN, **TORCHRUN, "SLURM_PROCID": "9"}, Place(3, 4, 1, 2, ("node0", 29400))),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        (SRUN, Place(2, 3, 0, 1, ("gpu07", port("41", "2")))),
        ({**SRUN, "MASTER_ADDR": "other", "MASTER_PORT": "7"}, Place(2, 3, 0, 1, ("other", 7))),
        ({**SRUN, "SLURM_TASKS_PER_NODE": "1(x3)"}, Place(2, 3, 0, 1, ("gpu07", port("41", "2")))),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, Place(1, 2, 1, 2, ("127.0.0.1", port()))),
        ({"SLURM_NTASKS": "1"}, Place()),  # salloc -n 1
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "9", "ENVIRONMENT": "BATCH"}, Place()),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place()),  # srun -n 1 in a job of three
        ({"SLURM_JOB_ID": "9"}, Place()),
        (MPIRUN, Place(1, 2, 1, 2, ("127.0.0.1", port()))),
        ({**MPIRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, Place(1, 2, 1, 2, ("127.0.0.1", port()))),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, Place()),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
            Place(0, 2, 0, 2, ("127.0.0.1", port())),
        ),
    ],
)
def test_finds_its_place(environ: dict[str, str], expected: Place) -> None:
    assert find_place(environ) == expected


@pytest.mark.parametrize("name", list(TORCHRUN))
def test_torchruns_variables_in_part(name: str) -> None:
    line = refused({key: value for key, value in TORCHRUN.items() if key != name})
    assert f"{name} is not" in line
    assert "start with torchrun, or unset " in line
    others = ("MASTER_ADDR", "MASTER_PORT")
    if name not in others:
        assert name in refused({name: TORCHRUN[name]}) or TORCHRUN[name] == "1"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", " ", "x", "1.0", "-1", "0x1", "1e3", "None", "٣", "9" * 30])
def test_numbers_that_are_none(name: str, value: str) -> None:
    assert refused({**TORCHRUN, name: value}).startswith(f"{name} is {value!r}, which is no number")


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({**TORCHRUN, "RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE 5 exceeds WORLD_SIZE 4"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but this process was not started by srun"),  # salloc -n 2
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "8"}, "srun python train.py"),
        ({**SRUN, "SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
        ({**SRUN, "SLURM_PROCID": "3"}, "SLURM_PROCID=3, SLURM_NTASKS=3"),
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({**SRUN, "SLURM_TASKS_PER_NODE": "2x"}, "SLURM_TASKS_PER_NODE is '2x'"),
        ({**SRUN, "SLURM_NODEID": "7"}, "SLURM_NODEID 7"),
        ({**SRUN, "SLURM_LOCALID": "1"}, "SLURM_LOCALID=1"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "but not SLURM_LOCALID"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "set MASTER_ADDR"),
        # The shell of a batch script is task 0 to Slurm; the other seven were never started.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}, "srun python"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "but not OMPI_COMM_WORLD_RANK"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": ""}, "OMPI_COMM_WORLD_LOCAL_SIZE is ''"),
        ({**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4"}, "set MASTER_ADDR"),
        ({"PMI_RANK": "0"}, "but not PMI_SIZE"),
    ],
)
def test_no_usable_rank_is_an_error(environ: dict[str, str], part: str) -> None:
    assert part in refused(environ)


def test_hydras_ranks_within_a_slurm_job() -> None:
    """Its proxies are srun's tasks, one a host, and their variables reach the ranks."""
    hydra = {"PMI_RANK": "13", "PMI_SIZE": "16", "MPI_LOCALRANKID": "5", "MPI_LOCALNRANKS": "8"}
    slurm = {**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x2)"}
    assert find_place({**slurm, **hydra}) == Place(13, 16, 5, 8, ("gpu07", port("41", "2")))
    pmi2 = {"PMI_RANK": "1", "PMI_SIZE": "2"}  # srun's own
    assert find_place({**slurm, **pmi2}) == Place(1, 2, 0, 1, ("gpu07", port("41", "2")))


def test_runs_that_share_a_host_meet_at_ports_of_their_own() -> None:
    starts = [
        {**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (41, 42, 43) for step in range(4)
    ]
    ports = [place.master[1] for start in starts if (place := find_place(start)).master is not None]
    assert len(set(ports)) == len(starts)
    assert all(20000 <= port < 30000 for port in ports)


def test_publishes_torchruns_variables() -> None:
    environ = dict(SRUN)
    publish(find_place(SRUN), environ)
    assert find_place({name: value for name, value in environ.items() if "SLURM" not in name}) == find_place(SRUN)
    environ = {}
    publish(Place(), environ)
    assert environ == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert find_place(environ) == Place()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a,b", "a"),
        ("rack3-[12]", "rack3-12"),
        ("n[1-2]-ib,m", "n1-ib"),
        ("a.b.example.org", "a.b.example.org"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(("count", "starts"), [("3", 3), ("0", 0), ("", 0), ("x", 0), (None, 0)])
def test_how_often_slurm_has_started_a_job(count: str | None, starts: int) -> None:
    assert count_starts({} if count is None else {"SLURM_RESTART_COUNT": count}) == starts
