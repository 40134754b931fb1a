"""A sweep as one array of Slurm jobs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from launch.paths import located
from launch.record import Record
from launch.slurm.check import check_writable, need_slurm
from launch.slurm.command import fitted, show
from launch.slurm.options import read_request
from launch.sweep.here import say
from launch.sweep.plan import Element, Sweep


class SlurmArray:
    """The array that the options ask for."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Reads the options and looks at the cluster.

        Raises:
            UserError: they are wrong, or do not fit it.
        """
        if not args.dry_run:
            need_slurm()
        self.request = fitted(read_request(args))
        self._at_most: int | None = args.at_most

    def show(self, sweep: Sweep, elements: Sequence[Element]) -> None:
        """Prints the batch script that would be submitted, and what its tasks run; nothing where there are no runs."""
        if not elements:
            return
        from launch.slurm.submit import Element as Run
        from launch.slurm.submit import prepare  # submitit takes 0.1 s

        runs = [Run(located(element.config)) for element in elements]
        submission = prepare(runs, self.request, Record(sweep.folder), sweep.name, self._at_most, copy=False)
        show(submission)

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
        say(f"job {array}: {len(jobs)} runs, {self.request} each")
        say(f"  python -m launch list {sweep.folder}\n  the same command with --table makes the table")
