"""From values a seed to tables and pictures: their numbers are those of the values."""

import json
import statistics

import pytest
from etils import epath

from convattn_jax.glue import results

TABLE = {"rte": {"accuracy": [0.5, 0.75, 0.7]}, "mrpc": {"accuracy": [0.8], "f1": [0.875]}}


def test_statistics_are_those_of_the_seeds():
    found = results.statistics(TABLE)
    assert found["rte"]["accuracy"] == {
        "mean": pytest.approx(0.65),
        "std": pytest.approx(statistics.stdev([0.5, 0.75, 0.7])),
        "median": 0.7,
        "best": 0.75,
        "seeds": 3,
    }
    assert found["mrpc"]["f1"] == {"mean": 0.875, "std": 0.0, "median": 0.875, "best": 0.875, "seeds": 1}


def test_the_table_has_a_row_a_metric_in_per_cent():
    head, rule, *rows = results.markdown(TABLE).splitlines()
    assert head == "| task | metric | mean | std | median | best | chance | seeds |"
    assert rule.count("|") == head.count("|")
    assert rows == [
        "| rte | accuracy | 65.0 | 13.2 | 70.0 | 75.0 | — | 3 |",
        "| mrpc | accuracy | 80.0 | 0.0 | 80.0 | 80.0 | — | 1 |",
        "| mrpc | f1 | 87.5 | 0.0 | 87.5 | 87.5 | — | 1 |",
    ]
    found = results.markdown({"word_order": {"accuracy": [0.9]}, "distance": {"pearson": [0.75], "spearman": [0.5]}})
    assert [line.split(" | ")[-2] for line in found.splitlines()[2:]] == ["50.0", "0.0", "0.0"]


def test_results_json_holds_the_values_and_nothing_else(tmp_path):
    results.write(epath.Path(tmp_path), TABLE)
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "statistics.json",
        "results.md",
        "results.png",
    }
    assert json.loads((tmp_path / "results.json").read_text()) == TABLE == results.load(tmp_path)
    assert json.loads((tmp_path / "statistics.json").read_text()) == results.statistics(TABLE)
    assert (tmp_path / "results.md").read_text() == results.markdown(TABLE)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_all_seeds_as_points_and_their_means_as_lines(tmp_path, monkeypatch):
    drawn = []

    class Kept(results.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(results, "Figure", Kept)
    results.plot({"one": TABLE, "other": {"rte": {"accuracy": [0.25, 0.35]}}}, tmp_path / "two.png")
    (axes,) = drawn[0].axes
    points = [(line.get_xdata(), line.get_ydata()) for line in axes.lines if len(line.get_xdata())]
    assert [sorted(y) for _, y in points] == [[50, 70, 75], [80], [87.5], [25, 35]]
    lines = [collection.get_segments()[0] for collection in axes.collections]
    assert [line[0][1] for line in lines] == pytest.approx([65, 80, 87.5, 30])
    (one, *_, other), (left, *_, right) = [x for x, _ in points], lines
    assert max(one) < min(other)  # side by side, both within the task's place
    assert -0.5 < left[0][0] < min(one) <= max(one) < left[1][0] <= right[0][0] < min(other) < right[1][0] < 0.5
    assert [label.get_text() for label in axes.get_xticklabels()] == ["rte\naccuracy", "mrpc\naccuracy", "mrpc\nf1"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]
    results.plot({"one": {"adjacent": {"accuracy": [0.25]}, "distance": {"pearson": [0.5]}}}, tmp_path / "two.png")
    (axes,) = drawn[1].axes
    dashed = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    assert [(line.get_xdata().mean(), set(line.get_ydata())) for line in dashed] == [(0, {50}), (1, {0})]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "chance"]
    assert {path.name for path in tmp_path.iterdir()} == {"two.png"}
