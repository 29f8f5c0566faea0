"""What a process can know inside mpirun: how many copies of it run, here and in all, but not on which hosts.

OpenMPI 4 has them in an internal variable, among others that do not count; the manuals and OpenMPI 5 know none.
So `mpirun -n 1` of a launcher is this machine, and several copies are refused: each of them would start the whole run.
OpenMPI as a way to reach nodes is `--launcher openmpi`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from train.cluster.nodes import Absent, Nodes
from train.errors import UserError

_SIZE, _LOCAL_SIZE, _RANK = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK"
_NODES_OF_OPENMPI_4 = "OMPI_MCA_orte_num_nodes"
_WAY_OUT = "call it once, without mpirun; --hostfile names the nodes, --launcher openmpi reaches them through mpirun."


def find(variables: Mapping[str, str]) -> Nodes | Absent:
    """This machine, when mpirun started this process alone; `copies` tells of the other case.

    Raises:
        UserError: mpirun has other nodes besides.
    """
    if _SIZE not in variables:
        return Absent(f"not started by OpenMPI's mpirun ({_SIZE} is not set)")
    num_nodes = variables.get(_NODES_OF_OPENMPI_4, "1")
    if num_nodes not in ("", "1"):
        raise UserError(
            f"mpirun has {num_nodes} nodes ({_NODES_OF_OPENMPI_4}) and does not tell this launcher their names:"
            f" {_WAY_OUT}"
        )
    return Nodes("openmpi", "mpirun of one process", (socket.gethostname(),))


def copies(variables: Mapping[str, str]) -> str | None:
    """What is wrong when mpirun started several copies of this launcher; None when it did not."""
    size, here = variables.get(_SIZE, "1"), variables.get(_LOCAL_SIZE, "1")
    if size in ("", "1"):
        return None
    nodes = (
        "on this machine" if size == here else f"on several nodes ({here} on this one), whose names it does not tell"
    )
    return (
        f"mpirun started {size} copies of this launcher {nodes}; this is number {variables.get(_RANK, '?')}, and each"
        f" would start the whole run: {_WAY_OUT}"
    )
