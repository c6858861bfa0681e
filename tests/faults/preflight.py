"""Faults of the preflight: facts that are not asked, and checks that let something pass."""

from faults.fault import Fault

FAULTS = (
    Fault(
        "any clock will do",
        "preflight/judgement.py",
        "SKEW = 5.0",
        "SKEW = 5e9",
        "check",
    ),
    Fault(
        "clocks may run behind",
        "preflight/judgement.py",
        "early = min(facts, key=lambda fact: fact.clock)",
        "early = facts[0]",
        "check",
    ),
    Fault(
        "no room for the checkpoint being written",
        "preflight/judgement.py",
        "count = asked.keep_checkpoints + 1",
        "count = asked.keep_checkpoints",
        "check",
    ),
    Fault(
        "checkpoints that are there count twice",
        "preflight/judgement.py",
        "total - leader.held > leader.free",
        "total > leader.free",
        "check",
    ),
    Fault(
        "the first device says how much memory all have",
        "preflight/judgement.py",
        "limits = [fact.memory for fact in facts if",
        "limits = [fact.memory for fact in facts[:1] if",
        "check",
    ),
    Fault(
        "packages of the first process only",
        "preflight/judgement.py",
        "        elif found := _different(facts, version):",
        "        elif found := _different(facts[:1], version):",
        "check",
    ),
    Fault(
        "code is known by its version",
        "preflight/facts.py",
        'code.update(f"{file.relative_to(root)}\\0".encode() + file.read_bytes())',
        "code.update(b'')",
        "check",
    ),
    Fault(
        "a state is as large everywhere as it is in all",
        "preflight/needs.py",
        "state=sum(map(bytes_here, arrays))",
        "state=sum(x.size * x.dtype.itemsize for x in arrays)",
        "check",
    ),
    Fault(
        "wrong sums between processes are let through",
        "preflight/needs.py",
        "        check_collectives(mesh)\n",
        "",
        "check",
    ),
    Fault(
        "data is known by its shards' sizes",
        "preflight/data.py",
        "        dataset.record(0)  # sizes are compared by now; this one is read\n",
        "        pass\n",
        "check",
    ),
    Fault(
        "any directory is the run directory",
        "preflight/run_directory.py",
        "        if time.monotonic() > deadline:\n            return f",
        "        if time.monotonic() > deadline:\n            return None and f",
        "check",
    ),
    Fault(
        "the check leaves a directory behind",
        "preflight/run_directory.py",
        "            place.rmdir()\n",
        "            pass\n",
        "check",
    ),
    Fault(
        "a check that fails is no failure",
        "commands/check.py",
        "return 1 if failed else 0",
        "return 0",
        "check",
    ),
    Fault(
        "each process has an experiment of its own",
        "commands/check.py",
        "problems = gathered(problem)",
        "problems = [problem]",
        "check",
    ),
)
