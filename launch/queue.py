"""Asks Slurm: runs its commands, and looks up any number of jobs by one call of squeue and one of sacct.

squeue knows what waits or runs now. sacct knows each start of a job and how it ended, where the cluster keeps accounts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.state import Job, Slurm

SECONDS = 6.0  # that a look-up may take: a controller that is away keeps squeue waiting for minutes
# A person's defaults for these commands, which may leave out jobs or nodes or change the form, are not ours.
THEIRS = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")

# Each array element on a line of its own (-r). Fields that Slurm has had since long before 20.
SQUEUE = ("squeue", "-h", "-r", "-o", "%i|%T|%S|%e|%N|%r")
# Every start of a job that was queued again (-D), whole jobs only (-X).
SACCT = ("sacct", "-n", "-P", "-X", "-D", "-o", "JobID,State,Submit,Start,End,NodeList,ExitCode")

NO_ACCOUNTS = ("accounting storage is disabled", "not found")
NO_TIME = ("Unknown", "N/A", "None", "NONE", "n/a")
NUMBER = re.compile(r"[1-9]\d*(_\d+)?")


@dataclass(frozen=True)
class Answer:
    """What came of a command."""

    text: str | None  # what it printed; None where it failed
    wrong: str = ""  # why it failed, in a line that names it
    code: int | None = 0  # its exit code; None where it could not be started, or was not waited for any longer
    said: str = ""  # the last line that it printed to stderr


def ask(words: Sequence[str], seconds: float | None = None) -> Answer:
    """Runs one of Slurm's commands, for ``seconds`` at most (None: ``SECONDS``)."""
    seconds = SECONDS if seconds is None else seconds
    environ = {name: value for name, value in os.environ.items() if not name.startswith(THEIRS)}
    environ["SLURM_TIME_FORMAT"] = "standard"
    try:
        done = subprocess.run(
            words,
            env=environ,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"{words[0]} gave no answer within {seconds:g} s", None)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Answer(None, f"{words[0]}: {'not found' if missing else error.strerror}", None)
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        return Answer(None, f"{words[0]}: {said or f'exit code {done.returncode}'}", done.returncode, said)
    return Answer(done.stdout, said=said)


def look_up(
    jobs: Sequence[str], past: Sequence[str], notify: Callable[[str], None], every_start: bool = False
) -> Slurm:
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
    answer = ask([*SQUEUE, "-j", ",".join(jobs)])
    text = answer.text
    if text is None and "Invalid job id" in answer.wrong:  # said where none of the jobs is in the queue any more
        text = ""
    queue = None if text is None else {job.job: job for job in parse_squeue(text)}
    gone = [job for job in dict.fromkeys(past) if NUMBER.fullmatch(job) and (every_start or job not in (queue or {}))]
    accounts = ask([*SACCT, "-j", ",".join(gone)]) if gone else Answer("")
    starts = None if accounts.text is None else parse_sacct(accounts.text, gone)
    if queue is None:
        notify(
            f"{answer.wrong}: {'the folders alone say' if starts is None else 'sacct and the folders say'} how jobs are"
        )
    # Many clusters keep no accounts: that is no news where the queue is known.
    elif starts is None and not any(words in accounts.wrong for words in NO_ACCOUNTS):
        notify(f"{accounts.wrong}: how jobs ended, the folders alone say")
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
