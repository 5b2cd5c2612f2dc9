"""What each stage of a loop needs where it runs, and what to do about what is missing there.

Facts come from ``eipnn.check`` and pw.x; here they are only judged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from typing import Any

import yaml

from aiida_eipnn import __version__
from aiida_eipnn.jobs.check import sources_digest
from aiida_eipnn.workflows.builder import EVALUATE, EXPLORE, LABEL, PROTOCOLS, TRAIN

BASE = ("numpy", "ase")
PACKAGES = {
    EXPLORE: BASE,
    LABEL: (*BASE, "kimpy"),
    TRAIN: (*BASE, "torch"),
    EVALUATE: (*BASE, "torch"),
}
# Without these a stage runs, but not all of it or not fast.
VESIN = {"vesin": "neighbours of small cells take three times as long without it"}
HELPFUL = {
    EXPLORE: {"kimpy": "molecular dynamics with a KIM model needs it", **VESIN},
    LABEL: {"numba": "labels take two to four times as long without it", **VESIN},
    TRAIN: VESIN,
    EVALUATE: VESIN,
}
ON_GPU = (TRAIN, EVALUATE)
# Packages whose next major version may read and write other things.
SAME_MAJOR = ("numpy", "torch")

KIM_ITEM = ("__MO_", "__SM_")
# The Debian package that has the models; elsewhere the KIM API fetches them itself.
KIM_MODELS = "apt-get install openkim-models, or kim-api-collections-management install user {}"
# More names than this hide the line that matters.
SHOWN = 3


class State(StrEnum):
    """What a finding means for the stage."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the result.

    Parameters
    ----------
    state
        Whether the stage can run: ``missing`` says that it cannot.
    text
        What was found.
    remedy
        What to type or to change; empty where nothing is to be done.
    """

    state: State
    text: str
    remedy: str = ""


def findings_of_job(
    stage: str,
    facts: Mapping[str, Any],
    *,
    eips: Sequence[str] = (),
    gpu: bool = False,
) -> list[Finding]:
    """Judge what a job of ``stage`` found.

    Parameters
    ----------
    stage
        ``explore``, ``label``, ``train`` or ``evaluate``.
    facts
        The metrics of ``eipnn.check``.
    eips
        EIPs that are to label; any where it is empty.
    gpu
        Whether the stage is to run on a GPU.
    """
    version = version_of_package(facts)
    if version.state is State.MISSING:
        # Another version may tell other facts.
        return [version]
    found = [version, *packages(stage, facts, eips)]
    if stage == LABEL:
        found += kim_models(facts, eips)
    if stage in ON_GPU and not _trouble(facts, "torch"):
        found += gpus(facts, gpu=gpu)
    return found


def version_of_package(facts: Mapping[str, Any]) -> Finding:
    """Compare aiida-eipnn there with the one here."""
    there = facts["aiida_eipnn"]
    if there["version"] != __version__:
        return other_version(there["version"], _python(facts))
    if there["sources"] != sources_digest():
        return Finding(
            state=State.WARNING,
            text=f"aiida-eipnn {__version__} there has other source files than the one here",
            remedy="install both from the same wheel or commit",
        )
    return Finding(state=State.OK, text=f"aiida-eipnn {__version__}, the same as here")


def other_version(there: str, python: str) -> Finding:
    """Say that aiida-eipnn there is not the one here."""
    return Finding(
        state=State.MISSING,
        text=f"aiida-eipnn {there} there, {__version__} here: they must be the same",
        remedy=f"{python} -m pip install --no-deps aiida-eipnn=={__version__}",
    )


def packages(stage: str, facts: Mapping[str, Any], eips: Sequence[str]) -> list[Finding]:
    """Judge the packages that a stage imports."""
    needed, helpful = list(PACKAGES[stage]), dict(HELPFUL.get(stage, {}))
    if stage == LABEL and eips and not _kim_names(eips):
        needed.remove("kimpy")
    there = [
        f"{name} {facts['packages'][name]['version']}"
        for name in (*needed, *helpful)
        if not _trouble(facts, name)
    ]
    python = f"Python {facts['python']['version']}"
    found = [Finding(state=State.OK, text=", ".join([python, *there, _cores(facts)]))]
    found += [_lacks(State.MISSING, facts, name) for name in needed if _trouble(facts, name)]
    found += [
        _lacks(State.WARNING, facts, name, why)
        for name, why in helpful.items()
        if _trouble(facts, name)
    ]
    found += [
        finding for name in SAME_MAJOR if name in needed for finding in _other_major(facts, name)
    ]
    return found + _not_compiled(facts, needed)


def _cores(facts: Mapping[str, Any]) -> str:
    n_cores = facts["n_cores"]
    return f"{n_cores} CPU core{'s' if n_cores > 1 else ''}"


def _lacks(state: State, facts: Mapping[str, Any], name: str, why: str = "") -> Finding:
    text = f"{name} {_trouble(facts, name)}" + (f"; {why}" if why else "")
    return Finding(state=state, text=text, remedy=pip_install(_python(facts), name))


def pip_install(python: str, name: str) -> str:
    """Return what to type to get a package into the environment of a Python."""
    if name == "kimpy":
        return (
            f'CXXFLAGS="-O1 -g0" {python} -m pip install kimpy, where pkg-config finds libkim-api '
            "(Debian: libkim-api-dev)"
        )
    if name == "torch":
        return f"{python} -m pip install torch, or load the centre's own in the prepend text"
    return f"{python} -m pip install {name}"


def _other_major(facts: Mapping[str, Any], name: str) -> list[Finding]:
    there = facts["packages"][name].get("version")
    try:
        here = metadata.version(name)
    except metadata.PackageNotFoundError:
        return []
    if there is None or there.split(".")[0] == here.split(".")[0]:
        return []
    return [
        Finding(
            state=State.WARNING,
            text=f"{name} {there} there, {here} here",
            remedy="tests ran with what is here: take the same major version on both",
        )
    ]


def _not_compiled(facts: Mapping[str, Any], needed: Sequence[str]) -> list[Finding]:
    slow = [name for name in needed if facts["packages"][name].get("compiled") is False]
    if not slow or not facts["environment"]["PYTHONDONTWRITEBYTECODE"]:
        return []
    return [
        Finding(
            state=State.WARNING,
            text=f"each job compiles {', '.join(slow)} anew: PYTHONDONTWRITEBYTECODE is set",
            remedy=f"{_python(facts)} -m compileall -q on its site-packages, once",
        )
    ]


def kim_models(facts: Mapping[str, Any], eips: Sequence[str]) -> list[Finding]:
    """Judge the KIM models: those that were named must be there, otherwise any."""
    if _trouble(facts, "kimpy"):
        return []
    kimpy = facts["packages"]["kimpy"]
    models = set(kimpy["models"])
    if trouble := kimpy["models_trouble"]:
        return [Finding(state=State.MISSING, text=f"KIM models cannot be listed: {trouble}")]
    if absent := [name for name in _kim_names(eips) if name not in models]:
        return [_lacks_models(State.MISSING, f"KIM models {_some(absent)} are missing", absent)]
    text = f"{len(models)} KIM models"
    if eips:
        return [Finding(state=State.OK, text=f"{text}, all that were named")]
    return _models_of_protocols(models, text)


def _models_of_protocols(models: set[str], text: str) -> list[Finding]:
    """Judge the models when none was named: a loop without --eip takes those of the protocol."""
    absent = {
        elements: [name for name in _kim_names(names) if name not in models]
        for elements, names in protocol_eips().items()
    }
    complete = [elements for elements, names in absent.items() if not names]
    missing = [name for names in absent.values() for name in names]
    text += f", all that the protocols name for {', '.join(complete)}" if complete else ""
    if not complete:
        # Not one element can be labelled by default.
        return [_lacks_models(State.MISSING, f"{text}, none of those of the protocols", missing)]
    found = [Finding(state=State.OK, text=text)]
    for elements, names in absent.items():
        if names:
            what = f"for {elements} the protocols also name {_some(names)}"
            found.append(_lacks_models(State.WARNING, what, names))
    return found


def _lacks_models(state: State, text: str, names: Sequence[str]) -> Finding:
    return Finding(state=state, text=text, remedy=KIM_MODELS.format(names[0]))


def protocol_eips() -> dict[str, list[str]]:
    """Return the EIPs that the protocols name, by their elements."""
    table = yaml.safe_load(PROTOCOLS.read_text(encoding="utf-8"))["default_inputs"]["eips"]
    return {elements: list(names) for elements, names in table.items()}


def gpus(facts: Mapping[str, Any], *, gpu: bool) -> list[Finding]:
    """Judge whether torch computes on GPUs, where there are any or one was asked for."""
    torch, driver = facts["packages"]["torch"], facts["driver"]
    seen = torch["gpus"]
    if trouble := torch["gpu_trouble"]:
        remedy = f"install a torch that is built for {_some(seen or driver)}"
        return [Finding(state=State.MISSING, text=f"torch fails on {trouble}", remedy=remedy)]
    if seen:
        return [Finding(state=State.OK, text=f"torch computes on {_counted(seen)}")]
    if driver:
        return [_torch_sees_none(facts)]
    if gpu:
        return [
            Finding(
                state=State.MISSING,
                text="a GPU was asked for, but the job was given none",
                remedy="ask the scheduler for one in --options, such as "
                'custom_scheduler_commands: "#SBATCH --gpus=1", in a queue that has them',
            )
        ]
    return [Finding(state=State.OK, text="no GPU: networks run on CPUs")]


def _torch_sees_none(facts: Mapping[str, Any]) -> Finding:
    built_for = facts["packages"]["torch"]["cuda"]
    hidden = facts["environment"]["CUDA_VISIBLE_DEVICES"]
    text = f"the node has {_counted(facts['driver'])}, but torch sees no GPU"
    if built_for is None:
        text += ": it is built for CPUs"
        remedy = f"{_python(facts)} -m pip install --force-reinstall torch, without +cpu"
    elif hidden in ("", "-1", "NoDevFiles"):
        text += f": CUDA_VISIBLE_DEVICES is {hidden!r}"
        remedy = "ask the scheduler for a GPU in --options, or do not set the variable"
    else:
        text += f": it is built for CUDA {built_for}"
        remedy = f"take a newer driver, or a torch for an older CUDA than {built_for}"
    return Finding(state=State.MISSING, text=text, remedy=remedy)


def wants_gpu(options: Mapping[str, Any]) -> bool:
    """Return whether these ``metadata.options`` ask for a GPU, as far as words tell."""
    names = ("custom_scheduler_commands", "queue_name", "qos")
    words = " ".join(str(options.get(name, "")) for name in names).lower()
    return any(word in words for word in ("gpu", "gres", "cuda"))


def _trouble(facts: Mapping[str, Any], name: str) -> str:
    return str(facts["packages"][name].get("trouble", ""))


def _python(facts: Mapping[str, Any]) -> str:
    return str(facts["python"]["executable"])


def _kim_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if any(mark in name for mark in KIM_ITEM)]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} GPU{'s' if len(names) > 1 else ''} ({_some(sorted(set(names)))})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
