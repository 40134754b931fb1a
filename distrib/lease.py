"""Who may write a run folder: one process at a time, also on a shared disk that knows no locks.

The holder's ``writer.json`` says who it is; its heartbeat is that file's time. A holder on this machine is looked up by
its process id; one elsewhere is alive while the time moves. Times are never compared between machines: what "now" is,
a file of our own in the same folder tells, so that both are the disk's.

Slurm starts a job again when it has lost a node, which may be alive and write on: of one job the later start wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from distrib.config import UserError
from distrib.faults import Failure, Interrupted

BEAT_SECONDS = 5.0
DEAD_SECONDS = 30.0  # without a beat: six missed ones, or a disk that was away so long

NAME = "writer.json"


class LeaseLost(Failure):
    """Another process has taken the folder over; nothing more is written to it."""


@dataclass(frozen=True)
class Holder:
    """What ``writer.json`` says. ``machine`` and ``born`` are empty where the system does not tell."""

    token: str
    host: str
    pid: int
    since: str  # ISO 8601, for a person
    machine: str = ""  # boot and namespace in which ``pid`` means something
    born: str = ""  # when the process began, in clock ticks of that boot: process ids are used again
    job: str = ""  # what starts a run again and again, where something does
    start: int = 0  # how often it has done so

    def is_succeeded_by(self, other: Holder) -> bool:
        """Whether ``other`` is a later start of the same job."""
        return self.job != "" and self.job == other.job and self.start < other.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lease:
    """The right to write one folder, from ``acquire`` to ``release``.

    Args:
        folder: what is to be written.
        job: which job's processes these are, where something may start them again; empty: nothing does.
        start: how often that job was started before.
    """

    def __init__(self, folder: Path, job: str = "", start: int = 0) -> None:
        self._folder, self._path = folder, folder / NAME
        self._me = Holder(
            token=secrets.token_hex(8),
            host=platform.node(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            machine=_machine(),
            born=_born(os.getpid()),
            job=job,
            start=start,
        )
        self._mine = folder / f".{NAME}.{self._me.token}"
        self._made: list[Path] = []  # folders that were not there before
        self._lost: Holder | None = None
        self._over = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def token(self) -> str:
        """Unique to this start: for names that no other writer may choose too."""
        return self._me.token

    def acquire(
        self, notify: Callable[[str], None] = lambda text: None, stop: Callable[[], bool] = lambda: False
    ) -> Lease:
        """Takes the folder, making it where there is none; waits up to ``DEAD_SECONDS`` for a silent holder elsewhere.

        Raises:
            UserError: somebody holds it, or it cannot be written.
            Interrupted: ``stop`` said so during the wait.
        """
        try:
            self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._mine.write_text(json.dumps(asdict(self._me)) + "\n", encoding="utf-8")
                while not self._taken():
                    holder = _read(self._path)
                    if holder is not None and self._lives(holder, notify, stop):
                        raise UserError(
                            f"{self._folder} is being written by {holder}: stop that one, or choose another "
                            "run.name or run.dir"
                        )
                    if holder is not None and self._succeed(holder):
                        before = holder.is_succeeded_by(self._me)
                        how = "is of this job's start before" if before else f"has left {self._folder} without a word"
                        notify(f"{holder} {how}; taking over")
                        break
            finally:
                self._mine.unlink(missing_ok=True)
        except (UserError, Interrupted):
            self._unmake()
            raise
        except OSError as error:
            self._unmake()
            raise UserError(f"cannot write to {self._folder}: {error.strerror}: set run.dir") from None
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()
        return self

    def release(self) -> None:
        """Lets go of the folder. What was made for it and is empty goes too. A second call does nothing."""
        heart, self._heart = self._heart, None
        if heart is None:
            return
        ours = self.held()
        self._over.set()
        heart.join()
        if ours:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._unmake()

    def held(self) -> bool:
        """Whether the folder is ours for certain; looks at the disk. False while that is away: nobody can tell."""
        if self._over.is_set() or self._lost is not None:
            return False
        try:
            holder = _read(self._path)
        except OSError:
            return False
        if holder is not None and holder.token != self._me.token:
            self._lost = holder
        return self._lost is None

    def check(self) -> None:
        """Costs nothing; for each step.

        Raises:
            LeaseLost: another process has taken the folder over.
        """
        if self._lost is not None:
            raise LeaseLost(f"{self._folder} was taken over by {self._lost}; this process writes nothing more and ends")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS) and self._lost is None:
            if self.held():
                with contextlib.suppress(OSError):
                    os.utime(self._path)

    def _taken(self) -> bool:
        """Puts our file where there is none, whole or not at all."""
        try:
            os.link(self._mine, self._path)
        except FileExistsError:
            return False
        except OSError:  # no hard links on this disk
            try:
                file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                return False
            with open(file, "w", encoding="utf-8") as stream:
                stream.write(self._mine.read_text(encoding="utf-8"))
        return True

    def _lives(self, holder: Holder, notify: Callable[[str], None], stop: Callable[[], bool]) -> bool:
        if holder.is_succeeded_by(self._me):
            return False
        if holder.born and holder.machine == self._me.machine:
            return _born(holder.pid) == holder.born
        began, beat = time.monotonic(), _time(self._path)
        told = False
        while time.monotonic() - began <= DEAD_SECONDS:
            os.utime(self._mine)
            if _time(self._mine) - beat > DEAD_SECONDS:
                return False
            if stop():
                raise Interrupted
            if not told:
                notify(f"{self._folder} was left by {holder}: looking whether it lives, {DEAD_SECONDS:g} s at most")
                told = True
            time.sleep(BEAT_SECONDS / 10)
            if (now := _time(self._path)) != beat:
                return now != 0  # gone: it has just left
        return False

    def _succeed(self, dead: Holder) -> bool:
        """Puts our file in the place of a dead holder's, unless another successor was faster.

        Several may find it dead at once: the folder made here is the right to replace this one holder.
        """
        turn = self._folder / f".{NAME}.after-{dead.token}"
        try:
            turn.mkdir()
        except FileExistsError:
            os.utime(self._mine)
            with contextlib.suppress(OSError):
                if _time(self._mine) - turn.stat().st_mtime > DEAD_SECONDS:  # a successor that was killed in between
                    turn.rmdir()
            time.sleep(BEAT_SECONDS / 50)
            return False
        try:
            holder = _read(self._path)
            if holder is None or holder.token != dead.token:
                return False
            os.replace(self._mine, self._path)
        finally:
            turn.rmdir()
        return True

    def _unmake(self) -> None:
        for folder in self._made:  # the deepest first
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@dataclass(frozen=True)
class Sight:
    """What an onlooker sees of a folder's holder."""

    holder: Holder
    here: bool  # on this machine, where the process itself can be looked up
    alive: bool | None  # None: nobody can tell from here
    silent: float | None  # seconds since the last heartbeat, by the disk's clock; None where that is not known


def look(folder: Path, now: float | None) -> Sight | None:
    """Who holds ``folder``; None for nobody. Waits for nothing: ``now`` is what ``disk_time`` said of this disk.

    Raises:
        OSError: the folder cannot be read.
    """
    holder, beat = _read(folder / NAME), _time(folder / NAME)
    if holder is None or beat == 0:
        return None
    silent = None if now is None else max(0.0, now - beat)
    if holder.born and holder.machine == _machine():
        return Sight(holder, True, _born(holder.pid) == holder.born, silent)
    return Sight(holder, False, None if silent is None else silent <= DEAD_SECONDS, silent)


def disk_time(folder: Path) -> float | None:
    """What the clock of the folder's disk shows, in seconds; None where nothing can be written.

    A file of our own tells it, which is gone when this returns.
    """
    probe = folder / f".{NAME}.{secrets.token_hex(8)}"
    try:
        try:
            probe.touch()
            os.utime(probe)
            return _time(probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError:
        return None


def _read(path: Path) -> Holder | None:
    """The holder; None where there is none. A damaged file names nobody, and has a heartbeat all the same."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    damaged = Holder(token="damaged", host="an unknown machine", pid=0, since="an unknown time")
    try:
        values = json.loads(text)
        known = [field.name for field in fields(Holder) if field.name in values]
        holder = Holder(**{name: type(getattr(damaged, name))(values[name]) for name in known})
    except (ValueError, KeyError, TypeError):
        return damaged
    return holder if re.fullmatch("[0-9a-f]{16}", holder.token) else damaged


def _time(path: Path) -> float:
    """When the file was last touched, seconds of the disk's clock; 0 where it is gone."""
    try:
        with path.open("rb") as file:  # opened, because only then a network disk looks anew
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return ""


def _born(pid: int) -> str:
    """When a process of this machine began; empty for none, and for one that is dead and not yet reaped."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] in ("Z", "X") else words[19]
