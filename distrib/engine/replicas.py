"""Whether all ranks still hold the same weights, bit for bit.

They begin alike and apply the same reduced gradient, so they stay alike, as long as memory, processor and network of
each do what they should. Where one does not, nothing else says so: the loss goes on, and so do checkpoints, which are
rank 0's.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from distrib.engine.state import statistics_of
from distrib.faults import Failure
from distrib.optim import Ema
from distrib.runtime import Runtime

CHUNK = 1 << 22  # elements that are summed together: 16 MB, and as much again for their places


class Replicas:
    """Compares checksums of weights, momentum and average: each ``every`` steps, and before a save.

    A comparison is one pass of small sums over the tensors on the device, and an all-reduce of six integers there. The
    host reads the result a step later, so it gets ahead of the device by one step only, once in ``every``; before a
    save it waits, as the save does. Where the sums differ the ranks exchange them to find out whose.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        runtime: Runtime,
        every: int | None,
    ) -> None:
        """``every``: None to never compare. One rank alone never does."""
        self._network, self._optimizer, self._ema, self._runtime = network, optimizer, ema, runtime
        self._every = every if runtime.world > 1 else None
        self._own = set(statistics_of(network))  # each rank's own: they differ
        self._posted: tuple[int, torch.Tensor, Callable[[], torch.Tensor]] | None = None

    def after(self, step: int) -> None:
        """Call it on all ranks after each step.

        Raises:
            Failure: on all ranks: some rank's weights are not those of the others.
        """
        if self._every is None:
            return
        self._read()
        if step % self._every == 0:
            self._post(step)

    def compare(self, step: int) -> None:
        """Compares now. Call it on all ranks.

        Raises:
            Failure: as ``after``.
        """
        if self._every is None:
            return
        self._read()
        self._post(step)
        self._read()

    def sums(self) -> dict[str, torch.Tensor]:
        """This rank's checksums, int64 [] each, on the device."""
        return {name: checksum(list(tensors)) for name, tensors in self._parts()}

    def _parts(self) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """What must be alike, in an order that is the same on all ranks."""
        yield "weights", (t for name, t in self._network.state_dict().items() if name not in self._own)
        state = self._optimizer.state
        of_groups = (p for group in self._optimizer.param_groups for p in group["params"])
        momentum = (state[p].get("momentum_buffer") for p in of_groups)
        yield "momentum", (buffer for buffer in momentum if buffer is not None)
        if self._ema is not None:
            yield "average (EMA)", (t for name, t in self._ema.average.items() if name not in self._own)

    def _post(self, step: int) -> None:
        sums = torch.stack(list(self.sums().values()))
        # The largest of ~x is the smallest of x, turned round: one all-reduce tells both.
        self._posted = step, sums, self._runtime.max_later(torch.cat([sums, ~sums]))

    def _read(self) -> None:
        if self._posted is None:
            return
        (step, sums, read), self._posted = self._posted, None
        largest, smallest = read().chunk(2)
        if not torch.equal(largest, ~smallest):  # on all ranks or on none: both came from the all-reduce
            self._name_the_odd(step, sums)

    def _name_the_odd(self, step: int, sums: torch.Tensor) -> None:
        found = self._runtime.gather_objects((sums.tolist(), platform.node()))
        names = [name for name, _ in self._parts()]
        raise Failure(told(step, names, [row for row, _ in found], [host for _, host in found]), everywhere=True)


def told(step: int, names: Sequence[str], rows: Sequence[Sequence[int]], hosts: Sequence[str]) -> str:
    """Who is unlike the others, and in what; ``rows``: each rank's sums, in the order of ``names``."""
    counts = Counter(tuple(row) for row in rows).most_common()
    common, votes = counts[0]
    settled = 2 * votes > len(rows)  # else nobody can say who is right
    odd = [rank for rank, row in enumerate(rows) if not settled or tuple(row) != common]
    differ = [name for k, name in enumerate(names) if len({row[k] for row in rows}) > 1]
    ranks = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in odd)
    others = f"from the other {votes}" if settled else "from each other, and nobody can say which is right"
    return (
        f"after step {step} the {' and '.join(differ)} of {ranks} differ {others}: a memory, a processor or a network "
        "there made a mistake. Nothing was saved since the ranks were last alike; the same command continues from "
        "the newest checkpoint, on other machines if they can be had"
    )


@torch.no_grad()
def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A sum over the bits of ``tensors``, int64 [], on their device; the same in any order of adding, as integers are.

    Each 32-bit word is mixed with its place first, so that words that have changed places show, and any one bit that
    has flipped: the mixing maps different words of one place to different ones. Other changes pass with a chance of
    about 2^-32. Tensors of 4 or 8 bytes an element.
    """
    total, place = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else "cpu"), 0
    words: list[torch.Tensor] = []
    for k, tensor in enumerate(tensors):
        words.append(tensor.detach().contiguous().view(-1).view(torch.int32))
        if k == len(tensors) - 1 or sum(w.numel() for w in words) >= CHUNK:
            chunk, words = torch.cat(words), []
            total += _mixed(chunk, place).sum(dtype=torch.int64)
            place += chunk.numel()
    return total


def _mixed(words: torch.Tensor, place: int) -> torch.Tensor:
    """int32 [n] → int32 [n], in place: MurmurHash3's last round (Appleby), in which each bit reaches all others.

    Each of its steps can be undone; products wrap around.
    """
    places = torch.arange(place, place + words.numel(), dtype=torch.int32, device=words.device)
    words ^= places.mul_(-1640531527)  # 2^32 divided by the golden ratio (Knuth): neighbours lie far apart
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        high = words >> shift
        words ^= high.bitwise_and_((1 << (32 - shift)) - 1)  # int32 shifts its sign in
        if factor != 1:
            words *= factor
    return words
