"""What a step loses to the ranks' agreement on stops and saves, on this machine and, by a model, on many more ranks.

Real ranks on gloo take steps that are nothing but a wait, as that for a device is, with an exchange of flags at every
step, at every k-th (``distrib.faults.exchange_interval`` of the world asked about), and without, in turns. All ranks
share this machine's cores: with more ranks than cores, theirs is the wait for a core, not for a network.

The model: gloo's all-reduce is a ring of 2 · (ranks - 1) messages, one after the other, whose time is fitted to the
all-reduces measured, or assumed as on a network (``distrib.faults.ring_seconds``). An exchange costs its step what the
call itself takes the processor, and the rest of an all-reduce that k steps are too short for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist

from distrib.config import UserError
from distrib.faults import Agreement, exchange_interval, ring_seconds
from distrib.tools.bench.report import Report, positive

SHARE = ("<", 0.1)  # percent of a step
BARE = 50  # all-reduces a round
PATIENCE = timedelta(minutes=5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``exchange``."""
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4, 8, 16], help="default: 2 4 8 16")
    parser.add_argument(
        "--at", type=positive, default=1024, metavar="RANKS", help="model so many; default: %(default)s"
    )
    parser.add_argument("--step", type=positive, default=30, metavar="MS", help="a step's length; default: %(default)s")
    parser.add_argument("--steps", type=positive, default=64, help="of each kind in a round; default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=5)


def run(args: argparse.Namespace) -> None:
    """Measures each number of ranks in ``--rounds`` rounds and prints the report."""
    every = exchange_interval(args.at)
    if min(args.ranks) < 2:
        raise UserError("--ranks: one rank exchanges nothing: give 2 or more")
    if args.steps < 2 * every:
        raise UserError(f"--steps {args.steps} holds no two exchanges {every} steps apart: give {2 * every} or more")
    settings = {"ranks": args.ranks, "step_ms": args.step, "steps": args.steps, "rounds": args.rounds}
    report = Report("exchange", {**settings, "at": args.at, "every": every}, args.json)
    ways = {"": 1, f", 1 in {every}": every}
    found: dict[int, list[dict[str, Any]]] = {}
    for world in args.ranks:
        for way in ways:
            report.compare(f"step{way}: {world} ranks", f"step alone: {world} ranks")
        found[world] = on_ranks(world, {**settings, "ways": ways})
        for each in found[world]:
            report.add(f"all-reduce: {world} ranks", "ms", 1e3 * each["bare"])
            report.add(f"step alone: {world} ranks", "ms", 1e3 * each["alone"])
            for way in ways:
                report.add(f"step{way}: {world} ranks", "ms", 1e3 * each["steps"][way])
                report.add(f"lost to it{way}: {world} ranks", "µs a step", 1e6 * each["lost"][way])
                report.add(f"processor's time in it{way}: {world} ranks", "µs a step", 1e6 * each["own"][way])
        report.save()
    step, most = args.step / 1e3, max(args.ranks)
    low, high = ring_seconds(args.at)
    for k in range(args.rounds):
        message = message_seconds({world: rounds[k]["bare"] for world, rounds in found.items()})
        measured = 2 * (args.at - 1) * message
        report.add("fit: a message of the ring", "µs", 1e6 * message)
        report.add(f"fit: all-reduce, {args.at} ranks", "ms", 1e3 * measured)
        for way, calls in ways.items():
            own = found[most][k]["own"][way] * calls  # of one exchange
            for name, ring in (("this machine's", measured), ("a network's", high)):
                row = f"model, {name} messages: lost of a step{way}, {args.at} ranks"
                goal = SHARE if calls == every and ring == high else None
                report.add(row, "%", 100 * share(own, ring, calls, step), goal)
    report.notes += [
        f"a step is {args.step} ms of sleep and the exchange; what is lost to it is the time in the call, posting and "
        "waiting for the last one, on average over the ranks; some of it is a wait for a core that others use",
        f"a network's messages are assumed to be as in distrib.faults, where an all-reduce of {args.at} ranks takes "
        f"{1e3 * low:.0f} to {1e3 * high:.0f} ms (the latter here); so many ranks were not to be had",
        "this machine's messages wait for a core where there are more ranks than cores, or others use them",
        "the model knows nothing of ranks that are late, for which the gradients wait too",
    ]
    report.save()
    print(report)


def message_seconds(bare: Mapping[int, float]) -> float:
    """The time of one message, from all-reduces' seconds by number of ranks: least squares, through nothing for one."""
    messages = {world: 2 * (world - 1) for world in bare}
    return sum(messages[w] * bare[w] for w in bare) / sum(count**2 for count in messages.values())


def share(own: float, ring: float, calls: int, step: float) -> float:
    """The part of a step that is lost where every ``calls``-th exchanges; ``own``, ``ring`` and ``step`` in seconds."""
    return (own + max(0.0, ring - calls * step)) / (calls * step)


def on_ranks(world: int, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict a round, seconds on average over the ranks: "bare", "alone", and by way "steps", "lost", "own".

    Raises:
        RuntimeError: a rank failed.
    """
    context = get_context("forkserver")  # torch is imported once for all ranks
    context.set_forkserver_preload([__name__, "distrib.tools.bench.__main__"])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="distrib-bench-") as folder:
        ranks = [context.Process(target=_rank, args=(folder, k, world, dict(settings), sender)) for k in range(world)]
        for process in ranks:
            process.start()
        sender.close()  # the ranks hold it: with the last of them the wait ends
        try:
            found = receiver.recv()
        except EOFError:
            found = None
        for process in ranks:
            process.join()
    codes = [process.exitcode for process in ranks]
    if found is None or any(codes):
        raise RuntimeError(f"of {world} ranks these failed: {[k for k, code in enumerate(codes) if code]}")
    return found


def _rank(folder: str, rank: int, world: int, settings: dict[str, Any], sender: Connection) -> None:
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    rounds = [
        _round(group, settings["steps"], settings["step_ms"] / 1e3, settings["ways"]) for _ in range(settings["rounds"])
    ]
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, rounds)
    if rank == 0:
        sender.send([_average([own[k] for own in everyones]) for k in range(len(rounds))])
    dist.destroy_process_group()


def _round(group: Any, steps: int, step: float, ways: Mapping[str, int]) -> dict[str, Any]:
    flags = torch.zeros(2, dtype=torch.int32)
    dist.all_reduce(flags, group=group)
    began = time.perf_counter()
    for _ in range(BARE):
        dist.all_reduce(flags, group=group)
    found: dict[str, Any] = {"bare": (time.perf_counter() - began) / BARE, "steps": {}, "lost": {}, "own": {}}
    for way, every in [(None, 0), *ways.items()]:
        agreement = Agreement(group, every) if way is not None else None
        dist.barrier(group=group)
        lost, own, began = 0.0, 0.0, time.perf_counter()
        for _ in range(steps):
            time.sleep(step)
            if agreement is not None:
                called, worked = time.perf_counter(), time.thread_time()
                agreement.exchange(stop=False)
                own += time.thread_time() - worked
                lost += time.perf_counter() - called
        took = (time.perf_counter() - began) / steps
        if agreement is None:
            found["alone"] = took
        else:
            agreement.close()
            found["steps"][way], found["lost"][way], found["own"][way] = took, lost / steps, own / steps
    return found


def _average(found: Sequence[Any]) -> Any:
    """Of dicts of one form, number by number."""
    if isinstance(found[0], dict):
        return {key: _average([each[key] for each in found]) for key in found[0]}
    return mean(found)
