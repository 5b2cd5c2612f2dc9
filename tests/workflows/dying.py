"""A work chain whose daemon dies in the worst moment: a child is submitted, nothing noted down."""

import os
import signal
from pathlib import Path

from aiida.engine import ToContext, WorkChain
from aiida.orm import Str

from aiida_eipnn.workflows.once import SubmitsOnce


class Child(WorkChain):
    """Does nothing."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.do_nothing)

    def do_nothing(self):
        pass


class Parent(SubmitsOnce):
    """Submits a child, and kills its worker before the step has ended, but only once."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("mark", valid_type=Str)
        spec.outline(cls.first, cls.second)

    def first(self):
        child = self.submit(Child, metadata={"call_link_label": "child"})
        mark = Path(self.inputs.mark.value)
        if not mark.exists():
            mark.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return ToContext(child=child)

    def second(self):
        # The label is the same, but that child is known: this is another one.
        return ToContext(child=self.submit(Child, metadata={"call_link_label": "child"}))
