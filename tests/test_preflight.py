"""distrib.preflight with real gloo ranks, one of them bad: named with its host, and every rank ends in its time."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import runs
import torch

from distrib import preflight as package
from distrib import program
from distrib.place import Place, publish
from distrib.preflight import clocks, disk, facts, links, preflight, sums
from distrib.runtime import Runtime, leave, start
from launch.__main__ import main as launch
from launch.preflight import build

Plant = Callable[[], None]  # what makes a rank bad, called in its process

GIB = 1 << 30
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
    hosts = tmp_path / "bad hosts"
    return Ended(codes, said, hosts.read_text().splitlines() if hosts.exists() else [])


def _rank(place: Place, folder: Path, tmp_path: Path, plant: Plant | None) -> None:
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "SLURMD_NODENAME": f"node{place.rank // place.local_world}",
        "DISTRIB_BAD_HOSTS_FILE": str(tmp_path / "bad hosts"),
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
    package.SECONDS = 3.0


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
    began = time.monotonic()
    ended = run_ranks(tmp_path, 3, {0: impatient, 1: impatient, 2: hangs_in_its_transfer})
    assert time.monotonic() - began < 30
    assert ended.codes == [1] * 3
    assert ended.said[2] == ["error: preflight: rank 2 on node2 hangs: the exchange with rank 1 did not end within 3 s"]
    assert all(line.startswith("error: preflight: rank ") for line in ended.lines)
    assert ended.bad_hosts == []  # nobody can say whose fault it is


def test_a_disk_that_hangs_is_its_nodes_fault(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, 2, {0: impatient, 1: hangs_at_its_disk})
    assert ended.codes == [1] * 2
    reason = f"hangs: writing to {tmp_path}/runs/new did not end within 3 s"
    assert ended.said[1] == [f"error: preflight: rank 1 on node1 {reason}"]
    assert ended.bad_hosts == [f"node1 rank 1 on node1 {reason}"]


def test_a_rank_that_dies(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, bad={1: dies})
    assert ended.codes == [1, 9, 1]
    for rank in (0, 2):
        (line,) = ended.said[rank]
        assert line.startswith(f"error: preflight: rank {rank} on node{rank} fails in the all-reduce: ")


# Through the programs


def two_nodes(folders: Sequence[Path], *words: str) -> list[subprocess.CompletedProcess[str]]:
    """A program as the one rank of each of two "nodes"; ``{folder}`` in its words is the node's run folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return together(
        [[word.format(folder=folder) for word in words] for folder in folders],
        [{**common, "RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"} for rank in range(2)],
    )


def together(
    commands: Sequence[Sequence[str]], environs: Sequence[Mapping[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=runs.ROOT,
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for words, environ in zip(commands, environs, strict=True)
    ]
    try:
        said = [process.communicate(timeout=runs.TIMEOUT) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                runs.kill_group(process)
    return [subprocess.CompletedProcess(p.args, p.returncode, *s) for p, s in zip(processes, said, strict=True)]


SYNTHETIC = ("data.loader=synthetic", "data.synthetic.train=60", "data.synthetic.val=10", "model.num_classes=10")
TRAIN = ("train.py", *runs.SMALL, *SYNTHETIC, "train.steps=1", "run.dir={folder}")


def test_training_begins_with_it_on_two_nodes(tmp_path: Path) -> None:
    done = two_nodes([tmp_path / "run"] * 2, *TRAIN)
    assert [one.returncode for one in done] == [0, 0], done
    first = done[0].stdout.splitlines()[0]
    assert LINE.fullmatch(first), done[0].stdout
    assert "preflight" not in done[1].stdout + done[1].stderr
    assert runs.newest_checkpoint(tmp_path / "run").is_file()


def test_training_does_not_begin_where_the_run_folder_is_not_shared(tmp_path: Path) -> None:
    done = two_nodes([tmp_path / "run", tmp_path / "elsewhere"], *TRAIN)
    assert [one.returncode for one in done] == [2, 2], done
    line = f"error: preflight: run.dir {tmp_path}/run is another folder for rank 1 on node1 than for rank 0 on node0: "
    assert done[0].stderr.startswith(line)
    assert done[0].stderr.count("\n") == 1
    assert done[1].stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_training_does_not_begin_on_a_bad_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTRIB_BAD_HOSTS_FILE", str(tmp_path / "hosts"))
    done = two_nodes([tmp_path / "run", tmp_path / "file/run"], *TRAIN)
    assert [one.returncode for one in done] == [1, 1], done
    line = f"rank 1 on node1 cannot write to {tmp_path}/run: Not a directory\n"
    assert [one.stderr for one in done] == [f"error: preflight: {line}", ""]
    assert (tmp_path / "hosts").read_text() == f"node1 {line}"
    assert not (tmp_path / "run").exists()


def test_one_process_may_ask_for_it(tmp_path: Path) -> None:
    words = [word.format(folder=tmp_path / "run") for word in TRAIN]
    (done,) = together([[*words, "launch.preflight=true"]], [{"CUDA_VISIBLE_DEVICES": ""}])
    assert done.returncode == 0, done
    assert re.match(r"preflight: 1 rank on 1 node: [\d.,]+ GiB free for the run \([\d.]+ s\)\n", done.stdout)


@pytest.mark.parametrize(
    ("asked", "world", "local_world", "wanted"),
    [("auto", 4, 4, False), ("auto", 4, 2, True), (True, 1, 1, True), (False, 4, 2, False)],
)
def test_when_it_is_wanted(asked: bool | str, world: int, local_world: int, wanted: bool) -> None:
    runtime = Runtime(0, world, 0, local_world, torch.device("cpu"))
    assert package.is_wanted(asked, runtime) is wanted  # type: ignore[arg-type]


def test_launch_on_two_machines(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    words = ["-m", "launch", "preflight", "--procs", "2", "--run-dir", str(tmp_path / "run"), "--nnodes", "2"]
    environ = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = together([[*words, "--rdzv-endpoint", endpoint]] * 2, [environ] * 2)
    assert [one.returncode for one in done] == [0, 0], done
    (table,) = [one.stdout for one in done if one.stdout]
    head, *ranks, versions = table.splitlines()
    assert head.split() == ["rank", "host", "GPU", "memory", "free", "GB/s", "clock"]
    assert [line.split()[0] for line in ranks] == ["0", "1", "2", "3"]
    assert f"torch {torch.__version__}" in versions
    (line,) = [line for one in done for line in one.stderr.splitlines() if line.startswith("preflight: ")]
    assert LINE.fullmatch(line)
    assert "4 ranks on 2 nodes" in line
    assert list(tmp_path.iterdir()) == []


def test_launch_alone_hands_on_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["-m", "launch", "preflight", "--run-dir", str(tmp_path / "file/run")]
    (done,) = together([words], [{"CUDA_VISIBLE_DEVICES": ""}])
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write to {tmp_path}/file/run: Not a directory: make room, or set run.dir\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "2"], "--nnodes needs --procs, and --rdzv-endpoint HOST:PORT"),
        (["--nnodes", "2", "--procs", "2"], "--nnodes needs --procs, and --rdzv-endpoint HOST:PORT"),
        (["--procs", "2", "--rdzv-endpoint", "a:1"], "--rdzv-endpoint is for several machines"),
        (["--procs", "0"], "argument --procs: '0' is not a whole number of 1 or more"),
    ],
)
def test_launchs_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["preflight", *words, "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_launchs_command() -> None:
    alone = build(None, "runs/a", 1, None, {}, 8)
    assert alone.argv == (sys.executable, "-m", "distrib.tools.preflight", "--run-dir", "runs/a")
    here = str(build(4, "runs/a", 1, None, {}, 8))
    assert here.startswith("OMP_NUM_THREADS=2 ")
    assert " --standalone --local-addr=localhost --nproc-per-node=4 " in here
    both = build(4, "runs/a", 2, "gpu01:29400", {"OMP_NUM_THREADS": "1"}, 8)
    assert not both.env
    assert {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=gpu01:29400"} <= set(both.argv)
    assert both.argv[-4:] == ("-m", "distrib.tools.preflight", "--run-dir", "runs/a")


# Parts of it, on numbers


def make_ranks(*hosts: str, gpu: str = "H200", held: int = GIB // 2) -> list[facts.Rank]:
    counts: dict[str, int] = {}
    ranks = []
    for number, host in enumerate(hosts):
        local = counts[host] = counts.get(host, -1) + 1
        ranks.append(facts.Rank(number, local, host, {"torch": "2"}, {"GPU": gpu}, 140 * GIB, 141 * GIB, held))
    return ranks


def test_nodes_of_ranks_in_any_order() -> None:
    def numbers(ranks: list[facts.Rank]) -> list[list[int]]:
        return [[rank.rank for rank in node] for node in facts.group(ranks)]

    assert numbers(make_ranks("a", "a", "b", "b")) == [[0, 1], [2, 3]]
    assert numbers(make_ranks("a", "b", "a", "b", "a")) == [[0, 2, 4], [1, 3]]
    two_agents = [facts.Rank(k, k % 2, "a", {}, {}) for k in range(4)]
    assert numbers(two_agents) == [[0, 1], [2, 3]]


def changed(rank: facts.Rank, **values: object) -> facts.Rank:
    return facts.Rank(**{**vars(rank), **values})  # type: ignore[arg-type]


def test_gpus_that_are_taken_or_missing() -> None:
    ranks = make_ranks("a", "a", "b", "b")
    assert facts.check_gpus(ranks) == []
    ranks[2] = changed(ranks[2], held=12 * GIB)
    (bad,) = facts.check_gpus(ranks)
    assert str(bad) == "rank 2 on b has a GPU of which other processes hold memory: 12.0 GiB are in use"
    ranks[1] = changed(ranks[1], machine={"GPU": facts.NONE})
    assert str(facts.check_gpus(ranks)[0]) == "rank 1 on a has no GPU, rank 0 on a has one"
    everywhere = make_ranks("a", "a", held=5 * GIB)  # a node that others use, too
    assert [bad.rank.rank for bad in facts.check_gpus(everywhere)] == [0, 1]
    assert facts.check_gpus(make_ranks("a", "b", gpu=facts.NONE)) == []


def test_differences_are_told_with_the_odd_one() -> None:
    ranks = make_ranks("a", "b", "c")
    assert facts.differences(ranks) == []
    ranks[0] = changed(ranks[0], machine={"GPU": "H100", "driver": "575"})
    told = facts.differences(ranks)
    assert told[0] == "rank 0 on a has GPU H100, 2 ranks have H200: the slowest sets the pace"
    assert told[1] == "rank 0 on a has driver 575, 2 ranks have none"
    ranks[1] = changed(ranks[1], machine={"GPU": "A100"})
    assert "(one of 2 ranks that differ), rank 0 on a has H100" in facts.differences(ranks)[0]


def test_who_is_to_blame_for_a_wrong_sum() -> None:
    assert sums.wrong_ranks([[], [], []]) == []
    assert [rank for rank, _ in sums.wrong_ranks([[1], [1], [1]])] == [1]
    assert [rank for rank, _ in sums.wrong_ranks([[1], []])] == [0]
    assert [rank for rank, _ in sums.wrong_ranks([[0, 1, 2], [], []])] == [0]
    assert [rank for rank, _ in sums.wrong_ranks([[0, 2], [0, 2], [0, 2], [0]])] == [0, 2]


@pytest.mark.parametrize("nodes", range(1, 9))
def test_the_ring_has_each_neighbour_once(nodes: int) -> None:
    rounds = links.ring(nodes)
    assert len(rounds) <= 3
    for pairs in rounds:
        ends = [node for pair in pairs for node in pair]
        assert len(ends) == len(set(ends))
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(pairs) == len(set(pairs)) == (nodes if nodes > 2 else nodes - 1)


def measured(nodes: int, speed: Callable[[int, int], float]) -> links.Links:
    pairs = [pair for pairs in links.ring(nodes) for pair in pairs]
    return links.Links(nodes, {pair: speed(*pair) for pair in pairs})


def test_which_nodes_are_slow() -> None:
    def without(*slow: int) -> Callable[[int, int], float]:
        return lambda a, b: 1.0 if slow and (a in slow or b in slow) else 10.0

    assert measured(4, without()).slow() == []
    assert measured(3, without(1)).slow() == [1]
    assert measured(8, without(7)).slow() == [7]
    assert measured(2, without(1)).slow() == []  # nobody to compare with
    between = measured(7, without(0, 2))  # 1 has slow neighbours only
    assert sorted(between.slow()) == [0, 1, 2]
    again = between.doubtful()
    assert sorted(a for a, _ in again) == [0, 1, 2]
    assert len({b for _, b in again} - {0, 1, 2}) == 3
    between.note({pair: 10.0 if pair[0] == 1 else 1.0 for pair in again})
    assert sorted(between.slow()) == [0, 2]


def test_a_moments_delay_is_not_slow() -> None:
    found = measured(3, lambda a, b: 0.1 if 1 in (a, b) else 1.0)  # 40 ms, not 4
    assert found.slow() == [1]
    assert links.Links(3, found.speeds, bytes=4_000_000, spared=0.03).slow() == [1]
    assert links.Links(3, found.speeds, bytes=4_000_000, spared=0.05).slow() == []


def test_a_slow_link_is_not_its_nodes() -> None:
    found = measured(5, lambda a, b: 1.0 if {a, b} == {2, 3} else 10.0)
    assert found.slow() == []
    assert found.slow_links() == [((2, 3), 1.0)]
    assert found.doubtful() == []
    assert links.in_rounds([(2, 3), (0, 1), (3, 4)]) == [[(2, 3), (0, 1)], [(3, 4)]]
    found.note({(3, 2): 9.0})
    assert found.slow_links() == []


def test_clocks_are_bounded_from_both_sides() -> None:
    # True times of coming and leaving; nobody leaves before all have come.
    rounds = [((0.0, 1.0), (0.9, 1.2), (0.5, 1.0)), ((2.0, 2.2), (2.1, 2.15), (2.05, 2.3))]
    ahead = (0.0, 7.0, -0.5)
    ranks = [[(come + by, go + by) for come, go in (turn[k] for turn in rounds)] for k, by in enumerate(ahead)]
    found = clocks.judge(ranks)
    middle = found[0].skew
    for clock, by in zip(found, ahead, strict=True):
        assert abs(clock.skew - middle - by) <= clock.accuracy + 1e-9
        assert clock.accuracy < 0.3  # the shortest meeting took 0.15 to 0.3
    assert clocks.judge([[(1.0, 2.0)]]) == [clocks.Clock(0.0, 0.0)]


def test_a_checksum_of_the_sources() -> None:
    assert re.fullmatch("[0-9a-f]{12}", facts.source_checksum())
    assert facts.source_checksum() == facts.source_checksum()
