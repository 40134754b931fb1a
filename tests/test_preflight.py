"""distrib.preflight with real gloo ranks, one of them bad: named with its host, and every rank ends in its time."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from distrib import preflight as package
from distrib import program
from distrib.faults import BAD_MACHINE
from distrib.place import Place, publish
from distrib.preflight import clocks, disk, facts, links, preflight, sums
from distrib.runtime import leave, start

Plant = Callable[[], None]  # what makes a rank bad, called in its process

LINE = re.compile(
    r"preflight: (\d+) ranks on (\d+) nodes: alike, all-reduce right, [\d.e+-]+ GB/s, "
    r"clocks within \S+ m?s \([\d.]+ s\)"
)


# Real ranks


@dataclass(frozen=True)
class Ended:
    """How the ranks ended, and the lines that they printed."""

    codes: list[int | None]
    said: list[list[str]]
    bad_hosts: list[str]
    reported: list[int]  # to the launcher, in no order

    @property
    def lines(self) -> list[str]:
        return [line for lines in self.said for line in lines]


def run_ranks(
    tmp_path: Path,
    world: int = 3,
    bad: Mapping[int, Plant] | None = None,
    folders: Mapping[int, Path] | None = None,
    ranks_a_node: int = 1,
) -> Ended:
    """A preflight of ``world`` processes, rank r on "node{r // ranks_a_node}", which see one folder or others."""
    context = get_context("forkserver")  # imports torch once, for all ranks of the session
    context.set_forkserver_preload(["distrib.preflight"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        place = Place(rank, world, rank % ranks_a_node, ranks_a_node, ("127.0.0.1", port))
        folder = (folders or {}).get(rank, tmp_path / "runs" / "new")
        target = (place, folder, tmp_path, (bad or {}).get(rank))
        processes.append(context.Process(target=_rank, args=target))
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = [(tmp_path / f"said{rank}").read_text().splitlines() for rank in range(world)]
    hosts, reports = tmp_path / "bad hosts", tmp_path / "reports"
    reported = [int(line.split()[1]) for line in reports.read_text().splitlines()] if reports.exists() else []
    return Ended(codes, said, hosts.read_text().splitlines() if hosts.exists() else [], reported)


def _rank(place: Place, folder: Path, tmp_path: Path, plant: Plant | None) -> None:
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "SLURMD_NODENAME": f"node{place.rank // place.local_world}",
        "DISTRIB_BAD_HOSTS_FILE": str(tmp_path / "bad hosts"),
        "DISTRIB_EXIT_CODE_FILE": str(tmp_path / "reports"),
    }
    publish(place, os.environ)
    said = os.open(tmp_path / f"said{place.rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)

    def work(stop: object) -> None:
        runtime = start(place)
        if plant is not None:
            plant()
        try:
            preflight(runtime, folder, program.say)
        finally:
            leave()

    sys.exit(program.run(work))


# Ranks that are bad


def other_torch() -> None:
    torch.__version__ = "2.11.0"


def other_sources() -> None:
    facts.source_checksum = lambda: "0123456789ab"


def adds_wrong_numbers() -> None:
    add_up = sums.add_up

    def wrong(tensor: torch.Tensor) -> None:
        tensor[tensor.count_nonzero(dim=1).argmax(), 7] += 1  # in its own part
        add_up(tensor)

    sums.add_up = wrong


def gets_wrong_numbers() -> None:
    add_up = sums.add_up

    def wrong(tensor: torch.Tensor) -> None:
        add_up(tensor)
        tensor[0, 0] = float("nan")

    sums.add_up = wrong


def slow() -> None:
    delayed(lambda peer: 0.3)


def slow_with_1() -> None:
    delayed(lambda peer: 0.3 * (peer == 1))


def delayed(seconds: Callable[[int], float]) -> None:
    transfer = links.transfer

    def late(ours: torch.Tensor, theirs: torch.Tensor, peer: int) -> None:
        time.sleep(seconds(peer))
        transfer(ours, theirs, peer)

    links.transfer = late


def a_minute_ahead() -> None:
    clocks.wall_clock = lambda: time.time() + 60


def impatient() -> None:
    package.SECONDS = 8.0


def hangs_in_its_transfer() -> None:
    impatient()
    delayed(lambda peer: 100.0)


def hangs_at_its_disk() -> None:
    impatient()
    disk.os.fsync = lambda descriptor: time.sleep(100)


def dies() -> None:
    sums.add_up = lambda tensor: os._exit(9)


# What is found


@pytest.mark.parametrize(("world", "ranks_a_node"), [(2, 1), (4, 1), (4, 2)])
def test_all_is_well(world: int, ranks_a_node: int, tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, world, ranks_a_node=ranks_a_node)
    assert ended.codes == [0] * world, ended.said
    assert len(ended.lines) == 1
    found = LINE.fullmatch(ended.said[0][0])
    assert found, ended.said
    assert (int(found[1]), int(found[2])) == (world, world // ranks_a_node)
    assert not (tmp_path / "runs").exists()  # it was not there before
    assert ended.bad_hosts == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "runs/new").mkdir(parents=True)
    assert run_ranks(tmp_path, 2).codes == [0, 0]
    assert list((tmp_path / "runs/new").iterdir()) == []


def fails(ended: Ended, code: int, line: str) -> None:
    """All ranks end with ``code``, and rank 0 alone tells why, in one line."""
    assert ended.codes == [code] * len(ended.codes), ended.said
    assert ended.reported == [{1: BAD_MACHINE}.get(code, code)] * len(ended.codes)
    assert ended.said[1:] == [[]] * (len(ended.codes) - 1)
    (told,) = ended.said[0]
    assert re.fullmatch(f"error: preflight: {line}", told), told


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (other_torch, r"torch 2\.11\.0, 2 ranks have \d[\w.+]*"),
        (other_sources, "source code 0123456789ab, 2 ranks have [0-9a-f]{12}"),
    ],
)
def test_another_version(plant: Plant, what: str, tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, bad={1: plant})
    fails(ended, 2, f"rank 1 on node1 has {what}: install the same on all nodes")
    assert ended.bad_hosts == []  # it is the installation that is wrong
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (adds_wrong_numbers, "adds wrong numbers to the all-reduce"),
        (gets_wrong_numbers, "gets wrong numbers from the all-reduce"),
    ],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_wrong_sum(plant: Plant, reason: str, rank: int, tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, bad={rank: plant})
    fails(ended, 1, f"rank {rank} on node{rank} {reason}")
    assert ended.bad_hosts == [f"node{rank} rank {rank} on node{rank} {reason}"]


@pytest.mark.parametrize(("world", "rank"), [(3, 0), (4, 1)])
def test_a_slow_node(world: int, rank: int, tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, world, {rank: slow})
    reason = r"sends and receives [\d.]+ GB/s, half of the nodes [\d.]+ or more"
    fails(ended, 1, f"rank {rank} on node{rank} {reason}")
    (line,) = ended.bad_hosts
    assert re.fullmatch(f"node{rank} rank {rank} on node{rank} {reason}", line)


def test_a_slow_link_between_fast_nodes(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, 4, {2: slow_with_1})
    assert ended.codes == [0] * 4, ended.said
    warning, line = ended.said[0]
    assert re.match(r"preflight: the link between node1 and node2 carries [\d.]+ GB/s, half of the nodes have", warning)
    assert "1 warning, see above" in line
    assert ended.bad_hosts == []


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, folders={1: tmp_path / "elsewhere"})
    at = re.escape(str(tmp_path / "runs/new"))
    fails(ended, 2, f"run.dir {at} is another folder for rank 1 on node1 than for rank 0 on node0: set it to one on .*")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_one_node_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run_ranks(tmp_path, folders={2: tmp_path / "file/run"})
    fails(ended, 1, "rank 2 on node2 cannot write to .*/runs/new: Not a directory")
    (line,) = ended.bad_hosts
    assert line.startswith("node2 rank 2 on node2 cannot write to ")


def test_no_node_can_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run_ranks(tmp_path, 2, folders=dict.fromkeys(range(2), tmp_path / "file/run"))
    assert ended.codes == [2, 2]
    (line,) = ended.lines
    assert re.fullmatch(
        r"error: cannot write to .*/file/run from any node, such as node0: Not a directory: make room, or set run\.dir",
        line,
    )
    assert ended.bad_hosts == []


def test_a_clock_ahead(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, bad={1: a_minute_ahead})
    assert ended.codes == [0] * 3, ended.said
    warning, line = ended.said[0]
    assert re.match(r"preflight: the clock of rank 1 on node1 is (60\.0|59\.9) s ahead \(± [\d.]+ m?s\): ", warning)
    assert "clocks within 60.0 s" in line


def test_a_hang_ends(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, 3, {0: impatient, 1: impatient, 2: hangs_in_its_transfer})
    assert ended.codes == [1] * 3  # the hang itself would be longer than run_ranks waits
    assert ended.reported == [BAD_MACHINE] * 3
    assert ended.said[2] == ["error: preflight: rank 2 on node2 hangs: the exchange with rank 1 did not end within 8 s"]
    assert all(line.startswith("error: preflight: rank ") for line in ended.lines)
    assert ended.bad_hosts == []  # nobody can say whose fault it is


def test_a_disk_that_hangs_is_its_nodes_fault(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, 2, {0: impatient, 1: hangs_at_its_disk})
    assert ended.codes == [1] * 2
    reason = f"hangs: writing to {tmp_path}/runs/new did not end within 8 s"
    assert ended.said[1] == [f"error: preflight: rank 1 on node1 {reason}"]
    assert ended.bad_hosts == [f"node1 rank 1 on node1 {reason}"]


def test_a_rank_that_dies(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, bad={1: dies})
    assert ended.codes == [1, 9, 1]
    for rank in (0, 2):
        (line,) = ended.said[rank]
        assert line.startswith(f"error: preflight: rank {rank} on node{rank} fails in the all-reduce: ")
    assert ended.reported == [BAD_MACHINE] * 2
