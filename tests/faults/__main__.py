"""Plants each fault in a copy of the project and runs the tests that every change must pass.

    python tests/faults [--only NAME ...] [--jobs 2] [--out FILE]

The tests named beside a fault run first; where they pass, all do. A fault is caught if a test fails.
The result goes to a JSON file as it comes, and faults that are in the file already are not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from faults.fault import Fault, all_faults  # noqa: E402

COPIED = (
    "transfusion_jax",
    "tests",
    "experiments",
    "benchmarks",
    "docs",
    "README.md",
    "pyproject.toml",
    "setup.cfg",
)


def failing_test(copy: Path, tests: list[str]) -> str | None:
    """The first of these tests that fails in a copy of the project; None if all pass."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"exit code {run.returncode}"


def caught_by(fault: Fault) -> str | None:
    """The test that sees a fault, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        file = copy / "transfusion_jax" / fault.file
        file.write_text(fault.planted(file.read_text()))
        nearest = [f"tests/test_{name}.py" for name in fault.tests.split()]
        deselected = ["--deselect", "tests/test_faults.py"]
        return failing_test(copy, nearest) or failing_test(copy, deselected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults by name; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("faults.json"), help="default: faults.json"
    )
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    faults = [f for f in all_faults() if f.name in (arguments.only or [f.name])]
    waiting = [fault for fault in faults if fault.name not in results]

    def run(fault: Fault) -> None:
        begin = time.perf_counter()
        results[fault.name] = caught_by(fault)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        seen = results[fault.name] or "SURVIVES"
        print(f"{fault.name:50} {time.perf_counter() - begin:5.0f} s  {seen}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as executor:
        list(executor.map(run, waiting))
    caught = sum(results[fault.name] is not None for fault in faults)
    print(f"{caught} of {len(faults)} faults caught, {caught / max(len(faults), 1):.0%}")


if __name__ == "__main__":
    main()
