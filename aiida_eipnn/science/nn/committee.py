"""A committee of networks: what they predict together, and how it is kept in files."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from aiida_eipnn.science.arrays import FloatArray
from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.selection import Selection, select
from aiida_eipnn.science.labels import Labels, join_labels
from aiida_eipnn.science.nn.device import array_of, located
from aiida_eipnn.science.nn.graph import Graph, species_of
from aiida_eipnn.science.nn.network import (
    MACE,
    Network,
    NetworkParameters,
    describe_configurations,
)
from aiida_eipnn.science.nn.sizes import BATCH_EDGES, check_bounds
from aiida_eipnn.science.nn.stage import energy_head, predict_heads
from aiida_eipnn.science.nn.tensor_files import load_tensors, save_tensors
from aiida_eipnn.science.nn.trunk import Batch, BatchSet
from aiida_eipnn.science.predictions import OF_FEATURES, Predictions, join_predictions
from aiida_eipnn.science.versions import versions_of

# Version 2 brought what networks say of their features: feature_uncertainty.
SCHEMA_VERSION = 2
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"


class _Batch(NamedTuple):
    """Predictions of ``m`` heads for a batch, and what each atom's features say, if anything."""

    energy: FloatArray
    forces: FloatArray
    stress: FloatArray
    features: NDArray[np.float32]
    of_atoms: dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Committee:
    """Networks that were trained alike, each from its own seed.

    A network with heads that were drawn about that of DFT predicts once for each of them: the
    spread is that of the heads of all members.

    Parameters
    ----------
    members
        The networks.
    stage
        What they were trained in: ``pretrain``, ``classify`` or ``finetune``.
    seeds
        The seed of each member.
    eips
        Names of the EIPs that they learnt from; empty where there were none.
    facts
        More to know about the training, as plain values.
    """

    members: tuple[Network, ...]
    stage: str
    seeds: tuple[int, ...]
    eips: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.seeds):
            raise ValueError(
                f"a committee needs at least one member, and a seed for each: got "
                f"{len(self.members)} members and {len(self.seeds)} seeds"
            )

    def __len__(self) -> int:
        return len(self.members)

    @property
    def n_heads(self) -> int:
        """Predictions that the spread is one of: of each member one, or those of its heads."""
        return sum(max(1, member.n_drawn) for member in self.members)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the networks know, ascending."""
        return self.members[0].elements

    @property
    def parameters(self) -> NetworkParameters:
        """Architecture of the networks."""
        return self.members[0].settings

    def to(self, device: torch.device) -> Self:
        """Return the committee on a device; itself where it is there."""
        if self.members[0].device == located(device):
            return self
        return replace(self, members=tuple(item.on(device) for item in self.members))

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``weights.safetensors`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"member_{number}.{name}": tensor
            for number, member in enumerate(self.members)
            for name, tensor in member.state_dict().items()
        }
        save_tensors(folder / WEIGHTS, tensors)
        text = json.dumps(self._config(), indent=1, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the folder is of a newer version, or if the weights do not fit the configuration.
        FileNotFoundError
            If a file is missing.
        """
        config = json.loads((folder / CONFIG).read_text())
        if config["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"{folder} holds a committee of version {config['schema_version']}, this program "
                f"reads up to {SCHEMA_VERSION}; update aiida-eipnn"
            )
        tensors = load_tensors(folder / WEIGHTS)
        members = [_load_member(config, tensors, number) for number in range(len(config["seeds"]))]
        return cls(
            members=tuple(members),
            stage=config["stage"],
            seeds=tuple(config["seeds"]),
            eips=tuple(config["eips"]),
            facts=config["facts"],
        )

    def predict(
        self,
        configurations: Configurations,
        batch_size: int = 64,
        batch_edges: int = BATCH_EDGES,
    ) -> Predictions:
        """Predict energies, forces, stresses, and the spread of the members.

        Parameters
        ----------
        configurations
            Any number of them.
        batch_size
            Configurations that are predicted at once, at most.
        batch_edges
            Places for neighbours that they may have together; a configuration that has more is
            predicted alone (:class:`aiida_eipnn.science.nn.sizes.Sizes`).

        Raises
        ------
        ValueError
            If a configuration contains an element that the networks do not know, or if they were
            not trained to predict energies.
        """
        parts = list(self.predict_parts(configurations, batch_size, batch_edges))
        return join_predictions(parts) if parts else self._nothing(configurations)

    def predict_parts(
        self,
        configurations: Configurations,
        batch_size: int = 64,
        batch_edges: int = BATCH_EDGES,
        first: int = 0,
    ) -> Iterator[Predictions]:
        """Predict one batch after the other, from row ``first`` on, one of them in memory.

        The other parameters and errors are those of :meth:`predict`; what is unknown is found
        before the first batch.
        """
        energy_head(self.members[0])
        check_bounds(batch_size, batch_edges)
        species_of(configurations, self.elements)
        # Neighbours of so many are found at once, which takes little: how many they have is not
        # known before.
        starts = range(first, len(configurations), batch_size)
        chunks = (
            configurations.take(range(start, min(start + batch_size, len(configurations))))
            for start in starts
        )
        return chain.from_iterable(self._predict(chunk, batch_edges) for chunk in chunks)

    def select(
        self,
        configurations: Configurations,
        eip_labels: Labels,
        batch_size: int = 64,
        batch_edges: int = BATCH_EDGES,
    ) -> Selection:
        """Choose for each configuration the EIP to believe, or none.

        Parameters
        ----------
        configurations
            Any number of them.
        eip_labels
            Labels of the EIPs; an EIP is not chosen where it has none.
        batch_size
            Configurations that are classified at once, at most.
        batch_edges
            Places for neighbours that they may have together.

        Raises
        ------
        ValueError
            If the networks were not trained in stage ``classify``, or with other EIPs.
        """
        if eip_labels.sources.tolist() != list(self.eips):
            raise ValueError(
                f"the classifier chooses among {list(self.eips)}, but the labels are of "
                f"{eip_labels.sources.tolist()}"
            )
        described = self._describe(configurations)
        parts = [
            self._probabilities(described.batch(rows))
            for rows in described.neighbours.sizes.batches(batch_size, batch_edges)
        ]
        empty = np.zeros((0, len(self.eips) + 1))
        return select(np.concatenate([empty, *parts]), _rows_for(configurations, eip_labels))

    def _describe(self, configurations: Configurations) -> BatchSet:
        # Each batch is seen once: nothing to keep.
        device = self.members[0].device
        return describe_configurations(
            configurations, self.parameters, self.elements, keep=False, device=device
        )

    def _predict(self, configurations: Configurations, batch_edges: int) -> Iterator[Predictions]:
        described = self._describe(configurations)
        for rows in described.neighbours.sizes.batches(len(configurations), batch_edges):
            part = self._predict_batch(described.batch(rows))
            yield _summarise(configurations.take(rows), part)

    def _nothing(self, configurations: Configurations) -> Predictions:
        m = self.n_heads
        features = np.zeros((0, self.members[0].trunk.n_features), np.float32)
        by_member = np.zeros((m, 0)), np.zeros((m, 0, 3)), np.zeros((m, 0, 6))
        known = all(member.feature_uncertainty is not None for member in self.members)
        of_atoms = {name: np.zeros(0, np.float32) for name in OF_FEATURES} if known else {}
        return _summarise(configurations, _Batch(*by_member, features, of_atoms))

    def _predict_batch(self, batch: Batch) -> _Batch:
        results = [predict_heads(member, batch) for member in self.members]
        first = self.members[0]
        pooled = first.pooled(results[0].features, batch.graph)
        energy, forces, stress = (
            np.concatenate([getattr(result, name) for result in results])
            for name in ("energy", "forces", "stress")
        )
        features = array_of(pooled[:, : first.trunk.n_features]).astype(np.float32)
        each = [result.features for result in results]
        return _Batch(energy, forces, stress, features, self._of_atoms(each, batch.graph))

    def _of_atoms(self, features: list[Tensor], graph: Graph) -> dict[str, NDArray[np.float32]]:
        """Return what the features of each atom say, in the mean of the members that can tell."""
        spreads, distances = [], []
        for member, own in zip(self.members, features, strict=True):
            if (known := member.feature_uncertainty) is not None:
                spreads.append(member.heads.scale * known.spreads(own))
                distances.append(known.distances(own, graph.species))
        return {
            name: array_of(torch.stack(parts).mean(dim=0)).astype(np.float32)
            for name, parts in zip(OF_FEATURES, (spreads, distances), strict=True)
            if parts
        }

    def _probabilities(self, batch: Batch) -> FloatArray:
        with torch.no_grad():
            each = [
                member.logits(member.trunk(batch), batch.graph).softmax(dim=1)
                for member in self.members
            ]
        return array_of(torch.stack(each).mean(dim=0)).astype(np.float64)

    def _config(self) -> dict[str, Any]:
        heads = self.members[0].heads
        classifier, known = self.members[0].classifier, self.members[0].feature_uncertainty
        return {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "seeds": list(self.seeds),
            "elements": [chemical_symbols[number] for number in self.elements],
            "network": asdict(self.parameters),
            "heads": list(heads.names),
            "classes": list(classifier.names) if classifier else [],
            "n_drawn": None if known is None else len(known.heads),
            "eips": list(self.eips),
            # For people: the numbers that are used are among the weights.
            "reference_energies": [_references(member) for member in self.members],
            "energy_scale": [float(member.heads.scale) for member in self.members],
            "facts": self.facts,
            "versions": versions_of(
                ["torch", "numpy", "vesin", "safetensors"]
                + (["mace-torch"] if self.parameters.trunk == MACE else [])
            ),
        }


def _summarise(configurations: Configurations, parts: _Batch) -> Predictions:
    deviation = parts.forces - parts.forces.mean(axis=0)
    return Predictions(
        ids=configurations.ids,
        offsets=configurations.offsets,
        energy=parts.energy.mean(axis=0),
        forces=parts.forces.mean(axis=0),
        stress=parts.stress.mean(axis=0),
        energy_std=parts.energy.std(axis=0) / configurations.n_atoms,
        forces_std=np.sqrt((deviation**2).sum(axis=2).mean(axis=0)),
        features=parts.features,
        **parts.of_atoms,
    )


def _rows_for(configurations: Configurations, labels: Labels) -> Labels:
    """Return a row of labels for each configuration, missing where there was none."""
    empty = Labels.missing(configurations, list(map(str, labels.sources)))
    present = np.isin(configurations.ids, labels.ids)
    if not present.any():
        return empty
    rows = labels.rows_of(configurations.ids[present])
    together = join_labels([labels.take(rows), empty.take(np.flatnonzero(~present))])
    return together.take(together.rows_of(configurations.ids))


def _load_member(config: dict[str, Any], tensors: dict[str, torch.Tensor], number: int) -> Network:
    elements = [chemical_symbols.index(symbol) for symbol in config["elements"]]
    network = Network(
        NetworkParameters.from_dict(config["network"]),
        elements,
        config["heads"],
        config["classes"],
        config.get("n_drawn"),
    )
    prefix = f"member_{number}."
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit {CONFIG}: {error}") from error
    return network


def _references(member: Network) -> dict[str, dict[str, float]]:
    return {
        name: {
            chemical_symbols[number]: float(member.heads.reference[row, column])
            for column, number in enumerate(member.elements)
        }
        for row, name in enumerate(member.heads.names)
    }
