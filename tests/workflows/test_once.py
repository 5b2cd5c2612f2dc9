"""A work chain goes on after a pause, also in the moment in which its child ends."""

import asyncio

import pytest
from aiida.engine import ToContext, WorkChain
from aiida.manage import get_manager

from aiida_eipnn.workflows.once import SubmitsOnce


class Child(WorkChain):
    """Ends at once."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.end)

    def end(self):
        pass


class PausedAsItsChildEnds(SubmitsOnce):
    """Is asked to pause, and to go on later, in the moment in which its child ends."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.begin, cls.end)

    def begin(self):
        return ToContext(child=self.submit(Child))

    def end(self):
        assert self.ctx.child.is_finished_ok

    def _on_awaitable_finished(self, awaitable):
        self.pause()
        super()._on_awaitable_finished(awaitable)
        self.loop.call_later(0.2, self.play)


@pytest.mark.usefixtures("aiida_profile")
def test_a_work_chain_that_is_paused_as_its_child_ends_goes_on():
    runner = get_manager().create_runner(communicator=None, poll_interval=0.1)
    process = runner.instantiate_process(PausedAsItsChildEnds)
    runner.loop.run_until_complete(asyncio.wait_for(process.step_until_terminated(), 20))
    assert process.node.is_finished_ok
