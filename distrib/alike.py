"""Whether all ranks were started with the same settings: on several nodes people type them on each."""

from __future__ import annotations

from distrib.config import Config, UserError
from distrib.follow import flatten
from distrib.runtime import Runtime

# What may differ from machine to machine, and what only rank 0 uses.
OF_A_MACHINE = ("data.root", "data.index_dir", "data.workers", "data.prefetch", "wandb.")


def check_alike(config: Config, runtime: Runtime) -> None:
    """Compares the settings of all ranks with those of rank 0: with another learning rate the ranks would drift apart.

    Raises:
        UserError: on all ranks, with the first key that differs, and where.
    """
    ours = {
        key: value for key, value in flatten(config.model_dump(mode="json")).items() if not key.startswith(OF_A_MACHINE)
    }
    first = runtime.on_main(lambda: ours)
    key = next((key for key in sorted(ours | first) if ours.get(key) != first.get(key)), None)

    def look() -> None:
        if key is not None:
            raise UserError(
                f"rank {runtime.rank} was started with {key}={ours.get(key)}, rank 0 with {first.get(key)}: type the "
                "same settings on every node"
            )

    runtime.on_each(look)
