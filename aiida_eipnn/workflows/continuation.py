"""A loop that goes on where another one ended or broke, with all that it made."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiida.common.links import LinkType
from aiida.engine import ProcessBuilder, ProcessSpec
from aiida.orm import Bool, Data, Dict, Float, Int, List, ProcessNode, Str
from aiida_quantumespresso.workflows.protocols.utils import recursive_merge

from aiida_eipnn.calculations.dft import compare_levels
from aiida_eipnn.calculations.loop import (
    INITIAL,
    KNOWN,
    REFUSED,
    TEST,
    TWINS,
    iteration_name,
    reconsidered,
)
from aiida_eipnn.data.choice import ChoiceData
from aiida_eipnn.data.committee import CommitteeData
from aiida_eipnn.data.configurations import ConfigurationsData
from aiida_eipnn.data.labels import LabelsData
from aiida_eipnn.data.predictions import PredictionsData
from aiida_eipnn.data.selection import SelectionData
from aiida_eipnn.workflows.builder import FINETUNINGS, TRAININGS, default_eips, member_seeds
from aiida_eipnn.workflows.label_dft import level_of_pw, runs_of_lane

LOOP = "ActiveLearningWorkChain"
PREVIOUS = "previous"
ERROR_KNOWN_LABELS = 310

Inputs = dict[str, Any]

OTHERS: dict[str, type[Data]] = {
    "eip_labels": LabelsData,
    "pretrained": CommitteeData,
    "history": Dict,
    "committee": CommitteeData,
    "selection": SelectionData,
    "predictions": PredictionsData,
}

# Where the values of a protocol are among the inputs, if not under their own name.
PATHS: dict[str, tuple[str, ...]] = {
    "label": ("label", "job", "parameters"),
    "train": ("train", "job", "parameters"),
    "network": ("train", "job", "network"),
    "classes": ("train", "job", "classes"),
    "evaluate": ("evaluate", "parameters"),
    **{name: (name,) for name in (*TRAININGS, "label_model", "acquisition", "extension", "stop")},
}
FLAGS = ("train_scratch", "use_pseudo_labels")
COUNTS = ("n_members", "n_heads", "n_pretrained")
FILES = ("upload_above", "clean_workdir")
CHANGEABLE = (*PATHS, *FLAGS, *COUNTS, *FILES, "eips", "extend", "dft")

# What EIP labels and pre-trained networks depend on: where it is changed they are made again.
BEHIND_EIP_LABELS = (("label", "job", "eips"), PATHS["label"])
BEHIND_PRETRAINED = (
    *BEHIND_EIP_LABELS,
    PATHS["pretrain"],
    PATHS["network"],
    PATHS["classes"],
    ("pretrain_seeds",),
)


@dataclass(kw_only=True)
class Made:
    """What a loop has made, and the loops that it continues.

    Parameters
    ----------
    pool
        The pool.
    choices, labels
        By what they were asked for: ``refused``, ``known``, ``test``, ``initial``, ``i001``, ...
    runs
        Finished runs of pw.x whose labels the loop did not come to take, as DftLabelWorkChain
        takes them.
    known
        Configurations of the known labels.
    took_known
        Whether the loop came to take the known labels that it was given.
    others
        ``eip_labels``, ``pretrained``, ``history``, and of its last iteration ``committee``,
        ``selection`` and ``predictions``.
    """

    pool: ConfigurationsData | None = None
    choices: dict[str, ChoiceData] = field(default_factory=dict)
    labels: dict[str, LabelsData] = field(default_factory=dict)
    runs: dict[str, Data] = field(default_factory=dict)
    known: dict[str, ConfigurationsData] = field(default_factory=dict)
    took_known: bool = False
    others: dict[str, Data] = field(default_factory=dict)


def add_previous(spec: ProcessSpec) -> None:
    """Add what a previous loop made to the inputs of the loop."""
    spec.input_namespace(
        PREVIOUS,
        required=False,
        help="What a previous loop made, which is not made again; `get_builder_continue` fills it.",
    )
    for name, kind in (
        ("choices", ChoiceData),
        ("labels", LabelsData),
        ("runs", Data),
        ("known", ConfigurationsData),
    ):
        spec.input_namespace(f"{PREVIOUS}.{name}", dynamic=True, valid_type=kind, required=False)
    for name, kind in {"loop": Str, **OTHERS}.items():
        spec.input(f"{PREVIOUS}.{name}", valid_type=kind, required=False)


def must_train(previous: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Return whether a loop that goes on has something to learn, before it asks for more."""
    if "history" not in previous:
        return True
    name, labels = _iteration(previous["history"]), previous.get("labels", {})
    if name in labels:
        return True
    # What was chosen is labelled first.
    if name in previous.get("choices", {}):
        return False
    return "labels" in known or _has_news(labels, previous["history"])


def _has_news(labels: Mapping[str, LabelsData], history: Dict) -> bool:
    """Return whether there are labels that the last iteration did not learn."""
    learnt = history["iterations"][-1].get("n_training_labels")
    there = sum(
        node.base.attributes.get("n_labels") for name, node in labels.items() if name != TEST
    )
    return learnt is not None and there != learnt


def last_name(previous: Mapping[str, Any]) -> str:
    """Return the name of the last iteration of a previous loop that has one."""
    return _iteration(previous["history"])


def runs_of(runs: Mapping[str, Data], choice: ChoiceData) -> dict[str, Data]:
    """Return those of the runs that are of a choice."""
    ids = set(choice.ids().tolist())
    return {name: node for name, node in runs.items() if name.partition("_")[2] in ids}


def fill_continuation(
    builder: ProcessBuilder,
    loop: ProcessNode,
    overrides: Mapping[str, Any],
    known: tuple[ConfigurationsData | None, LabelsData | None],
    is_lost: bool,
) -> ProcessBuilder:
    """Fill in the inputs of a loop that goes on where ``loop`` came to.

    Raises
    ------
    ValueError
        If that cannot be; the message says what to do.
    """
    _require_over(loop, is_lost)
    before = loop.get_builder_restart()._inputs(prune=True)
    inputs = _copy(before)
    inputs.pop(PREVIOUS, None)
    made = read_made(loop)
    for name, value in overrides.items():
        _override(inputs, name, value, made.pool)
    _require_same_level(before, inputs)
    if made.pool is not None:
        inputs.pop("explore", None)
        inputs["pool"] = made.pool
    _add_known(inputs, known, made, loop)
    inputs[PREVIOUS] = {"loop": Str(loop.uuid), **_reusable(made, before, inputs)}
    _require_work(inputs, loop)
    builder._update(inputs)
    return builder


def read_made(loop: ProcessNode) -> Made:
    """Return what a loop has made, as far as it came."""
    given, calls = _links(loop, "in"), list(_calls(loop))
    outputs = _links(loop, "out")
    made = Made(
        pool=outputs.get("pool", given.get("pool")),
        choices=_below(given, f"{PREVIOUS}__choices__"),
        labels=_below(given, f"{PREVIOUS}__labels__"),
        known=_below(given, f"{PREVIOUS}__known__"),
    )
    names = [name for name in OTHERS if f"{PREVIOUS}__{name}" in given]
    made.others = {name: given[f"{PREVIOUS}__{name}"] for name in names}
    _take_calls(made, calls)
    # What exploration added to the pool comes after the pool that it was added to.
    for label, node in sorted(outputs.items()):
        _take_output(made, label, node)
    if made.took_known:
        made.known[f"{KNOWN}_{len(made.known) + 1:02d}"] = given["known__configurations"]
    if "history" in made.others:
        made.others |= _last_iteration(outputs, _iteration(made.others["history"]))
    runs = _below(given, f"{PREVIOUS}__runs__")
    for label, call in calls:
        batch = label.removeprefix("dft_")
        if label.startswith("dft_") and batch in made.choices and batch not in made.labels:
            runs |= dict(finished_runs(call))
    open_ids = {
        str(name)
        for batch, choice in made.choices.items()
        if batch not in made.labels
        for name in choice.ids()
    }
    made.runs = {name: node for name, node in runs.items() if name.partition("_")[2] in open_ids}
    # Where not one label was made, it was not the configurations: then all is asked for again.
    for batch in (TEST, INITIAL):
        if batch in made.labels and made.labels[batch].base.attributes.get("n_labels") == 0:
            del made.labels[batch]
    return made


def finished_runs(labelling: ProcessNode) -> Iterator[tuple[str, Data]]:
    """Return the finished runs of pw.x below a DftLabelWorkChain, as it takes them itself."""
    for _, lane in _calls(labelling):
        yield from runs_of_lane(lane)


def _take_calls(made: Made, calls: list[tuple[str, ProcessNode]]) -> None:
    """Take what steps have made, even if the loop broke before it could emit it."""
    # Beside those of a previous loop, EIP labels and known labels are made of what is new only.
    adds = KNOWN in made.labels
    for label, call in calls:
        if not call.is_finished_ok:
            continue
        outputs = call.outputs
        if label == "explore":
            made.pool = outputs.pool
        elif label == "label_with_eips" and "eip_labels" not in made.others:
            made.others["eip_labels"] = outputs.labels
        elif label == "pretrain":
            made.others["pretrained"] = outputs.committee
        elif call.process_label == "refuse":
            made.choices[REFUSED] = outputs.result
        elif call.process_label == "set_apart_twins":
            made.choices[TWINS] = outputs.result
        elif call.process_label == "split_pool":
            made.choices |= {name: outputs[name] for name in outputs}
        elif call.process_label == "check_given_labels" and "labels" not in outputs:
            # Nothing was new.
            made.took_known = True
        elif call.process_label == ("add_known" if adds else "check_given_labels"):
            made.labels[KNOWN], made.choices[KNOWN] = outputs.labels, outputs.choice
            made.took_known = True
        elif call.process_label == "add_eip_labels":
            made.others["eip_labels"] = outputs.result


def _take_output(made: Made, label: str, node: Data) -> None:
    batch, _, name = label.removeprefix("iterations__").partition("__")
    if label in ("test_labels", "initial_labels"):
        made.labels[label.removesuffix("_labels")] = node
    elif name == "labels":
        made.labels[batch] = node
    elif name == "choice":
        made.choices[batch] = node
    elif name == "history":
        earlier = made.others.get("history")
        if earlier is None or len(node["iterations"]) >= len(earlier["iterations"]):
            made.others["history"] = node
    elif label in ("eip_labels", "pretrained"):
        made.others[label] = node
    elif name == "pool":
        made.pool = node
    elif name == "eip_labels":
        made.others[name] = node


def _last_iteration(outputs: Mapping[str, Data], name: str) -> dict[str, Data]:
    """Return committee, selection and predictions of an iteration, if it was trained here."""
    made = _below(outputs, f"iterations__{name}__")
    if "predictions" not in made:
        return {}
    twin = "verdict" in made and not made["verdict"]["eips_help"]
    return {
        "committee": made["scratch" if twin else "committee"],
        "predictions": made["scratch_predictions" if twin else "predictions"],
        "selection": made["selection"],
    }


def _iteration(history: Dict) -> str:
    return iteration_name(len(history["iterations"]))


def _links(process: ProcessNode, way: str) -> dict[str, Data]:
    """Return inputs (``in``) or outputs (``out``) of a work chain by their flat labels."""
    if way == "in":
        links = process.base.links.get_incoming(link_type=LinkType.INPUT_WORK)
    else:
        links = process.base.links.get_outgoing(link_type=LinkType.RETURN)
    return {entry.link_label: entry.node for entry in links.all()}


def _calls(process: ProcessNode) -> Iterator[tuple[str, ProcessNode]]:
    """Return what a process called, in the order of the calls, with the labels of the links."""
    kinds = (LinkType.CALL_CALC, LinkType.CALL_WORK)
    entries = process.base.links.get_outgoing(link_type=kinds).all()
    for entry in sorted(entries, key=lambda entry: entry.node.pk):
        yield entry.link_label, entry.node


def _below(nodes: Mapping[str, Data], prefix: str) -> dict[str, Any]:
    return {
        label.removeprefix(prefix): node
        for label, node in nodes.items()
        if label.startswith(prefix)
    }


def _copy(inputs: Mapping[str, Any]) -> Inputs:
    return {
        key: _copy(value) if isinstance(value, Mapping) and not isinstance(value, Data) else value
        for key, value in inputs.items()
    }


def _require_over(loop: ProcessNode, is_lost: bool) -> None:
    if getattr(loop, "process_label", None) != LOOP:
        raise ValueError(
            f"node {loop.pk} is no loop: `verdi process list -a -L {LOOP}` shows the loops there "
            "are"
        )
    if not (loop.is_terminated or is_lost):
        raise ValueError(
            f"loop {loop.pk} is {loop.process_state.value}: wait until it ends or end it with "
            f"`verdi process kill {loop.pk}`; if the process that ran it is gone, say so (--lost)"
        )


def _override(inputs: Inputs, name: str, value: Any, pool: ConfigurationsData | None) -> None:
    """Replace one value of a protocol among the inputs."""
    if name in PATHS:
        *path, last = PATHS[name]
        place = _at(inputs, path)
        place[last] = Dict(recursive_merge(_content(place.get(last)), value))
    elif name in FLAGS:
        inputs[name] = Bool(value)
    elif name == "upload_above":
        inputs[name] = Float(value)
    elif name == "clean_workdir":
        for place in (inputs, inputs["label"], inputs["train"]):
            place[name] = Bool(value)
    elif name == "n_heads":
        for training in FINETUNINGS:
            inputs[training] = Dict({**_content(inputs[training]), name: value})
    elif name in COUNTS:
        seeds = List(member_seeds(inputs["seed"].value, int(value)))
        if name == "n_members":
            inputs["train"]["job"]["seeds"] = seeds
        else:
            inputs["pretrain_seeds"] = seeds
    elif name == "eips":
        _override_eips(inputs, value, pool)
    elif name == "extend":
        _override_extend(inputs, value)
    elif name == "dft":
        _override_dft(inputs["dft"], value)
    else:
        raise ValueError(
            f"{name} cannot be changed in a loop that goes on, since what is there depends on it; "
            f"these can: {', '.join(CHANGEABLE)}. To change it, start a new loop and give it the "
            "labels as known ones"
        )


def _override_eips(
    inputs: Inputs, table: Mapping[str, Any], pool: ConfigurationsData | None
) -> None:
    """Replace the EIPs; what drives dynamics is one of them."""
    if pool is None:
        raise ValueError("the loop broke before it had a pool: start a new one with these eips")
    eips = default_eips(table, pool.base.attributes.get("elements"))
    inputs["label"]["job"]["eips"] = List(eips)
    if "extend" in inputs and inputs["extend"].get("eip", Str("")).value not in ("", *eips):
        inputs["extend"]["eip"] = Str(eips[0])


def _override_extend(inputs: Inputs, value: Mapping[str, Any]) -> None:
    """Replace settings of the exploration after each batch; recipes of none end it."""
    if not value or set(value) - {"recipes", "n_workers"}:
        raise ValueError(
            f"of extend, recipes and n_workers can be changed in a loop that goes on: {dict(value)}"
        )
    if not value.get("recipes", True):
        inputs.pop("extend", None)
    elif "extend" in inputs:
        extend = inputs["extend"]
        if "recipes" in value:
            extend["recipes"] = List(list(value["recipes"]))
        if "n_workers" in value:
            parameters = extend["parameters"].get_dict() if "parameters" in extend else {}
            extend["parameters"] = Dict({**parameters, "n_workers": value["n_workers"]})
    else:
        raise ValueError(
            "the loop explored nothing between its batches, so it does not know from where; give "
            "`extend` to a new loop, and the labels of this one as known ones"
        )


def _override_dft(inputs: Inputs, overrides: Mapping[str, Any]) -> None:
    for name, value in overrides.items():
        if name == "n_lanes":
            inputs[name] = Int(value)
        elif name == "min_success_fraction":
            inputs[name] = Float(value)
        elif name == "scaling" and name in inputs:
            inputs[name] = Dict(recursive_merge(_content(inputs[name]), value))
        elif name == "pw_base" and name in inputs:
            _override_pw(inputs[name], value)
        else:
            raise ValueError(
                f"dft.{name} cannot be changed in a loop that goes on; n_lanes, "
                "min_success_fraction, and where pw.x runs scaling and pw_base can"
            )


def _override_pw(inputs: Inputs, overrides: Mapping[str, Any]) -> None:
    kinds = {"max_iterations": Int, "clean_workdir": Bool}
    for name, value in overrides.items():
        if name in kinds:
            inputs[name] = kinds[name](value)
        elif name == "pw" and set(value) == {"parameters"}:
            pw = inputs["pw"]
            pw["parameters"] = Dict(
                recursive_merge(_content(pw["parameters"]), value["parameters"])
            )
        else:
            raise ValueError(
                f"dft.pw_base.{name} cannot be changed in a loop that goes on; pw.parameters, "
                f"{' and '.join(kinds)} can"
            )


def _content(node: Dict | None) -> dict[str, Any]:
    return {} if node is None else dict(node.get_dict())


def _at(inputs: Inputs, path: list[str]) -> Inputs:
    for name in path:
        inputs = inputs.setdefault(name, {})
    return inputs


def _require_same_level(before: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if pw.x would run at another level of theory than before."""
    if "pw_base" not in inputs["dft"]:
        return
    compare_levels([level_of_pw(place["dft"]["pw_base"]) for place in (before, inputs)])


def _add_known(
    inputs: Inputs,
    known: tuple[ConfigurationsData | None, LabelsData | None],
    made: Made,
    loop: ProcessNode,
) -> None:
    """Give known labels that were not taken yet, those of the loop or new ones."""
    old = inputs.pop(KNOWN, {})
    if made.took_known or loop.exit_status == ERROR_KNOWN_LABELS:
        old = {}
    configurations, labels = known
    if configurations is None or labels is None:
        if old:
            inputs[KNOWN] = old
        return
    if old:
        raise ValueError(
            f"loop {loop.pk} broke before it took its own known labels: continue it without "
            "others first, or put both into one file and start a new loop"
        )
    inputs[KNOWN] = {"configurations": configurations, "labels": labels}


def _reusable(made: Made, before: Mapping[str, Any], inputs: Mapping[str, Any]) -> Inputs:
    """Return what need not be made again."""
    others = dict(made.others)
    for name, paths in (("eip_labels", BEHIND_EIP_LABELS), ("pretrained", BEHIND_PRETRAINED)):
        if any(_value(before, path) != _value(inputs, path) for path in paths):
            others.pop(name, None)
    groups = {
        "choices": made.choices,
        "labels": made.labels,
        "runs": made.runs,
        "known": made.known,
    }
    return {**{name: nodes for name, nodes in groups.items() if nodes}, **others}


def _value(inputs: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if name not in inputs:
            return None
        inputs = inputs[name]
    return inputs.get_list() if isinstance(inputs, List) else _content(inputs)


def _require_work(inputs: Inputs, loop: ProcessNode) -> None:
    """Raise ``ValueError`` if the loop would stop before it did anything."""
    previous = inputs[PREVIOUS]
    if "history" not in previous or _iteration(previous["history"]) in previous["choices"]:
        return
    found = reconsidered(
        previous["history"].get_dict(),
        previous["predictions"].value(),
        inputs["acquisition"].get_dict(),
        inputs["stop"].get_dict(),
        previous["choices"],
    )
    if found["stop"]:
        raise ValueError(
            f"loop {loop.pk} would stop at once, since {found['stop']['text']}: change `stop` (or "
            "`acquisition`) in the overrides; iterations and DFT points count from the first loop "
            "on"
        )
