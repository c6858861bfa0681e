"""What the points of a sweep change, and their table: on directories that are written by hand."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion_jax.config import Experiment, SourceConfig, stored
from transfusion_jax.sweeps.figure import draw
from transfusion_jax.sweeps.points import Point, changes, make_points, varying, written
from transfusion_jax.sweeps.table import as_csv, as_markdown, groups, make_rows, markdown, titles


def named(base: Experiment, name: str, seed: int = 0, **model) -> Experiment:
    return replace(
        base,
        name=name,
        model=replace(base.model, **model),
        train=replace(base.train, seed=seed),
    )


@pytest.fixture
def points(experiment, tmp_path) -> list[Point]:
    """Two seeds of one point, a deeper one, and one that has not been run."""
    experiments = [
        named(experiment, "a"),
        named(experiment, "a_again", seed=1),
        named(experiment, "deep", layers=4),
        named(experiment, "later", width=128),
    ]
    points = make_points(experiments, tmp_path)
    finish(points[0], text_perplexity=2.0, drawn=0.5, model_flops=1e12)
    finish(points[1], text_perplexity=4.0, drawn=0.7, model_flops=1e12)
    finish(points[2], text_perplexity=1.25, model_flops=4e12, parts={"0-99": 1.0})
    return points


def finish(point: Point, **metrics) -> None:
    point.directory.mkdir(parents=True)
    (point.directory / "config.json").write_text(stored.dumps(point.experiment))
    costs = {"parameters": 1234567, "tokens": 30720, "train_seconds": 12.5}
    others = {"steps": 40, "goodput": 0.9, "wall_shares": {"steps": 0.9}}
    (point.directory / "summary.json").write_text(json.dumps({**costs, **others, **metrics}))


PUBLISHED = {"deep": {"text_perplexity": 1.5, "FID": 20.3}, "later": {"FID": 61.3}}


def cells(text: str) -> list[dict[str, str]]:
    """The lines of a Markdown table, by heading."""
    head, _, *body = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    )
    return [dict(zip(head, line, strict=True)) for line in body]


def test_a_change_is_what_most_points_have_otherwise(experiment):
    base = named(experiment, "base")
    less = replace(base, name="less", data=replace(base.data, sources=(SourceConfig("digits"),)))
    found = changes([base, named(base, "deep", layers=4), named(base, "b", width=128), less])
    absent = {"data.sources.1.name": None, "data.sources.1.weight": None}
    assert found == [{}, {"model.layers": 4}, {"model.width": 128}, absent]
    assert written(found[3]) == "data.sources.1.name absent, data.sources.1.weight absent"
    # Where no value is that of most, each point says its own.
    assert changes([base, named(base, "deep", layers=4)]) == [
        {"model.layers": 2},
        {"model.layers": 4},
    ]
    assert varying([base, named(base, "deep", layers=4)]) == changes(
        [base, named(base, "deep", layers=4)]
    )
    assert changes([base]) == [{}]
    halves = [named(base, "a"), named(base, "b"), *(named(base, n, layers=4) for n in "cd")]
    assert [row["model.layers"] for row in changes(halves)] == [2, 2, 4, 4]


def test_the_csv_has_every_digit_and_a_column_for_each_field(points):
    lines = list(csv.DictReader(io.StringIO(as_csv(make_rows(points, PUBLISHED)))))
    assert [line["status"] for line in lines] == ["finished"] * 3 + ["not run"]
    assert lines[2] == {
        "point": "deep",
        "status": "finished",
        "model.layers": "4",
        "model.width": "64",
        "train.seed": "0",
        "parameters": "1234567",
        "model_flops": "4000000000000.0",
        "tokens": "30720",
        "train_seconds": "12.5",
        "text_perplexity": "1.25",
        "text_perplexity (published)": "1.5",
        "drawn": "",
        "FID (published)": "20.3",
    }
    assert lines[3]["model.width"] == "128" and lines[3]["FID (published)"] == "61.3"
    assert lines[3]["parameters"] == lines[3]["text_perplexity"] == ""


def test_the_markdown_shows_changes_costs_metrics_and_published_numbers(points):
    rows = make_rows(points, PUBLISHED)
    table, _, over_seeds = as_markdown(rows).partition("\nMean (least to greatest) over seeds:\n\n")
    lines = cells(table)
    assert lines[1] == {
        "point": "a_again",
        "status": "finished",
        "changes": "train.seed=1",
        "parameters": "1,234,567",
        "FLOPs": "1e+12",
        "tokens": "30,720",
        "seconds": "12.5",
        "text_perplexity": "4",
        "text_perplexity (published)": "",
        "drawn": "0.7",
        "FID (published)": "",
    }
    assert lines[3]["changes"] == "model.width=128" and lines[3]["FLOPs"] == ""
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned as text, too
    assert cells(over_seeds) == [
        {
            "point": "a",
            "seeds": "2",
            "text_perplexity": "3 (2 to 4)",
            "drawn": "0.6 (0.5 to 0.7)",
        },
        {"point": "deep", "seeds": "1", "text_perplexity": "1.25", "drawn": ""},
    ]


def test_seeds_are_put_together_where_two_have_finished(points):
    rows = make_rows(points, {})
    assert [[row.name for row in alike] for alike in groups(rows).values()] == [
        ["a", "a_again"],
        ["deep"],
        ["later"],
    ]
    (points[1].directory / "summary.json").unlink()
    rows = make_rows(points, {})
    assert rows[1].status == "not finished" and "seeds" not in as_markdown(rows)


def test_numbers_of_another_sampler_are_not_those_of_the_point(points):
    point = points[0]
    other = replace(point.experiment, sampler=replace(point.experiment.sampler, guidance=9.0))
    moved = replace(point.experiment, train=replace(point.experiment.train, log_every=7))
    assert replace(point, experiment=other).status() == "not finished"
    assert replace(point, experiment=moved).summary() == point.summary() != None  # noqa: E711


def test_a_bar_in_a_cell_does_not_end_it():
    head, _, row = markdown({"a|b": ["x|y"], "b": [1]}).splitlines()
    assert (head, row) == (r"| a\|b | b |", r"| x\|y | 1 |")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.int32)


def test_the_picture_has_a_panel_for_each_metric(points, tmp_path):
    assert not draw(make_rows(points[3:], {}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    two, three = tmp_path / "two.png", tmp_path / "three.png"
    assert draw(make_rows(points[:2], {}), two)
    assert draw(make_rows(points[:2], {"a": {"FID": 3.0}}), three)
    assert pixels(three).shape[1] > pixels(two).shape[1] + 100
    red = (pixels(three) == (0xB3, 0x20, 0x2C)).all(-1)
    assert red.any() and not (pixels(two) == (0xB3, 0x20, 0x2C)).all(-1).any()


def test_there_is_no_picture_of_more_points_than_can_be_read(points, monkeypatch, tmp_path):
    rows = make_rows(points, PUBLISHED)
    monkeypatch.setattr("transfusion_jax.sweeps.figure.POINTS", 2)  # there are three, seeds aside
    assert not draw(rows, tmp_path / "table.png") and not (tmp_path / "table.png").exists()
    monkeypatch.setattr("transfusion_jax.sweeps.figure.POINTS", 3)
    assert draw(rows, tmp_path / "table.png")


def test_what_all_points_have_in_common_has_no_panel(points, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "transfusion_jax.sweeps.figure.save", lambda figure, *_: drawn.append(figure)
    )
    rows = make_rows(points[:2], {})
    same = [replace(row, summary={**row.summary, "real_spread": 0.33}) for row in rows]
    assert draw(same, tmp_path / "x.png")
    titles = [axes.get_title() for axes in drawn[0].axes if axes.get_visible()]
    assert titles == [name for name in same[0].metrics if name != "real_spread"] != []


def test_seeds_are_named_by_what_their_names_have_in_common(points, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "transfusion_jax.sweeps.figure.save", lambda figure, *_: drawn.append(figure)
    )
    rows = make_rows(points[:2], {})
    named = [replace(row, name=f"wide_{i}") for i, row in enumerate(rows)]
    draw(named, tmp_path / "x.png")
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["wide"]


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (("seed_10", "seed_11"), "seed"),
        (("wide_256_10", "wide_256_12"), "wide_256"),
        (("128_a", "128_b"), "128"),
        (("a", "b"), "a"),
    ],
)
def test_a_title_does_not_end_within_a_number(points, names, shared):
    rows = make_rows(points[:2], {})
    named = [replace(row, name=n) for row, n in zip(rows, names, strict=True)]
    assert titles([named]) == [shared]


def test_groups_that_would_have_one_title_have_the_name_of_their_first(points):
    rows = make_rows(points[:2], {})
    sizes = ("small", "large")
    found = [[replace(row, name=f"seed{i}_{s}") for i, row in enumerate(rows)] for s in sizes]
    assert titles(found) == ["seed0_small", "seed0_large"]


def test_a_mean_says_over_how_many_seeds_it_is(points):
    """One that drew nothing has no spread: the mean of the others is not that of all."""
    (points[1].directory / "summary.json").unlink()
    points[1].directory.joinpath("config.json").unlink()
    points[1].directory.rmdir()
    finish(points[1], drawn=0.7, text_perplexity=float("inf"))
    _, _, over_seeds = as_markdown(make_rows(points, {})).partition("over seeds:\n\n")
    row = cells(over_seeds)[0]
    assert (row["seeds"], row["text_perplexity"], row["drawn"]) == (
        "2",
        "2, 1 of 2",
        "0.6 (0.5 to 0.7)",
    )


def test_metrics_are_drawn_over_flops_where_these_vary(points, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "transfusion_jax.sweeps.figure.save", lambda figure, *_: drawn.append(figure)
    )
    draw(make_rows(points, PUBLISHED), tmp_path / "x.png")
    draw(make_rows(points[:2], {}), tmp_path / "x.png")
    over, along = ([axes for axes in figure.axes if axes.get_visible()] for figure in drawn)
    # A metric that is only published has no place over our FLOPs.
    assert [axes.get_title() for axes in over] == ["text_perplexity", "drawn"]
    assert {axes.get_xscale() for axes in over} == {"log"}
    marks = {tuple(map(float, line.get_xydata()[0])) for line in over[0].lines}
    assert {(1e12, 3.0), (4e12, 1.25), (4e12, 1.5)} <= marks
    assert {axes.get_xscale() for axes in along} == {"linear"}
    assert [label.get_text() for label in along[0].get_yticklabels()] == ["a"]
    ends = [line.get_xdata() for line in along[0].lines]
    assert any(list(x) == [2.0, 4.0] for x in ends) and any(list(x) == [3.0] for x in ends)
