"""The flows of moves, each loaded once in a process however many copies of a move there are.

A move knows its flow by content hash. Where the file is, is a hint: if it is gone or changed, `use_flow` says where the
right one is now.
"""

from __future__ import annotations

import os
from pathlib import Path

from openmm_tsf.checkpoint import CheckpointError, flow_info, flow_path, load_flow
from openmm_tsf.flow import Flow

_FLOWS: dict[str, Flow] = {}


def use_flow(checkpoint: str | os.PathLike) -> str:
    """Load a flow for all moves that were made with it, wherever it was then.

    For simulations that are restored from storage after their checkpoint was moved.

    Args:
        checkpoint: a checkpoint, a run directory, or a pretrained name.

    Returns:
        The flow's content hash.

    Raises:
        ValueError, CheckpointError: there is no such file or flow, or it is not whole.
    """
    path = flow_path(checkpoint)
    digest = flow_info(path)["sha256"]
    if digest not in _FLOWS:
        flow = load_flow(path)
        _FLOWS[digest] = flow.requires_grad_(False)
    return digest


def flow_of(checkpoint: str, digest: str) -> Flow:
    """The flow of a content hash, from where it was when the move was made.

    Raises:
        CheckpointError: it is no longer there, or it is another flow now.
    """
    if digest not in _FLOWS:
        advice = (
            f"the move was made with the flow of hash {digest[:12]}...; if that is elsewhere now, call "
            "openmm_tsf.exchange.use_flow('its/path.tsf') first"
        )
        if not Path(checkpoint).is_file():
            raise CheckpointError(f"the flow {checkpoint} has been moved or deleted; {advice}")
        found = use_flow(checkpoint)
        if found != digest:
            raise CheckpointError(f"{checkpoint} has changed: its hash is {found[:12]}... now; {advice}")
    return _FLOWS[digest]
