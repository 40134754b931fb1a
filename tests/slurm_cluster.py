"""A real Slurm cluster on this machine, for tests: several nodes, started as root from Debian's packages.

    with Cluster(folder) as cluster:
        job = cluster.submit("--nodes=2", "--wrap", "srun hostname")
        cluster.wait(lambda: cluster.job(job)["JobState"] == "COMPLETED")

By hand: ``python tests/slurm_cluster.py --folder DIR``, until Ctrl-C.

Each node, and each daemon, is the first process of a process namespace of its own. The kernel ends whatever is in such
a namespace with its first process, daemons of jobs too, so a node's death is a real one and nothing outlives the
cluster, not even where its owner is killed. Mounts and networks lie in namespaces and go with them.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import slurm_files

T = TypeVar("T")

PACKAGES = "apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server iproute2"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "setpriv", "ip")
PROGRAMS_OF_ACCOUNTING = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db")
SECONDS = 60  # for anything that is waited for
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

_numbers = itertools.count()


def available(accounting: bool = False) -> str:
    """Why no cluster can run here; empty where it can."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root"
    programs = PROGRAMS + (PROGRAMS_OF_ACCOUNTING if accounting else ())
    missing = [name for name in programs if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)}: {PACKAGES}"
    trial = subprocess.run([*_unshare("--uts", "--net"), "true"], capture_output=True, text=True)
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else ""


class Cluster:
    """Slurm with nodes n1, n2, …; each claims 16 CPUs, 64 GB and ``gpus`` GPUs (device files that swallow all).

    Partitions: ``debug``, the default, whose jobs are requeued for those of ``high`` after ``grace`` seconds; ``high``;
    and ``small``: node n1 alone, ten minutes.

    A node has its own host name, processes and /dev/shm; the other files are shared, as on a shared disk. The nodes
    know each other by name.

    Args:
        folder: for all files of the cluster; made where absent. The path of a socket in it must fit 108 bytes.
        nodes: at most 12.
        accounting: with a database, so that ``sacct`` answers. Without it ``sacct`` is an error.
        namespaces: each node has a network of its own, on a switch; ``cut`` needs it. Else they share this machine's
            loopback under addresses of their own.
        user_signal: whether a job that is preempted gets the signal that ``sbatch --signal`` asks for
            (``preempt_send_user_signal``). Without, it gets SIGTERM only.
        grace: seconds from the signal to the end of a job that is preempted.

    The thread that starts a cluster must live as long as the cluster does: the kernel ends it with that thread.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        nodes: int = 4,
        gpus: int = 8,
        accounting: bool = False,
        namespaces: bool = False,
        user_signal: bool = True,
        grace: int = 30,
    ) -> None:
        if not 1 <= nodes <= 12:
            raise ValueError(f"{nodes} nodes: 1 to 12 are possible")
        self.folder = Path(folder).resolve()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.namespaces = namespaces
        self.accounting = accounting
        # Clusters of other processes may run beside this one. A process id is unique among them.
        number = next(_numbers) % 16
        base = ipaddress.IPv4Address("10.128.0.0" if namespaces else "127.64.0.0")
        first = base + (os.getpid() % 2**15) * 256 + number * 16 + 1
        self.head = str(first)
        self.addresses = {node: str(first + 1 + index) for index, node in enumerate(self.nodes)}
        self.link = f"slurm{os.getpid()}-{number:x}"  # of this machine, to the switch
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._settings = slurm_files.Settings(
            folder=self.folder,
            host=socket.gethostname(),
            head=self.head,
            addresses=self.addresses,
            ports=[],
            gpus=gpus,
            accounting=accounting,
            user_signal=user_signal,
            grace=grace,
        )
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts everything; returns when all nodes are idle."""
        self._settings.ports = _free_ports(len(self.nodes) + 2)
        slurm_files.write(self._settings)
        folder = self.folder
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        # --force: a test's folder is not open to every user, as munged would have it.
        self._spawn(
            "munged",
            f"munged -F --force --key-file={key} --socket={folder}/munge.sock --pid-file={folder}/run/munged.pid"
            f" --log-file={folder}/log/munged.log --seed-file={folder}/run/munged.seed",
        )
        if self.namespaces:
            self._start_switch()
        if self.accounting:
            self._start_accounting()
        self.wait((folder / "munge.sock").exists)
        self._spawn("slurmctld", "slurmctld -D -i")
        for node in self.nodes:
            self._start_node(node)
        self.wait(lambda: set(self.states().values()) == {"idle"})

    def stop(self) -> None:
        """Ends everything. May be called at any time, and again."""
        for name in reversed(list(self._daemons)):
            self._end(name)
        if self.namespaces:  # the kernel takes its time to end networks
            self.wait(lambda: not Path("/sys/class/net", self.link).exists())

    def run(self, *command: str, check: bool = True) -> str:
        """Runs a command of Slurm (or any) as a user of the cluster; returns what it wrote, errors too where it failed.

        Raises:
            AssertionError: it failed, and ``check``.
        """
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode == 0:
            return done.stdout
        printed = done.stdout + done.stderr
        assert not check, f"{' '.join(command)}: {done.returncode}\n{printed}"
        return printed

    def submit(self, *words: str) -> int:
        """``sbatch`` with these words; returns the job's id. Its output goes to job-ID.out in the cluster's folder."""
        return int(self.run("sbatch", "--parsable", f"--output={self.folder}/job-%A.out", *words).partition(";")[0])

    def output(self, job: int) -> str:
        """What a job of ``submit`` has written so far."""
        file = self.folder / f"job-{job}.out"
        return file.read_text() if file.exists() else ""

    def job(self, job: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says: ``JobState``, ``Restarts``, ``Reason``, ``BatchHost``, ….

        Raises:
            AssertionError: Slurm does not know it.
        """
        return _fields(self.run("scontrol", "show", "job", "-o", str(job)))

    def states(self) -> dict[str, str]:
        """Each node's state in sinfo's words: ``idle``, ``mixed``, ``allocated``, ``down*``, …; ``*``: no answer.

        Empty while the controller does not answer.
        """
        lines = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines) if lines and "error" not in lines[0] else {}

    def wait(self, condition: Callable[[], T], seconds: float = SECONDS) -> T:
        """Waits until ``condition`` returns something true, and returns that.

        Raises:
            AssertionError: it did not, or a daemon that should run has ended. Says what Slurm says at that time.
        """
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                what = f"{', '.join(ended)} ended" if ended else f"not within {seconds} s"
                raise AssertionError(f"{what}\n{self._tell(ended)}")
            time.sleep(0.1)
        return value

    def crash(self, node: str) -> None:
        """A node's death: all its processes at once, and its network."""
        self._end(node)

    def up(self, node: str) -> None:
        """Starts a crashed node again; returns when it can take jobs."""
        self._start_node(node)
        self.wait(lambda: self.states().get(node) in ("idle", "mixed", "allocated"))

    def cut(self, node: str) -> None:
        """Cuts a node from all others and from the controller. Its processes run on, and no connection is closed."""
        self._switch(f"ip link set {node} down")

    def join(self, node: str) -> None:
        """Undoes ``cut``."""
        self._switch(f"ip link set {node} up")

    def hurry(self, job: int | str) -> None:
        """Starts a requeued job now: Slurm would wait 2 minutes, until the old credentials have expired.

        Not at once: a node goes on ending a job's processes for some seconds, those of the next start too, and takes
        no credential from before it has begun to.
        """
        time.sleep(6)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def enter(self, node: str, *command: str) -> str:
        """Runs a command on a node, beside Slurm; returns what it wrote."""
        return self.run("nsenter", f"--target={self._first(node)}", "--all", *command)

    def _start_switch(self) -> None:
        """A bridge, in a network of its own, and this machine's link to it."""
        self._spawn("switch", "ip link add switch type bridge && ip link set switch up && sleep infinity", "--net")
        self.wait(lambda: "switch" in self._switch("ip -o link", check=False))
        pid = self._first("switch")
        subprocess.run(
            ["sh", "-ec", f"ip link add {self.link} type veth peer name head netns {pid}\n"
             f"ip addr add {self.head}/28 dev {self.link}\nip link set {self.link} up"],
            check=True,
        )  # fmt: skip
        self._switch("ip link set head master switch up")

    def _switch(self, script: str, check: bool = True) -> str:
        assert self.namespaces, "this cluster has one network: Cluster(…, namespaces=True)"
        return self.run("nsenter", f"--target={self._first('switch')}", "--net", "sh", "-ec", script, check=check)

    def _start_node(self, node: str) -> None:
        lines = [
            f"hostname {node}",
            f"mount --bind {self.folder}/hosts /etc/hosts",
            "mount -t tmpfs -o mode=1777 shm /dev/shm",
        ]
        if self.namespaces:
            address = f"ip addr add {self.addresses[node]}/28 dev eth0"
            lines = ["read -r _", "ip link set lo up", address, "ip link set eth0 up", *lines]
        # Not exec: the shell stays the first process and takes leave of the orphans that jobs leave.
        lines += [f"slurmd -D -N {node} &", "wait"]
        process = self._spawn(node, "\n".join(lines), "--uts", *(["--net"] if self.namespaces else []))
        if self.namespaces:
            # The name may still be that of the dead node's link.
            pid = self._first(node)
            self._switch(f"ip link del {node} 2>/dev/null || true")
            self._switch(f"ip link add {node} type veth peer name eth0 netns {pid}")
            self._switch(f"ip link set {node} master switch up")
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()

    def _start_accounting(self) -> None:
        data, sock = self.folder / "database", self.folder / "mariadb.sock"
        install = "mariadb-install-db --no-defaults --user=root --auth-root-authentication-method=normal --skip-test-db"
        self.run(*install.split(), f"--datadir={data}", *slurm_files.DATABASE)
        options = " ".join(slurm_files.DATABASE)
        self._spawn(
            "mariadbd",
            f"mariadbd --no-defaults --user=root --skip-networking --datadir={data} --socket={sock} {options}",
        )
        self.wait(sock.exists)
        self._spawn("slurmdbd", f"MYSQL_UNIX_PORT={sock} slurmdbd -D")
        # It makes its tables first. The controller would not be recorded were it unknown.
        self.wait(lambda: "error" not in self.run("sacctmgr", "-i", "add", "cluster", "test", check=False))

    def _spawn(self, name: str, script: str, *namespaces: str) -> subprocess.Popen[bytes]:
        """Starts a daemon as the first process of its own process namespace."""
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [*_unshare(*namespaces), "sh", "-ec", script],
                env=self.environ,
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is the owner's, who ends them in order
            )
        self._daemons[name] = process
        return process

    def _end(self, name: str) -> None:
        process = self._daemons.pop(name)
        # Not unshare but its child, the namespace's first process: the kernel lets it end after all others in there.
        while process.poll() is None:
            for pid in _children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert process.stdin is not None
        process.stdin.close()

    def _first(self, name: str) -> int:
        """The process id of the first process in a daemon's namespace, as seen from here."""
        process = self._daemons[name]
        return self.wait(lambda: _children(process.pid))[0]

    def _tell(self, ended: list[str]) -> str:
        logs = [self.folder / "log" / f"{name}.out" for name in ended]
        told = [self.run(*command, check=False) for command in (("sinfo", "-N", "-l"), ("scontrol", "show", "job"))]
        return "\n".join([*told, *(log.read_text()[-2000:] for log in logs if log.exists())])


def _unshare(*namespaces: str) -> list[str]:
    # Two links of one chain: setpriv ends unshare with us, --kill-child the namespace with unshare.
    pid = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *pid, *namespaces]


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{SBIN}"


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _fields(line: str) -> dict[str, str]:
    """``Key=value`` pairs; values may hold spaces."""
    return dict(re.findall(r"([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", line.strip()))


def _free_ports(count: int) -> list[int]:
    """Ports in a row below those that the kernel gives to connections: a node that comes back finds its own free."""
    while True:
        start = 20000 + secrets.randbelow(12000 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(start, start + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return list(range(start, start + count))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of eight GPUs that share the loopback, without accounting."""
    if reason := available():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def main() -> None:
    """Keeps a cluster until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="Starts a Slurm cluster on this machine and keeps it until Ctrl-C.")
    parser.add_argument("--folder", required=True, help="for all of its files")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=8, help="a node")
    parser.add_argument("--accounting", action="store_true", help="with a database, for sacct")
    parser.add_argument("--namespaces", action="store_true", help="a network of its own for each node")
    parser.add_argument("--no-user-signal", action="store_true", help="preemption sends SIGTERM only")
    parser.add_argument("--grace", type=int, default=30, help="seconds that a preempted job has")
    args = parser.parse_args()
    if reason := available(args.accounting):
        sys.exit(reason)
    signals = {signal.SIGINT, signal.SIGTERM}
    begin = time.monotonic()
    with Cluster(
        args.folder, args.nodes, args.gpus, args.accounting, args.namespaces, not args.no_user_signal, args.grace
    ) as cluster:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        print(f"# {args.nodes} nodes idle after {time.monotonic() - begin:.1f} s; Ctrl-C ends them")
        print(f"export SLURM_CONF={cluster.environ['SLURM_CONF']}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
