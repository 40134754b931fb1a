"""Several hosts on this machine, for tests: namespaces with a network, processes and a name of their own. Needs root.

    with Hosts(2, tmp_path) as hosts:
        process = hosts.begin("h1", ["hostname"], stdout=subprocess.PIPE, text=True)

The first process of a host is a shell that waits. The kernel ends whatever is in the host with it, so ``crash`` is a
real death, and nothing outlives the test. All links lie in the namespaces and go with them. The hosts share all files,
as on a shared disk, but not /dev/shm, and know each other by name. Each has one core: ranks that believe the whole
machine to be theirs would wait for each other's threads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("unshare", "nsenter", "setpriv", "ip")
# Two links of one chain: setpriv ends unshare with us, --kill-child the namespace with unshare.
APART = (
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child"),
    *("--mount", "--mount-proc", "--uts", "--net"),
)
SECONDS = 30


def available() -> str:
    """Why no hosts can be had here; empty where they can."""
    if os.geteuid() != 0:
        return "hosts of their own for tests need root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install -y --no-install-recommends iproute2 util-linux"
    trial = subprocess.run([*APART, "true"], capture_output=True, text=True)
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else ""


class Hosts:
    """``count`` hosts h1, h2, …, with the addresses 10.0.0.1, … on one switch; ``folder`` is for their files.

    The thread that starts them must live as long as they do: the kernel ends them with it.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self._hosts_file = folder / "hosts"
        self._shells: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        lines = [f"10.0.0.{number} {name}" for number, name in enumerate(self.names, 1)]
        self._hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        try:
            self._start("switch", "ip link add switch type bridge\nip link set switch up")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def boot(self, name: str) -> None:
        """Starts a host, for the first time or after a crash."""
        number = self.names.index(name) + 1
        pid = self._start(
            name,
            f"hostname {name}\nmount --bind {self._hosts_file} /etc/hosts\nmount -t tmpfs -o mode=1777 shm /dev/shm\n"
            "ip link set lo up",
        )
        self._on("switch", f"ip link del {name} 2>/dev/null || true")  # the dead host's, which goes in its own time
        self._on(
            "switch", f"ip link add {name} type veth peer name eth0 netns {pid} && ip link set {name} master switch up"
        )
        self._on(name, f"ip addr add 10.0.0.{number}/24 dev eth0 && ip link set eth0 up")

    def begin(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on a host; ``options`` are Popen's. Signals go by ``signal``."""
        core = sorted(os.sched_getaffinity(0))[self.names.index(name) % len(os.sched_getaffinity(0))]
        enter = ["nsenter", f"--target={self._first(name)}", "--all", f"--wd={options.get('cwd', '.')}"]
        return subprocess.Popen([*enter, "taskset", "--cpu-list", str(core), *command], **options)

    @staticmethod
    def signal(process: subprocess.Popen[Any], number: int) -> None:
        """Sends a signal to a command of ``begin``: Popen's own would reach nsenter, which keeps it."""
        os.kill(_children(process.pid)[0], number)

    def crash(self, name: str) -> None:
        """A host's death: all of its processes at once, by SIGKILL."""
        shell = self._shells.pop(name)
        while shell.poll() is None:
            for pid in _children(shell.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                shell.wait(0.1)

    def stop(self) -> None:
        """Ends everything. May be called at any time, and again."""
        for name in list(self._shells):
            self.crash(name)

    def _start(self, name: str, script: str) -> int:
        """Starts a namespace's first process; returns its id, as seen from here, once the script is done."""
        ready = self._hosts_file.with_name(f"ready-{name}")
        ready.unlink(missing_ok=True)
        # Not exec: the shell takes leave of the orphans that a killed agent leaves.
        script = f"set -e\n{script}\ntouch {ready}\nwhile :; do sleep 3600; done"
        log = self._hosts_file.with_name(f"log-{name}")
        with log.open("wb") as file:
            self._shells[name] = subprocess.Popen(
                [*APART, "sh", "-c", script], start_new_session=True, stdout=file, stderr=file
            )
        deadline = time.monotonic() + SECONDS
        while not ready.exists():
            running = self._shells[name].poll() is None
            assert running and time.monotonic() < deadline, log.read_text()  # noqa: PT018
            time.sleep(0.02)
        return self._first(name)

    def _first(self, name: str) -> int:
        return _children(self._shells[name].pid)[0]

    def _on(self, name: str, script: str) -> None:
        net = ["nsenter", f"--target={self._first(name)}", "--net", "sh", "-ec", script]
        done = subprocess.run(net, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{script}: {done.stderr}"


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
