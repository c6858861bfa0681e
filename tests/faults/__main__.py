"""Plants each fault in a copy of the project and runs the tests that should see it.

    python tests/faults [--lists NAME ...] [--only PART ...] [--nearest] [--jobs 2] [--out FILE]

First the nearest tests of all these faults run without any fault, and have to pass. Then, for each
fault, its nearest tests run and, where these pass, all that every change must pass. A fault is
caught if a test fails. Results are kept in a JSON file, and faults that are in it are not run again
unless `--only` asks for them.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from faults.fault import LISTS, Fault, faults_by_list  # noqa: E402

COPIED = (
    "transfusion_jax",
    "tests",
    "examples",
    "experiments",
    "launch",
    "benchmarks",
    "docs",
    "README.md",
    "pyproject.toml",
    "setup.cfg",
)
FAILED = (1, 2)  # exit codes of pytest: tests failed, or a file could not be collected
SECONDS = 1800  # after which a run counts as one that hangs


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of the project."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        yield copy


def failing_tests(copy: Path, tests: list[str], *options: str) -> list[str]:
    """Those of these tests that fail in a copy of the project."""
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=line", *options]
    # With the long ones, which `pytest` alone leaves out.
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *options, *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    try:
        run = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return [f"(hangs) {' '.join(tests)}"]
    found = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if run.returncode != 0 and (run.returncode not in FAILED or not found):
        raise RuntimeError(f"pytest cannot run {' '.join(tests)}:\n{run.stdout}\n{run.stderr}")
    return [line.split(" - ")[0].split(" ", 1)[1] for line in found]


def caught_by(fault: Fault, nearest_only: bool) -> str | None:
    """The test that sees a fault, or None."""
    with copied() as copy:
        file = copy / "transfusion_jax" / fault.file
        file.write_text(fault.planted(file.read_text()))
        seen = failing_tests(copy, fault.nearest(), "-x")
        if not seen and not nearest_only:
            seen = failing_tests(copy, [], "-x", "--deselect", "tests/test_faults.py")
        return seen[0] if seen else None


def check_without_faults(faults: list[Fault]) -> None:
    """Ends the program if some of the nearest tests fail anyway."""
    tests = sorted({test for fault in faults for test in fault.nearest()})
    with copied() as copy:
        if tests and (failing := failing_tests(copy, tests)):
            sys.exit("without any fault:\n" + "\n".join(failing))


def table(results: dict[str, str | None]) -> str:
    """Faults caught of those that were run, by list and in all."""
    rows = {
        name: [results[fault.name] is not None for fault in faults if fault.name in results]
        for name, faults in faults_by_list().items()
    }
    rows["all"] = [caught for found in rows.values() for caught in found]
    return "\n".join(f"{name:14}{sum(x):4} of {len(x):3}" for name, x in rows.items() if x)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", nargs="+", metavar="NAME", choices=LISTS, default=LISTS)
    parser.add_argument("--only", nargs="+", metavar="PART", help="those whose names hold a part")
    parser.add_argument("--nearest", action="store_true", help="run the nearest tests only")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("faults.json"), help="default: faults.json"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    out = arguments.out
    results = json.loads(out.read_text()) if out.exists() else {}
    faults = [fault for name in arguments.lists for fault in faults_by_list()[name]]
    if arguments.only:
        faults = [f for f in faults if any(part in f.name for part in arguments.only)]
    waiting = [fault for fault in faults if arguments.only or fault.name not in results]
    check_without_faults(waiting)

    def run(fault: Fault) -> None:
        begin = time.perf_counter()
        results[fault.name] = caught_by(fault, arguments.nearest)
        out.write_text(json.dumps(results, indent=2) + "\n")
        seen = results[fault.name] or "SURVIVES"
        print(f"{fault.name:50} {time.perf_counter() - begin:5.0f} s  {seen}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as executor:
        list(executor.map(run, waiting))
    print(table(results))


if __name__ == "__main__":
    main()
