"""What the launcher keeps of a run, in ``launch/`` within the run's folder. Imports no torch.

    launch/events.jsonl       one JSON object a line, appended only:
                              {"event": "submitted", "time", "job", "name", "nodes", "procs", "tasks", "submission"}
                              {"event": "began", "time", "job", "restart", "nodes", "step"}
                              {"event": "ended", "time", "job", "restart", "code", "step", "reason", "then"}
    launch/logs/rank_00000.log    what each rank prints, over all its starts
    launch/reports/JOB.RESTART/HOST           how each rank of a node ended in one start of a job: "RANK CODE MESSAGE";
                                              with --tasks gpu HOST.RANK; "none 75": stopped before it had ranks
    launch/reports/JOB.RESTART/HOST.restarts  why workers were started again within it: "TIME REASON"
    launch/reports/JOB.RESTART.bad_hosts      nodes that were found unfit in it: "HOST REASON"
    launch/reports/JOB.attempts               how often a job's starts ended alike at one step: "KIND STEP COUNT"
    launch/stop               there while `launch stop` wants the run to end and not to be queued again
    launch/code/REVISION/     the code that jobs of this run use
    launch/SUBMISSION/        configuration, batch script and output of one submission

``job`` is Slurm's number, with ``_INDEX`` behind it in an array; ``restart`` counts how often Slurm has started it
again, from 0. ``step`` is the newest checkpoint's, 0 where there is none; ``then`` is "requeued" or "over". The batch
script writes the last two events, in shell (slurm/job.sh).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "launch"


class Record:
    """The launcher's files of one run."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run = Path(os.path.expanduser(run_dir)).absolute()
        self.path = self.run / FOLDER
        self.events = self.path / "events.jsonl"
        self.logs = self.path / "logs"
        self.reports = self.path / "reports"
        self.stop = self.path / "stop"

    def log_of(self, rank: int) -> Path:
        """What this rank prints."""
        return self.logs / f"rank_{rank:05d}.log"

    def add(self, event: str, values: Mapping[str, Any]) -> None:
        """Appends an event with the present time.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values})
        with self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All events, oldest first; lines of another form, such as a half-written one, are passed over."""
        found = []
        with contextlib.suppress(OSError):
            for line in self.events.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and isinstance(event.get("event"), str):
                        found.append(event)
        return found

    def jobs(self) -> list[str]:
        """The jobs that were submitted for this run, oldest first."""
        return [str(event["job"]) for event in self.read() if event["event"] == "submitted"]
