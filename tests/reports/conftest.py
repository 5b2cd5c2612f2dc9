"""A loop as the real one leaves it in the database, made of stored nodes without running a code."""

import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
from ase.build import bulk

from aiida_eipnn.science.configurations import Configurations
from aiida_eipnn.science.eip.selection import NONE, Selection
from aiida_eipnn.science.labels import Labels
from aiida_eipnn.science.predictions import Predictions

EIPS = (
    "SW_StillingerWeber_1985_Si__MO_405512056662_005",
    "Tersoff_LAMMPS_Tersoff_1988T3_Si__MO_186459956893_003",
)
TYPES = ("rattled", "strained", "vacancy")
SECONDS = 30.0
BROKEN = "The loop broke while labelling with DFT: process 1, it was killed."
ENDINGS = {
    "finished": {"exit_status": 0},
    "broken": {"exit_status": 403, "exit_message": BROKEN},
    "waiting": {"process_state": "waiting"},
    "created": {"process_state": "created"},
}
FAILED_REASON = "pw.x exit 410: The electronic minimization did not converge."


def silicon(n: int, rng: np.random.Generator) -> Configurations:
    frames = []
    for _ in range(n):
        atoms = bulk("Si")
        atoms.set_cell(atoms.cell * rng.uniform(0.96, 1.04), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        frames.append(atoms)
    return Configurations.from_atoms(frames, [TYPES[row % 3] for row in range(n)])


class Graph:
    """Makes process nodes with their links."""

    def process(self, kind, name, *, caller=None, label="CALL", inputs=None, **attributes):
        from aiida.common.links import LinkType
        from aiida.orm import WorkflowNode

        node = kind()
        is_work = isinstance(node, WorkflowNode)
        node.base.attributes.set_many(
            {
                "process_label": name,
                "process_state": "finished",
                # A process that still runs has no exit status.
                **({} if "process_state" in attributes else {"exit_status": 0}),
                **attributes,
            }
        )
        for key, value in (inputs or {}).items():
            value.store()
            node.base.links.add_incoming(
                value, LinkType.INPUT_WORK if is_work else LinkType.INPUT_CALC, key
            )
        if caller is not None:
            node.base.links.add_incoming(
                caller, LinkType.CALL_WORK if is_work else LinkType.CALL_CALC, label
            )
        return node.store()

    def create(self, node, **outputs):
        from aiida.common.links import LinkType

        for key, value in outputs.items():
            value.base.links.add_incoming(node, LinkType.CREATE, key)
            value.store()

    def give_back(self, node, **outputs):
        from aiida.common.links import LinkType

        for key, value in outputs.items():
            value.base.links.add_incoming(node, LinkType.RETURN, key)


@dataclass
class SyntheticLoop:
    """What the tests need to know of the loop."""

    node: object
    pool: object
    committee: object
    pretrained: object
    labels: dict
    points: dict


class Maker:
    """Makes a loop step by step, with the links and labels of the real work chains."""

    def __init__(
        self, *, n_iterations: int, state: str, eips=EIPS, extra=None, tells_of_atoms=False
    ):
        from aiida.orm import CalcFunctionNode, CalcJobNode, WorkChainNode

        self.work, self.job, self.function = WorkChainNode, CalcJobNode, CalcFunctionNode
        self.rng = np.random.default_rng(0)
        self.graph = Graph()
        self.n_iterations, self.n_asked, self.state = n_iterations, 2, state
        self.eips, self.extra, self.tells_of_atoms = eips, extra or {}, tells_of_atoms
        self.labels, self.choices, self.points = {}, {}, {}
        self.pool = self.committee = self.pretrained = None

    def make(self) -> SyntheticLoop:
        self.start()
        if self.state != "created":
            self.run()
        return SyntheticLoop(
            node=self.loop,
            pool=self.pool,
            committee=self.committee,
            pretrained=self.pretrained,
            labels=self.labels,
            points=self.points,
        )

    def run(self):
        self.explore()
        self.label_with_eips()
        self.split()
        self.dft("test")
        if self.state == "broken":
            return
        self.dft("initial", failing=True)
        inputs = {"eip_labels__pool": self.eip_labels}
        self.pretrained = self.train("pretrain", inputs)["committee"]
        self.graph.give_back(self.loop, pretrained=self.pretrained)
        history = None
        for number in range(1, self.n_iterations + 1):
            history = self.iterate(number, history)
        if self.state == "finished":
            self.graph.give_back(
                self.loop,
                committee=self.committee,
                selection=self.selection,
                predictions=self.predictions,
                history=history,
            )

    def start(self):
        from aiida.orm import Dict, Float, InstalledCode, Int, List, load_computer
        from aiida_pseudo.data.pseudo import UpfData

        from aiida_eipnn.data.configurations import ConfigurationsData

        computer = load_computer("localhost")
        code = InstalledCode(label="pw", computer=computer, filepath_executable="/bin/true")
        job = InstalledCode(label="eipnn-job", computer=computer, filepath_executable="/bin/true")
        upf = b'<UPF version="2.0.1"><PP_HEADER element="Si" z_valence="4.0"/></UPF>'
        self.given = {
            "explore__configurations__seeds": ConfigurationsData.from_value(silicon(1, self.rng)),
            "label__job__eips": List(list(self.eips)),
            "label__job__code": job,
            "dft__pw_base__pw__code": code,
            "dft__pw_base__pw__parameters": Dict({"SYSTEM": {"ecutwfc": 20.0}}),
            "dft__pw_base__pw__pseudos__Si": UpfData(io.BytesIO(upf), filename="Si.upf"),
            "dft__pw_base__kpoints_distance": Float(0.5),
            "dft__scaling": Dict({"bands_factor": 1.2}),
            "train__job__seeds": List([11, 12]),
            "pretrain": Dict({"stage": "pretrain"}),
            "classify": Dict({"stage": "classify"}),
            "finetune": Dict({"stage": "finetune", "steps": 5, "n_heads": 8}),
            "stop": Dict({"max_iterations": self.n_iterations + (self.state != "finished")}),
            "acquisition": Dict({"n_select": self.n_asked}),
            "split": Dict({"test": 3, "initial": 4}),
            "seed": Int(7),
            **self.extra,
        }
        self.code = job
        self.loop = self.graph.process(
            self.work, "ActiveLearningWorkChain", inputs=self.given, **ENDINGS[self.state]
        )

    def explore(self):
        from aiida_eipnn.data.configurations import ConfigurationsData

        explore = self.graph.process(
            self.job,
            "ExploreCalculation",
            caller=self.loop,
            label="explore",
            inputs={"configurations__seeds": self.given["explore__configurations__seeds"]},
        )
        self.pool = ConfigurationsData.from_value(silicon(24, self.rng))
        self.graph.create(explore, pool=self.pool)
        self.graph.give_back(self.loop, pool=self.pool)

    def truth(self, rows):
        sets = self.pool.value().take(rows)
        volumes = np.abs(np.linalg.det(sets.cells))
        forces = np.random.default_rng(5).normal(0, 0.6, (len(self.pool) * 2, 3))
        offsets = self.pool.value().offsets
        atoms = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        return -215.0 + 0.02 * (volumes - volumes.mean()) ** 2, forces[atoms]

    def label_with_eips(self):
        from aiida.orm import Dict

        from aiida_eipnn.data.labels import LabelsData

        base = self.graph.process(
            self.work, "LabelBaseWorkChain", caller=self.loop, label="label_with_eips"
        )
        job = self.graph.process(
            self.job,
            "LabelCalculation",
            caller=base,
            label="iteration_01",
            inputs={
                "configurations__pool": self.pool,
                "eips": self.given["label__job__eips"],
                "code": self.code,
            },
        )
        energy, forces = self.truth(range(len(self.pool)))
        noise = [0.1, 0.4]
        value = Labels(
            ids=self.pool.value().ids,
            offsets=self.pool.value().offsets,
            sources=np.array(self.eips),
            energy=np.stack(
                [energy + 206 + self.rng.normal(0, s, len(energy)) for s in noise], axis=1
            ),
            forces=np.stack([forces + self.rng.normal(0, s, forces.shape) for s in noise]),
            stress=np.full((len(energy), 2, 6), np.nan),
            status=np.zeros((len(energy), 2), dtype=np.int64),
            reasons=np.array([], dtype="<U1"),
            origins=np.full(len(energy), "", dtype="<U36"),
        )
        self.eip_labels = LabelsData.from_value(value, level={})
        metadata = {
            "kim_id": "MO_405512056662_005",
            "title": "Stillinger-Weber potential for Si",
            "species": ["Si"],
            "family": "SW",
            "citation": "Stillinger and Weber, Phys. Rev. B 31, 5262 (1985)",
            "doi": "10.1103/PhysRevB.31.5262",
            "year": 1985,
            "machine_learned": False,
        }
        metrics = {
            "eips": {
                name: {
                    "n_ok": 24,
                    "n_failed": 0,
                    "seconds": 1.5,
                    "metadata": metadata if row == 0 else {},
                }
                for row, name in enumerate(self.eips)
            }
        }
        self.graph.create(job, labels=self.eip_labels, metrics=Dict(metrics))
        self.graph.give_back(base, labels=self.eip_labels)
        self.graph.give_back(self.loop, eip_labels=self.eip_labels)

    def split(self):
        node = self.graph.process(
            self.function,
            "split_pool",
            caller=self.loop,
            inputs={"pool": self.pool, "sizes": self.given["split"], "seed": self.given["seed"]},
        )
        for name, rows in (("test", range(3)), ("initial", range(3, 7))):
            self.choices[name] = self.choice(rows, np.full(len(rows), np.nan), "random")
            self.graph.create(node, **{name: self.choices[name]})

    def choice(self, rows, scores, strategy):
        from aiida_eipnn.data.choice import Choice, ChoiceData

        ids = self.pool.value().ids[list(rows)]
        return ChoiceData.from_value(Choice(ids=ids, scores=scores), strategy=strategy)

    def dft(self, batch, *, failing=False, unfinished=0):
        from aiida.orm import Dict

        from aiida_eipnn.data.labels import LabelsData

        choice = self.choices[batch]
        running = {"process_state": "waiting"} if unfinished else {}
        inputs = {
            "configurations": self.pool,
            "choice": choice,
            **{
                key.removeprefix("dft__"): node
                for key, node in self.given.items()
                if key.startswith("dft__")
            },
        }
        parent = self.graph.process(
            self.work,
            "DftLabelWorkChain",
            caller=self.loop,
            label=f"dft_{batch}",
            inputs=inputs,
            **running,
        )
        level = Dict({"code": "quantumespresso.pw", "ecutwfc": 20.0})
        self.graph.create(
            self.graph.process(
                self.function,
                "level_of_theory",
                caller=parent,
                inputs={"parameters": inputs["pw_base__pw__parameters"]},
            ),
            result=level,
        )
        lane = self.graph.process(
            self.work,
            "DftLaneWorkChain",
            caller=parent,
            label="lane_000",
            inputs={"configurations": self.pool, "choice": choice},
            **running,
        )
        ids = choice.ids().tolist()
        rows = self.pool.value().rows_of(ids)
        energy, forces = self.truth(rows)
        runs, status, origins = {}, np.zeros((len(ids), 1), dtype=np.int64), []
        for row, name in enumerate(ids[: len(ids) - unfinished]):
            fails = failing and row == len(ids) - 1
            is_last = unfinished and row == len(ids) - unfinished - 1
            calculation, result = self.pw(
                lane, name, energy[row], forces[2 * row : 2 * row + 2], fails=fails, running=is_last
            )
            runs[f"{'failed' if fails else 'labelled'}_{name}"] = result
            status[row, 0] = int(fails)
            origins.append("" if fails else calculation.uuid)
        self.points[batch] = ids
        if unfinished:
            return
        bad = np.repeat(status[:, 0] > 0, 2)
        value = Labels(
            ids=np.array(ids),
            offsets=np.arange(len(ids) + 1) * 2,
            sources=np.array(["dft"]),
            energy=np.where(status > 0, np.nan, energy[:, None]),
            forces=np.where(bad[:, None], np.nan, forces)[None],
            stress=np.full((len(ids), 1, 6), np.nan),
            status=status,
            reasons=np.array([FAILED_REASON]),
            origins=np.array(origins, dtype="<U36"),
        )
        labels = LabelsData.from_value(value, level=level.get_dict())
        gather = self.graph.process(
            self.function,
            "gather_dft_labels",
            caller=lane,
            inputs={"configurations": self.pool, "choice": choice, "level": level, **runs},
        )
        self.graph.create(gather, result=labels)
        self.graph.give_back(lane, labels=labels)
        self.graph.give_back(parent, labels=labels)
        self.labels[batch] = labels
        names = {"test": "test_labels", "initial": "initial_labels"}
        self.graph.give_back(
            self.loop, **{names.get(batch, f"iterations__{batch}__labels"): labels}
        )

    def pw(self, lane, name, energy, forces, *, fails, running):
        from aiida.orm import ArrayData, Dict, FolderData, StructureData

        row = self.pool.value().rows_of([name])[0]
        structure = StructureData(ase=self.pool.value().atoms(row))
        prepare = self.graph.process(
            self.function, "prepare_runs", caller=lane, inputs={"configurations": self.pool}
        )
        self.graph.create(prepare, **{f"structure_{name}": structure})
        end = {"process_state": "waiting"} if running else {"exit_status": 402 if fails else 0}
        given = {
            "pw__structure": structure,
            "pw__parameters": self.given["dft__pw_base__pw__parameters"],
            "pw__code": self.given["dft__pw_base__pw__code"],
        }
        base = self.graph.process(
            self.work, "PwBaseWorkChain", caller=lane, label=f"dft_{name}", inputs=given, **end
        )
        copy = Dict(self.given["dft__pw_base__pw__parameters"].get_dict())
        calculation = self.graph.process(
            self.job,
            "PwCalculation",
            caller=base,
            label="iteration_01",
            inputs={"structure": structure, "parameters": copy, "code": given["pw__code"]},
            resources={"num_machines": 1, "num_mpiprocs_per_machine": 4},
            withmpi=True,
            **end,
        )
        if running:
            return calculation, None
        retrieved, trajectory = FolderData(), ArrayData()
        trajectory.set_array("forces", forces[None])
        outputs = {"retrieved": retrieved}
        if not fails:
            facts = {
                "wall_time_seconds": SECONDS,
                "energy": float(energy),
                "creator_version": "6.7MaX",
            }
            outputs |= {"output_trajectory": trajectory, "output_parameters": Dict(facts)}
        self.graph.create(calculation, **outputs)
        return calculation, retrieved if fails else trajectory

    def train(self, name, inputs, committee=None):
        from aiida.orm import Dict, FolderData

        from aiida_eipnn.data.committee import CONFIG, WEIGHTS, CommitteeData

        setting = self.given["finetune" if name == "scratch" else name]
        base = self.graph.process(self.work, "TrainBaseWorkChain", caller=self.loop, label=name)
        job = self.graph.process(
            self.job,
            "TrainCalculation",
            caller=base,
            label="iteration_01",
            inputs={
                "configurations__pool": self.pool,
                "training": setting,
                "code": self.code,
                "seeds": self.given["train__job__seeds"],
                **inputs,
                **({"committee": committee} if committee else {}),
            },
            version={"core": "2.9.4"},
        )
        node, retrieved = CommitteeData(), FolderData()
        node.base.repository.put_object_from_filelike(
            io.BytesIO(json.dumps({"seeds": [11, 12]}).encode()), CONFIG
        )
        node.base.repository.put_object_from_filelike(io.BytesIO(b"weights"), WEIGHTS)
        status = {"state": "done", "versions": {"aiida-eipnn": "0.1.0", "torch": "2.13.0"}}
        retrieved.base.repository.put_object_from_filelike(
            io.BytesIO(json.dumps(status).encode()), "status.json"
        )
        outputs = {"committee": node, "metrics": Dict({}), "retrieved": retrieved}
        if name == "classify":
            outputs["selection"] = self.selection_data()
        self.graph.create(job, **outputs)
        return outputs

    def selection_data(self):
        from aiida_eipnn.data.selection import SelectionData

        n = len(self.pool)
        choice = self.rng.integers(0, 3, n)
        return SelectionData.from_value(
            Selection(
                ids=self.pool.value().ids,
                sources=np.array([*self.eips, NONE]),
                probabilities=np.eye(3)[choice],
                choice=choice,
            )
        )

    def evaluate(self, label, committee, noise):
        from aiida_eipnn.data.predictions import PredictionsData

        job = self.graph.process(
            self.job,
            "EvaluateCalculation",
            caller=self.loop,
            label=label,
            inputs={"configurations__pool": self.pool, "committee": committee, "code": self.code},
        )
        energy, forces = self.truth(range(len(self.pool)))
        spread = noise * self.rng.uniform(0.3, 2.0, len(forces))
        predictions = PredictionsData.from_value(
            Predictions(
                ids=self.pool.value().ids,
                offsets=self.pool.value().offsets,
                energy=energy + self.rng.normal(0, 0.2 * noise, len(energy)),
                forces=forces + spread[:, None] * self.rng.normal(0, 1, forces.shape),
                stress=np.full((len(energy), 6), np.nan),
                energy_std=np.linspace(0.5, 1.5, len(energy)) * noise,
                forces_std=spread,
                features=self.rng.normal(size=(len(energy), 4)),
                strangeness=100 * spread if self.tells_of_atoms else None,
            )
        )
        self.graph.create(job, predictions=predictions)
        return predictions

    def iterate(self, number, previous):
        from aiida.orm import Dict

        from aiida_eipnn.calculations.loop import assess

        prefix = f"iterations__i{number:03d}__"
        labels = {f"labels__{name}": node for name, node in self.labels.items() if name != "test"}
        self.selection = self.train(
            "classify", {**labels, "eip_labels__pool": self.eip_labels}, self.pretrained
        )["selection"]
        self.committee = self.train("finetune", labels, self.pretrained)["committee"]
        twin = self.train("scratch", labels)["committee"]
        noise = 0.12 / number
        self.predictions = self.evaluate("evaluate", self.committee, noise)
        scratch = self.evaluate("evaluate_scratch", twin, 3 * noise)
        inputs = {
            "pool": self.pool,
            "predictions": self.predictions,
            "test_labels": self.labels["test"],
            "eip_labels": self.eip_labels,
            "parameters": self.given["acquisition"],
            "stop": self.given["stop"],
            "scratch": scratch,
            **{f"labels_{name}": node for name, node in self.labels.items() if name != "test"},
            **{f"taken_{name}": node for name, node in self.choices.items()},
            **({"previous": previous} if previous else {}),
        }
        # The real assessment, so that the record has the shape of a real one.
        history = Dict(assess(**inputs).get_dict())
        self.graph.create(
            self.graph.process(self.function, "assess", caller=self.loop, inputs=inputs),
            result=history,
        )
        outputs = {
            "selection": self.selection,
            "committee": self.committee,
            "scratch": twin,
            "predictions": self.predictions,
            "scratch_predictions": scratch,
            "history": history,
        }
        self.graph.give_back(self.loop, **{prefix + key: node for key, node in outputs.items()})
        if number < self.n_iterations or self.state == "waiting":
            self.acquire(number)
            last = number == self.n_iterations
            self.dft(f"i{number:03d}", unfinished=1 if last else 0)
        return history

    def acquire(self, number):
        taken = {name for node in self.choices.values() for name in node.ids().tolist()}
        value = self.predictions.value()
        free = [row for row in np.argsort(-value.uncertainty) if str(value.ids[row]) not in taken]
        rows = free[: self.n_asked]
        node = self.graph.process(
            self.function,
            "acquire",
            caller=self.loop,
            inputs={"predictions": self.predictions, "seed": self.given["seed"]},
        )
        choice = self.choice(rows, value.uncertainty[rows], "diverse")
        self.graph.create(node, result=choice)
        self.graph.give_back(self.loop, **{f"iterations__i{number:03d}__choice": choice})
        self.choices[f"i{number:03d}"] = choice


CACHE = {}


@pytest.fixture
def make_loop(aiida_profile, aiida_localhost):
    """Return a function that makes a loop whose state is a key of ``ENDINGS``.

    Hundreds of nodes take seconds to store, so equal loops are made once, and again only where
    another test emptied the database.
    """
    from aiida.common.exceptions import ClosedStorage, NotExistent
    from aiida.orm import load_node

    def make(state="finished", *, n_iterations=2, tells_of_atoms=False) -> SyntheticLoop:
        assert aiida_localhost.label == "localhost"
        key = (state, n_iterations, tells_of_atoms)
        try:
            load_node(CACHE[key].node.uuid)
        except (KeyError, NotExistent, ClosedStorage):
            CACHE[key] = Maker(
                n_iterations=n_iterations, state=state, tells_of_atoms=tells_of_atoms
            ).make()
        return CACHE[key]

    return make
