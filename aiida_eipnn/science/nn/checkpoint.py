"""Checkpoints of a training: one safetensors file for each member, replaced as a whole.

Beside it a small file says how far the member is: what may be worth knowing where the checkpoint
itself is far away.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiida_eipnn.science.arrays import write_whole
from aiida_eipnn.science.nn.network import Network
from aiida_eipnn.science.nn.tensor_files import load_tensors, read_metadata, save_tensors
from aiida_eipnn.science.nn.training import TrainingState

SCHEMA_VERSION = "2"

_NETWORK, _AVERAGE, _OPTIMISER, _BEST = "network.", "average.", "optimiser.", "best."


def checkpoint_path(folder: Path, member: int) -> Path:
    """Return the file of a member."""
    return folder / f"member_{member:03d}.safetensors"


def save_checkpoint(path: Path, state: TrainingState, fingerprint: str) -> None:
    """Write everything that the training needs to go on.

    Parameters
    ----------
    path
        The file.
    state
        The training.
    fingerprint
        Identifies settings and data; a checkpoint of other ones is refused.
    """
    tensors = {_NETWORK + name: tensor for name, tensor in state.network.state_dict().items()}
    if not state.finished:
        tensors |= {_AVERAGE + name: tensor for name, tensor in state.average.items()}
        tensors |= _optimiser_tensors(state.optimiser)
        tensors |= {_BEST + name: tensor for name, tensor in state.best.items()}
    facts = {
        "epoch": state.epoch,
        "step": state.step,
        "n_steps": state.n_steps,
        "sums": state.sums,
        "seconds": state.seconds,
        "history": state.history,
        "finished": state.finished,
    }
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "rate_factor": repr(state.rate_factor),
        "facts": json.dumps(facts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    save_tensors(partial, tensors, metadata)
    # A rename is atomic: a job killed here leaves the old file or the new one, never half.
    partial.replace(path)
    said = {name: facts[name] for name in ("epoch", "step", "n_steps", "finished")}
    write_whole(path.with_suffix(".json"), json.dumps({**said, "rate_factor": state.rate_factor}))


def read_rate_factor(path: Path, fingerprint: str) -> float | None:
    """Return the factor on the learning rate of a checkpoint, ``None`` where there is none.

    Raises
    ------
    ValueError
        If the checkpoint is of other settings or data, or cannot be read.
    """
    return float(_metadata(path, fingerprint)["rate_factor"]) if path.exists() else None


def load_checkpoint(path: Path, state: TrainingState, fingerprint: str) -> None:
    """Bring ``state``, fresh from the start, to where the checkpoint was written.

    Raises
    ------
    ValueError
        If the checkpoint is of other settings or data, or cannot be read.
    """
    facts = json.loads(_metadata(path, fingerprint)["facts"])
    state.network.load_state_dict(load_tensors(path, _NETWORK))
    state.epoch, state.step, state.n_steps = facts["epoch"], facts["step"], facts["n_steps"]
    state.sums = {name: (total, count) for name, (total, count) in facts["sums"].items()}
    state.seconds, state.history = facts["seconds"], facts["history"]
    state.finished = facts["finished"]
    if not state.finished:
        state.average, state.best = (
            _moved(load_tensors(path, prefix), state.network.device) for prefix in (_AVERAGE, _BEST)
        )
        _load_optimiser(state.optimiser, load_tensors(path, _OPTIMISER))


def load_finished(path: Path, network: Network, fingerprint: str) -> dict[str, Any] | None:
    """Load the weights of a member whose training is complete, and return its facts.

    ``None``, and nothing loaded, where the training is not complete.
    """
    if not path.exists():
        return None
    metadata = _metadata(path, fingerprint)
    facts: dict[str, Any] = json.loads(metadata["facts"])
    if not facts["finished"]:
        return None
    network.load_state_dict(load_tensors(path, _NETWORK))
    return {**facts, "rate_factor": float(metadata["rate_factor"])}


def _metadata(path: Path, fingerprint: str) -> dict[str, str]:
    try:
        metadata = read_metadata(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} is not a checkpoint: {error}; remove it") from error
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path.name} has version {metadata.get('schema_version')} of the checkpoints, this "
            f"program reads {SCHEMA_VERSION}; start without the checkpoint"
        )
    if metadata["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path.name} is the checkpoint of a training with other settings or data; start "
            "without it"
        )
    return metadata


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{_OPTIMISER}{index}.{name}": torch.as_tensor(value)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    content = optimiser.state_dict()
    content["state"] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        content["state"].setdefault(int(index), {})[name] = tensor
    optimiser.load_state_dict(content)
