"""launch slurm: what its options and a cluster's profile say together, and the mistakes in both."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrib.config import UserError
from launch.slurm.options import Request, minutes, parse, read_request
from launch.slurm.profile import NAME, Profile, find_profile, words


def request(tmp_path: Path, *words: str, profile: str = "") -> Request:
    (tmp_path / "c.yaml").write_text("{}")
    if profile:
        (tmp_path / NAME).write_text(profile)
    return read_request(parse(["--config", str(tmp_path / "c.yaml"), *words]))


def test_nothing_asked_for_is_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.slurm.profile.HOME", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    found = request(tmp_path)
    assert (found.nodes, found.procs, found.world, found.where) == (1, 1, 1, "")
    assert found.profile == Profile(slurm={}, srun={})


def test_options_win_over_the_profile(tmp_path: Path) -> None:
    profile = "{nodes: 2, gpus_per_node: 8, partition: g, time: 12:00:00, qos: null, slurm: {nice: 5, exclusive: true}}"
    found = request(tmp_path, "--nodes", "4", "--slurm", "nice=9", "--slurm", "no_kill", profile=profile)
    assert (found.nodes, found.procs, found.world) == (4, 8, 32)
    assert found.profile.partition == "g"
    assert (found.profile.time, found.profile.qos) == ("12:00:00", None)
    assert words(found.profile.slurm) == ["--nice=9", "--exclusive", "--no-kill"]
    assert found.where == str(tmp_path / NAME)


def test_processes_that_are_no_gpus(tmp_path: Path) -> None:
    found = request(tmp_path, "--gpus-per-node", "0", "--procs-per-node", "3")
    assert found.profile.gpus_per_node == 0
    assert found.world == 3


def test_the_first_profile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here, home = (tmp_path / name for name in ("configs", "here", "home"))
    for folder in (beside, here, home):
        folder.mkdir()
        (folder / NAME).write_text(f"partition: {folder.name}")
    monkeypatch.setattr("launch.slurm.profile.HOME", home)
    monkeypatch.chdir(here)
    config = str(beside / "c.yaml")
    for expected in (beside, here, home):
        found = find_profile(config)
        assert found.profile.partition == expected.name
        assert found.path is not None
        found.path.unlink()
    assert find_profile(config).path is None


def test_a_profiles_variables() -> None:
    profile = Profile(nccl={"ib_hca": "mlx5", "NCCL_DEBUG": "INFO"}, environment={"A": "a b", "NCCL_DEBUG": "WARN"})
    assert profile.variables() == {"NCCL_IB_HCA": "mlx5", "NCCL_DEBUG": "WARN", "A": "a b"}


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90), ("90:30", 90.5), ("12:00:00", 720), ("1-0", 1440), ("1-12", 2160), ("2-01:30", 2970),
        ("1-00:00:30", 1440.5), ("UNLIMITED", float("inf")), ("infinite", float("inf")),
    ],
)  # fmt: skip
def test_time_limits(time: str, expected: float) -> None:
    assert minutes(time) == expected


@pytest.mark.parametrize("time", ["", "12h", "1:2:3:4", "-5", "0", "0:00:00", "1-", "a-b", "1.5"])
def test_times_that_are_none(time: str) -> None:
    with pytest.raises(UserError, match=r"--time .* is no time limit: sbatch takes minutes"):
        minutes(time)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes", "0"], "--nodes: '0' is not a whole number of 1 or more"),
        (["--nodes", "two"], "--nodes: 'two' is not a whole number"),
        (["--gpus-per-node", "-1"], "gpus-per-node"),
        (["--time", "12h"], "--time '12h' is no time limit"),
        (["--tasks", "rank"], "tasks: Input should be 'node' or 'gpu', got 'rank'"),
        (["--slurm", "=3"], "--slurm takes key=value"),
        (["--slurm", "nodes=3"], "--slurm nodes: write --nodes"),
        (["--slurm", "cpus_per_task=3"], "--slurm cpus-per-task: the launcher says that itself: leave it out"),
        (["--slurm", "requeue=false"], "--slurm requeue: the launcher says that itself"),
        (["--srun", "output=x"], "--srun output: the launcher says that itself"),
        (["--time", "2"], "--time 2 is no longer than the 120 s before its end"),
        (["--srun", "a b"], "--srun takes key=value"),
        (["--signal-seconds", "100000"], "signal_seconds"),
        (["--partion", "x"], "did you mean --partition?"),
        (["--profile", "/none.yaml"], "cannot read /none.yaml: No such file"),
    ],
)
def test_mistakes_in_options(words: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        request(tmp_path, *words)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("partion: gpu", "unknown key partion; did you mean partition?"),
        ("container: {image: a, mount: b}", "unknown key container.mount; did you mean mounts?"),
        ("nodes: many", "nodes: Input should be a valid integer"),
        ("zzz: 1", "unknown key zzz; there are nodes, "),
        ("- a", "a profile is a mapping"),
        ("a: [", "not valid YAML"),
        ("time: 12h", "no time limit"),
        ("container: {}", "container.image: Field required"),
        ("environment: {'A;touch x': 1}", "environment.A;touch x"),
        ("nccl: {ib-hca: mlx5}", "nccl.ib-hca"),
    ],
)
def test_mistakes_in_a_profile(profile: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        request(tmp_path, profile=profile)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_none_where_none_may_be(tmp_path: Path) -> None:
    assert request(tmp_path, "--restarts", "0").profile.restarts == 0


def test_what_sbatch_would_read_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"SBATCH_ACCOUNT": "a", "SBATCH_PARTITION": "p", "SBATCH_SIGNAL": "TERM@5", "SBATCH_QOS": ""}
    (tmp_path / NAME).write_text("partition: gpu")
    found = read_request(parse(["--config", "c.yaml"]), environ).profile
    assert (found.account, found.partition, found.qos, found.slurm) == ("a", "gpu", None, {})


def test_each_option_of_the_profile_is_a_key_of_it() -> None:
    from launch.slurm.options import OF_PROFILE

    keys = [flag[2:].replace("-", "_") for flag, _, _ in OF_PROFILE]
    assert set(keys) <= set(Profile.model_fields)
