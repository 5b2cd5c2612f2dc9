"""Which of several processes this one is, where a job runs in more than one."""

from collections.abc import Mapping
from dataclasses import dataclass

# Number, count, and number on the node, as torchrun, Open MPI and a step of Slurm tell them.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    # In a batch script, which is one process whatever it asked for, there is no such count.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
# Where the processes find one another; torchrun sets both.
_MEETING = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Place:
    """The number of this process among ``count``, and among those of its node."""

    number: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for the job."""
        return self.number == 0


ALONE = Place()


def place_of(environment: Mapping[str, str]) -> Place:
    """Return the place that torchrun, mpirun or srun gave to this process."""
    for number, count, local in _NAMES:
        if {number, count} <= set(environment):
            return Place(
                number=int(environment[number]),
                count=int(environment[count]),
                local=int(environment.get(local, 0)),
            )
    return ALONE


def check_meeting(environment: Mapping[str, str]) -> None:
    """Raise ``ValueError`` where nothing says how several processes find one another."""
    if missing := [name for name in _MEETING if not environment.get(name)]:
        raise ValueError(
            f"several processes shall train together, and {' and '.join(missing)} is not set: "
            "start them by torchrun, or export MASTER_ADDR (the first node) and MASTER_PORT (any "
            "free port) before mpirun or srun"
        )
