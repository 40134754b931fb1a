"""Asks Slurm about jobs: one call of squeue and one of sacct for any number of them.

squeue knows what waits or runs now. sacct knows each start of a job and how it ended, where the cluster keeps accounts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

from launch.state import Job, Slurm

SECONDS = 6.0  # that a command may take: a controller that is away keeps squeue waiting for minutes

# Each array element on a line of its own (-r). Fields that Slurm has had since long before 20.
SQUEUE = ("squeue", "-h", "-r", "-o", "%i|%T|%S|%e|%N|%r")
# Every start of a job that was queued again (-D), whole jobs only (-X).
SACCT = ("sacct", "-n", "-P", "-X", "-D", "-o", "JobID,State,Submit,Start,End,NodeList,ExitCode")

NO_TIME = ("Unknown", "N/A", "None", "NONE", "n/a")
NUMBER = re.compile(r"[1-9]\d*(_\d+)?")


def ask(jobs: Sequence[str], past: Sequence[str], notify: Callable[[str], None], every_start: bool = False) -> Slurm:
    """What Slurm says of ``jobs``.

    Args:
        jobs: their numbers, which the queue is asked for.
        past: those for which the accounts are asked too, if the queue has them not.
        notify: hears, in one line, why Slurm gave no answer: there is none here, or a command failed.
        every_start: the accounts are asked also for those that are in the queue, for their earlier starts.
    """
    jobs = list(dict.fromkeys(job for job in jobs if NUMBER.fullmatch(job)))
    if not jobs:
        return Slurm({}, {})
    if shutil.which(SQUEUE[0]) is None and shutil.which(SACCT[0]) is None:
        notify("there is no Slurm on this machine: the folders alone say how their jobs are")
        return Slurm()
    text, wrong = _run([*SQUEUE, "-j", ",".join(jobs)])
    if text is None and "Invalid job id" in wrong:  # said where none of the jobs is in the queue any more
        text = ""
    queue = None if text is None else {job.job: job for job in parse_squeue(text)}
    gone = [job for job in dict.fromkeys(past) if NUMBER.fullmatch(job) and (every_start or job not in (queue or {}))]
    told, why = _run([*SACCT, "-j", ",".join(gone)]) if gone else ("", "")
    starts = None if told is None else parse_sacct(told, gone)
    if queue is None:
        notify(f"{wrong}: {'the folders alone say' if starts is None else 'sacct and the folders say'} how jobs are")
    # Many clusters keep no accounts: that is no news where the queue is known.
    elif starts is None and "accounting storage is disabled" not in why and "not found" not in why:
        notify(f"{why}: how jobs ended, the folders alone say")
    return Slurm(queue, starts)


def parse_squeue(text: str) -> list[Job]:
    """The jobs in what ``SQUEUE`` prints; lines of another form are passed over."""
    rows = (line.strip().split("|", 5) for line in text.splitlines())
    return [
        Job(row[0], row[1].upper(), row[5].strip("()"), _time(row[2]), _time(row[3]), row[4])
        for row in rows
        if len(row) == 6 and NUMBER.fullmatch(row[0])
    ]


def parse_sacct(text: str, jobs: Sequence[str]) -> dict[str, list[Job]]:
    """Each job's starts, oldest first, in what ``SACCT`` prints.

    Array elements that have not begun share a line, ``123_[0-5,7%2]``; each of ``jobs`` in it gets one.
    """
    starts: dict[str, list[tuple[str, Job]]] = {}
    for line in text.splitlines():
        row = line.strip().split("|")
        if len(row) != 7:
            continue
        number, state, submitted, start, end, nodes, code = row
        word = state.split()[0].rstrip("+").upper() if state.split() else ""  # "CANCELLED by 1000"
        for job in [number] if NUMBER.fullmatch(number) else [job for job in jobs if _within(job, number)]:
            nodes = "" if nodes == "None assigned" else nodes
            made = Job(job, word, start=_time(start), end=_time(end), nodes=nodes, code=code)
            starts.setdefault(job, []).append((submitted, made))
    # Slurm gives each start a time of submission of its own.
    return {job: [made for _, made in sorted(rows, key=lambda row: row[0])] for job, rows in starts.items()}


def _within(job: str, number: str) -> bool:
    """Whether ``123_4`` is among ``123_[0-5,7%2]``."""
    base, _, index = job.partition("_")
    match = re.fullmatch(rf"{base}_\[([\d,\-:]+)(%\d+)?\]", number)
    if not index or not match:
        return False
    for part in match[1].split(","):
        bounds, _, step = part.partition(":")
        first, _, last = bounds.partition("-")
        if int(index) in range(int(first), int(last or first) + 1, int(step or 1)):
            return True
    return False


def _time(text: str) -> str:
    return "" if text in NO_TIME else text


def _run(command: Sequence[str]) -> tuple[str | None, str]:
    """What a command prints, or None and what is wrong, in a line."""
    # A person's defaults for these commands, which may leave jobs out, are not ours.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    environ["SLURM_TIME_FORMAT"] = "standard"
    try:
        done = subprocess.run(
            command,
            env=environ,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} gave no answer within {SECONDS:g} s"
    except OSError as error:
        return None, f"{command[0]}: {'not found' if isinstance(error, FileNotFoundError) else error.strerror}"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, f"{command[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}"
    return done.stdout, ""
