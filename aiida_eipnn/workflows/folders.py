"""Folders on the computers where jobs run: which files lie there already, and when they go."""

from collections.abc import Iterable, Mapping
from typing import Any

from aiida.engine import WorkChain
from aiida.orm import ArrayData, CalcJobNode, Computer, Data, Float, RemoteData

# A million bytes.
_MEGA = 1e6


def megabytes(node: Data) -> float:
    """Return how large the files of a node are, in MB (a million bytes)."""
    repository = node.base.repository
    sizes = (repository.get_object_size(name) for name in repository.list_object_names())
    return sum(sizes) / _MEGA


def computer_of(inputs: Mapping[str, Any]) -> Computer:
    """Return where a job with these inputs runs."""
    # A portable code has none.
    computer: Computer = inputs["code"].computer or inputs["metadata"]["computer"]
    return computer


def upload_name(node: Data, computer: Computer) -> str:
    """Return the name of the copy of a node on a computer, a valid label of a link."""
    return f"upload_{node.pk}_{computer.pk}"


def missing_uploads(
    wanted: Iterable[tuple[ArrayData, Computer]],
    uploads: dict[str, RemoteData | None],
    above: Float,
) -> dict[str, tuple[ArrayData, Computer]]:
    """Return, by their names, the copies of large nodes that are still to be made.

    Parameters
    ----------
    wanted
        Nodes, and where several jobs read them.
    uploads
        The copies that there are by their names, ``None`` where one could not be made.
    above
        Size from which on a node counts as large, in MB.
    """
    named = {upload_name(node, computer): (node, computer) for node, computer in wanted}
    return {
        name: (node, computer)
        for name, (node, computer) in named.items()
        if name not in uploads and megabytes(node) >= above.value
    }


def clean_folders(work_chain: WorkChain) -> None:
    """Remove the folders of all jobs that a work chain called itself."""
    jobs = [node for node in work_chain.node.called if isinstance(node, CalcJobNode)]
    cleaned = [job for job in jobs if clean_folder(work_chain, job)]
    if cleaned:
        pks = " ".join(str(job.pk) for job in cleaned)
        work_chain.report(f"cleaned the remote folders of {pks}")


def clean_folder(work_chain: WorkChain, job: CalcJobNode) -> bool:
    """Remove the folder of a job, unless it is removed already; return whether that was done."""
    folder = job.base.links.get_outgoing(link_label_filter="remote_folder").first()
    if folder is None or folder.node.is_cleaned:
        return False
    try:
        folder.node._clean()
    except Exception as error:
        # Whatever a transport raises: what is left on a disk is no reason to lose a work chain.
        work_chain.report(f"the remote folder of {job.pk} could not be removed: {error}")
        return False
    return True
