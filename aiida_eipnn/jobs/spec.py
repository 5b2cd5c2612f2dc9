"""What a job reads and writes: the one place that spells a file name.

A job is a folder. ``job.json`` says what to do; the folders beside it hold the inputs as ``.npy``
files (:func:`aiida_eipnn.science.arrays.save_arrays`); results go below ``output``, the state of
the run into ``status.json``, and what a restart needs into ``checkpoint``.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from aiida_eipnn.science.nn.sizes import BATCH_EDGES

JOB = "job.json"
STATUS = "status.json"
LOG = "eipnn-job.log"

# Inputs. The first four hold one folder of arrays for each set, whatever its name.
CONFIGURATIONS = "configurations"
LABELS = "labels"
EIP_LABELS = "eip_labels"
EXCLUDE = "exclude"
SELECTION = "selection"
COMMITTEE = "committee"
CHECKPOINT = "checkpoint"
# The folder of an interrupted job, whose checkpoint is to be taken over.
PARENT_FOLDER = "parent_folder"

# Below the checkpoint of a training.
PSEUDO_LABELS = "pseudo_labels"
LABEL_MODEL = "label_model.json"

# The small files of a checkpoint, which tell whether there is one and how far it is: what is to be
# made and what members have learnt; which labels are there.
CHECKPOINT_MARKS = (f"{CHECKPOINT}/*.json", f"{CHECKPOINT}/*/state.npy")

# Outputs
OUTPUT = "output"
METRICS = "metrics.json"
# One line for each record of a training, while it runs.
PROGRESS = "progress.jsonl"
PREDICTIONS = "predictions"


class State(StrEnum):
    """How far a job came."""

    RUNNING = "running"
    DONE = "done"
    INTERRUPTED = "interrupted"
    # One of several processes died. There may be a checkpoint to go on from.
    KILLED = "killed"
    # The same for a job whose memory did not do.
    OUT_OF_MEMORY = "out_of_memory"
    # Inputs that were said to be on this computer are not.
    INPUTS_GONE = "inputs_gone"
    FAILED = "failed"


class Stage(StrEnum):
    """What a training job trains."""

    PRETRAIN = "pretrain"
    CLASSIFY = "classify"
    FINETUNE = "finetune"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploreJob:
    """Make a pool of configurations out of the seed configurations.

    Parameters
    ----------
    recipes
        What to make: for each, ``config_type``, ``count`` and the settings of that type
        (:func:`aiida_eipnn.science.pool.make_pool`).
    seed
        Seed of every random choice.
    eip
        Name of the EIP that drives molecular dynamics, where no committee is given to do so.
    n_workers
        Processes that run molecular dynamics side by side; what they find does not depend on it.
    device
        Where the committee is: ``cpu``, ``cuda``, or ``auto``, a GPU where there is one.
    max_seconds
        Stop by then with a checkpoint; a restart goes on from there.
    """

    kind: ClassVar[str] = "explore"

    recipes: tuple[dict[str, Any], ...]
    seed: int
    eip: str | None = None
    n_workers: int = 1
    device: str = "auto"
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        _check_count("n_workers", self.n_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelJob:
    """Label configurations with empirical interatomic potentials.

    Parameters
    ----------
    eips
        Names of the EIPs, one column of labels each.
    n_workers
        Processes that work side by side.
    timeout
        Seconds that an EIP may take for one configuration.
    memory
        MB that a process may take.
    atomic_energies
        Also keep the energy of each atom, where an EIP tells it.
    max_seconds
        Stop by then; a restart goes on from there.
    """

    kind: ClassVar[str] = "label"

    eips: tuple[str, ...]
    n_workers: int = 1
    timeout: float = 60.0
    memory: float = 4096.0
    atomic_energies: bool = False
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """Train the members of a committee in one stage.

    Parameters
    ----------
    stage
        ``pretrain``, ``classify`` or ``finetune``.
    seeds
        One seed for each member.
    network
        Fields of :class:`aiida_eipnn.science.nn.network.NetworkParameters`; ignored where the
        job starts from a committee.
    training
        Fields of :class:`aiida_eipnn.science.nn.training.TrainingParameters`.
    selection
        Fields of :class:`aiida_eipnn.science.eip.selection.SelectionParameters`.
    pseudo_labels
        Fields of :class:`aiida_eipnn.science.eip.label_model.LabelModelParameters`: stage
        ``finetune`` learns what EIP and DFT labels together say of the other configurations too.
        ``None`` leaves that out.
    judges
        Names of the sets of labels that may be held out; all where it is empty, or where there is
        none of them. Labels that a committee asked for are where it was unsure: to be judged by
        them is to its disadvantage.
    n_workers
        Processes that work side by side, one member each; of no account where torchrun or the
        like starts several, which take each step of a member together.
    batch_parts
        Parts that a batch is computed in, one after the other: less memory, and the same result.
    batch_edges
        Neighbour pairs that are computed at once, at most, every atom counting as many as the one
        with most in its batch: one with more is computed in more parts. ``batch_parts`` divides it.
    device
        ``cpu``, ``cuda``, or ``auto``: the GPU where there is one.
    max_seconds
        Stop by then with a checkpoint; a restart goes on from there.
    """

    kind: ClassVar[str] = "train"

    stage: Stage
    seeds: tuple[int, ...]
    network: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    pseudo_labels: dict[str, Any] | None = None
    judges: tuple[str, ...] = ()
    n_workers: int = 1
    batch_parts: int = 1
    batch_edges: int = BATCH_EDGES
    device: str = "auto"
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("a committee needs at least one member: give one seed for each")
        _check_count("batch_parts", self.batch_parts)
        _check_count("batch_edges", self.batch_edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateJob:
    """Predict labels and uncertainties of configurations with a committee.

    Parameters
    ----------
    batch_size
        Configurations that are predicted at once, at most.
    batch_edges
        Neighbour pairs that are computed at once, at most, every atom counting as many as the one
        with most in its batch; a configuration that has more is predicted alone.
    device
        ``cpu``, ``cuda``, or ``auto``: the GPU where there is one.
    max_seconds
        Stop by then with a checkpoint; a restart goes on from there.
    """

    kind: ClassVar[str] = "evaluate"

    batch_size: int = 64
    batch_edges: int = BATCH_EDGES
    device: str = "auto"
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        _check_count("batch_edges", self.batch_edges)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckJob:
    """Look at the place where jobs run: its Python, packages, KIM models and GPUs.

    Parameters
    ----------
    max_seconds
        Not needed: it takes seconds.
    """

    kind: ClassVar[str] = "check"

    max_seconds: float | None = None


Job = ExploreJob | LabelJob | TrainJob | EvaluateJob | CheckJob
KINDS: dict[str, type[Job]] = {
    job.kind: job for job in (ExploreJob, LabelJob, TrainJob, EvaluateJob, CheckJob)
}


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")


def write_job(path: Path, job: Job) -> None:
    """Write ``job`` as JSON."""
    path.write_text(job_to_json(job))


def job_to_json(job: Job) -> str:
    """Return ``job`` as JSON text, the same text for the same job."""
    return json.dumps({"kind": job.kind, **asdict(job)}, indent=1, sort_keys=True) + "\n"


def read_job(path: Path) -> Job:
    """Read what :func:`write_job` wrote.

    Raises
    ------
    ValueError
        If the file is not a job, names an unknown kind, or has fields that this kind lacks.
    """
    try:
        content = json.loads(path.read_text())
        kind = content.pop("kind")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a job description: {error!r}") from error
    if kind not in KINDS:
        raise ValueError(f"{path} asks for a job of kind {kind!r}; there are {sorted(KINDS)}")
    known = {item.name for item in fields(KINDS[kind])}
    if unknown := sorted(set(content) - known):
        raise ValueError(
            f"{path}: a job of kind {kind!r} has no fields {unknown}, only {sorted(known)}"
        )
    for name in ("recipes", "eips", "seeds", "judges"):
        if name in content:
            content[name] = tuple(content[name])
    if "stage" in content:
        content["stage"] = Stage(content["stage"])
    return KINDS[kind](**content)
