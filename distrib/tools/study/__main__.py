"""The command line: reads the study, trains what is missing, writes the figures; a mistake is one line and code 2."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distrib import program
from distrib.cli import load_config
from distrib.config import UserError
from distrib.faults import FINISHED, STOPPED, StopSignals
from distrib.layout import look
from distrib.options import Parser, positive, settings_among
from distrib.program import say
from distrib.tools.study import figure, jobs, plan, report
from distrib.tools.study.outcome import Outcome, read_outcome

EXAMPLES = """examples:
  distrib study degradation --data cifar10 --jobs 2
  distrib study my-study --data pets --seeds 5 train.epochs=10    # a folder of configurations and a _study.yaml
  distrib study --runs zero --variant "one: model.zero_init_residual=false" \\
      --variant "zero: model.zero_init_residual=true" -- --config own_images --data pets

Stopped, the same command goes on; a run of other settings is another run. p is a paired t-test's over the seeds.
"""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and what stands behind ``--``.

    Raises:
        UserError: they are wrong.
        SystemExit: ``--help`` was asked for.
    """
    parser = Parser(
        parts=[],
        prog="distrib study",
        description="Trains variants once a seed, compares them, and writes table.md, results.json and figure.png.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="NAME|FOLDER key=value", help="the study; settings of all its runs")
    parser.add_argument("--data", metavar="DIR", help="the same as data.root=DIR")
    parser.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="how many: 0 to N-1; default: %(default)s"
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time; default: %(default)s")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="the runs' folders; default: runs/studies/NAME")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for the three files; default: that of the runs")
    parser.add_argument(
        "--variant", action="append", metavar="'NAME: words'", help="in place of a study: train.py's words; repeat it"
    )
    split = list(argv).index("--") if "--" in argv else len(argv)
    return parser.parse_words(argv[:split]), list(argv[split + 1 :])


def study_of(args: argparse.Namespace, behind: Sequence[str]) -> plan.Study:
    """The study that the arguments mean.

    Raises:
        UserError: they mean none, or two.
    """
    names, overrides = settings_among(args.words)
    if args.variant:
        if names:
            raise UserError(f"--variant is in place of a study: leave {names[0]} out")
        return plan.typed_study(args.variant, [*behind, *overrides])
    if behind:
        raise UserError("what stands behind -- goes with --variant; settings of a study stand before it: key=value")
    if len(names) != 1:
        raise UserError("give the name or the folder of one study (distrib study --help)")
    return plan.read_study(names[0], overrides)


def collect(study: plan.Study, planned: Sequence[plan.Job]) -> dict[str, list[Outcome]]:
    """What the finished runs tell, by variant, in the seeds' order."""
    return {v.name: [read_outcome(job) for job in planned if job.variant == v.name] for v in study.variants}


def run(args: argparse.Namespace, behind: Sequence[str], stop: StopSignals) -> int:
    """Does what the arguments ask for; returns the exit code.

    Raises:
        UserError: the study, a configuration or a folder is wrong.
    """
    from distrib.tools.study.network import size_of

    study = study_of(args, behind)
    runs = args.runs or Path("runs", "studies", study.name)
    output = args.output or runs
    figure.check_matplotlib()
    planned = plan.jobs_of(study, args.seeds, runs)
    asked = {variant.name: variant.config(0) for variant in study.variants}
    figure.check_settings(study, asked)
    report.check_output(output, study)
    if not all(job.finished for job in planned):
        for config in asked.values():  # before a run's folder is made
            look(config.data, config.model.num_classes)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {output}: {error.strerror}: choose another --output") from None
    macs = {name: size_of(config.model, config.data.size).macs for name, config in asked.items()}
    # The largest network of a seed first: what comes last is short, and no core waits long for it.
    began, left = time.monotonic(), sum(not job.finished for job in planned)
    code = jobs.train_all(sorted(planned, key=lambda job: (job.seed, -macs[job.variant])), args.jobs, stop.requested)
    if code != FINISHED:
        if code == STOPPED:
            say(f"{stop.received or 'a run'}: stopped; the same command goes on")
        return code
    outcomes = collect(study, planned)
    # Now that the number of classes is known.
    settled = {job.variant: load_config(job.folder / "config.yaml") for job in planned}
    sizes = {name: size_of(config.model, config.data.size) for name, config in settled.items()}
    markdown = report.as_markdown(study, outcomes, sizes)
    settings = {v.name: {"config": v.file, "overrides": list(v.overrides)} for v in study.variants}
    report.write_results(output, markdown, report.as_json(study, outcomes, sizes, settings))
    print(markdown, end="")
    report.write_figure(output, figure.draw(study, outcomes))
    took = time.monotonic() - began
    if left:
        say(f"{left} runs, {args.jobs} at a time: {took / 60:.1f} min; {output}/figure.png")
    return FINISHED


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 75 stopped on request, 2 the user's to mend, or that of a run that failed."""

    def work(stop: StopSignals) -> int:
        args, behind = parse(argv)
        return run(args, behind, stop)

    return program.run(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
