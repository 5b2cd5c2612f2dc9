"""What goes into the loop and comes out of it."""

from typing import Any

from aiida.engine import ProcessSpec
from aiida.orm import Bool, Data, Dict, Float, List, to_aiida_type

from aiida_eipnn.calculations import ports
from aiida_eipnn.calculations.dft import compare_levels
from aiida_eipnn.calculations.evaluate import EvaluateCalculation
from aiida_eipnn.calculations.explore import ExploreCalculation
from aiida_eipnn.calculations.loop import DISPUTED, FIRST, INITIAL, RANDOM, TEST
from aiida_eipnn.calculations.train import validate_seeds
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.data.predictions import PredictionsData
from aiida_eipnn.data.selection import SelectionData
from aiida_eipnn.jobs.spec import PARENT_FOLDER, Stage
from aiida_eipnn.science.acquisition import AcquisitionParameters, Measure, Strategy
from aiida_eipnn.science.convergence import StopCriteria
from aiida_eipnn.science.eip.label_model import LabelModelParameters
from aiida_eipnn.science.extension import ExtensionParameters
from aiida_eipnn.workflows.continuation import add_previous
from aiida_eipnn.workflows.label_dft import (
    DftLabelWorkChain,
    level_of_pw,
    runs_pw,
    validate_labeller,
    validate_occupations,
    validate_pw,
)
from aiida_eipnn.workflows.restart import LabelBaseWorkChain, TrainBaseWorkChain

# In MB: less than this is sent in the time that a job takes to start.
UPLOAD_ABOVE = 10.0

# The twin is fine-tuned like the committee, but from scratch.
STAGES = {
    "pretrain": Stage.PRETRAIN,
    "classify": Stage.CLASSIFY,
    "finetune": Stage.FINETUNE,
    "scratch": Stage.FINETUNE,
}

MIN_CONTACT = "min_contact"

# Strategies that rank by what members disagree about.
BY_SPREAD = (Strategy.UNCERTAINTY, Strategy.DIVERSE, Strategy.REPRESENTATIVE)

# What the loop itself gives to each job.
OF_THE_LOOP = ("configurations", "exclude", PARENT_FOLDER, "uploaded")
OF_TRAININGS = ("labels", "eip_labels", "selection", "committee", "training")


def add_inputs(spec: ProcessSpec) -> None:
    """Add what the loop is given."""
    _add_explorations(spec)
    _add_jobs(spec)
    _add_labels(spec)
    _add_settings(spec)
    _add_networks(spec)
    _add_files(spec)
    spec.inputs.validator = _validate_inputs


def _add_explorations(spec: ProcessSpec) -> None:
    spec.input(
        "pool",
        valid_type=ConfigurationsData,
        required=False,
        help="The pool; without it `explore` makes one.",
    )
    spec.expose_inputs(
        ExploreCalculation,
        namespace="explore",
        exclude=(PARENT_FOLDER, "uploaded"),
        namespace_options={"required": False, "populate_defaults": False},
    )
    spec.expose_inputs(
        ExploreCalculation,
        namespace="extend",
        exclude=("committee", PARENT_FOLDER, "uploaded"),
        namespace_options={
            "required": False,
            "populate_defaults": False,
            "help": "Exploration after each batch of DFT labels; what it finds joins the pool.",
        },
    )
    ports.add_dict(
        spec,
        "extension",
        "When a committee drives `extend`: fields of ExtensionParameters.",
        ports.settings_validator(ExtensionParameters.from_dict),
    )


def _add_jobs(spec: ProcessSpec) -> None:
    spec.expose_inputs(LabelBaseWorkChain, namespace="label", exclude=_of_jobs(OF_THE_LOOP))
    spec.expose_inputs(
        DftLabelWorkChain, namespace="dft", exclude=("configurations", "choice", "runs")
    )
    spec.expose_inputs(
        TrainBaseWorkChain, namespace="train", exclude=_of_jobs((*OF_THE_LOOP, *OF_TRAININGS))
    )
    spec.expose_inputs(
        EvaluateCalculation, namespace="evaluate", exclude=(*OF_THE_LOOP, "committee")
    )


def _of_jobs(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"job.{name}" for name in names)


def _add_labels(spec: ProcessSpec) -> None:
    spec.input_namespace(
        "known",
        required=False,
        help="DFT labels that are there already: they are trained on from the start.",
    )
    spec.input("known.configurations", valid_type=ConfigurationsData, required=False)
    spec.input("known.labels", valid_type=LabelsData, required=False)
    add_previous(spec)


def _add_settings(spec: ProcessSpec) -> None:
    ports.add_dict(
        spec,
        "split",
        "How many configurations to hold out (test) and to start from (initial), and which of "
        "them come first: random or disputed, those that EIPs disagree about.",
        _validate_split,
    )
    ports.add_dict(
        spec,
        "label_model",
        "How to make pseudo-labels: fields of LabelModelParameters.",
        ports.settings_validator(LabelModelParameters.from_dict),
    )
    ports.add_dict(
        spec, "gate", "What to refuse: min_contact, in sums of covalent radii.", _validate_gate
    )
    ports.add_dict(
        spec,
        "acquisition",
        "How to choose the next DFT points: fields of AcquisitionParameters.",
        ports.settings_validator(AcquisitionParameters.from_dict),
    )
    ports.add_dict(
        spec,
        "stop",
        "When to stop: fields of StopCriteria.",
        ports.settings_validator(StopCriteria.from_dict),
    )
    ports.add_seed(spec)


def _add_networks(spec: ProcessSpec) -> None:
    for name, stage in STAGES.items():
        ports.add_training(spec, name, stage)
    spec.input(
        "pretrain_seeds",
        valid_type=List,
        required=False,
        serializer=to_aiida_type,
        validator=_validate_pretrain_seeds,
        help=(
            "Seeds of the networks to pre-train, from which the members start in turn; without "
            "it each member is pre-trained from its own seed."
        ),
    )
    _add_switch(spec, "train_scratch", "Train a twin from scratch too, to see what the EIPs bring.")
    _add_switch(
        spec,
        "use_pseudo_labels",
        "Fine-tune on what EIP and DFT labels say of the pool too.",
    )


def _add_files(spec: ProcessSpec) -> None:
    spec.input(
        "upload_above",
        valid_type=Float,
        serializer=to_aiida_type,
        default=lambda: Float(UPLOAD_ABOVE),
        help="Pools and EIP labels larger than this, in MB, are put on the computers that "
        "train and evaluate once, and not sent with each job.",
    )
    _add_switch(
        spec,
        "clean_workdir",
        "Remove the remote folders of explorations and evaluations that went well, once "
        "their results are home. The other jobs: label, train and dft.pw_base have their own.",
    )


def _add_switch(spec: ProcessSpec, name: str, text: str) -> None:
    spec.input(
        name,
        valid_type=Bool,
        serializer=to_aiida_type,
        default=lambda: Bool(False),
        help=text,
    )


def add_outputs(spec: ProcessSpec) -> None:
    """Add what the loop makes."""
    spec.output("pool", valid_type=ConfigurationsData, required=False)
    spec.output("eip_labels", valid_type=LabelsData, help="What the EIPs say about the pool.")
    spec.output("test_labels", valid_type=LabelsData, help="DFT labels that no stage saw.")
    spec.output("initial_labels", valid_type=LabelsData, required=False)
    spec.output("pretrained", valid_type=CommitteeData, help="After the EIPs, before DFT.")
    spec.output_namespace(
        "iterations",
        dynamic=True,
        valid_type=Data,
        help="What each iteration made, emitted as it is made.",
    )
    spec.output(
        "committee",
        valid_type=CommitteeData,
        help="The last committee; its twin from scratch where held-out labels say so.",
    )
    spec.output("selection", valid_type=SelectionData, help="The last choice of EIPs.")
    spec.output("predictions", valid_type=PredictionsData, help="Its view of the pool.")
    spec.output("history", valid_type=Dict, help="Errors by iteration, and why it stopped.")


def add_exit_codes(spec: ProcessSpec) -> None:
    """Add the reasons for which the loop breaks."""
    for number, name, what in (
        (401, "EXPLORE", "making the pool"),
        (402, "EIP_LABELS", "labelling with EIPs"),
        (403, "DFT_LABELS", "labelling with DFT"),
        (404, "PRETRAIN", "pre-training"),
        (405, "CLASSIFY", "training the classifier of EIPs"),
        (406, "FINETUNE", "fine-tuning"),
        (407, "EVALUATE", "evaluating the committee"),
        (408, "SPLIT", "splitting the pool"),
        (409, "ASSESS", "assessing the committee"),
        (410, "ACQUIRE", "choosing the next DFT points"),
    ):
        spec.exit_code(
            number,
            f"ERROR_{name}",
            message=f"The loop broke while {what}: {{message}} -- what was made before is in "
            "the outputs.",
        )
    spec.exit_code(
        310,
        "ERROR_KNOWN_LABELS",
        message="The given DFT labels were refused: {message}",
    )


def _validate_inputs(inputs: Any, _: Any) -> str | None:
    """Refuse, before anything runs, what would only break later."""
    if "pool" not in inputs and "explore" not in inputs:
        return "give a pool, or the inputs below `explore` to make one"
    if len(inputs.get("known", {})) == 1:
        return "`known` needs both configurations and labels"
    for validate in (_validate_size, _validate_budget, _validate_spread, _validate_levels):
        if message := validate(inputs):
            return message
    known = {**inputs.get("known", {}), **inputs.get("previous", {})}
    if inputs["split"].get_dict().get(INITIAL, 0) == 0 and "labels" not in known:
        return f"nothing to learn from: set split.{INITIAL} above 0, or give `known` labels"
    if message := validate_labeller(inputs["dft"]):
        return message
    if not runs_pw(inputs["dft"]):
        return None
    if "pool" in inputs:
        return validate_pw(inputs["dft"]["pw_base"], inputs["pool"])
    return validate_occupations(inputs["dft"]["pw_base"])


def _validate_pretrain_seeds(value: List | None, context: Any) -> str | None:
    # It may be left out.
    return None if value is None else validate_seeds(value, context)


def _validate_split(value: Dict | None, _: Any) -> str | None:
    sizes = value.get_dict() if value is not None else {}
    first = sizes.pop(FIRST, RANDOM)
    if strange := {name: size for name, size in sizes.items() if not _is_count(size)}:
        return f"split holds whole numbers from 0 on, got {strange}"
    if not set(sizes) <= {TEST, INITIAL} or sizes.get(TEST, 0) < 1:
        return f"split holds {TEST} (at least 1), {INITIAL} and {FIRST}, got {sizes}"
    if first not in (RANDOM, DISPUTED):
        return f"split.{FIRST} is {RANDOM} or {DISPUTED}, not {first!r}"
    return None


def _is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _validate_gate(value: Dict | None, _: Any) -> str | None:
    given = value.get_dict() if value is not None else {}
    if unknown := sorted(set(given) - {MIN_CONTACT}):
        return f"gate holds {MIN_CONTACT} only, not {unknown}"
    contact = given.get(MIN_CONTACT, 0)
    if isinstance(contact, bool) or not isinstance(contact, int | float) or not contact >= 0:
        return f"gate.{MIN_CONTACT} must be a number from 0 on, got {contact!r}"
    return None


def _validate_budget(inputs: Any) -> str | None:
    split, budget = inputs["split"].get_dict(), inputs["stop"].get_dict().get("dft_budget")
    n_first = split.get(TEST, 0) + split.get(INITIAL, 0)
    if budget is None or n_first <= budget or "choices" in inputs.get("previous", {}):
        return None
    return (
        f"the split asks for {n_first} DFT labels before the first iteration, which is more than "
        f"stop.dft_budget, {budget}: make the split smaller or the budget larger"
    )


def _validate_spread(inputs: Any) -> str | None:
    settings = AcquisitionParameters.from_dict(inputs["acquisition"].get_dict())
    n_opinions = max(
        len(inputs["train"]["job"]["seeds"].get_list()),
        *(inputs[name].get_dict().get("n_heads", 0) for name in ("finetune", "scratch")),
    )
    if n_opinions > 1 or settings.strategy not in BY_SPREAD:
        return None
    if settings.measure != Measure.COMMITTEE:
        return None
    return (
        f"one network without heads is sure of everything, and strategy {settings.strategy} goes "
        "by what is not sure: set n_members or n_heads above 1, or take another "
        "acquisition.measure or strategy"
    )


def _validate_levels(inputs: Any) -> str | None:
    dft, previous = inputs["dft"], inputs.get("previous", {})
    given = [inputs.get("known", {}).get("labels"), dft.get("stored")]
    given += previous.get("labels", {}).values()
    levels = [node.level for node in given if node is not None]
    if runs_pw(dft):
        levels.append(level_of_pw(dft["pw_base"]))
    try:
        compare_levels(levels)
    except ValueError as error:
        return str(error)
    return None


def _validate_size(inputs: Any) -> str | None:
    if "pool" in inputs:
        n_pool = len(inputs["pool"])
    else:
        recipes = inputs["explore"]["recipes"].get_list()
        n_pool = sum(int(recipe.get("count", 0)) for recipe in recipes)
    split = inputs["split"].get_dict()
    sizes = {name: split.get(name, 0) for name in (TEST, INITIAL)}
    if n_pool == 0:
        return "the pool is empty: give at least one configuration"
    if sum(sizes.values()) > n_pool:
        return (
            f"the split {sizes} needs {sum(sizes.values())} configurations, the pool has {n_pool}: "
            "make the pool larger or the split smaller"
        )
    return None
