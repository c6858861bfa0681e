"""Plans in words: one plan as a page, several as a ranked table."""

from transfusion_jax.parallel.rules import RULES, mesh_axes
from transfusion_jax.planning.plan import Plan


def page(plan: Plan) -> str:
    """Everything about one plan."""
    memory = plan.memory
    experiment = plan.experiment
    microbatches = experiment.train.accumulation
    cut = {
        axis: [m for m in plan.mesh if plan.mesh[m] > 1 and m in mesh_axes(axis)] for axis in RULES
    }
    axes = "; ".join(f"{axis} over {' and '.join(over)}" for axis, over in cut.items() if over)
    whole = ", ".join(f"{name} ({size(taken)})" for name, taken in plan.unsharded.items())
    lines = {
        "verdict": "fits" if plan.fits else "does not fit",
        "memory": f"{size(memory.peak)} of {size(memory.memory)} a chip: "
        f"arguments {size(memory.arguments)}, temporaries {size(memory.temporaries)}"
        + (f"; host {size(memory.host)}" if memory.host else ""),
        "chips": f"{plan.topology.chips} in {plan.topology.slices} "
        f"slice{'s' * (plan.topology.slices > 1)} of {plan.topology.name}",
        "mesh": _mesh(plan),
        "axes": axes or "none is sharded",
        "replicated": whole or "nothing",
        "parameters": f"{plan.parameters:,}"
        + (f", {plan.trained:,} of them trained" if plan.trained < plan.parameters else ""),
        "step": f"{experiment.data.batch_rows} rows of {experiment.data.row_length} positions"
        + (f" in {microbatches} microbatches" if microbatches > 1 else "")
        + f"; remat {experiment.model.remat}, attention {experiment.model.attention}",
        "model": f"{plan.model_flops:.3e} FLOPs a step; attention counted on {plan.rows}",
    }
    if plan.costs:
        lines |= _costs(plan)
    lines["compiled"] = f"in {plan.compile_seconds:.0f} s"
    return "\n".join(
        [f"{experiment.name} on {plan.topology.name}", *(f"  {k:12}{v}" for k, v in lines.items())]
    )


def _costs(plan: Plan) -> dict[str, str]:
    """The lines about what a step costs."""
    costs = plan.costs
    data = plan.experiment.data
    kinds = ", ".join(
        f"{kind} {size(sent)}" for kind, sent in sorted(costs.collective_bytes.items())
    )
    seconds = ", ".join(f"{what} {time:.4g}" for what, time in costs.seconds.items())
    tokens = data.batch_rows * data.row_length / plan.step_seconds
    return {
        "hardware": f"{costs.hardware_flops:.3e} FLOPs a step "
        f"({costs.hardware_flops / plan.model_flops:.2f} x)",
        "collectives": f"sent by a chip in a step: {kinds or 'nothing'}",
        "roofline": f"{plan.step_seconds:.4g} s a step at best ({seconds}): "
        f"{plan.mfu:.1%} of peak, {tokens:,.0f} tokens/s",
    }


def table(plans: list[Plan]) -> str:
    """The plans, best first."""
    lines = [
        f"{'mesh':44}{'remat':11}{'micro':>5}{'a chip':>12}{'s a step':>10}{'of peak':>9}  bound by"
    ]
    for plan in ranked(plans):
        experiment = plan.experiment
        row = f"{_mesh(plan):43} {experiment.model.remat:11}{experiment.train.accumulation:5}"
        row += f"{size(plan.memory.peak):>12}"
        if plan.fits:
            lines.append(row + f"{plan.step_seconds:10.4g}{plan.mfu:9.1%}  {plan.bound}")
        else:
            lines.append(row + "  does not fit")
    return "\n".join(lines)


def ranked(plans: list[Plan]) -> list[Plan]:
    """Those that fit by time, of equals the one with less to do; then the others by memory."""

    def rank(plan: Plan) -> tuple:
        if not plan.fits:
            return (True, plan.memory.peak)
        return (False, plan.step_seconds, sum(plan.costs.seconds.values()))

    return sorted(plans, key=rank)


def _mesh(plan: Plan) -> str:
    return (
        ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    )


def size(count: float) -> str:
    """A number of bytes, in a fitting unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
