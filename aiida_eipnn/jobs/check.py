"""The check job: what is there where jobs run, told as facts that somebody else judges."""

import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import aiida_eipnn
from aiida_eipnn.jobs import spec
from aiida_eipnn.jobs.stop import NEVER, Stop

# What jobs import beside this package.
PACKAGES = ("numpy", "ase", "vesin", "safetensors", "torch", "kimpy", "numba")
# Reading torch for the first time from a busy file system takes a minute.
SECONDS = 300.0
DRIVER = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
DRIVER_SECONDS = 30.0
ENVIRONMENT = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def run(job: spec.CheckJob, folder: Path, stop: Stop = NEVER) -> spec.State:
    """Write what is there into the metrics below ``output``; what is missing is no failure."""
    facts = {
        "host": platform.node(),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "aiida_eipnn": {"version": aiida_eipnn.__version__, "sources": sources_digest()},
        "packages": {name: ask_apart("import_package", name) for name in PACKAGES},
        "driver": driver_gpus(),
        "n_cores": usable_cores(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }
    output = folder / spec.OUTPUT
    output.mkdir(exist_ok=True)
    (output / spec.METRICS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return spec.State.DONE


def ask_apart(question: str, *arguments: str) -> dict[str, Any]:
    """Call a function of this module in another interpreter, which a broken package may end.

    A package that is compiled for another processor does so, without a word.
    """
    code = (
        "import json, sys\n"
        "from aiida_eipnn.jobs import check\n"
        f"print(json.dumps(check.{question}(*sys.argv[1:])))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"trouble": f"is not imported within {SECONDS:g} s"}
    if done.returncode:
        words = [f"ends Python with exit status {done.returncode}", *done.stderr.splitlines()[-1:]]
        return {"trouble": ": ".join(words)}
    # Some packages print while they are imported.
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def import_package(name: str) -> dict[str, Any]:
    """Import a package; say its version, or why it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        # Whatever a broken package raises is what the user must read.
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        return {"trouble": "is not installed" if missing else f"{type(error).__name__}: {error}"}
    cached = module.__spec__.cached if module.__spec__ else None
    return {
        "version": getattr(module, "__version__", None) or metadata.version(name),
        "compiled": cached is not None and Path(cached).exists(),
        **(MORE[name](module) if name in MORE else {}),
    }


def list_kim_models(_: Any) -> dict[str, Any]:
    """List the portable KIM models that are installed."""
    try:
        kim = importlib.import_module("aiida_eipnn.science.eip.kim")
        return {"models": list(kim.installed_kim_models()), "models_trouble": ""}
    except Exception as error:
        return {"models": [], "models_trouble": f"{type(error).__name__}: {error}"}


def ask_torch(torch: Any) -> dict[str, Any]:
    """Say which GPUs torch sees, and whether it computes on each of them."""
    found: dict[str, Any] = {"cuda": torch.version.cuda, "gpus": [], "gpu_trouble": ""}
    if not torch.cuda.is_available():
        return found
    for number in range(torch.cuda.device_count()):
        found["gpus"].append(torch.cuda.get_device_name(number))
        try:
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            (ones @ ones).sum().item()
        except RuntimeError as error:
            # torch lists GPUs that it has no code for.
            found["gpu_trouble"] = f"GPU {number}: {str(error).splitlines()[0]}"
    return found


# What is to be known of some packages beside their version.
MORE = {"torch": ask_torch, "kimpy": list_kim_models}


def driver_gpus() -> list[str]:
    """Return the GPUs that the driver knows, each with the driver's version."""
    if shutil.which(DRIVER[0]) is None:
        return []
    try:
        listed = subprocess.run(
            DRIVER, capture_output=True, text=True, check=True, timeout=DRIVER_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.splitlines()


def usable_cores() -> int:
    """Return how many cores this process may use, which a scheduler may have made fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sources_digest() -> str:
    """Return a digest of the source files that jobs run, the same wherever they are installed."""
    root = Path(aiida_eipnn.__file__).parent
    digest = hashlib.sha256()
    for room in ("jobs", "science"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
