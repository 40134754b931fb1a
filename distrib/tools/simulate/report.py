"""The simulated rank in lines for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distrib.engine.state import ROWS_UP_TO

SHOWN = 6  # sample ids


def lines(found: dict[str, Any]) -> list[str]:
    """What ``rank.simulate`` returns, section by section."""
    place, plan, cost = found["place"], found["plan"], found["cost"]
    return [
        f"rank {place['rank']} of {place['world']}: machine {place['node']} of {place['nodes']}, "
        f"local rank {place['local_rank']} of {place['local_world']} (all counted from 0); nothing is trained",
        _data(found["data"]),
        *found["resolved"],
        f"this rank: {plan['share']} images a step",
        *(_slice(part) for part in found["first_step"]),
        _evaluation(found["evaluation"]),
        *_rendezvous(found["rendezvous"]),
        *_memory(found["memory"]),
        _checkpoint(found["checkpoint"], place["world"]),
        *_cost(cost),
    ]


def _data(data: dict[str, Any]) -> str:
    where = {
        "index": f"the index of {data['root']}",
        "synthetic": "synthetic, data.synthetic",
        "data.synthetic": "ImageNet's numbers, data.synthetic: data.root is not on this machine",
    }[data["source"]]
    return f"training: {data['train']:,} images, validation: {data['val']:,}, {data['classes']} classes ({where})"


def _slice(part: dict[str, Any]) -> str:
    first, stop = part["positions"]
    ids = part["ids"]
    more = f" … {ids[-1]}" if len(ids) > SHOWN else ""
    shown = ", ".join(map(str, ids[:SHOWN]))
    return f"  step 1, epoch {part['epoch']}: positions {first} to {stop - 1}, samples {shown}{more}"


def _evaluation(found: dict[str, Any]) -> str:
    own = found["own"]
    share = f"{len(own)} of them, {found['own_images']} images from {own[0][0]} on" if own else "none of them"
    batches = f"{found['batches']} batches of {found['batch']}, {found['rounds']} a rank at most"
    return f"evaluation: {batches}; this rank: {share}"


def _rendezvous(found: dict[str, Any]) -> list[str]:
    every, within = found["exchange_every"], found["stop_known_within"]
    flags = f"ranks exchange their flags every {'step' if every == 1 else f'{every} steps'}"
    meeting = []
    if "torchrun" in found:
        variables = " ".join(f"{name}={value}" for name, value in found["environment"].items())
        meeting = [f"torchrun {' '.join(found['torchrun'])} train.py …", f"  {variables}"]
    return [
        *meeting,
        f"{flags}; a stop is known to all {within} {'step' if within == 1 else 'steps'} later at the latest",
        f"time-outs: {found['step_timeout'] / 60:g} minutes for a step's collectives, "
        f"{found['control_timeout'] / 60:g} for the control group's",
    ]


def _memory(found: dict[str, Any]) -> list[str]:
    device = found["device"]
    parts = ", ".join(f"{name} {_size(device[name])}" for name in device if name != "total" and device[name])
    return [
        f"memory of each device: {_size(device['total'])} from the first step to the last ({parts}); activations, "
        "batches, the kernels' workspaces and the communication's buffers come on top and are not computed",
        f"memory of the host for a save: {_size(found['host_of_a_save']['rank_0'])} on rank 0, none elsewhere",
    ]


def _checkpoint(found: dict[str, Any], world: int) -> str:
    rows = (
        f"{_size(found['statistics'])} of it the ranks' batch-norm statistics"
        if found["statistics"]
        else f"the mean of the batch-norm statistics alone, as there are more than {ROWS_UP_TO} ranks"
        if not found["exact_resume"]
        else "no batch-norm statistics that change"
    )
    exact = (
        "goes on to the bit" if found["exact_resume"] else "differs in the last digits from one that was not stopped"
    )
    return (
        f"checkpoint: {_size(found['bytes'])}, {rows}; a run continued on {world} ranks {exact}; "
        f"{found['kept']} are kept: {_size(found['kept'] * found['bytes'])}"
    )


def _cost(cost: dict[str, Any]) -> list[str]:
    exchange, save, assumed = cost["exchange"], cost["save"], cost["assumed"]
    step, write = f"{1e3 * assumed['step']:g} ms", f"{assumed['write_bytes_per_second'] / 1e6:g} MB/s"
    ring = _span([1e3 * seconds for seconds in exchange["ring"]])
    lost = _span([100 * part for part in exchange["share_of_step"]])
    moved = {name: _size(save[f"{name}_bytes"]) for name in ("summed", "gathered", "copied")}
    return [
        f"by a model, with steps of {step} and a disk that takes {write} (both assumed):",
        f"  an exchange takes {ring} ms beside {exchange['every']} × {step} of steps, which lose {lost} % to it; "
        "what the call itself takes, distrib bench exchange measures",
        f"  a step reduces {_size(cost['step']['reduced_bytes'])} of gradients",
        f"  a save sums {moved['summed']} over the ranks, gathers {moved['gathered']} on rank 0, copies "
        f"{moved['copied']} to its host's memory, and is written in {save['write_seconds']:.2g} s beside the training",
    ]


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in values)
    return low if low == high else f"{low} to {high}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} KB" if count else "nothing"
