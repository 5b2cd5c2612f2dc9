"""Work chains that submit each child once, and go on, whatever happens to them and the daemon."""

from typing import Any

from aiida.engine import Process, ProcessState, WorkChain
from aiida.orm import ProcessNode

SUBMITTED = "submitted"


class SubmitsOnce(WorkChain):
    """A work chain that takes over what it submitted in a step that was cut off.

    A step whose daemon dies runs again, from the checkpoint before it, which knows nothing of a
    child that the step had submitted already. That child runs all the same: without more ado there
    would be two, and pw.x would do the work of both. Here the checkpoint knows the children of the
    steps that ended, so that any other child of the node is one of the step that was cut off.
    """

    def on_create(self) -> None:
        """Begin without children: a checkpoint of an earlier version has no such list."""
        super().on_create()
        self.ctx[SUBMITTED] = []

    def submit(
        self, process: type[Process], inputs: dict[str, Any] | None = None, **kwargs: Any
    ) -> ProcessNode:
        """Submit a child, or take over the one that the same step submitted before it was cut off.

        Parameters
        ----------
        process, inputs, kwargs
            As for any work chain. Children of one step need different ``call_link_label``.
        """
        label = {**(inputs or {}), **kwargs}.get("metadata", {}).get("call_link_label")
        node = self._submitted_before(process, label)
        if node is None:
            node = super().submit(process, inputs, **kwargs)
        else:
            self.report(f"{node.process_label} {node.pk} ({label}) runs already: it is taken over")
        if SUBMITTED in self.ctx:
            self.ctx[SUBMITTED].append(node.pk)
        return node

    def on_playing(self) -> None:
        """Go on where the last child ended in the moment of the pause.

        The engine forgets a child that ends between the request to pause and the pause itself: the
        work chain would wait for ever, for nothing.
        """
        super().on_playing()
        self.call_soon(self._stop_waiting_for_nothing)

    def _stop_waiting_for_nothing(self) -> None:
        # Looked at when it runs, not before: it may have gone on by itself, or wait for others.
        if self.state == ProcessState.WAITING and not self._awaitables:
            self.resume()

    def _submitted_before(self, process: type[Process], label: str | None) -> ProcessNode | None:
        if label is None or SUBMITTED not in self.ctx:
            return None
        found = [
            entry.node
            for entry in self.node.base.links.get_outgoing(
                ProcessNode, link_label_filter=label
            ).all()
            if entry.node.pk not in self.ctx[SUBMITTED]
            and entry.node.process_type == process.build_process_type()
            and can_go_on(entry.node)
        ]
        return min(found, key=lambda node: node.pk) if found else None


def can_go_on(node: ProcessNode) -> bool:
    """Return whether a process has ended by itself, or may still do so.

    One that was created when the daemon died may have no checkpoint to go on from.
    """
    return node.is_finished or (not node.is_terminated and node.checkpoint is not None)
