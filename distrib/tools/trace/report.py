"""What was found, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distrib.tools.trace.parting import Comparison, Parting, relative

SAID = {"ids": "ids", "draws": "draws", "loss": "loss", "gradient_norm": "gradient norm"}
HINTS = {
    "ids": "other samples: look at run.seed, train.global_batch, and at the files and pictures that could not be read",
    "draws": "the same samples, drawn otherwise: look at run.seed, and at the version of the code",
    "loss": "the same samples and draws: the weights were others already, or the pictures or the arithmetic are",
    "gradient_norm": "the same loss: the backward pass or the sum over the ranks is another",
}


def as_lines(found: Comparison, names: Sequence[str]) -> list[str]:
    """Where the runs ``names`` part, or that they do not."""
    lines = _parting(found) if found.partings else [_alike(found)]
    lines += [
        f"{SAID[what]} of the global batch: relative difference of at most {gap:.3g} (step {step})"
        for what, (gap, step) in found.largest.items()
    ]
    if not found.norms:
        lines.append("gradient norms were not compared: a trace has none")
    lines += [
        f"not compared, as {name} alone has them: steps {spans}"
        for name, spans in zip(names, found.only, strict=True)
        if spans.count
    ]
    return lines


def _alike(found: Comparison) -> str:
    what = "ids, draws, losses and gradient norms" if found.norms else "ids, draws and losses"
    if not found.exact:
        what = "ids and draws of the global batch"
    return f"alike in {_steps(found)}: {what}; {_worlds(found)}"


def _parting(found: Comparison) -> list[str]:
    first = found.partings[0]
    same = [parting for parting in found.partings if parting.rank == first.rank]
    where = "" if first.rank is None else f", rank {first.rank}"
    lines = [f"they part at step {first.step}{where}, in {', '.join(SAID[p.what] for p in same)} ({_worlds(found)})"]
    lines += [f"  {_values(parting)}" for parting in same]
    others = sorted({p.rank for p in found.partings if p.rank is not None} - {first.rank})
    if others:
        lines.append(f"so do {len(others)} more ranks: {', '.join(map(str, others[:8]))}{' …' if others[8:] else ''}")
    lines.append(HINTS[first.what])
    return [*lines, f"before, alike in {_steps(found)}" if found.alike.count else "no step before it is in both"]


def _values(parting: Parting) -> str:
    name = SAID[parting.what]
    if isinstance(parting.a, str) and isinstance(parting.b, str):
        a, b = float.fromhex(parting.a), float.fromhex(parting.b)
        return f"{name}: A {parting.a} ({a:.9g}), B {parting.b} ({b:.9g}), relative {relative(a, b):.3g}"
    one, other = ("nothing" if value is None else value for value in (parting.a, parting.b))
    return f"{name}: A {one}, B {other} at place {parting.place + 1} of {parting.of}; {parting.others} differ"


def _steps(found: Comparison) -> str:
    return f"{found.alike.count:,} steps ({found.alike})" if found.alike.count != 1 else f"one step ({found.alike})"


def _worlds(found: Comparison) -> str:
    a, b = (" or ".join(map(str, sorted(worlds))) for worlds in found.worlds)
    if found.exact:
        return "on 1 rank each" if a == "1" else f"on {a} ranks each"
    return f"A on {a}, B on {b} ranks"


def final_states(
    summaries: Sequence[Mapping[str, Any] | None], names: Sequence[str], exact: bool
) -> tuple[str, bool | None]:
    """What the digests in two ``summary.json`` tell, and whether they agree; None where they cannot be compared.

    ``exact``: whether they were to.
    """
    digests: list[dict[str, str]] = []
    for name, summary in zip(names, summaries, strict=True):
        digest = summary.get("sha256") if summary else None
        if not isinstance(digest, dict):
            return f"final states were not compared: {name} has no sha256 in a summary.json", None
        digests.append(digest)
    a, b = digests
    first, second = (summary.get("step") for summary in summaries if summary)
    if first != second:
        return f"final states were not compared: A's is of step {first}, B's of step {second}", None
    other = [part for part in a | b if a.get(part) != b.get(part)]
    same = [part for part in a if part not in other]
    reason = "" if exact or not other else ", as they do on other numbers of ranks"
    said = [f"{', '.join(part)} {word}" for part, word in ((other, f"differ{reason}"), (same, "alike")) if part]
    return f"state after step {first}: {'; '.join(said)}", not other
