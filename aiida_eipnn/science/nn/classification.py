"""The stage that learns which EIP is right where."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from aiida_eipnn.science.arrays import IntArray
from aiida_eipnn.science.eip.selection import NONE, class_labels
from aiida_eipnn.science.nn.network import Network, describe_configurations, fit_pooling
from aiida_eipnn.science.nn.sizes import Sizes
from aiida_eipnn.science.nn.stage import (
    StageInputs,
    StageSettings,
    Statistics,
    need_labels,
    network_parameters,
    new_network,
)
from aiida_eipnn.science.nn.training import Loss, Step
from aiida_eipnn.science.reference import fit_alignment


class Classification:
    """Learn which EIP is right where, from the configurations that DFT labelled."""

    defaults: Mapping[str, Any] = {
        # A linear readout of frozen features, from some ten labels: held down by weight decay.
        "steps": 600,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "weight_decay": 0.2,
        "trunk_rate_factor": 0.0,
        "ema_decay": 0.98,
    }

    def __init__(self, inputs: StageInputs, settings: StageSettings) -> None:
        labels = need_labels(inputs.labels, "classification", "DFT labels")
        eip_labels = need_labels(inputs.eip_labels, "classification", "labels of at least one EIP")
        self.settings, self.inputs = settings, inputs
        self.held_out = np.zeros(0, dtype=np.int64)
        self.parameters = network_parameters(inputs, settings)
        self.statistics = Statistics(inputs, self.parameters, settings)
        self.elements = self.statistics.elements
        alignment = fit_alignment(inputs.configurations, labels, eip_labels)
        self.aligned = alignment.apply(inputs.configurations, eip_labels)
        both = labels.take(np.flatnonzero(np.isin(labels.ids, eip_labels.ids)))
        if not len(both):
            raise ValueError(
                f"none of the {len(labels)} configurations with DFT labels has EIP labels; label "
                "them with the EIPs first"
            )
        self.classes = class_labels(both, self.aligned, settings.selection)
        self.n_labels = len(both)
        configurations = inputs.configurations
        self.described = describe_configurations(
            configurations.take(configurations.rows_of(both.ids)),
            self.parameters,
            self.elements,
            device=settings.device,
            batch_edges=settings.edges_at_once,
        )
        self._sizes = self.described.neighbours.sizes

    def __len__(self) -> int:
        return len(self.described)

    @property
    def heads(self) -> tuple[str, ...]:
        """Those of the networks that it starts from."""
        return self.inputs.members[0].heads.names if self.inputs.members else ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The EIPs, then none."""
        return (*map(str, self.aligned.sources), NONE)

    @property
    def n_drawn(self) -> None:
        """None: there is no head of DFT."""
        return None

    def for_member(self, member: int) -> Self:
        """Return itself: all members learn from the same labels."""
        return self

    def network(self, seed: int, member: int) -> Network:
        """Return the network that a member starts from."""
        source = (
            self.inputs.members[member % len(self.inputs.members)] if self.inputs.members else None
        )
        network = new_network(self, seed)
        if source:
            network.trunk.load_state_dict(source.trunk.state_dict())
            network.heads.load_state_dict(source.heads.state_dict())
        fit_pooling(network, self.statistics.described, self.settings.edges_at_once)
        return network

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the cross-entropy."""
        n, rows = len(rows), step.share.of(rows)
        if not len(rows):
            return Loss(torch.zeros((), device=network.device), {"accuracy": (0.0, 0)})
        batch = self.described.batch(rows)
        logits = network.logits(network.trunk(batch), batch.graph)
        wanted = torch.as_tensor(self.classes[rows], device=logits.device)
        hits = int((logits.argmax(dim=1) == wanted).sum())
        value = nn.functional.cross_entropy(logits, wanted, reduction="sum") / n
        return Loss(value, {"accuracy": (hits, len(rows))})

    def sizes(self, rows: IntArray, step: Step) -> Sequence[Sizes]:
        """Return the sizes of these configurations."""
        return [self._sizes.take(rows)]

    def validate(self, network: Network) -> dict[str, float]:
        """Return nothing: no label is held out."""
        return {}

    def finish(self, network: Network, seed: int) -> None:
        """Do nothing: the classifier needs the standardisation that it was trained with."""
