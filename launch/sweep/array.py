"""A sweep as one array of Slurm jobs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from launch.paths import located
from launch.record import Record
from launch.slurm.check import active, check_writable, need_slurm
from launch.slurm.command import fitted
from launch.slurm.options import read_request
from launch.sweep.here import say
from launch.sweep.plan import Element, Sweep
from launch.sweep.state import RUNNING, Found


class SlurmArray:
    """The array that the options ask for."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Reads the options and looks at the cluster.

        Raises:
            UserError: they are wrong, or do not fit it.
        """
        if not args.dry_run and not args.table:
            need_slurm()
        self.request = fitted(read_request(args))
        self._at_most: int | None = args.at_most

    def active(self, elements: Sequence[Element]) -> dict[str, Found]:
        """The runs of which a job is queued or runs: they are left alone."""
        records = {element.name: Record(element.folder) for element in elements}
        there = active(list(records.values()))
        return {name: Found(RUNNING) for name, record in records.items() if record.run in there}

    def submit(self, sweep: Sweep, elements: Sequence[Element]) -> None:
        """Submits the runs as one array; nothing where there are none.

        Raises:
            UserError: a folder cannot be written, or sbatch refuses; nothing is submitted then.
        """
        if not elements:
            say("nothing to submit")
            return
        from launch.slurm.submit import Element as Run
        from launch.slurm.submit import submit  # submitit takes 0.1 s

        runs = [Run(located(element.config)) for element in elements]
        for run in runs:
            check_writable(run.record)
        base = Record(sweep.folder)
        jobs = submit(runs, self.request, base, sweep.name, self._at_most)
        array = jobs[0].partition("_")[0]
        say(f"job {array}: {len(jobs)} runs, {self.request.nodes} nodes × {self.request.procs} ranks each")
        say(f"  python -m launch list {sweep.folder}\n  the same command with --table makes the table")
