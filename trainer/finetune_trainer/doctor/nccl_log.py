"""Parses the transport between GPUs from NCCL's log (NCCL_DEBUG=INFO, subsystem INIT). Pure.

Formats: NCCL 2.18 to 2.29, `src/transport/{net,p2p,shm}.cc`, `src/transport/net_ib*` and `src/init.cc`:

    Channel 00/0 : 3[3] -> 8[0] [send] via NET/IB/0/GDRDMA
    Channel 00/0 : 3[3] -> 8[0] [send] via NET/IB/2(1)/GDRDMA     by another GPU of the node (PXN)
    Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM
    Channel 01 : 0[0] -> 1[1] via SHM/direct/direct
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

SOCKET = "Socket"
_NET = re.compile(r" via NET/(?P<name>[^/\n]+)/\d+(?:\(\d+\))?(?P<rest>\S*)")
_INSIDE = re.compile(r" via (P2P/(?:direct pointer|indirect|\w+)|SHM)\b")
_NETWORK = re.compile(r"NCCL INFO Using network (.+?)\s*$")
_DEVICES = re.compile(r"NET/IB : Using\s+(.+?);? OOB")
_REASONS = (
    re.compile(r"NCCL WARN (Call to ibv_\w+ failed.*)"),
    re.compile(r"(NET/IB : No device found\.?)"),
    re.compile(r"(Failed to open libibverbs\S*)"),
    re.compile(r"(NCCL_IB_DISABLE set by environment to [1-9]\d*)"),
    re.compile(r"(NCCL_NET set by environment to \S+)"),
    re.compile(r"(Failed to initialize NET plugin IB)"),
)
_MAX_REASON = 200


@dataclass(frozen=True)
class Transport:
    """The transport between GPUs."""

    network: str = ""
    """NCCL's name of the network between nodes: `IB` (InfiniBand and RoCE), `Socket` (TCP), or a plugin's."""
    gpu_direct: bool = False
    """Whether the adapter reads GPU memory itself on every connection (GPUDirect RDMA)."""
    devices: str = ""
    """Adapters, as `[0]mlx5_0:1/RoCE`."""
    inside: tuple[str, ...] = ()
    """Transports within a node: `P2P/CUMEM`, `P2P/IPC`, `SHM`."""
    reasons: tuple[str, ...] = ()
    """NCCL's messages on why it does not use InfiniBand."""

    @property
    def words(self) -> str:
        """Description of the transport in one line."""
        direct = {SOCKET: " (TCP)"}.get(self.network, " with GPUDirect RDMA" if self.gpu_direct else
                                        " without GPUDirect RDMA")  # fmt: skip
        between = f"NET/{self.network}{direct} between nodes" if self.network else ""
        return ", ".join(filter(None, [between, f"{' and '.join(self.inside)} within a node" if self.inside else ""]))


def parse_log(lines: Iterable[str]) -> Transport:
    """Return the transport in one worker's log. Fields that the log does not show stay empty.

    The network is that of the connections, or without connections the one that NCCL has chosen.
    """
    chosen, devices, used, direct = "", "", [], []
    inside, reasons = set(), []
    for line in lines:
        if found := _NET.search(line):
            used.append(found["name"])
            direct.append("GDRDMA" in found["rest"])
        elif found := _INSIDE.search(line):
            inside.add(found[1])
        elif found := _NETWORK.search(line):
            chosen = found[1]
        elif found := _DEVICES.search(line):
            devices = found[1]
        reasons += [match[1].strip()[:_MAX_REASON] for match in (one.search(line) for one in _REASONS) if match]
    network = SOCKET if SOCKET in used else (used or [chosen])[-1]
    return Transport(network, bool(direct) and all(direct), devices, tuple(sorted(inside)), _once(reasons))


def joined(parts: Iterable[Transport]) -> Transport:
    """Return the transport of all workers: the slowest network, and GPUDirect only if all connections use it."""
    known = [one for one in parts if one != Transport()]
    if not known:
        return Transport()
    between = [one for one in known if one.network]
    slowest = next((one for one in between if one.network == SOCKET), (between or known)[0])
    return replace(
        slowest,
        gpu_direct=bool(between) and all(one.gpu_direct for one in between),
        inside=tuple(sorted({name for one in known for name in one.inside})),
        reasons=_once(reason for one in known for reason in one.reasons),
    )


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
