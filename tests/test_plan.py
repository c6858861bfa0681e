"""Plans for TPUs: compiled where libtpu is at hand. `python tests/test_plan.py` writes the golden files anew."""

import functools
import importlib.util
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from transfusion_jax.cli import load_experiment, main
from transfusion_jax.config import TABLE_2, DataConfig, Experiment, MeshConfig, ModelConfig
from transfusion_jax.data.packing import pack
from transfusion_jax.model.attention import Intervals
from transfusion_jax.model.transfusion import abstract_model
from transfusion_jax.parallel.rules import parameter_shardings
from transfusion_jax.planning import topology as topology_lib
from transfusion_jax.planning.plan import make_plan
from transfusion_jax.planning.program import read_program
from transfusion_jax.planning.rows import model_flops, row_work, sample_rows
from transfusion_jax.planning.search import parts_of, remedies, search
from transfusion_jax.planning.topology import CHIPS, find_topology, larger

ROOT, GOLDEN = Path(__file__).parent.parent, Path(__file__).parent / "golden"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu (pip install '.[tpu]')"
)


def paper_experiment(size: str) -> Experiment:
    return runpy.run_path(str(ROOT / f"experiments/transfusion_{size.replace('.', '_').lower()}.py"))["config"]()


SMALL = """
from transfusion_jax.config import DataConfig, Experiment, MeshConfig, ModelConfig, TrainConfig

def config():
    return Experiment(
        "small",
        model=ModelConfig(layers=3, width=256, heads=4, vocab_size=512),
        data=DataConfig(row_length=1024, batch_rows=8),
        train=TrainConfig(vocab_chunk=256),
        mesh=MeshConfig(data=1, fsdp=-1, topology="v5e:2x2"),
    )
"""


@pytest.fixture
def small(tmp_path) -> str:
    (tmp_path / "small.py").write_text(SMALL)
    return str(tmp_path / "small.py")


def refused(capsys, *arguments: str) -> str:
    assert main(("plan", *arguments)) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3", "v5p:4x4", "v5p:4x4x5", "v5p:0x4x4", "v5p", "nonsense"])
def test_unknown_topologies_are_refused_with_those_known(capsys, small, name):
    line = refused(capsys, small, "--topology", name)
    assert name in line and all(kind in line for kind in CHIPS) and "16x16" in line


def test_bad_input_is_one_line(capsys, small, tmp_path, monkeypatch):
    assert "there is no directory" in refused(capsys, small, "--json", str(tmp_path / "nowhere" / "plan.json"))
    assert "perhaps you meant --model.width" in refused(capsys, small, "--model.widht", "3")
    assert "--slices 0 must be at least 1" in refused(capsys, small, "--slices", "0")
    assert "name a topology" in refused(capsys, small, "--mesh.topology", "")
    monkeypatch.setattr(topology_lib.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'transfusion-jax[tpu]'" in refused(capsys, small)


@needs_libtpu
def test_meshes_and_batches_that_do_not_fit_are_refused(capsys, small):
    assert "mesh.fsdp=3, mesh.sequence=1, mesh.tensor=1 do not fit the 4 devices" in refused(
        capsys, small, "--mesh.fsdp", "3"
    )
    assert "data.batch_rows=6 is not divisible by the 4 shards" in refused(capsys, small, "--data.batch-rows", "6")
    line = refused(capsys, small, "--train.accumulation", "4")
    assert "data.batch_rows=8 is not divisible by the 4 shards" in line and "train.accumulation=4" in line
    assert "data=1 is not divisible by the 2 slices" in refused(capsys, small, "--slices", "2", "--mesh.data", "1")
    line = refused(capsys, small, "--mesh.fsdp", "1", "--mesh.sequence", "4", "--data.row-length", "1022")
    assert "mesh.sequence * mesh.tensor = 4 must divide data.row_length=1022" in line


def test_the_next_topology_has_at_least_twice_the_chips():
    assert [larger(name) for name in ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x1", "v5p:2x4x4", "v5p:4x4x12")] == [
        "v5e:2x4", "v5e:4x8", None, "v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8",
    ]  # fmt: skip


def test_batches_are_parted_by_doubling():
    experiment = Experiment("x", data=DataConfig(batch_rows=48))
    assert parts_of(experiment, {"data": 2, "fsdp": 2}) == [1, 2, 4]


def test_work_of_rows_is_counted_from_their_intervals():
    """Two rows of 8 in blocks of 4: one causal, one of two documents with padding."""
    start = jnp.asarray([[0] * 8, [0, 0, 0, 3, 3, 0, 0, 0]], jnp.int32)
    end = jnp.asarray([range(1, 9), [1, 2, 3, 4, 5, 0, 0, 0]], jnp.int32)
    work = row_work(Intervals(start, end), 0.5, 4)
    assert (work.pairs, work.visited_blocks, work.visited_pairs) == ((36 + 9) / 2, 6 / 4, 3 * 16)
    assert row_work(Intervals(start, end), 0.5, 0).visited_pairs == 64


def test_model_flops_are_those_of_the_products_with_parameters():
    """Against the products of the compiled forward pass, whose attention is a full square here."""
    experiment = Experiment(
        "small", model=ModelConfig(layers=1, width=64, heads=2, mlp_width=192, vocab_size=384, compute_dtype="float32",
        attention="dense"), data=DataConfig(row_length=512, batch_rows=2),
    )  # fmt: skip
    graph, parameters = abstract_model(experiment)
    parameters = nnx.to_pure_dict(parameters)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), pack([], 512, experiment.image))

    def forward(parameters, batch):
        model = nnx.merge(graph, parameters)
        hidden, predicted = model(batch, batch.latents_BMhwc, batch.image_limit_BM)
        return model.logits(hidden), predicted

    program = read_program(jax.jit(forward).lower(parameters, batch).compile().as_text())
    square = Intervals(jnp.zeros((2, 512), jnp.int32), jnp.full((2, 512), 512, jnp.int32))
    # The slots are computed whether they hold an image or not.
    ours = model_flops(parameters, experiment, row_work(square, float(experiment.image_slots), 0))
    assert ours / 3 == pytest.approx(program.flops, rel=1e-3)


@needs_libtpu
def test_plan_of_a_small_experiment(capsys, small, tmp_path):
    path = tmp_path / "plan.json"
    assert main(("plan", small, "--json", str(path))) == 0
    said, plan = capsys.readouterr().out, json.loads(path.read_text())
    assert "fits" in said and "embed over fsdp" in said
    assert plan["fits"] and plan["chips"] == 4 and plan["topology"] == "v5e:2x2"
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 1}
    memory = plan["bytes_per_chip"]
    assert 0 < memory["arguments"] + memory["temporaries"] <= memory["peak"] < memory["memory"] == 15.75 * 2**30
    # float32 parameters, average and two moments, cut in four; heads of 64 are padded to the 128 lanes.
    assert 1 < memory["arguments"] / (16 * plan["parameters"] / 4) < 1.5
    # Layers and the vocabulary's chunks are computed twice forward; blocks hold more pairs than are seen.
    ratio = plan["hardware_flops_per_step"] / plan["model_flops_per_step"]
    assert 4 / 3 < ratio < 2
    assert set(plan["collective_bytes"]) & {"all-gather", "all-reduce", "collective-permute"}
    assert plan["roofline_step_seconds"] == max(plan["roofline_seconds"].values())
    peak = plan["model_flops_per_step"] / (4 * 197e12 * plan["roofline_step_seconds"])
    assert plan["roofline_mfu"] == pytest.approx(peak) and 0 < peak < 1
    assert plan["compile_seconds"] > 0


# All scores of 64 rows a chip are 16 GiB for a layer.
TOO_MUCH = (
    "--data.batch-rows",
    "256",
    "--data.row-length",
    "4096",
    "--model.layers",
    "1",
    "--model.attention",
    "dense",
)


@needs_libtpu
def test_what_the_compiler_refuses_does_not_fit(small):
    experiment = load_experiment(small, TOO_MUCH)
    plan = make_plan(experiment, find_topology("v5e:2x2"), *sample_rows(experiment)[:2])
    assert not plan.fits and plan.memory.peak > plan.memory.memory
    assert plan.memory.peak == plan.memory.arguments + plan.memory.temporaries
    said = plan.json()
    assert said["hardware_flops_per_step"] is None and said["model_flops_per_step"] > 0
    assert json.loads(json.dumps(said)) == said


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would(capsys, small, tmp_path):
    path = tmp_path / "plan.json"
    assert main(("plan", small, "--json", str(path), *TOO_MUCH)) == 1
    said, plan = capsys.readouterr().out, json.loads(path.read_text())
    assert "does not fit" in said and not plan["fits"]
    assert [remedy["change"].split()[0] for remedy in plan["remedies"]] == ["--train.accumulation", "--topology"]
    assert all(remedy["fits"] and remedy["change"] in said for remedy in plan["remedies"])


def test_search_keeps_the_batch_and_ranks_by_time():
    """With a planner that knows that tensor=2, remat attention and two parts are best."""

    class Fake:
        def __init__(self, experiment):
            self.experiment, self.fits, self.memory = experiment, experiment.mesh.tensor != 8, None
            time = abs(experiment.mesh.tensor - 2) + (experiment.model.remat != "attention")
            self.step_seconds = 1 + time + abs(experiment.train.accumulation - 2)

    model = ModelConfig(heads=16, width=256)
    experiment = Experiment("x", data=DataConfig(batch_rows=64), model=model, mesh=MeshConfig(1, 16))
    found = list(search(lambda e, t: Fake(e), experiment, topology_of(16)))
    best = min((plan for plan in found if plan.fits), key=lambda plan: plan.step_seconds).experiment
    assert (best.mesh.tensor, best.model.remat, best.train.accumulation) == (2, "attention", 2)
    assert all(plan.experiment.data == experiment.data for plan in found)
    assert len({plan.experiment for plan in found}) == len(found)


def topology_of(count: int):
    return topology_lib.Topology("v5e:4x4", 1, CHIPS["v5e"], tuple(range(count)))


def test_remedies_are_tried_one_by_one():
    class Fake:
        def __init__(self, experiment, topology):
            self.experiment, self.topology, self.mesh = experiment, topology, experiment.mesh.axes
            self.fits = experiment.model.remat == "offload" or experiment.train.accumulation >= 4

    failed = Fake(Experiment("x", data=DataConfig(batch_rows=64), mesh=MeshConfig(1, 16)), topology_of(16))
    tried = functools.partial(map, lambda found: found[0])
    none = replace(failed.topology, name="v5e:16x16")  # there is no larger one
    failed.topology = none
    assert list(tried(remedies(Fake, failed))) == ["--model.remat offload", "--train.accumulation 4"]


def shardings(size: str) -> dict:
    """Mesh axes of every parameter of a size, on the mesh of its experiment file, and what a device holds of it."""
    experiment = paper_experiment(size)
    count = np.prod([int(n) for n in experiment.mesh.topology.partition(":")[2].split("x")])
    axes = {k: int(count) if n == -1 else n for k, n in experiment.mesh.axes.items()}
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    _, parameters = abstract_model(experiment)
    placed = jax.tree.leaves_with_path(parameter_shardings(parameters, mesh))
    shapes = jax.tree.leaves(nnx.to_pure_dict(parameters))
    rows = {
        ".".join(key.key for key in path): f"{x.shape} cut {tuple(s.spec)} to {s.shard_shape(x.shape)}"
        for (path, s), x in zip(placed, shapes, strict=True)
    }
    return {"topology": experiment.mesh.topology, "mesh": axes, "parameters": rows}


@pytest.mark.parametrize("size", TABLE_2)
def test_every_parameter_is_where_it_should_be(size):
    assert shardings(size) == json.loads((GOLDEN / "shardings.json").read_text())[size]


def collectives(size: str) -> dict:
    experiment = paper_experiment(size)
    intervals, images, _ = sample_rows(experiment)
    plan = make_plan(experiment, find_topology(experiment.mesh.topology), intervals, images)
    return {"fits": plan.fits, "kinds": sorted(plan.costs.collective_bytes)}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("size", TABLE_2)
def test_the_papers_sizes_fit_and_use_the_collectives_that_they_should(size):
    assert collectives(size) == {"fits": True, "kinds": json.loads((GOLDEN / "collectives.json").read_text())[size]}


if __name__ == "__main__":
    (GOLDEN / "shardings.json").write_text(json.dumps({size: shardings(size) for size in TABLE_2}, indent=1) + "\n")
    if "--collectives" in sys.argv:
        kinds = {size: collectives(size)["kinds"] for size in TABLE_2}
        (GOLDEN / "collectives.json").write_text(json.dumps(kinds, indent=1) + "\n")
