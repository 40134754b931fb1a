"""``--nnodes``: where agents that are started by hand, one a node, meet. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import re
import socket

from distrib.config import UserError
from distrib.options import positive
from launch.command import Rendezvous

PORT = 29400  # torchrun's own
RESTARTS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a start on several nodes, by torchrun's names; none is needed for this machine alone."""
    nodes = parser.add_argument_group("several nodes (type the same command on each)")
    nodes.add_argument("--nnodes", type=_nodes, metavar="N|MIN:MAX", help="how many; MIN:MAX: nodes may come and go")
    nodes.add_argument(
        "--rdzv-endpoint", metavar="HOST[:PORT]", help=f"one of them, where they meet (default port: {PORT})"
    )
    nodes.add_argument(
        "--max-restarts", type=_count, metavar="N", help=f"how often workers may be started again (default: {RESTARTS})"
    )
    nodes.add_argument("--rdzv-id", metavar="NAME", help="with --fresh: a name that no earlier start had")


def read_rendezvous(args: argparse.Namespace, name: str) -> Rendezvous | None:
    """Where the agents meet, or None for a start on this machine alone; ``name``: the run's.

    Raises:
        UserError: options that do not go together, or a host that cannot be found.
    """
    if args.nnodes is None:
        for flag in ("--rdzv-endpoint", "--max-restarts", "--rdzv-id"):
            if getattr(args, flag[2:].replace("-", "_")) is not None:
                raise UserError(f"{flag} is for a start on several nodes: say --nnodes too")
        return None
    if args.rdzv_endpoint is None:
        raise UserError("--nnodes needs --rdzv-endpoint HOST: the name of one of the nodes, the same on each")
    if args.fresh and args.rdzv_id is None:
        # Else a second --fresh would look like a worker of the first that is started again, and go on.
        raise UserError("--fresh on several nodes needs --rdzv-id NAME: one that no earlier start had, alike on each")
    least, most = args.nnodes
    restarts = RESTARTS if args.max_restarts is None else args.max_restarts
    return find_rendezvous(args.rdzv_endpoint, most, args.rdzv_id or name, restarts, least)


def find_rendezvous(endpoint: str, nodes: int, name: str, restarts: int = 0, least: int | None = None) -> Rendezvous:
    """The rendezvous of ``nodes`` agents at ``endpoint``, a HOST or HOST:PORT, as this machine sees it.

    Raises:
        UserError: the host cannot be found.
    """
    host, port = _endpoint(endpoint)
    is_host = _is_here(host)
    # Not the host's address as itself sees it: some systems give their own name one of the loopback.
    address = host if is_host else _address_towards(host, port)
    return Rendezvous(nodes, host, port, name, is_host, address, restarts, least)


def _nodes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"takes a number of nodes, as in 2, or MIN:MAX, as in 1:4; got {text!r}")
    return least, most


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(PORT)
    if not host or ":" in host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv-endpoint takes HOST or HOST:PORT, got {text!r}")
    return host, int(port)


def _is_here(host: str) -> bool:
    """Whether ``host`` is this machine: whether one of its addresses can be bound here.

    Raises:
        UserError: nobody knows a host of this name.
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"--rdzv-endpoint {host}: {error.strerror}: give a name or address that all nodes know"
        ) from None
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to ``host``; nothing is sent.

    Raises:
        UserError: there is no way.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {host}: {error.strerror}: no way there from this machine") from None
