"""The one training loop: a task supplies data and loss, the loop does the rest.

Every random choice is drawn from the seed, the epoch and the step, so a training that was
interrupted needs no state of a random generator to go on, and on a CPU ends with the same weights;
GPUs add numbers in an order of their own.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from aiida_eipnn.science.arrays import IntArray
from aiida_eipnn.science.nn.device import FULL, MIXED_PRECISIONS, mixed_precision
from aiida_eipnn.science.nn.network import Network
from aiida_eipnn.science.nn.processes import ONE_PROCESS, Processes
from aiida_eipnn.science.nn.shares import WHOLE, Share
from aiida_eipnn.science.nn.sizes import BATCH_EDGES, Sizes, count_parts
from aiida_eipnn.science.settings import build
from aiida_eipnn.science.verdict import SCORE

# The learning rate ends at this part of its start.
FINAL_RATE = 0.01
# Where the head of DFT starts from.
EIP_START, NEW_START = "eips", "new"
HEAD_STARTS = (EIP_START, NEW_START)
# Part of the steps in which the learning rate rises from zero.
WARM_UP = 0.02
# Records of a training at most: a small set takes thousands of epochs.
MAX_RECORDS = 100
# Seconds between two checkpoints.
CHECKPOINT_SECONDS = 30.0


class Diverged(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """The loss is not finite any more; a lower learning rate may help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingParameters:
    """Schedule and weights of a training.

    Parameters
    ----------
    steps
        Number of gradient steps; rounded to whole epochs, so that every configuration is seen
        equally often.
    min_epochs
        A large set takes more steps, so that each configuration is seen that often.
    batch_size
        Configurations of a step.
    learning_rate
        Largest rate of the heads; it falls along a cosine to a hundredth.
    trunk_rate_factor
        Rate of the trunk relative to that; 0 freezes the trunk.
    weight_decay
        Decoupled weight decay (AdamW).
    ema_decay
        Decay of the running average of the weights, which is what is used in the end.
    gradient_clip
        Largest norm of the gradient.
    energy_weight
        Weight of the error of the energy per atom, in eV/atom, in the loss.
    forces_weight
        Weight of the error of a force component, in eV/Å.
    stress_weight
        Weight of the error of a component of the virial per atom, in eV/atom.
    pseudo_weight
        Weight of the pseudo-labels relative to the DFT labels, at the start; it falls to zero.
    replay_weight
        Weight of what the EIPs say while DFT labels are learnt; 0 lets their heads go.
    head_start
        Where the head of DFT starts from in a network that learnt from EIPs: ``eips``, the
        combination of their heads that fits the DFT labels, or ``new``, small random weights.
    head_noise
        Relative noise on a head that is copied: members shall differ.
    bootstrap
        Whether each member draws a set of its own from the labels, with replacement.
    validation_fraction
        Part of the labels that is not learnt but judges: the weights that did best on them are
        what is used in the end. They are labels all the same, and must be counted as such.
    patience
        Stop when so many records in a row did not do better on them; 0 never stops early.
    n_heads
        Heads that fine-tuning draws about the trained one (0 or 1: none): each of them predicts
        like a member (:mod:`aiida_eipnn.science.nn.last_layer`).
    mixed_precision
        ``none``; or ``tf32`` or ``bfloat16``, with which steps are less exact and, on GPUs, faster
        (:func:`aiida_eipnn.science.nn.device.mixed_precision`).
    """

    steps: int
    min_epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 3e-3
    trunk_rate_factor: float = 1.0
    weight_decay: float = 1e-5
    ema_decay: float = 0.995
    gradient_clip: float = 10.0
    energy_weight: float = 10.0
    forces_weight: float = 1.0
    stress_weight: float = 0.0
    pseudo_weight: float = 1.0
    replay_weight: float = 0.1
    head_start: str = EIP_START
    head_noise: float = 0.05
    bootstrap: bool = False
    validation_fraction: float = 0.0
    patience: int = 0
    n_heads: int = 0
    mixed_precision: str = FULL

    def __post_init__(self) -> None:
        for name in ("steps", "min_epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be below 0, and finite: {getattr(self, name)}")
        for name in ("patience", "n_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number from 0 on, not {value!r}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be from 0 to below 1, not {self.validation_fraction}"
            )
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay must be below 1, not {self.ema_decay}")
        if self.head_start not in HEAD_STARTS:
            raise ValueError(f"head_start must be one of {HEAD_STARTS}, not {self.head_start!r}")
        if self.mixed_precision not in MIXED_PRECISIONS:
            raise ValueError(
                f"mixed_precision must be one of {MIXED_PRECISIONS}, not {self.mixed_precision!r}"
            )
        if not isinstance(self.bootstrap, bool):
            raise TypeError(f"bootstrap must be true or false, not {self.bootstrap!r}")

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> Self:
        """Build from plain values, over the defaults of a stage.

        Raises
        ------
        ValueError
            If a key is unknown or a value cannot be used.
        """
        return build(cls, {**(defaults or {}), **content}, "training")

    def n_epochs(self, n_items: int) -> int:
        """Return how many epochs a set of ``n_items`` is trained for."""
        n_batches = math.ceil(n_items / self.batch_size)
        return max(1, self.min_epochs, round(self.steps / n_batches))


_NOT_NEGATIVE = (
    "trunk_rate_factor",
    "weight_decay",
    "ema_decay",
    "energy_weight",
    "forces_weight",
    "stress_weight",
    "pseudo_weight",
    "replay_weight",
    "head_noise",
)


class Step(NamedTuple):
    """Where the training is: part of it that is done (0 to 1), and the step's own randomness.

    Every ``share`` of the batch has a generator that draws the same.
    """

    progress: float
    rng: np.random.Generator
    share: Share = WHOLE


class Loss(NamedTuple):
    """Loss of a step, and sum and count of each quantity whose mean over the epoch is reported."""

    value: Tensor
    sums: Mapping[str, tuple[Tensor | float, int]]


class Task(Protocol):
    """What a stage supplies to the loop."""

    def __len__(self) -> int:
        """Return the number of labelled configurations."""
        ...

    def loss(self, network: Network, rows: IntArray, step: Step) -> Loss:
        """Return the loss of the given labelled configurations, as far as it is of this share."""
        ...

    def sizes(self, rows: IntArray, step: Step) -> Sequence[Sizes]:
        """Return the sizes of all that the loss of these configurations computes.

        Of themselves, and of what the loss draws beside them: the step's generator is as new.
        """
        ...

    def validate(self, network: Network) -> dict[str, float]:
        """Return errors on labels that are held out, empty where there are none.

        ``validation_score`` among them decides: the smaller the better.
        """
        ...


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """A training under way.

    Parameters
    ----------
    network
        Weights as the optimiser has them; their running average once ``finished``.
    seed
        Seed of the member.
    rate_factor
        Factor on the learning rate, below 1 in a second attempt.
    optimiser
        Made by :func:`start_training`.
    average
        Running average of every trained weight, by name.
    epoch, step
        The next step to take.
    n_steps
        Steps that were taken.
    sums
        Sum and count of each reported quantity in this epoch.
    seconds
        Time spent in this epoch.
    history
        What was reported, now and then, after complete epochs.
    best
        The weights that did best on the labels that are held out, by name; empty before the first
        look.
    finished
        Whether all epochs are.
    """

    network: Network
    seed: int
    rate_factor: float
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor]
    epoch: int = 0
    step: int = 0
    n_steps: int = 0
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    finished: bool = False


def start_training(
    network: Network, parameters: TrainingParameters, seed: int, rate_factor: float = 1.0
) -> TrainingState:
    """Return the state before the first step."""
    frozen = parameters.trunk_rate_factor == 0
    network.trunk.requires_grad_(not frozen)
    trunk = [] if frozen else list(network.trunk.parameters())
    heads = [weight for name, weight in network.named_parameters() if not name.startswith("trunk.")]
    groups = [
        {"params": trunk, "factor": parameters.trunk_rate_factor},
        {"params": heads, "factor": 1.0},
    ]
    optimiser = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=parameters.learning_rate,
        weight_decay=parameters.weight_decay,
        fused=True,
    )
    average = {name: weight.detach().clone() for name, weight in _trained(network).items()}
    return TrainingState(
        network=network,
        seed=seed,
        rate_factor=rate_factor,
        optimiser=optimiser,
        average=average,
    )


def fit(
    state: TrainingState,
    task: Task,
    parameters: TrainingParameters,
    *,
    save: Callable[[TrainingState], None] = lambda _: None,
    must_stop: Callable[[], bool] = lambda: False,
    report: Callable[[dict[str, float]], None] = lambda _: None,
    processes: Processes = ONE_PROCESS,
    n_parts: int = 1,
    batch_edges: int = BATCH_EDGES,
) -> bool:
    """Train until all epochs are complete; return False where it had to stop before.

    Parameters
    ----------
    state
        From :func:`start_training` or from a checkpoint. It is changed.
    task
        Data and loss.
    parameters
        Schedule and weights.
    save
        Writes a checkpoint: every now and then, and before the loop stops.
    must_stop
        Asked before every step. One process that must stop stops all.
    report
        Is told every new record of the history.
    processes
        Those that take each step together, each with its share of the batch. Only the first one
        saves, reports and judges by held-out labels.
    n_parts
        Parts that each computes one after the other, at least: less memory, and the same sum.
    batch_edges
        Places for neighbours that a part may have (:class:`aiida_eipnn.science.nn.sizes.Sizes`): a
        batch of large configurations is computed in more parts.

    Raises
    ------
    Diverged
        If the loss is not finite.
    """
    n_epochs = parameters.n_epochs(len(task))
    n_batches = math.ceil(len(task) / parameters.batch_size)
    if not processes.is_first:
        save, report = _tell_nobody, _tell_nobody
    processes.copy_first(state.network.state_dict())
    processes.copy_first(state.average)
    saved = time.monotonic()
    while state.epoch < n_epochs:
        order = _epoch_order(len(task), state, bootstrap=parameters.bootstrap)
        while state.step < n_batches:
            if processes.any(must_stop()):
                save(state)
                return False
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save(state)
                saved = time.monotonic()
            first = state.step * parameters.batch_size
            progress = (state.epoch * n_batches + state.step) / (n_epochs * n_batches)
            rows = order[first : first + parameters.batch_size]
            sets = task.sizes(rows, Step(progress, _rng_of(state)))
            parts = count_parts(sets, batch_edges, n_parts=n_parts, n_processes=processes.count)
            _take_step(state, task, parameters, rows, progress, processes, parts)
        if _end_epoch(state, task, n_epochs, processes):
            report(state.history[-1])
            if _is_patience_over(state, parameters):
                break
    _use(state, state.best or state.average)
    state.best, state.finished = {}, True
    return True


def learning_rate(progress: float) -> float:
    """Return the factor on the learning rate when this part of the training is done."""
    if progress < WARM_UP:
        return (progress + 1e-3) / WARM_UP
    done = (progress - WARM_UP) / (1 - WARM_UP)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _take_step(
    state: TrainingState,
    task: Task,
    parameters: TrainingParameters,
    rows: IntArray,
    progress: float,
    processes: Processes,
    n_parts: int,
) -> None:
    start = time.monotonic()
    trained = list(_trained(state.network).values())
    losses = []
    state.optimiser.zero_grad()
    with mixed_precision(state.network, parameters.mixed_precision):
        for share in processes.shares(n_parts):
            loss = task.loss(state.network, rows, Step(progress, _rng_of(state), share))
            # A share may be empty.
            if loss.value.requires_grad:
                # Without naming them, torch would differentiate by the positions too.
                loss.value.backward(inputs=trained)  # type: ignore[no-untyped-call]
            losses.append(loss._replace(value=loss.value.detach()))
    processes.add_gradients(trained)
    _descend(state, parameters, progress)
    # Only now: asking a GPU for a number waits for all that it was told to do before.
    value, sums = _add_losses(losses, processes)
    if not math.isfinite(value):
        raise Diverged(f"the loss became {value} in epoch {state.epoch + 1}")
    for name, (total, count) in {**sums, "loss": (value * len(rows), len(rows))}.items():
        before = state.sums.get(name, (0.0, 0))
        state.sums[name] = (before[0] + total, before[1] + count)
    state.step += 1
    state.seconds += time.monotonic() - start


def _rng_of(state: TrainingState) -> np.random.Generator:
    """Return the generator of the next step, as new."""
    return np.random.default_rng([state.seed, state.epoch, state.step, 1])


def _add_losses(
    losses: Sequence[Loss], processes: Processes
) -> tuple[float, dict[str, tuple[float, int]]]:
    """Return the loss of the whole batch, and its sums and counts, the same in all processes."""
    names = sorted(losses[0].sums)
    rows = [
        [float(loss.value), *(float(item) for name in names for item in loss.sums[name])]
        for loss in losses
    ]
    value, *rest = processes.add([sum(column) for column in zip(*rows, strict=True)])
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return value, {
        name: (total, round(count)) for name, (total, count) in zip(names, pairs, strict=True)
    }


def _descend(state: TrainingState, parameters: TrainingParameters, progress: float) -> None:
    rate = parameters.learning_rate * state.rate_factor * learning_rate(progress)
    for group in state.optimiser.param_groups:
        group["lr"] = rate * group["factor"]
    trained = _trained(state.network)
    torch.nn.utils.clip_grad_norm_(trained.values(), parameters.gradient_clip)
    state.optimiser.step()
    state.n_steps += 1
    # Early on the average must not remember the random start.
    decay = min(parameters.ema_decay, state.n_steps / (state.n_steps + 10))
    # By name: a checkpoint gives the averages back in another order.
    averages = [state.average[name] for name in trained]
    with torch.no_grad():
        torch._foreach_lerp_(averages, list(trained.values()), 1 - decay)


def _end_epoch(state: TrainingState, task: Task, n_epochs: int, processes: Processes) -> bool:
    """Go on to the next epoch; return whether there is a new record."""
    state.epoch, state.step = state.epoch + 1, 0
    if state.epoch % math.ceil(n_epochs / MAX_RECORDS) and state.epoch < n_epochs:
        return False
    means = {name: total / count for name, (total, count) in state.sums.items() if count}
    record = {"epoch": state.epoch, **means, "seconds": state.seconds}
    state.sums, state.seconds = {}, 0.0
    start = time.monotonic()
    state.history.append(record | _validate(state, task, processes))
    state.history[-1]["seconds"] += time.monotonic() - start
    return True


def _validate(state: TrainingState, task: Task, processes: Processes) -> dict[str, float]:
    """Ask the averaged weights about labels that are held out, and keep the best weights."""
    errors: dict[str, float] = {}
    if processes.is_first:
        now = {name: weight.detach().clone() for name, weight in _trained(state.network).items()}
        _use(state, state.average)
        errors = task.validate(state.network)
        _use(state, now)
    errors = processes.as_first(errors)
    if errors:
        before = [row[SCORE] for row in state.history]
        if errors[SCORE] < min(before, default=math.inf):
            state.best = {name: weight.clone() for name, weight in state.average.items()}
    return errors


def _is_patience_over(state: TrainingState, parameters: TrainingParameters) -> bool:
    scores = [row[SCORE] for row in state.history if SCORE in row]
    if not (scores and parameters.patience):
        return False
    return len(scores) - 1 - int(np.argmin(scores)) >= parameters.patience


def _epoch_order(n_items: int, state: TrainingState, *, bootstrap: bool) -> IntArray:
    order = np.random.default_rng([state.seed, state.epoch, 0]).permutation(n_items)
    if not bootstrap:
        return order
    # The same draw in every epoch: it is the member's own set.
    drawn = np.random.default_rng([state.seed, 2]).integers(0, n_items, n_items)
    return drawn[order]


def _tell_nobody(_: object) -> None:
    pass


def _use(state: TrainingState, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in _trained(state.network).items():
            weight.copy_(weights[name])


def _trained(network: Network) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
