"""Plans for TPUs: compiled where libtpu is at hand. `python tests/test_plan.py` writes the golden
files anew."""

import functools
import importlib.util
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import packings
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from transfusion_jax.commands.experiments import load_experiment
from transfusion_jax.commands.main import main
from transfusion_jax.config import (
    TABLE_2,
    DataConfig,
    Experiment,
    ImageConfig,
    MeshConfig,
    ModelConfig,
)
from transfusion_jax.data.packing import pack
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.build import abstract_model
from transfusion_jax.model.work import Work, model_flops
from transfusion_jax.parallel.chips import CHIPS
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import parameter_shardings
from transfusion_jax.planning import cache
from transfusion_jax.planning import topology as topology_lib
from transfusion_jax.planning.describe import ranked
from transfusion_jax.planning.plan import Memory, Plan, asked_for, make_plan, used_chunks
from transfusion_jax.planning.program import read_program
from transfusion_jax.planning.rows import Rows, row_work, rows_of, sample_rows
from transfusion_jax.planning.search import POLICIES, microbatch_counts, remedies, search
from transfusion_jax.planning.topology import find_topology, larger, rings

ROOT, GOLDEN = Path(__file__).parent.parent, Path(__file__).parent / "golden"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPU needs libtpu (pip install '.[tpu]')",
)


def paper_experiment(size: str) -> Experiment:
    return runpy.run_path(
        str(ROOT / f"experiments/transfusion_{size.replace('.', '_').lower()}.py")
    )["config"]()


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


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5e:3x3", "v5p:4x4", "v5p:4x4x5", "v5p:0x4x4", "v5p", "nonsense"]
)
def test_unknown_topologies_are_refused_with_those_known(capsys, small, name):
    line = refused(capsys, small, "--topology", name)
    assert name in line and all(kind in line for kind in CHIPS) and "16x16" in line


def test_bad_input_is_one_line(capsys, small, tmp_path, monkeypatch):
    for path in (tmp_path / "nowhere" / "plan.json", tmp_path):
        assert f"--json {path}" in refused(capsys, small, "--json", str(path))
    assert "perhaps you meant --model.width" in refused(capsys, small, "--model.widht", "3")
    assert "--slices 0 must be at least 1" in refused(capsys, small, "--slices", "0")
    assert "name a topology" in refused(capsys, small, "--mesh.topology", "")
    monkeypatch.setattr(topology_lib.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'transfusion-jax[tpu]'" in refused(capsys, small)


@needs_libtpu
def test_sums_over_devices_stay_in_the_loop_over_microbatches(small, tmp_path):
    """Behind the loop, XLA for TPU has given wrong gradients of embeddings: it moves the sum of
    their gradient and of the output projection's there, 8 % of these bytes."""
    sent = []
    for parts in ("1", "2"):
        file = tmp_path / f"{parts}.json"
        flags = "--mesh.data 4 --mesh.fsdp 1 --data.batch-rows 16 --data.row-length 512".split()
        flags += ["--train.vocab-chunk", "512", "--train.accumulation", parts]
        assert main(["plan", small, *flags, "--json", str(file)]) == 0
        sent.append(json.loads(file.read_text())["collective_bytes"]["all-reduce"])
    assert sent[1] == pytest.approx(2 * sent[0], rel=0.001)


@needs_libtpu
def test_meshes_and_batches_that_do_not_fit_are_refused(capsys, small):
    assert "mesh.fsdp=3, mesh.sequence=1, mesh.tensor=1 do not fit the 4 devices" in refused(
        capsys, small, "--mesh.fsdp", "3"
    )
    assert "data.batch_rows=6 is not divisible by the 4 shards" in refused(
        capsys, small, "--data.batch-rows", "6"
    )
    line = refused(capsys, small, "--train.accumulation", "4")
    assert (
        "data.batch_rows=8 is not divisible by the 4 shards" in line
        and "train.accumulation=4" in line
    )
    assert "data=1 is not divisible by the 2 slices" in refused(
        capsys, small, "--slices", "2", "--mesh.data", "1"
    )
    line = refused(
        capsys, small, "--mesh.fsdp", "1", "--mesh.sequence", "4", "--data.row-length", "1022"
    )
    assert "mesh.sequence * mesh.tensor = 4 must divide data.row_length=1022" in line


@needs_libtpu
@pytest.mark.parametrize("kind", CHIPS)
def test_every_kind_of_chip_makes_a_mesh(kind):
    for layout in ("2x2", "4x4") if CHIPS[kind].torus == 2 else ("2x2x1", "4x4x4"):
        topology = find_topology(f"{kind}:{layout}")
        assert topology.chips == np.prod([int(n) for n in layout.split("x")])
        assert topology.devices_per_chip == (2 if kind == "tpu7x" else 1)
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2), list(topology.devices))
        assert mesh.shape["fsdp"] * 2 == len(topology.devices)


@pytest.mark.parametrize(
    "name, closed",
    [("v5p:4x4x8", "111"), ("v5p:2x4x4", "000"), ("v5e:8x16", "010"), ("v6e:16x16", "110")],
)
def test_dimensions_that_are_rings(name, closed):
    kind, layout = name.split(":")
    assert rings(layout, CHIPS[kind]) == tuple(flag == "1" for flag in closed)


@needs_libtpu
def test_links_of_a_group_are_those_along_its_axes():
    """A dimension of 4 is a ring on v5p and a line on v5e; a group uses the dimensions in which its
    members differ."""
    ring, line = find_topology("v5p:4x4x4"), find_topology("v5e:4x4")
    assert ring.link_bandwidth(range(64), ring.devices) == 6 * 100e9
    along = [i for i, device in enumerate(ring.devices) if tuple(device.coords[1:]) == (0, 0)]
    assert len(along) == 4 and ring.link_bandwidth(along, ring.devices) == 2 * 100e9
    assert ring.link_bandwidth(along[:2], ring.devices) == 100e9
    small = find_topology("v5p:2x2x4")
    assert small.link_bandwidth(range(16), small.devices) == 3 * 100e9
    assert line.link_bandwidth(range(16), line.devices) == 2 * 50e9


def test_what_is_refused_for_another_memory_is_not_a_verdict_on_hbm():
    assert (
        asked_for("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", 1)
        == 20 * 2**30
    )
    assert (
        asked_for("the total memory required for HLO temporaries (2.00M) exceeds", 5) == 5 + 2**21
    )
    with pytest.raises(ValueError, match="for another reason than HBM"):
        asked_for("Ran out of memory in memory space vmem. Used 24.00M of 16.00M vmem.", 1)


def test_the_next_topology_has_at_least_twice_the_chips():
    assert [
        larger(name)
        for name in ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x1", "v5p:2x4x4", "v5p:4x4x12")
    ] == [
        "v5e:2x4",
        "v5e:4x8",
        None,
        "v5p:2x2x2",
        "v5p:4x4x4",
        "v5p:8x8x8",
    ]


def test_batches_are_parted_in_every_way_that_gives_a_device_whole_rows():
    experiment = Experiment("x", data=DataConfig(batch_rows=48))
    assert microbatch_counts(experiment, {"data": 2, "fsdp": 2}) == [1, 2, 3, 4, 6, 12]


def test_work_of_rows_is_counted_from_their_intervals():
    """Two rows of 8 in blocks of 4: one causal, one of two documents with padding."""
    start = jnp.asarray([[0] * 8, [0, 0, 0, 3, 3, 0, 0, 0]], jnp.int32)
    end = jnp.asarray([range(1, 9), [1, 2, 3, 4, 5, 0, 0, 0]], jnp.int32)
    rows = Rows(Intervals(start, end), 0.5, 3.0, "by hand")
    work = row_work(rows, 4)
    # The first block of queries sees one block of keys in either row, the second sees two.
    assert (work.pairs, work.loop_blocks, work.computed_pairs) == ((36 + 9) / 2, 3 / 2, 3 * 16)
    assert row_work(rows, 0).computed_pairs == 64


@pytest.mark.parametrize(
    ("image", "targets", "share"),
    [
        (ImageConfig(), 1024, 2 / 8),
        (ImageConfig(), 1025, 3 / 8),
        (ImageConfig(height=16, width=16, channels=1, patch=1, codes=8), 1024, 4 / 8),
    ],
    ids=["text", "a chunk more", "codes"],
)
def test_logits_are_planned_for_chunks_that_hold_targets(image, targets, share):
    """Rows of 4,096 in chunks of 512, and four images of 256 patches in each."""
    tokens = dict(family="chameleon", image_attention="causal") if image.codes else {}
    model = ModelConfig(**tokens)
    experiment = Experiment("x", model=model, image=image, data=DataConfig(row_length=4096))
    assert used_chunks(experiment, Work(images=4, targets=targets, pairs=0)) == share


def test_rows_that_a_device_has_together_walk_over_the_blocks_between():
    """One sees the first block of three, the other the last, so chunked attention walks over all of
    them for both."""
    start = jnp.asarray([[0] * 6, [4] * 6], jnp.int32)
    rows = Rows(Intervals(start, start + 1), 0.0, 0.0, "by hand")
    assert (row_work(rows, 2, 1).loop_blocks, row_work(rows, 2, 2).loop_blocks) == (1, 3)
    assert row_work(rows, 2, 2).computed_pairs == 3 * 4


def test_model_flops_are_those_of_the_products_with_parameters():
    """Against the products of the compiled forward pass, whose attention is a full square here."""
    experiment = Experiment(
        "small",
        model=ModelConfig(
            layers=1,
            width=64,
            heads=2,
            mlp_width=192,
            vocab_size=384,
            compute_dtype="float32",
            attention="dense",
        ),
        data=DataConfig(row_length=512, batch_rows=2),
    )
    graph, parameters = abstract_model(experiment)
    parameters = nnx.to_pure_dict(parameters)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), pack([], 512, experiment.image)
    )

    def forward(parameters, batch):
        model = nnx.merge(graph, parameters)
        hidden, predicted = model(batch, batch.latents_BMhwc, batch.image_limit_BM)
        return model.logits(hidden), predicted

    program = read_program(jax.jit(forward).lower(parameters, batch).compile().as_text())
    square = Intervals(jnp.zeros((2, 512), jnp.int32), jnp.full((2, 512), 512, jnp.int32))
    # Logits of every position and patches of every slot are computed here, whatever the rows hold.
    rows = Rows(square, float(experiment.image_slots), 512.0, "by hand")
    ours = model_flops(
        nnx.merge(graph, parameters).multiplications(), experiment, row_work(rows, 0)
    )
    assert ours / 3 == pytest.approx(program.flops, rel=1e-3)


def test_logits_without_a_target_are_no_model_flops():
    """Two rows: of text alone, and of an image, whose patches and padding have no text target."""
    experiment = Experiment(
        "small",
        image=ImageConfig(4, 4, 1, 2),
        model=ModelConfig(layers=1, width=64, heads=2, mlp_width=192, vocab_size=384),
        data=DataConfig(row_length=packings.LENGTH, batch_rows=2),
    )
    model = nnx.merge(*abstract_model(experiment))
    text, image = (
        rows_of(packings.batch([row]), packings.P, "by hand") for row in ("t" * 36, "tItt")
    )
    assert (text.targets, image.targets, text.images, image.images) == (36, 3, 0, 1)
    work = row_work(text, 0)
    fewer = replace(work, targets=image.targets)
    apart = model_flops(model.multiplications(), experiment, work) - model_flops(
        model.multiplications(), experiment, fewer
    )
    assert apart == 2 * 6 * (36 - 3) * 64 * 384
    both = rows_of(packings.batch(["t" * 36, "tItt"]), packings.P, "by hand")
    assert (both.targets, both.images) == ((36 + 3) / 2, 1 / 2)


@needs_libtpu
def test_plan_of_a_small_experiment(capsys, small, tmp_path):
    path = tmp_path / "plan.json"
    assert main(("plan", small, "--json", str(path))) == 0
    said, plan = capsys.readouterr().out, json.loads(path.read_text())
    assert "fits" in said and "embed over fsdp" in said
    assert plan["fits"] and plan["chips"] == 4 and plan["topology"] == "v5e:2x2"
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 1}
    memory = plan["bytes_per_chip"]
    assert (
        0
        < memory["arguments"] + memory["temporaries"]
        <= memory["peak"]
        < memory["memory"]
        == 15.75 * 2**30
    )
    # float32 parameters, average and two moments, cut in four; heads of 64 are padded to the 128
    # lanes.
    assert 1 < memory["arguments"] / (16 * plan["parameters"] / 4) < 1.5
    # Layers and the vocabulary's chunks are computed twice forward; blocks hold more pairs than are
    # seen.
    ratio = plan["hardware_flops_per_step"] / plan["model_flops_per_step"]
    assert 4 / 3 < ratio < 2
    assert set(plan["collective_bytes"]) & {"all-gather", "all-reduce", "collective-permute"}
    # Bound by computing, as 2,048 positions a chip are enough for.
    assert plan["roofline_step_seconds"] == pytest.approx(
        plan["hardware_flops_per_step"] / (4 * 197e12)
    )
    assert plan["roofline_mfu"] == pytest.approx(1 / ratio)
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


@pytest.mark.parametrize(("peak", "fits"), [(100, True), (101, False)])
def test_all_that_a_step_holds_must_fit(peak, fits):
    memory = Memory(arguments=60, temporaries=peak - 60, peak=peak, memory=100)
    assert Plan.fits.fget(SimpleNamespace(costs=object(), memory=memory)) is fits


@needs_libtpu
def test_what_the_compiler_refuses_does_not_fit(small):
    experiment = load_experiment(small, TOO_MUCH)
    plan = make_plan(experiment, find_topology("v5e:2x2"), sample_rows(experiment))
    assert not plan.fits and plan.memory.peak > plan.memory.memory
    assert (
        plan.memory.temporaries > 64 * 4 * 4096**2 * 2
    )  # the scores of a layer, in bfloat16 at least
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
    assert [remedy["change"].split()[0] for remedy in plan["remedies"]] == [
        "--train.accumulation",
        "--topology",
    ]
    assert all(remedy["fits"] and remedy["change"] in said for remedy in plan["remedies"])


class FakePlan:
    """A plan for a chip with 8 rows, each of which takes memory by the policy."""

    ROW = {"none": 12, "minimal": 6, "attention": 4, "full": 3, "offload": 1}
    SECONDS = {"none": 3.0, "minimal": 3.1, "attention": 3.8, "full": 4.0, "offload": 4.0}

    def __init__(self, experiment, topology, memory=24, interconnect=0.0):
        # As in a plan, what "auto" stands for is known.
        self.experiment = replace(experiment, model=replace(experiment.model, attention="pallas"))
        self.mesh, self.topology = experiment.mesh.axes, topology
        parts = experiment.train.accumulation
        temporaries = 8 * self.ROW[experiment.model.remat] // parts
        self.memory = Memory(4, temporaries, 4 + temporaries, memory)
        self.fits = self.memory.peak <= memory
        computing = self.SECONDS[experiment.model.remat]
        sending = interconnect * parts / experiment.mesh.tensor
        self.costs = SimpleNamespace(seconds={"compute": computing, "interconnect": sending})
        self.step_seconds = max(computing, sending)
        self.bound = "compute" if computing >= sending else "interconnect"


def searched(**plan):
    """(tensor, remat, microbatches) of the plans that a search compiles, and of the best."""
    experiment = Experiment(
        "x",
        data=DataConfig(batch_rows=128),
        model=ModelConfig(heads=16, width=256, remat="full"),
        mesh=MeshConfig(1, 16),
    )
    planner = functools.partial(FakePlan, **plan)
    found = list(search(planner, planner(experiment, topology_of(16))))
    tried = [
        (p.mesh["tensor"], p.experiment.model.remat, p.experiment.train.accumulation) for p in found
    ]
    assert len({(p.mesh["data"], *key) for p, key in zip(found, tried, strict=True)}) == len(found)
    assert all(p.experiment.data.batch_rows == 128 for p in found)
    return tried, tried[found.index(ranked(found)[0])] if found else None


def test_search_compiles_from_least_recomputation_what_may_fit_until_computing_limits():
    # Eight rows of 12 do not fit, nor can those of two or of four microbatches; one row does.
    assert searched(memory=18) == ([(1, "none", 1), (1, "none", 8)], (1, "none", 8))
    assert searched(memory=200) == ([(1, "none", 1)], (1, "none", 1))


def test_search_goes_on_where_nothing_of_a_policy_fits():
    tried, best = searched(memory=10.5)
    assert tried == [(1, "none", 1), (1, "minimal", 1), (1, "minimal", 8)]
    assert best == (1, "minimal", 8)


def test_search_tries_meshes_where_sending_limits():
    tried, best = searched(memory=200, interconnect=5.0)
    assert tried[: len(POLICIES) - 1] == [
        (1, remat, 1) for remat in POLICIES if remat != "full"
    ] and best == (2, "none", 1)
    assert {tensor for tensor, *_ in tried} == {1, 2}  # with 2, computing limits


@pytest.mark.parametrize("fits", [True, False])
def test_a_plan_is_made_once_for_its_experiment_topology_rows_and_code(tmp_path, monkeypatch, fits):
    made, said = [], []

    def make(experiment, topology, rows):
        made.append(experiment)
        memory = Memory(1, 2, 3 if fits else 300, 100, host=5)
        costs = cache.Costs(1e18, {"all-gather": 2.5}, {"compute": 0.1}) if fits else None
        mesh = {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 1}
        # As in a plan, what "auto" stands for is known.
        model = replace(experiment.model, attention="pallas")
        experiment = replace(experiment, model=model)
        whole = {"norm": 4}
        return Plan(experiment, topology, mesh, 7, 6, memory, 1e17, costs, 12.5, whole, rows.origin)

    monkeypatch.setattr(cache, "make_plan", make)
    experiment, topology = Experiment("x", data=DataConfig(batch_rows=64)), topology_of(16)
    one = jnp.zeros((2, 8), jnp.int32)
    rows = Rows(Intervals(one, one + 1), 1.0, 2.0, "2 rows")

    def plan(experiment=experiment, topology=topology, rows=rows):
        return cache.kept_plan(experiment, topology, rows, tmp_path / "plans", said.append)

    first = plan()
    assert plan() == first and len(made) == 1 and "as planned before" in said[-1]
    others = (
        {"experiment": replace(experiment, train=replace(experiment.train, accumulation=2))},
        {"topology": replace(topology, slices=2)},
        {"rows": replace(rows, intervals=Intervals(one, one + 2))},
    )
    for number, other in enumerate(others, 2):
        plan(**other)
        assert len(made) == number
    for number, change in enumerate(
        (
            lambda: monkeypatch.setattr(cache, "_code", lambda: "changed"),
            lambda: monkeypatch.setattr(cache, "_version", lambda package: "9.9"),
            lambda: monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_flag=true"),
            lambda: jax.config.update("jax_optimization_level", "O1"),
        ),
        5,
    ):
        change()
        plan()
        assert len(made) == number
    jax.config.update("jax_optimization_level", "UNKNOWN")
    monkeypatch.undo()
    monkeypatch.setattr(cache, "make_plan", make)
    for file in (tmp_path / "plans").iterdir():
        file.write_text("{}")
    assert plan() == first and len(made) == 9 and "is made again" in said[-1]


def test_a_plan_that_cannot_be_kept_is_made(tmp_path, monkeypatch):
    (tmp_path / "plans").write_text("a file")
    monkeypatch.setattr(cache, "make_plan", lambda *_: SimpleNamespace())
    monkeypatch.setattr(cache, "_key", lambda *_: "key")
    said = []
    made = cache.kept_plan(None, None, None, tmp_path / "plans", said.append)
    assert isinstance(made, SimpleNamespace) and "the plan is not kept" in said[-1]


def topology_of(count: int):
    return topology_lib.Topology("v5e:4x4", 1, CHIPS["v5e"], tuple(range(count)))


def test_remedies_are_tried_one_by_one():
    class Fake:
        def __init__(self, experiment, topology):
            self.experiment, self.topology, self.mesh = experiment, topology, experiment.mesh.axes
            self.fits = experiment.model.remat == "offload" or experiment.train.accumulation >= 4

    failed = Fake(
        Experiment("x", data=DataConfig(batch_rows=64), mesh=MeshConfig(1, 16)), topology_of(16)
    )
    none = replace(failed.topology, name="v5e:16x16")  # there is no larger one
    failed.topology = none
    assert [(change, plan.fits) for change, plan in remedies(Fake, failed)] == [
        ("--model.remat offload", True),
        ("--train.accumulation 2", False),
        ("--train.accumulation 4", True),
    ]


def shardings(size: str) -> dict:
    """Mesh axes of every parameter of a size, on the mesh of its experiment file, and what a device
    holds of it."""
    experiment = paper_experiment(size)
    count = np.prod([int(n) for n in experiment.mesh.topology.partition(":")[2].split("x")])
    axes = {k: int(count) if n == -1 else n for k, n in experiment.mesh.axes.items()}
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    _, parameters = abstract_model(experiment)
    placed = jax.tree.leaves_with_path(parameter_shardings(parameters, mesh))
    shapes = jax.tree.leaves(nnx.to_pure_dict(parameters))
    rows = {
        ".".join(
            key.key for key in path
        ): f"{x.shape} cut {tuple(s.spec)} to {s.shard_shape(x.shape)}"
        for (path, s), x in zip(placed, shapes, strict=True)
    }
    return {"topology": experiment.mesh.topology, "mesh": axes, "parameters": rows}


@pytest.mark.parametrize("size", TABLE_2)
def test_every_parameter_is_where_it_should_be(size):
    assert shardings(size) == json.loads((GOLDEN / "shardings.json").read_text())[size]


def collectives(size: str) -> dict:
    experiment = paper_experiment(size)
    plan = make_plan(experiment, find_topology(experiment.mesh.topology), sample_rows(experiment))
    return {
        "fits": plan.fits,
        "MiB": {kind: round(n / 2**20) for kind, n in sorted(plan.costs.collective_bytes.items())},
    }


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("size", TABLE_2)
def test_the_papers_sizes_fit_and_use_the_collectives_that_they_should(size):
    found, golden = collectives(size), json.loads((GOLDEN / "collectives.json").read_text())[size]
    assert found["fits"] and set(found["MiB"]) == set(golden["MiB"])
    assert sum(found["MiB"].values()) == pytest.approx(sum(golden["MiB"].values()), rel=0.1)


if __name__ == "__main__":
    (GOLDEN / "shardings.json").write_text(
        json.dumps({size: shardings(size) for size in TABLE_2}, indent=1) + "\n"
    )
    if "--collectives" in sys.argv:
        found = {size: collectives(size) for size in TABLE_2}
        (GOLDEN / "collectives.json").write_text(json.dumps(found, indent=1) + "\n")
