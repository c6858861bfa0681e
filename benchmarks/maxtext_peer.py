"""The training step of Llama 7B as MaxText compiles it for a TPU slice, and as we do.

    python3.12 -m venv maxtext && source maxtext/bin/activate
    pip install 'maxtext[tpu]==0.2.5' && pip install -e .
    python benchmarks/maxtext_peer.py maxtext --topology v5p:4x4x4 --remat full
    python benchmarks/maxtext_peer.py ours --topology v5p:4x4x4 --remat full

MaxText's step is what its ahead-of-time compile (`train_compile`) builds from its own
`llama2-7b`, with our vocabulary; ours is the text-only baseline of the same size. Both have 512
rows of 4,096 positions a step, float32 weights cut over all chips, bfloat16 products, AdamW. One
compiler compiles both, and `planning` reads both programs. Attention's kernels are counted on rows
of one document each, in blocks of 512, as both have them. Settings of MaxText's can be given by
name: `sa_use_fused_bwd_kernel=true`.
"""

import argparse
import importlib.metadata
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from transfusion_jax.config import MeshConfig, llama
from transfusion_jax.model.attention.platforms import DEFAULT_BLOCK
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.planning.plan import KERNEL_FLOPS, abstract_batch, asked_for
from transfusion_jax.planning.program import read_program
from transfusion_jax.planning.topology import find_topology
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step

ROWS, LENGTH = 512, 4096
TOPOLOGIES = {"v5p:4x4x4": "v5p-128", "v5e:16x16": "v5e-256"}
"""Our names for slices, and MaxText's."""
SPLASH = {"fwd": 4, "dq": 6, "dkv": 8}
"""As `KERNEL_FLOPS`, by a part of the name of MaxText's kernel. Its fused backward pass has one
kernel, dkv, with the products of dq as well."""
FUSED = 10
GIB = 1 << 30


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("whose", choices=("maxtext", "ours"))
    parser.add_argument("--topology", choices=TOPOLOGIES, default="v5p:4x4x4")
    parser.add_argument("--remat", default="full", help="a policy, as its owner calls it")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--text", type=Path, help="where to leave the compiled program")
    return parser.parse_known_args()


def maxtext(args: argparse.Namespace, chips: int, settings: list[str]) -> Any:
    """MaxText's step, by its own program up to where that would compile."""
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train_compile

    found = {}

    def lower(step, inputs, named, mesh, into, out, static, donated, config, rules):
        with jax.set_mesh(mesh), rules:
            jitted = jax.jit(
                step,
                in_shardings=into,
                out_shardings=out,
                static_argnums=static,
                donate_argnums=donated,
            )
            found["lowered"] = jitted.lower(*inputs, **named)
        raise StopIteration

    train_compile.jit_and_compile = lower
    base = Path(pyconfig.__file__).parent / "base.yml"
    try:
        train_compile.main(
            [
                "train_compile",
                str(base),
                f"compile_topology={TOPOLOGIES[args.topology]}",
                "compile_topology_num_slices=1",
                "model_name=llama2-7b",
                "override_model_config=true",
                "vocab_size=32128",
                f"base_num_decoder_layers={args.layers}",
                f"max_target_length={LENGTH}",
                f"per_device_batch_size={ROWS / chips / args.microbatches}",
                f"gradient_accumulation_steps={args.microbatches}",
                f"remat_policy={args.remat}",
                "enable_checkpointing=false",
                "jax_cache_dir=",
                *settings,
            ]
        )
    except StopIteration:
        return found["lowered"]
    raise RuntimeError("train_compile did not come to its compilation")


def ours(args: argparse.Namespace) -> Any:
    topology = find_topology(args.topology)
    base = llama("7B")
    experiment = replace(
        base,
        model=replace(base.model, remat=args.remat, layers=args.layers),
        train=replace(base.train, accumulation=args.microbatches),
        mesh=MeshConfig(data=1, fsdp=-1),
        data=replace(base.data, batch_rows=ROWS, row_length=LENGTH),
    )
    mesh = make_mesh(experiment.mesh, list(topology.devices))
    planned = blueprint(experiment, mesh)
    with jax.set_mesh(mesh):
        return compiled_step(planned).lower(
            planned.abstract, abstract_batch(planned.experiment, mesh)
        )


def kernel_flops(name: str, others: Iterable[str]) -> int:
    if name in KERNEL_FLOPS:
        return KERNEL_FLOPS[name]
    part = next(part for part in SPLASH if part in name)
    fused = part == "dkv" and not any("dq" in other for other in others)
    return FUSED if fused else SPLASH[part]


def read(compiled: Any, chips: int, microbatches: int) -> dict[str, Any]:
    """The figures of a compiled step."""
    said = compiled.memory_analysis()
    program = read_program(compiled.as_text())
    blocks = LENGTH // (block := DEFAULT_BLOCK["pallas"])
    pairs = blocks * (blocks + 1) // 2 * block**2 * ROWS / microbatches
    width = llama("7B").model.width
    kernels = sum(
        kernel_flops(name, program.kernels) * n * width * pairs
        for name, n in program.kernels.items()
    )
    sent = defaultdict(float)
    for collective in program.collectives:
        sent[collective.kind] += collective.bytes_sent * collective.times / GIB
    return {
        "arguments_gib": said.argument_size_in_bytes / GIB,
        "temporaries_gib": said.temp_size_in_bytes / GIB,
        "results_gib": (said.output_size_in_bytes - said.alias_size_in_bytes) / GIB,
        "program_gib": said.generated_code_size_in_bytes / GIB,
        "product_flops": program.flops * chips,
        "attention_flops": kernels,
        "hbm_gib": program.hbm_bytes / GIB,
        "sent_gib": dict(sorted(sent.items())),
        "sent_in_all_gib": sum(sent.values()),
        "kernels": program.kernels,
        "cost_analysis_flops": (compiled.cost_analysis() or {}).get("flops"),
    }


def main() -> int:
    args, settings = arguments()
    jax.config.update("jax_platforms", "cpu")
    chips = len(find_topology(args.topology).devices)
    lowering = time.perf_counter()
    lowered = maxtext(args, chips, settings) if args.whose == "maxtext" else ours(args)
    begin, cpu = time.perf_counter(), time.process_time()
    answer = {
        **{name: value for name, value in vars(args).items() if name != "text"},
        "settings": settings,
        **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "lower_seconds": begin - lowering,
    }
    try:
        compiled = lowered.compile()
        answer["compile_seconds"] = time.perf_counter() - begin
        answer["compile_cpu_seconds"] = time.process_time() - cpu
        if args.text:
            args.text.write_text(compiled.as_text())
        answer |= read(compiled, chips, args.microbatches)
    except jax.errors.JaxRuntimeError as error:
        answer["does_not_fit_gib"] = asked_for(str(error), 0) / GIB
    print(json.dumps(answer, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
