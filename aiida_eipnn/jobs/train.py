"""The train job: the members of a committee learn side by side, in one stage.

Each member writes its checkpoint, the last one with its final weights, and that is all that comes
back from a worker process. So a job that was killed loses seconds, and goes on anywhere.
"""

import errno
import json
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.failures import is_out_of_memory, reason_of
from aiida_eipnn.jobs.inputs import digest_of, ids_of_sets, read_configurations, read_labels
from aiida_eipnn.jobs.place import ALONE, Place, check_meeting
from aiida_eipnn.jobs.progress import remove_checkpoint
from aiida_eipnn.jobs.spec import State, TrainJob
from aiida_eipnn.jobs.stop import NEVER, SIGNALS, Stop, heeding_signals, was_asked
from aiida_eipnn.science.arrays import load_arrays, save_arrays, write_whole
from aiida_eipnn.science.eip.label_model import LabelModelParameters, make_pseudo_labels
from aiida_eipnn.science.eip.pseudo_labels import PseudoLabels
from aiida_eipnn.science.eip.selection import Selection, SelectionParameters
from aiida_eipnn.science.nn.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    load_finished,
    read_rate_factor,
    save_checkpoint,
)
from aiida_eipnn.science.nn.committee import Committee
from aiida_eipnn.science.nn.device import CUDA, ON_CPU, choose_device
from aiida_eipnn.science.nn.network import Network, NetworkParameters
from aiida_eipnn.science.nn.processes import ONE_PROCESS, Processes, gathered
from aiida_eipnn.science.nn.stage import (
    Stage,
    StageInputs,
    StageSettings,
    blank_network,
    need_labels,
)
from aiida_eipnn.science.nn.stages import STAGES, prepare
from aiida_eipnn.science.nn.training import Diverged, TrainingParameters, fit, start_training
from aiida_eipnn.science.verdict import AGREEMENT, N_HELD_OUT, SCORE, force_agreement

LOGGER = logging.getLogger(__name__)

# Factors on the learning rate: a member that diverges is tried once more.
RATE_FACTORS = (1.0, 0.3)
# Exit code of a worker whose memory did not do: that of the system for this.
_NO_MEMORY = errno.ENOMEM
# Seconds between two looks at the worker processes.
_POLL = 0.05


def run(job: TrainJob, folder: Path, stop: Stop = NEVER, place: Place = ALONE) -> State:
    """Train the committee; write it, and metrics, below ``folder/output``.

    Stage ``classify`` also writes the selection of EIPs for all configurations.

    Parameters
    ----------
    job, folder
        The job, and where it is: on a disk that all processes see.
    stop
        Asked before every step.
    place
        Of this process among those that train each member together; the first one writes.

    Raises
    ------
    ValueError
        If an input is missing or does not fit, or if a member diverges twice.
    LostProcess
        If another process died.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    if place.count > 1:
        check_meeting(os.environ)
    device = read_settings(job, place.local).device
    with gathered(place.number, place.count, device) as processes:
        inputs, stage = train_committee(job, folder, device, processes, stop)
    if not place.is_first:
        return State.DONE
    finished = finished_members(job, folder, stage)
    if finished is None:
        return State.INTERRUPTED
    committee = committee_of(job, stage, inputs, [network for network, _ in finished])
    records = [record for _, record in finished]
    output = folder / spec.OUTPUT
    committee.save(output / spec.COMMITTEE)
    metrics = {
        "stage": str(job.stage),
        "n_configurations": len(inputs.configurations),
        "n_trained_on": len(stage),
        "n_labels": stage.n_labels,
        "n_steps": sum(record["n_steps"] for record in records),
        "device": device.type,
        "n_processes": place.count,
        "members": records,
    }
    metrics |= judgement(stage, inputs, records)
    if (report := folder / spec.CHECKPOINT / spec.LABEL_MODEL).exists():
        # What is not a number has no place in JSON: nothing was there to measure.
        metrics["label_model"] = json.loads(report.read_text(), parse_constant=lambda _: None)
    if job.stage is spec.Stage.CLASSIFY:
        assert inputs.eip_labels is not None
        edges = stage.settings.edges_at_once
        selection = committee.select(inputs.configurations, inputs.eip_labels, batch_edges=edges)
        save_arrays(output / spec.SELECTION, selection.arrays())
        metrics |= {"choices": selection.counts, "classes": count_classes(stage)}
    metrics["seconds"] = time.monotonic() - started
    (output / spec.METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    # What it was for is in the output now.
    remove_checkpoint(folder / spec.CHECKPOINT)
    return State.DONE


def train_committee(
    job: TrainJob,
    folder: Path,
    device: torch.device,
    processes: Processes,
    stop: Stop,
) -> tuple[StageInputs, Stage]:
    """Train all members as far as the time goes; return what they learn from, and how."""
    if processes.is_first:
        make_pseudo_labels_of(job, folder)
    processes.wait()
    inputs, settings = read_inputs(job, folder), replace(read_settings(job), device=device)
    n_workers = count_processes(job, device) if processes.count == 1 else 1
    if n_workers > 1:
        # The workers have theirs.
        settings = replace(settings, device=ON_CPU)
    stage = prepare(str(job.stage), inputs, settings)
    if n_workers > 1:
        train_side_by_side(job, folder, n_workers, stop)
    else:
        train_members(job, folder, stage, settings, stop, processes)
    # What the first one does now removes what the others may still have to read.
    processes.wait()
    return inputs, stage


def judgement(
    stage: Stage, inputs: StageInputs, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return what a verdict rests on; nothing where no label is held out.

    The mean score on held-out labels, their number, and the agreement of the EIPs.
    """
    members = range(len(records))
    asked = {int(row) for member in members for row in stage.for_member(member).held_out}
    if not asked:
        return {}
    best = [min(epoch[SCORE] for epoch in record["epochs"]) for record in records]
    judged = {SCORE: sum(best) / len(best), N_HELD_OUT: len(asked)}
    if inputs.labels is None or inputs.eip_labels is None:
        return judged
    return judged | {AGREEMENT: force_agreement(inputs.labels, inputs.eip_labels)}


def make_pseudo_labels_of(job: TrainJob, folder: Path) -> None:
    """Make the pseudo-labels, once for all members and restarts.

    Raises
    ------
    ValueError
        If there are no labels to make them of.
    """
    checkpoint = folder / spec.CHECKPOINT
    if job.pseudo_labels is None or (checkpoint / spec.LABEL_MODEL).exists():
        return
    configurations = read_configurations(folder)
    labels = need_labels(read_labels(folder, spec.LABELS), "pseudo-labelling", "DFT labels")
    said = need_labels(read_labels(folder, spec.EIP_LABELS), "pseudo-labelling", "EIP labels")
    parameters = LabelModelParameters.from_dict(job.pseudo_labels)
    pseudo, model = make_pseudo_labels(
        configurations, labels.labelled(), said, parameters, job.seeds[0]
    )
    save_arrays(checkpoint / spec.PSEUDO_LABELS, pseudo.arrays())
    # Written last: it says that the labels are complete.
    write_whole(checkpoint / spec.LABEL_MODEL, json.dumps(model.report()))


def read_inputs(job: TrainJob, folder: Path) -> StageInputs:
    """Read everything that the stage learns from."""
    labels = read_labels(folder, spec.LABELS)
    selection, start = folder / spec.SELECTION, folder / spec.COMMITTEE
    pseudo = folder / spec.CHECKPOINT / spec.PSEUDO_LABELS
    committee = Committee.load(start) if start.is_dir() else None
    uses_selection = selection.is_dir() and job.stage is spec.Stage.FINETUNE
    return StageInputs(
        configurations=read_configurations(folder),
        labels=None if labels is None else labels.labelled(),
        eip_labels=read_labels(folder, spec.EIP_LABELS),
        selection=Selection.from_arrays(load_arrays(selection)) if uses_selection else None,
        pseudo=PseudoLabels.from_arrays(load_arrays(pseudo)) if pseudo.is_dir() else None,
        members=committee.members if committee else (),
        eips=committee.eips if committee else (),
        judges=tuple(ids_of_sets(folder, spec.LABELS, job.judges).tolist()),
    )


def read_settings(job: TrainJob, number: int = 0) -> StageSettings:
    """Check the settings of the job, over the defaults of its stage.

    ``number`` is that of the process: each takes another GPU, where there are several.

    Raises
    ------
    ValueError
        If a setting is unknown or cannot be used, or if there is no such device.
    """
    return StageSettings(
        network=NetworkParameters.from_dict(job.network),
        training=TrainingParameters.from_dict(job.training, STAGES[str(job.stage)].defaults),
        selection=SelectionParameters.from_dict(job.selection),
        device=choose_device(job.device, number),
        batch_parts=job.batch_parts,
        batch_edges=job.batch_edges,
    )


def count_processes(job: TrainJob, device: torch.device) -> int:
    """Return how many processes train side by side: on GPUs one for each, at most."""
    # A classifier is trained in less time than a process takes to start.
    if job.stage is spec.Stage.CLASSIFY:
        return 1
    n_processes = min(job.n_workers, len(job.seeds))
    return min(n_processes, torch.cuda.device_count()) if device.type == CUDA else n_processes


def train_members(
    job: TrainJob,
    folder: Path,
    stage: Stage,
    settings: StageSettings,
    stop: Stop,
    processes: Processes = ONE_PROCESS,
) -> None:
    """Train one member after the other as far as the time goes; their checkpoints say how far.

    Raises
    ------
    ValueError
        If a member diverges twice.
    """
    for member in range(len(job.seeds)):
        train_member(job, folder, stage, settings, member, stop, processes)


def train_member(
    job: TrainJob,
    folder: Path,
    stage: Stage,
    settings: StageSettings,
    member: int,
    must_stop: Callable[[], bool],
    processes: Processes = ONE_PROCESS,
) -> None:
    """Train one member from its checkpoint, if there is one, until it is complete or time is up.

    Raises
    ------
    ValueError
        If it diverges, and again at a lower learning rate.
    """
    stage = stage.for_member(member)
    path = checkpoint_path(folder / spec.CHECKPOINT, member)
    mark = fingerprint(job, folder)
    tried = read_rate_factor(path, mark)
    for factor in RATE_FACTORS if tried is None else RATE_FACTORS[RATE_FACTORS.index(tried) :]:
        seed, goes_on = job.seeds[member], factor == tried
        network = blank_network(stage) if goes_on else stage.network(seed, member)
        state = start_training(network, settings.training, seed, factor)
        if goes_on:
            load_checkpoint(path, state, mark)
        if state.finished:
            return
        try:
            done = fit(
                state,
                stage,
                settings.training,
                save=lambda state: save_checkpoint(path, state, mark),
                must_stop=must_stop,
                report=lambda record: report_progress(folder, member, record),
                processes=processes,
                n_parts=settings.batch_parts,
                batch_edges=settings.edges_at_once,
            )
        except Diverged as error:
            reason = error
            LOGGER.warning("member %d at %g of the learning rate: %s", member, factor, error)
            continue
        if done and processes.is_first:
            stage.finish(state.network, seed)
            save_checkpoint(path, state, mark)
        return
    raise ValueError(
        f"member {member} (seed {job.seeds[member]}) diverged, also at {RATE_FACTORS[-1]} of the "
        f"learning rate: {reason}; lower `learning_rate`, or look for labels that are far off"
    )


def report_progress(folder: Path, member: int, record: dict[str, float]) -> None:
    """Append a record of a member to the file that says how far the training is."""
    line = json.dumps({"member": member, **record}) + "\n"
    # One write in append mode: members of other processes cannot get between.
    with (folder / spec.PROGRESS).open("a") as file:
        file.write(line)


def train_side_by_side(job: TrainJob, folder: Path, n_processes: int, stop: Stop) -> None:
    """Train every ``n_processes``-th member in one process.

    Raises
    ------
    ValueError
        If a member diverges twice, or if a process dies.
    MemoryError
        If the memory of a process does not do, or if the system killed it.
    """
    context = multiprocessing.get_context("spawn")
    (folder / spec.CHECKPOINT).mkdir(exist_ok=True)
    members = range(len(job.seeds))
    shares = [members[first::n_processes] for first in range(n_processes)]
    processes = [
        context.Process(target=work, args=(job, folder, share, stop), daemon=True)
        for share in shares
    ]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            # One that failed ends the others: the job has failed.
            if any(_has_failed(process) for process in processes):
                break
            if was_asked():
                _ask_to_stop(processes)
            time.sleep(_POLL)
        for process, share in zip(processes, shares, strict=True):
            _check_exit(folder, share, process)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def work(job: TrainJob, folder: Path, members: Sequence[int], stop: Stop) -> None:
    """Train some members one after the other: the whole life of a worker process."""
    parent = os.getppid()
    torch.set_num_threads(1)

    def must_stop() -> bool:
        # Where the job was killed, another process adopts its workers: nobody waits for them.
        return stop() or os.getppid() != parent

    with heeding_signals():
        try:
            # The first member of a share is the number of its process.
            inputs, settings = read_inputs(job, folder), read_settings(job, members[0])
            stage = prepare(str(job.stage), inputs, settings)
            for member in members:
                train_member(job, folder, stage, settings, member, must_stop)
        except (ValueError, RuntimeError, MemoryError) as error:
            # A RuntimeError is what torch says of a GPU that is busy.
            _reason_path(folder, members).write_text(reason_of(error))
            raise SystemExit(_NO_MEMORY if is_out_of_memory(error) else 1) from error


def finished_members(
    job: TrainJob, folder: Path, stage: Stage
) -> list[tuple[Network, dict[str, Any]]] | None:
    """Return network and record of every member, ``None`` unless all are complete."""
    mark, finished = fingerprint(job, folder), []
    for member, seed in enumerate(job.seeds):
        path, network = checkpoint_path(folder / spec.CHECKPOINT, member), blank_network(stage)
        facts = load_finished(path, network, mark)
        if facts is None:
            return None
        record = {
            "seed": seed,
            "n_steps": facts["n_steps"],
            "rate_factor": facts["rate_factor"],
            "seconds": sum(epoch["seconds"] for epoch in facts["history"]),
            "epochs": facts["history"],
        }
        finished.append((network, record))
    return finished


def committee_of(
    job: TrainJob, stage: Stage, inputs: StageInputs, networks: list[Network]
) -> Committee:
    """Return the committee of these networks."""
    labels = inputs.eip_labels
    eips = inputs.eips if labels is None else tuple(map(str, labels.sources))
    training = asdict(read_settings(job).training)
    return Committee(
        members=tuple(networks),
        stage=str(job.stage),
        seeds=job.seeds,
        eips=eips,
        facts={"n_labels": stage.n_labels, "training": training},
    )


def fingerprint(job: TrainJob, folder: Path) -> str:
    """Return what must be equal for a checkpoint to fit: settings, data, networks to start from."""
    relevant = (
        job.stage,
        job.seeds,
        job.network,
        job.training,
        job.selection,
        job.pseudo_labels,
        job.judges,
    )
    names = (spec.CONFIGURATIONS, spec.LABELS, spec.EIP_LABELS, spec.EXCLUDE, spec.SELECTION)
    facts = json.dumps(relevant, sort_keys=True).encode()
    return digest_of(folder, (*names, spec.COMMITTEE), facts)


def count_classes(stage: Stage) -> dict[str, int]:
    """Return how often each class is the right one where DFT knows."""
    counts = Counter(int(number) for number in getattr(stage, "classes", ()))
    return {name: counts[number] for number, name in enumerate(stage.class_names)}


def _has_failed(process: BaseProcess) -> bool:
    # One that was asked to stop before it could heed that has left what was there.
    return process.exitcode not in (None, 0, *(-number for number in SIGNALS))


def _ask_to_stop(processes: Sequence[BaseProcess]) -> None:
    """Hand on a signal: not every scheduler sends it to all processes of a job."""
    for process in processes:
        process.terminate()


def _check_exit(folder: Path, members: Sequence[int], process: BaseProcess) -> None:
    if not _has_failed(process):
        return
    path = _reason_path(folder, members)
    if path.exists():
        reason = path.read_text()
        path.unlink()
        raise MemoryError(reason) if process.exitcode == _NO_MEMORY else ValueError(reason)
    ended = f"the process of members {list(members)} ended with code {process.exitcode}"
    if process.exitcode == -signal.SIGKILL:
        raise MemoryError(
            f"{ended}: the system killed it, mostly for lack of memory; lower `n_workers`"
        )
    raise ValueError(ended)


def _reason_path(folder: Path, members: Sequence[int]) -> Path:
    return folder / spec.CHECKPOINT / f"reason_{members[0]:03d}.txt"
