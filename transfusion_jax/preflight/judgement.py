"""The checks: each a pure function of the facts of all processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transfusion_jax.planning.describe import size
from transfusion_jax.preflight.facts import Facts

SKEW = 5.0
"""Seconds that the clocks of two hosts may differ by: logs are compared by time, and storage
refuses requests signed in the past or the future."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    ok: bool
    text: str
    """One line: what was found, or the problem."""
    passes: bool = False
    """Whether the problem may pass by itself: storage fails, or is full, under a run that is
    there."""


@dataclass(frozen=True)
class Asked:
    """What the checks need to know of the experiment."""

    keep_checkpoints: int
    plan: str
    """The command line that plans the memory of a step."""


def judge(facts: Sequence[Facts], asked: Asked) -> list[Finding]:
    """All checks, in the order in which problems are best mended."""
    return [
        experiments(facts),
        versions(facts),
        devices(facts),
        mesh(facts),
        memory(facts, asked),
        data(facts),
        directory(facts),
        space(facts, asked),
        clocks(facts),
    ]


def experiments(facts: Sequence[Facts]) -> Finding:
    """All processes have the same resolved config."""
    if found := _different(facts, lambda fact: fact.experiment[:8]):
        return Finding("experiment", False, f"differs between hosts: {found}")
    return Finding("experiment", True, f"the same in {_count(len(facts), 'process')}")


def versions(facts: Sequence[Facts]) -> Finding:
    """All processes run the same code on the same libraries."""
    names = dict.fromkeys(name for fact in facts for name in fact.versions)
    problems = []
    for name in names:

        def version(fact: Facts, name: str = name) -> str:
            return fact.versions.get(name, "not installed")

        if version(facts[0]) == "not installed":
            problems.append(f"{name} is not installed on {_who(facts[0])}")
        elif found := _different(facts, version):
            problems.append(f"{name} differs: {found}")
    if problems:
        return Finding("versions", False, "; ".join(problems))
    shown = ", ".join(f"{name} {version}" for name, version in facts[0].versions.items())
    return Finding("versions", True, shown)


def devices(facts: Sequence[Facts]) -> Finding:
    """All processes have devices of one kind, and as many of them."""
    if found := _different(facts, lambda fact: f"{fact.devices} {fact.kind}"):
        return Finding("devices", False, f"differ between processes: {found}")
    total = sum(fact.devices for fact in facts)
    where = _count(len({fact.host for fact in facts}), "host")
    found = f"{total} {facts[0].kind} in {_count(len(facts), 'process')} on {where}"
    return Finding("devices", True, found)


def mesh(facts: Sequence[Facts]) -> Finding:
    """The mesh suits the devices, the rows and the model."""
    if problems := _problems(facts, lambda fact: fact.needs.problem):
        return Finding("mesh", False, problems)
    return Finding("mesh", True, facts[0].needs.mesh)


def memory(facts: Sequence[Facts], asked: Asked) -> Finding:
    """The state alone fits the smallest device."""
    if any(fact.needs.problem for fact in facts):
        return Finding("memory", False, "not known while the mesh does not fit")
    state = max(fact.needs.state for fact in facts)
    limits = [fact.memory for fact in facts if fact.memory is not None]
    if not limits:
        return Finding("memory", True, f"state {size(state)} a device, which does not say its size")
    found = f"state {size(state)} of {size(min(limits))} a device"
    if state > min(limits):
        return Finding("memory", False, f"{found}: cut it further over fsdp or tensor")
    return Finding("memory", True, f"{found}; for activations as well: {asked.plan}")


def data(facts: Sequence[Facts]) -> Finding:
    """Every process reads every source, and all read the same one."""
    found = []
    for name in dict.fromkeys(name for fact in facts for name in fact.data):

        def known(fact: Facts, name: str = name) -> dict[str, str]:
            return fact.data.get(name, {"digest": "absent"})

        if problems := _problems(facts, lambda fact, known=known: known(fact).get("problem")):
            found.append(problems)
        elif other := _different(facts, lambda fact, known=known: known(fact)["digest"][:8]):
            found.append(f"{name} differs between hosts: {other}")
    if found:
        return Finding("data", False, "; ".join(found))
    return Finding("data", True, ", ".join(facts[0].data))


def directory(facts: Sequence[Facts]) -> Finding:
    """Every process writes to the run directory, and it is one directory."""
    if problems := _problems(facts, lambda fact: fact.directory):
        passes = all(fact.passes for fact in facts if fact.directory)
        return Finding("run directory", False, problems, passes)
    return Finding("run directory", True, "every process can write to it")


def space(facts: Sequence[Facts], asked: Asked) -> Finding:
    """There is room for the checkpoints that are kept, and one more while it is written."""
    leader = facts[0]
    if leader.needs.problem:
        return Finding("space", False, "not known while the mesh does not fit")
    if leader.free is None:
        unknown = "not known while the run directory cannot be read"
        return Finding("space", False, unknown, leader.passes)
    count = asked.keep_checkpoints + 1
    total = count * leader.needs.checkpoint
    kept = f"{count} checkpoints of {size(leader.needs.checkpoint)}"
    if total - leader.held > leader.free:
        there = f" beside the {size(leader.held)} there" if leader.held else ""
        text = f"{kept} do not fit into {size(leader.free)} free{there}"
        return Finding("space", False, text, passes=leader.held > 0)
    return Finding("space", True, f"{size(leader.free)} free for {kept}")


def clocks(facts: Sequence[Facts]) -> Finding:
    """The clocks of all hosts agree."""
    early = min(facts, key=lambda fact: fact.clock)
    late = max(facts, key=lambda fact: fact.clock)
    skew = late.clock - early.clock
    if skew > SKEW:
        text = f"{_who(late)} is {skew:.1f} s ahead of {_who(early)}; at most {SKEW:g} s will do"
        return Finding("clocks", False, text)
    return Finding("clocks", True, f"within {skew:.1f} s" if len(facts) > 1 else "one host")


def table(findings: Iterable[Finding]) -> str:
    """The findings, one line each."""
    return "\n".join(
        f"  {'ok' if finding.ok else 'FAILS':6}{finding.check:14}{' '.join(finding.text.split())}"
        for finding in findings
    )


def _different(facts: Sequence[Facts], value: Callable[[Facts], str]) -> str:
    """Which processes have which value, if they have different ones; else empty."""
    groups: dict[str, list[Facts]] = {}
    for fact in facts:
        groups.setdefault(value(fact), []).append(fact)
    return "" if len(groups) == 1 else ", ".join(f"{v} on {_all(who)}" for v, who in groups.items())


def _problems(facts: Sequence[Facts], problem: Callable[[Facts], str | None]) -> str:
    """The problems of all processes, each with those that have it; empty if there are none."""
    groups: dict[str, list[Facts]] = {}
    for fact in facts:
        if said := problem(fact):
            groups.setdefault(said, []).append(fact)
    if len(facts) == 1:
        return "; ".join(groups)
    return "; ".join(f"{said} (on {_all(who)})" for said, who in groups.items())


def _all(facts: Sequence[Facts]) -> str:
    """Processes by name, the first few of many."""
    named = ", ".join(_who(fact) for fact in facts[:3])
    return named + (f" and {len(facts) - 3} more" if len(facts) > 3 else "")


def _who(fact: Facts) -> str:
    return f"process {fact.process} ({fact.host})"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
