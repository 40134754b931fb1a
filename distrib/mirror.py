"""A second place for checkpoints: each one that is committed is copied there, and a start that lacks its own finds it.

    MIRROR/<run.name>/<settings>/current.json      whose checkpoints count: {"id", "folder", "job"}
    MIRROR/<run.name>/<settings>/<folder>/step_00001234.pt

``settings`` is a checksum of all that decides about the run's result: runs of one name and other settings never meet.
``folder`` is the run's id (that of W&B, which every checkpoint holds): a run that was begun anew has one of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distrib.checkpoint import PATTERN, TEMPORARY, newest_valid, path_for, superseded, verify
from distrib.config import Config, UserError
from distrib.follow import flatten
from distrib.store import Store, brief

CURRENT = "current.json"
PATIENCE = 60.0  # seconds at a run's end in which not a byte moves, before the copy is given up
# Where the run is, how it is watched, and what the machine is like: another value leaves it the same run.
FREE = (
    "run.dir", "run.name", "log.", "wandb.", "launch.", "checkpoint.", "trace", "train.compile", "train.micro_batch",
    "data.root", "data.index_dir", "data.wait_minutes", "data.workers", "data.prefetch", "data.decoder",
    "data.hw_decoder_load", "data.preallocate",
)  # fmt: skip


class Mirror:
    """Copies the newest committed checkpoint in a thread of its own. Only the rank that writes has one.

    One copy is under way and one waits; a newer one takes the place of that. What is under way is never broken off: a
    place that is slower than the saves would never get any whole.
    """

    def __init__(
        self, store: Store, config: Config, notify: Callable[[str], None], say: Callable[[str], None] = print
    ) -> None:
        """``config``: settled. ``notify`` hears of trouble, ``say`` of what was copied at the start."""
        self._store, self._notify, self._say = store, notify, say
        self._keep = config.checkpoint.keep
        self._home = f"{config.run.name}/{settings_sum(config)}"
        self._run: dict[str, Any] | None = None  # what CURRENT says, or is to say
        self._cleared = self._failed = False
        self._ready = threading.Condition()
        self._next: tuple[Path, int, int | None] | None = None
        self._lacks: Path | None = None  # the newest checkpoint here, where the mirror has none as new
        self._copying: int | None = None  # which step
        self._busy = False
        self._thread: threading.Thread | None = None

    # At a start

    def is_begun_by(self, job: str | None) -> bool:
        """Whether ``job`` began the run that is mirrored, with --fresh or as the first: then this is a restart."""
        with contextlib.suppress(Exception):
            return job is not None and self._current().get("job") == job
        return False

    def newer_than(self, here: Path | None, folder: Path) -> Path | None:
        """Copies the newest checkpoint that is whole and newer than ``here`` into ``folder``; None where there is none.

        Raises:
            UserError: there is nothing here, and the mirror cannot be read.
        """
        try:
            current = self._current()
            if here is not None:
                run_id = run_of(here)
                if current.get("id") != run_id:  # the mirror has seen others of these settings since, or none
                    current = {"id": run_id, "folder": _safe(run_id), "job": None}
            elif not current:
                self._tell_others()
                return None
            self._run = current
            mine = int(PATTERN.match(here.name)[1]) if here is not None else 0  # type: ignore[index]  # newest_valid's
            steps = self._steps()
            if here is not None and mine not in steps:
                self._lacks = here
            for step in steps:
                if here is not None and step <= mine:
                    break
                if (file := self._fetch(step, folder)) is not None:
                    older = f"newer than {here.name}" if here is not None else f"{folder} holds none"
                    self._say(f"copied {self._store.shown(self._name(step))} to {file}: {older}")
                    self._lacks = None
                    return file
        except UserError:
            raise
        except Exception as error:
            told = f"cannot read checkpoints from {self._store.shown(self._home)}: {brief(error)}"
            if here is None:
                raise UserError(f"{told}: start again when it can be read, or set checkpoint.mirror=null") from None
            self._failed = True
            self._notify(f"{told}; the run goes on from {here}")
        return None

    def begin(self, run_id: str, job: str | None, folder: Path, best: int | None) -> None:
        """From now on the mirror's checkpoints are those of the run ``run_id``, whose own lie in ``folder``.

        What the two lack of each other, the newest there and the ``best`` here, is copied meanwhile.
        """
        if self._run is None:
            self._run = {"id": run_id, "folder": None, "job": job}
        if self._lacks is not None and (found := PATTERN.match(self._lacks.name)):
            self._next = self._lacks, int(found[1]), best

        def start() -> None:
            self._settle()
            if best is not None and not path_for(folder, best).exists() and best in self._steps():
                self._fetch(best, folder)

        self._busy = True
        self._thread = threading.Thread(target=self._work, args=(start,), name="mirror", daemon=True)
        self._thread.start()

    # While the run goes on

    def offer(self, path: Path, step: int, best: int | None) -> None:
        """Copies a committed file soon, unless a newer one is offered before; ``best`` is kept besides the newest."""
        with self._ready:
            self._next = path, step, best
            self._ready.notify()

    def reads(self, step: int) -> bool:
        """Whether the file of ``step`` is being copied, or about to be."""
        with self._ready:
            return step == self._copying or (self._next is not None and step == self._next[1])

    def wait(self) -> None:
        """Waits for the copies that are due, for as long as any byte moves."""
        moved, since, told = self._store.moved, time.monotonic(), False
        while True:
            with self._ready:
                if not self._busy and self._next is None:
                    return
            time.sleep(0.05)
            if self._store.moved != moved:
                moved, since = self._store.moved, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                self._notify(f"{self._store.shown(self._home)} takes nothing any more: its newest checkpoint is older")
                return
            if not told and time.monotonic() - since > PATIENCE / 6:
                told = True
                self._notify(f"waiting for {self._store.shown(self._home)}")

    def _work(self, start: Callable[[], None]) -> None:
        self._try(start)
        while True:
            with self._ready:
                self._busy, self._copying = False, None
                while self._next is None:
                    self._ready.wait()
                (path, step, best), self._next = self._next, None
                self._busy, self._copying = True, step
            self._try(lambda: self._copy(path, step, best))  # noqa: B023  it is called here and now

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                self._failed = True
                where = self._store.shown(self._home)
                self._notify(f"cannot copy checkpoints to {where}: {brief(error)}; the run goes on without it")
        else:
            if self._failed and self._copying is not None:
                self._failed = False
                self._notify(f"checkpoints are copied to {self._store.shown(self._home)} again")

    def _settle(self) -> None:
        """Says in the mirror whose checkpoints count, and clears away what a killed copy left."""
        run = self._run
        assert run is not None
        if run["folder"] is None:  # a new run: W&B's id may be given from outside, to several
            taken, name = set(self._store.names(self._home)), _safe(run["id"])
            numbers = iter(range(2, 1 << 30))
            while name in taken:
                name = f"{_safe(run['id'])}.{next(numbers)}"
            run["folder"] = name
        if self._current() != run:
            self._store.write(f"{self._home}/{CURRENT}", json.dumps(run).encode())
        for name in self._store.names(f"{self._home}/{run['folder']}"):
            if name.endswith(TEMPORARY):
                self._store.remove(f"{self._home}/{run['folder']}/{name}")
        self._cleared = True

    def _copy(self, path: Path, step: int, best: int | None) -> None:
        if not self._cleared:
            self._settle()
        self._store.put(path, self._name(step))
        for old in superseded(self._steps(), step, self._keep, (best,)):
            self._store.remove(self._name(old))

    def _fetch(self, step: int, folder: Path) -> Path | None:
        """Copies one into ``folder`` by way of a temporary name; None, and told, where it is damaged.

        Raises:
            Exception: it cannot be read, or written here.
        """
        path = path_for(folder, step)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._store.get(self._name(step), partial)
            fault = verify(partial)
            if fault is not None:
                self._notify(f"{self._store.shown(self._name(step))} is damaged and passed over: {fault}")
                return None
            for place in (partial, folder):
                file = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
                if place == partial:
                    os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return path

    def _tell_others(self) -> None:
        name = self._home.partition("/")[0]
        if self._store.names(name):
            self._say(f"{self._store.shown(name)} holds checkpoints of other settings only: the run begins anew")

    def _current(self) -> dict[str, Any]:
        """What CURRENT says; nothing where there is none."""
        data = self._store.read(f"{self._home}/{CURRENT}")
        if data is None:
            return {}
        try:
            values = json.loads(data)
            return {"id": str(values["id"]), "folder": _safe(str(values["folder"])), "job": values.get("job")}
        except (ValueError, TypeError, KeyError):
            return {}

    def _name(self, step: int) -> str:
        assert self._run is not None
        return f"{self._home}/{self._run['folder']}/{path_for(Path(), step).name}"

    def _steps(self) -> list[int]:
        """The steps that are there, newest first."""
        assert self._run is not None
        names = self._store.names(f"{self._home}/{self._run['folder']}")
        return sorted((int(m[1]) for name in names if (m := PATTERN.match(name))), reverse=True)


def newest_of_both(mirror: Mirror | None, folder: Path, notify: Callable[[str], None]) -> Path | None:
    """The newest valid checkpoint of the run's ``folder`` and its mirror, copied into the folder where it is not there.

    Raises:
        UserError: it cannot be read, perhaps only now.
    """
    here = newest_valid(folder, notify)
    newer = mirror.newer_than(here, folder) if mirror is not None else None
    return newer or here


def run_of(path: Path) -> str:
    """The id of the run that wrote a checkpoint; of the file only what is asked for is read.

    Raises:
        Exception: it is none.
    """
    return str(torch.load(path, weights_only=True, mmap=True)["progress"]["wandb_id"])


def settings_sum(config: Config) -> str:
    """A checksum of what decides about the run's result and is not as by default: younger keys do not change it."""
    usual, asked = flatten(Config().model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    decides = {key: value for key, value in asked.items() if not key.startswith(FREE) and value != usual.get(key)}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "-", name)
