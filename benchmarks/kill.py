"""What is lost when the daemon is killed, or the power is cut, at any moment: nothing, it must be.

    make bench-kill

One small loop for silicon with the real pw.x, KIM and torch runs three times, each time in a
profile and with a daemon of its own: undisturbed; with accidents at random moments, one in each
equal part of the life of the undisturbed loop; and undisturbed on a pool of which much cannot be
labelled. An accident is a SIGKILL of the whole daemon (circus, broker, workers), in half of them
also of every job that runs, as when the power is cut. After each, `aiida-eipnn recover` is the only
thing that is done. Daemons are killed at moments that chance draws, power is cut while a job runs.

`dft_repeated` counts runs of pw.x on an input for which a run had ended before; twice, from the
provenance graph and from what a script around pw.x writes down. Caching is off: it would cover up
repetitions. Datasets are equal where ids, energies, forces, stresses and reasons are, bit by bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "kill.json"
BIN = Path(sys.executable).parent
RECOVER = [str(BIN / "aiida-eipnn"), "recover", "--profile", "kill"]
POOL = {"n_pool": 24, "n_hopeless": 2}
# Seven steps of self-consistency are enough where atoms are apart; where they overlap it takes nine
# to eleven, and pw.x gives up.
FAILING_POOL = {"n_pool": 14, "n_hopeless": 7, "electron_maxstep": 8}
# So many processes has this loop where nothing happens to it, a little fewer than it has then.
N_PROCESSES = 72
MAX_WAIT_SECONDS = 5.0
# A loop that takes longer than this hangs.
LIMIT_SECONDS = 3000


def draw_accidents(n: int, seed: int) -> list[dict[str, Any]]:
    """Return accidents, each at a random moment of its own part of the life of the loop.

    A moment is said by how many processes had ended by then, and for how long to wait after that.
    Power is cut while a job runs: the wait begins with the next job.
    """
    rng = np.random.default_rng(seed)
    after = (np.arange(n) + rng.uniform(size=n)) * N_PROCESSES / n
    waits = rng.uniform(0, MAX_WAIT_SECONDS, size=n)
    cuts = rng.permutation(np.arange(n) % 2 == 0)
    return [
        {
            "after": int(count),
            "wait_s": round(float(wait), 1),
            "power_cut": bool(cut),
            "at_work": bool(cut),
        }
        for count, wait, cut in zip(after, waits, cuts, strict=True)
    ]


def run_loop(name: str, folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Run one loop in a process and an AiiDA folder of its own."""
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "plan.json").write_text(json.dumps({"command": RECOVER, "accidents": [], **plan}))
    environment = os.environ | {
        "AIIDA_PATH": str(place),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(HERE / "kill_loop.py"), str(place)]
    subprocess.run(command, env=environment, check=True, timeout=LIMIT_SECONDS)
    result: dict[str, Any] = json.loads((place / "result.json").read_text())
    print(
        f"{name}: {result['state']} with {result['exit_status']} in {result['seconds']:.0f} s, "
        f"pw.x {result['ledger']['begun']} begun, {result['ledger']['repeated']} repeated",
        flush=True,
    )
    return result


def compare(calm: dict[str, Any], shaken: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the issue, and what helps to judge them."""
    accidents = shaken["accidents"]
    return {
        "kills": len(accidents),
        "dft_finished": shaken["graph"]["finished"],
        "dft_repeated": max(shaken["graph"]["repeated"], shaken["ledger"]["repeated"]),
        "dataset_equal": calm["dataset"] == shaken["dataset"],
        "choices_equal": calm["choices"] == shaken["choices"],
        "committee_equal": calm["committee"] == shaken["committee"],
        "loop_finished": shaken["state"] == "finished" and shaken["exit_status"] == 0,
        "n_labels": sum(not row["reason"] for rows in shaken["dataset"].values() for row in rows),
        "n_failed": sum(bool(row["reason"]) for rows in shaken["dataset"].values() for row in rows),
        "pw_begun": {"undisturbed": calm["ledger"]["begun"], "killed": shaken["ledger"]["begun"]},
        "pw_cut_off": shaken["ledger"]["begun"] - shaken["ledger"]["ended"],
        "processes": {"undisturbed": calm["states"], "killed": shaken["states"]},
        "seconds": {"undisturbed": calm["seconds"], "killed": shaken["seconds"]},
        "hit_while_pw_ran": sum("pw.x" in item["jobs_running"] for item in accidents),
        "accidents": accidents,
    }


def failing(result: dict[str, Any]) -> dict[str, Any]:
    """Return what became of the loop on a pool of which much cannot be labelled."""
    rows = [row for rows in result["dataset"].values() for row in rows]
    reasons = [row["reason"] for row in rows if row["reason"]]
    return {
        "asked": len(rows),
        "failed": len(reasons),
        "fraction": round(len(reasons) / len(rows), 3),
        "listed_with_reason": sum("pw.x" in reason for reason in reasons),
        "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "state": result["state"],
        "exit_status": result["exit_status"],
        "ended_because": result["stop"],
        "status_says": result["status"],
        "seconds": result["seconds"],
    }


def main() -> None:
    """Run the loops, print what came of them, write JSON."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", choices=("kills", "failing"), help="one half of it")
    options.add_argument("--keep", type=Path, help="folder for the profiles, kept afterwards")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    folder = (given.keep or Path(tempfile.mkdtemp(prefix="eipnn-kill-"))).absolute()
    found = json.loads(given.output.read_text()) if given.output.exists() else {}
    if given.only != "failing":
        plan = draw_accidents(given.kills, given.seed)
        plans: dict[str, dict[str, Any]] = {
            "undisturbed": POOL,
            "killed": {**POOL, "accidents": plan},
        }
        with ThreadPoolExecutor() as pool:
            calm, shaken = pool.map(lambda name: run_loop(name, folder, plans[name]), plans)
        found |= {"seed": given.seed, **compare(calm, shaken)}
    if given.only != "kills":
        found["failing_dft"] = failing(run_loop("failing", folder, FAILING_POOL))
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "accidents"}, indent=1))
    if given.keep is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
