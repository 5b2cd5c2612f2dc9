"""What the tests of jobs watch them by: a slow EIP, and how to wait for something."""

import time

# A module with an EIP that is slow, and marks each call in a file beside it.
SLOW = """
import time
from pathlib import Path
from aiida_eipnn.science.eip.analytic import LennardJones


class Slow:
    name, elements, cutoff = "slow", LennardJones().elements, 5.0
    description = LennardJones().description

    def label(self, atoms):
        time.sleep(0.2)
        with Path(__file__).with_name("calls").open("a") as calls:
            calls.write("x")
        return LennardJones().label(atoms)
"""


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def watch_neighbours(monkeypatch):
    """Return a list that the places for neighbours of each batch are appended to."""
    from aiida_eipnn.science.nn.graph import GraphTable

    made, batch = [], GraphTable.batch

    def seen(self, rows):
        graph = batch(self, rows)
        made.append(graph.partners.numel())
        return graph

    monkeypatch.setattr(GraphTable, "batch", seen)
    return made
