"""The report: what its tables say, that what is missing is named, that run folders put no HTML into it."""

import html.parser
import json
import math
import re
import shutil

import numpy as np
import pretend_runs
import pytest
from pretend_runs import finetuning, pretraining, sweep, write

from convattn_jax.config import UserError
from convattn_jax.evaluate import attention_file
from convattn_jax.report import __main__ as command
from convattn_jax.report import figures, markdown, page, pictures, runs, tables
from convattn_jax.resume import ADDED
from convattn_jax.statistics import paired_interval

LOSSES = {"absolute": [3.40, 3.42, 3.39], "composite": [3.31, 3.36, 3.33], "fixed": [3.5]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sweep of three variants; tests that change it take a copy."""
    return sweep(tmp_path_factory.mktemp("sweeps") / "three", LOSSES)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "three")


@pytest.fixture
def no_drawing(monkeypatch):
    """Pictures are drawn by one test alone: they take most of the time."""
    pixel = figures.Drawing("data:image/png;base64,AAAA", 1, 1)
    monkeypatch.setattr(figures, "_drawn", lambda draw, width, height, form="svg": pixel)


def rows(table):
    return {row[0].text: {name: cell.text for name, cell in zip(table.columns, row, strict=True)} for row in table.rows}


def lacking(c):
    return {(run, what.text) for what, names in tables.missing(c).rows for run in names.text.split(", ")}


# --- the numbers ---


def test_the_overview_has_a_row_a_variant_with_means_and_spreads(made):
    table = tables.overview(runs.collect([str(made)]))
    found = rows(table)
    assert list(found) == ["absolute", "composite", "fixed"]
    composite = found["composite"]
    losses = np.array(LOSSES["composite"])
    assert composite["held-out loss"] == f"{losses.mean():.3f} ± {losses.std(ddof=1):.3f}"
    assert composite["perplexity"] == f"{math.exp(losses.mean()):.1f}"
    assert composite["seeds"] == "3"
    scores = 100 * (1 - losses / 10) + 1  # the mean of two fine-tuning seeds, two points apart
    assert composite["word_order (accuracy)"] == f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}"
    assert composite["parameters"] == "1.23M"
    assert composite["tokens/s"] == "25.0k"
    assert composite["peak memory"] == "3.00 GB"
    assert found["fixed"]["held-out loss"] == "3.500"
    assert found["fixed"]["word_order (accuracy)"] == "66.0 ± 1.4°"  # over its two fine-tunings
    best = {row[0].text for row in table.rows if row[2].best}
    assert best == {"composite"}


def test_the_difference_is_paired_by_seed(made, copy):
    found = paired_interval([a - b for a, b in zip(LOSSES["composite"], LOSSES["absolute"], strict=True)])
    text = rows(tables.overview(runs.collect([str(made)])))["composite"]["loss − absolute"]
    signed = [f"{value:+.3f}".replace("-", "−") for value in (found.mean, found.low, found.high)]
    assert text == f"{signed[0]} [{signed[1]}, {signed[2]}] n=3"
    shutil.rmtree(copy / "absolute-1")  # then two seeds are left that both have
    text = rows(tables.overview(runs.collect([str(copy)])))["composite"]["loss − absolute"]
    assert text.startswith("−0.075 [")
    assert text.endswith("n=2")


def test_what_is_better_and_what_could_be_shown_stands_beside_each_difference(made):
    table = tables.differences(runs.collect([str(made)]))
    found = {(row[0].text, row[1].text): [cell.text for cell in row[2:]] for row in table.rows}
    differences = [a - b for a, b in zip(LOSSES["composite"], LOSSES["absolute"], strict=True)]
    smallest = paired_interval(differences).smallest
    assert found["held-out loss", "composite"][2:] == ["3", f"{smallest:.3f}", "better"]
    assert found["word_order (accuracy)", "composite"][-1] == "better"  # there more is better
    assert found["held-out loss", "fixed"] == ["+0.100", "—", "1", "—", "one seed"]
    assert found["distance (spearman)", "composite"][-1] == "not shown"


def test_another_baseline_can_be_named(made):
    c = runs.collect([str(made)], baseline="composite")
    assert rows(tables.overview(c))["composite"]["loss − composite"] == "—"
    with pytest.raises(UserError, match="--baseline='compsite' is unknown"):
        runs.collect([str(made)], baseline="compsite")


def test_winners_say_whether_the_seeds_tell_them_apart(made):
    found = rows(tables.winners(runs.collect([str(made)])))
    row = ["held-out loss", "composite", "3.333", "absolute", "3.403", "yes"]
    assert list(found["held-out loss"].values()) == row
    assert found["distance 3, right"]["best"] == "composite"
    assert found["parameters"]["told apart"] == "equal"


def test_accuracy_by_distance_counts_rows_of_all_seeds(tmp_path):
    pretraining(tmp_path / "a", 3.0)
    finetuning(tmp_path / "a", "probes", {"distance": {"spearman": [0.5, 0.5]}}, right=[1, 0.9, 0.8, 0.5, 0.5, 0.2, 0])
    seed = tmp_path / "a-probes" / "tasks" / "distance" / "0.json"
    write(seed, {"by_label": {"validation": {"1": [300, 0]}}})  # beside 100 rows, all of them right, of the other seed
    found = rows(tables.distances(runs.collect([str(tmp_path / "a")])))
    assert list(found["a"].values()) == ["a", "25", "90", "80", "50", "50", "20", "0"]


def test_glue_has_a_mean_where_all_its_tasks_are_there(tmp_path):
    both = {"rte": {"accuracy": [0.6]}, "cola": {"matthews": [0.4]}}
    finetuning(pretraining(tmp_path / "a", 3.0), "glue", both)
    finetuning(pretraining(tmp_path / "b", 3.0), "glue", {"rte": {"accuracy": [0.7]}})
    c = runs.collect([str(tmp_path)])
    found = rows(tables.overview(c))
    assert found["a"]["GLUE mean"] == "50.0"
    assert found["b"]["GLUE mean"] == "—"
    assert found["b"]["cola (matthews)"] == "—"
    assert ("b", "no results of cola") in lacking(c)


def test_a_length_that_positions_do_not_reach_is_not_applicable(copy):
    for seed in range(3):
        write(copy / f"absolute-{seed}" / "evaluations" / "length-32.json", {"length": 32, "applicable": False})
    (copy / "fixed-0" / "evaluations" / "length-32.json").unlink()
    c = runs.collect([str(copy)])
    found = rows(tables.lengths(c))
    assert found["absolute"]["32 tokens"] == "not applicable"
    assert found["fixed"]["32 tokens"] == "—"
    assert found["composite"]["32 tokens"].startswith("3.833 ±")
    assert lacking(c) == {("fixed-0", "not evaluated at length 32")}


# --- what is missing, and what is not equal ---


def test_unfinished_and_failed_runs_are_named_and_in_no_mean(copy):
    write(copy / "composite-0" / "summary.json", {"step": 3, "eval_loss": 1.0})  # of a shorter run, since prolonged
    shutil.rmtree(copy / "composite-2")
    write(copy / "status" / "composite-2.json", {"state": "failed", "stage": "pretrain", "error": "out of memory"})
    shutil.rmtree(copy / "fixed-0")
    shutil.rmtree(copy / "absolute-0-probes")
    c = runs.collect([str(copy)])
    assert lacking(c) == {
        ("composite-0", "pre-training has not ended: step 6 of 6"),
        ("composite-2", "pretrain failed: out of memory"),
        ("fixed-0", "not started"),
        ("absolute-0", "probes: no results yet"),
        ("absolute-0", "no results of word_order, distance"),
    }
    found = rows(tables.overview(c))
    assert found["composite"]["seeds"] == "1 of 3"
    assert found["composite"]["held-out loss"] == "3.360"
    assert found["composite"]["word_order (accuracy)"] == "67.4 ± 1.4°"  # of the finished run's two fine-tunings
    assert found["fixed"]["held-out loss"] == "—"


def test_a_loss_that_is_no_number_is_missing(copy):
    (copy / "fixed-0" / "summary.json").write_text('{"step": 6, "eval_loss": Infinity}')
    c = runs.collect([str(copy)])
    assert lacking(c) == {("fixed-0", "summary.json has no held-out loss")}
    assert rows(tables.overview(c))["fixed"]["held-out loss"] == "—"


def test_a_sweep_that_has_only_begun_is_reported(tmp_path, no_drawing):
    variants = ["absolute", "fixed"]
    jobs = {f"{name}-0": {"variant": name, "seed": 0, "stages": ["pretrain", "probes"]} for name in variants}
    write(tmp_path / "sweep.json", {"baseline": "absolute", "variants": variants, "jobs": jobs})
    c = runs.collect([str(tmp_path)])
    assert [[cell.text for cell in row] for row in tables.missing(c).rows] == [["not started", "absolute-0, fixed-0"]]
    text = command.write([str(tmp_path)])[0].read_text()
    assert "not started" in text


def test_seeds_made_before_and_after_a_key_came_are_one_variant(copy):
    path = copy / "composite-1" / "config.json"
    config = json.loads(path.read_text())
    for key in ADDED:
        group, _, leaf = key.partition(".")
        config.get(group, {}).pop(leaf, None)
    write(path, config)
    path = copy / "composite-2" / "config.json"
    config = json.loads(path.read_text())
    config["watchdog"]["frozen_seconds"] += 1
    write(path, config)
    c = runs.collect([str(copy)])
    assert list(c.variants) == ["absolute", "composite", "fixed"]
    assert not any("differ" in note for note in tables.notes(c))


def test_unequal_conditions_are_said(tmp_path):
    pretraining(tmp_path / "a", 3.0)
    pretraining(tmp_path / "b", 3.1, model__radius=3, train__batch_size=2)
    write(tmp_path / "b" / "data.json", {"fingerprint": "g"})
    found = tables.notes(runs.collect([str(tmp_path)]))
    assert any("differ in train.batch_size too (4: a; 2: b)" in note for note in found)
    assert any("not made with the same token rows" in note for note in found)
    assert not any("model.radius" in note for note in found)
    assert found[-1] == "Hardware: 1 x cpu, JAX 0."


def test_the_code_of_the_runs_is_said(tmp_path):
    def said(*starts: str) -> str:
        write(pretraining(tmp_path / "a", 3.0) / "starts.jsonl", "".join(starts))
        return tables.notes(runs.collect([str(tmp_path)]))[-1]

    one, same = ('{"commit": "c1", "code": "d1"}\n', '{"commit": "c1", "code": "d1", "step": 3}\n')
    assert said(one, same) == "Code: c1."
    changed, unknown = ('{"commit": "c1+changes", "code": "d2"}\n', '{"commit": null, "code": "d3"}\n')
    assert said(one, changed, unknown, "[cut") == "Code: c1, then c1+changes (d2), then d3."
    for name in "bc":
        pretraining(tmp_path / name, 3.1)
    assert said(one) == "Code (runs): not noted (2); c1 (1)."


def test_single_runs_are_grouped_by_their_settings(tmp_path):
    for folder, seed, changes in (("x-0", 0, {}), ("x-1", 1, {}), ("y", 2, {"model__radius": 1})):
        run = pretraining(tmp_path / folder, 3.0)
        write(run / "config.json", pretend_runs.config_of("x", seed, **changes))
    c = runs.collect([str(tmp_path / name) for name in ("x-0", "x-1")])
    assert {name: len(group) for name, group in c.variants.items()} == {"x": 2}
    c = runs.collect([str(tmp_path)])  # the same name, other settings
    assert set(c.variants) == {"x (x-0)", "x (x-1)", "x (y)"}


def test_sweeps_with_the_same_variants_stand_side_by_side(made, tmp_path):
    tenth = shutil.copytree(made, tmp_path / "tenth")
    for path in tenth.glob("*-[0-9]/config.json"):
        config = json.loads(path.read_text())
        config["data"]["fraction"] = 0.1
        write(path, config)
    c = runs.collect([str(made), str(tenth)])
    assert list(c.variants) == [f"{name} ({place})" for name in LOSSES for place in ("three", "tenth")]
    assert [run.seed for run in c.variants["absolute (tenth)"]] == [0, 1, 2]
    assert c.baseline == "absolute (three)"
    again = shutil.copytree(made, tmp_path / "again" / "three")  # the folders' names alone do not tell
    assert len(runs.collect([str(made), str(again)]).variants) == 2 * len(LOSSES)


def test_no_run_counts_twice(made, monkeypatch):
    monkeypatch.chdir(made.parent)
    c = runs.collect(["three", str(made), "three/absolute-0"])
    assert {name: len(group) for name, group in c.variants.items()} == {"absolute": 3, "composite": 3, "fixed": 1}
    assert lacking(c) == set()


def test_of_a_run_there_is_what_was_fine_tuned_from_it_and_no_run_beside_it(tmp_path, monkeypatch):
    run = pretraining(tmp_path / "a", 3.0)
    pretraining(tmp_path / "a-longer", 2.9)
    finetuning(run, "probes", {"word_order": {"accuracy": [0.9]}})
    monkeypatch.chdir(run)
    (found,) = runs.collect(["."]).runs()
    assert found.tasks == {"word_order": [0.9]}


def test_a_task_that_was_fine_tuned_twice_has_the_figures_of_the_sweep_and_the_others_are_named(copy):
    finetuning(copy / "fixed-0", "another", {"word_order": {"accuracy": [0.1]}})
    c = runs.collect([str(copy)])
    assert c.variants["fixed"][0].tasks["word_order"] == pytest.approx([0.65, 0.67])
    said = "Not shown, since another fine-tuning stands for it: word_order of fixed-0-another."
    assert said in tables.notes(c)


def test_a_stage_that_no_run_has_is_missing_too(copy):
    for folder in copy.glob("*/evaluations"):
        shutil.rmtree(folder)
    names = {f"{name}-{seed}" for name, losses in LOSSES.items() for seed in range(len(losses))}
    assert lacking(runs.collect([str(copy)])) == {(name, "evaluate: no results yet") for name in names}


def test_pre_training_that_failed_and_was_then_done_by_hand_is_whole(copy):
    write(copy / "status" / "fixed-0.json", {"state": "failed", "stage": "pretrain", "error": "out of memory"})
    assert lacking(runs.collect([str(copy)])) == set()


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    tuned = tmp_path / "tuned" / "first-glue"
    write(tuned / "config.json", {"task": "finetune", "init_from": "runs/first"})
    for path, said in (
        (tmp_path, "holds no run"),
        (tmp_path / "nowhere", "is no folder"),
        (tuned, "is fine-tuning only, made from runs/first: name that run"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main([str(path)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_a_run_beside_a_sweep_lacks_nothing_that_only_the_sweep_asked_for(made, tmp_path):
    (pretraining(tmp_path / "alone", 3.0) / "evaluations" / "length-32.json").unlink()
    assert lacking(runs.collect([str(made), str(tmp_path / "alone")])) == set()


def test_runs_of_no_sweep_are_complete_though_one_was_asked_for_more(tmp_path):
    for name in "ab":
        pretraining(tmp_path / name, 3.0)
    write(tmp_path / "a" / "evaluations" / "length-64.json", {"length": 64, "applicable": True, "loss": 3.5})
    finetuning(tmp_path / "a", "probes", {"word_order": {"accuracy": [0.9]}})
    c = runs.collect([str(tmp_path)])
    assert lacking(c) == set()
    assert rows(tables.lengths(c))["b"]["64 tokens"] == "—"


def test_the_page_of_one_run_is_in_its_folder_and_that_of_several_beside_them(tmp_path, no_drawing):
    names = [str(pretraining(tmp_path / name, 3.0)) for name in "ab"]
    for paths, out, folder in ((names[:1], "", tmp_path / "a"), (names, "", tmp_path), (names, tmp_path / "c", None)):
        found = command.write(paths, out=str(out))
        assert {path.parent for path in found} == {folder or out}


# --- the page ---


class Page(html.parser.HTMLParser):
    """What a browser would see: elements with attributes, the text, and tags that were not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone_and_holds_every_picture(made):
    found = [path.read_text() for path in command.write([str(made)])]
    assert [path.name for path in sorted(made.glob("report.*"))] == ["report.html", "report.md"]
    seen = Page(found[0])
    assert seen.open == []
    addresses = [attributes.get(name) for _, attributes in seen.elements for name in ("src", "href")]
    addresses = [address for address in addresses if address is not None]
    assert addresses
    assert all(value.startswith(("data:image/", "#")) for value in addresses)
    assert "http:" not in found[0]
    assert "https:" not in found[0]
    images = [attributes for tag, attributes in seen.elements if tag == "img"]
    assert all(image["alt"] for image in images)
    # two of losses, one a measure, one of distances, kernels and maps of three variants
    assert len(images) == 2 + 4 + 1 + 3 + 3
    targets = {attributes.get("id") for _, attributes in seen.elements}
    assert {value[1:] for value in addresses if value.startswith("#")} <= targets
    columns = [attributes for tag, attributes in seen.elements if tag == "th" and attributes["scope"] == "col"]
    assert seen.elements.count(("button", {"type": "button"})) == len(columns) > 20
    assert "| composite |" in found[1]


def test_lines_are_told_apart_without_colour():
    marks = [(figures.style(i)["marker"], str(figures.style(i)["linestyle"])) for i in range(40)]
    assert len(set(marks)) == 40


HOSTILE = '<script>alert("x")</script>$\\frac{&$'


def test_a_curve_far_above_the_others_does_not_flatten_their_second_half(tmp_path, monkeypatch):
    curves = {"far": [6.2, 6.0], "near": [3.6, 3.5], "nearer": [3.5, 3.4], "nearest": [3.3, 3.1]}
    groups = {name: [runs.Run(name, name, 0, tmp_path, {}, [(4.0, a), (6.0, b)])] for name, (a, b) in curves.items()}
    drawn = []
    monkeypatch.setattr(
        figures, "lines", lambda curves, *_: drawn.append(set(curves)) or figures.Drawing("data:image/svg", 1, 1)
    )
    whole, late = pictures.losses(runs.Comparison(groups, "far", "")).pictures
    assert drawn == [set(curves), set(curves) - {"far"}]
    assert late.title.endswith("without “far”")
    assert "far ends at 6.000" in late.words
    assert "far" not in whole.title


def test_hostile_run_folders_stay_text(tmp_path):
    folder = tmp_path / "runs"
    for name in ("a", "b"):
        run = pretraining(folder / name, 3.0)
        config = pretend_runs.config_of(HOSTILE if name == "a" else "</style>|b", 0)
        config["data"]["source"] = f"{HOSTILE}{name}"
        write(run / "config.json", config)
        write(run / "data.json", {"fingerprint": HOSTILE + name})
        summary = json.loads((run / "summary.json").read_text())
        write(run / "summary.json", summary | {"hardware": HOSTILE, "parameters": HOSTILE, "tokens_per_second": True})
        finetuning(run, "probes", {"word_order": {"accuracy": [0.5, HOSTILE, None]}, HOSTILE: {"accuracy": [1]}})
        write(run / "evaluations" / "length-9.json", {"length": HOSTILE, "loss": 1, "applicable": True})
    sentence = "a <b> $x^ & 'c'"
    names = json.dumps({"variants": [HOSTILE, 3], "jobs": {"../../etc": {"variant": HOSTILE, "stages": [HOSTILE, 4]}}})
    write(folder / "sweep.json", names)
    assert all(run.folder.parent == folder for run in runs.collect([str(folder)]).runs())
    html_path, markdown_path = command.write([str(folder)], sentence=sentence)
    seen = Page(html_path.read_text())
    assert [tag for tag, _ in seen.elements].count("script") == 1
    assert [tag for tag, _ in seen.elements].count("style") == 1
    assert not [tag for tag, _ in seen.elements if tag == "b"]
    assert any(HOSTILE in words for words in seen.words)
    assert "<script" not in markdown_path.read_text().replace("\\<", "")
    assert all(not name.startswith("on") for _, attributes in seen.elements for name in attributes)


@pytest.mark.parametrize(
    "damaged", ["config.json", "summary.json", "metrics.jsonl", "kernels.npz", "attention", "results"]
)
def test_a_damaged_file_counts_as_missing(copy, damaged, no_drawing):
    run = copy / "fixed-0"
    path = {
        "attention": attention_file(run, pretend_runs.SENTENCE),
        "results": copy / "fixed-0-probes" / "results.json",
    }.get(damaged, run / damaged)
    for content in (b"\x00\xff{[[", b"PK\x03\x04cut", b'{"step": "six", "eval_loss": Infinity, "train": 3}', b""):
        path.write_bytes(content)
        text = command.write([str(copy)])[0].read_text()
        assert "fixed" in text
        said = {
            "kernels.npz": "fixed: no taps in the scores",
            "attention": "fixed: no maps of this sentence, and no checkpoint to make them with",
            "metrics.jsonl": "fixed: no evaluation yet",
        }.get(damaged, "What is missing")
        assert said in text


@pytest.mark.parametrize("name", ["kernels.npz", "attention"])
def test_a_flipped_bit_anywhere_is_no_traceback(copy, name):
    """An archive's reader ends in errors of a dozen kinds."""
    run = copy / "fixed-0"
    path = attention_file(run, pretend_runs.SENTENCE) if name == "attention" else run / name
    whole = path.read_bytes()
    (found,) = runs.collect([str(run)]).runs()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        pictures._attention(found, pretend_runs.SENTENCE)
        pictures._kernels(found)


def test_markdown_takes_names_for_text():
    table = tables.Table("<t>", "a|b", ("x_y",), ((tables.Cell("[a](b) `c` <d>|", best=True),),))
    text = markdown.document("*", ["#"], [table])
    assert r"**\[a\](b) \`c\` \<d\>\|**" in text
    assert re.search(r"^# \\\*$", text, re.MULTILINE)


def test_a_cell_without_a_number_has_nothing_to_sort_by():
    made_up = ((tables.Cell("x", "x"), tables.Cell("—")), (tables.Cell("y", "y"), tables.Cell("3", 3.0)))
    table = tables.Table("t", "", ("a", "b"), made_up)
    seen = Page(page.page("t", [], [("t", page.table(table))]))
    cells = [attributes.get("data-value") for tag, attributes in seen.elements if tag == "td"]
    assert cells == [None, "3.0"]


def test_kernels_share_one_scale_and_maps_follow_the_sentence(made, monkeypatch):
    limits = []
    monkeypatch.setattr(figures, "kernels", lambda terms, limit: limits.append(limit) or figures.Drawing("", 1, 1))
    monkeypatch.setattr(figures, "attention", lambda found: figures.Drawing(" ".join(found.tokens), 1, 1))
    c = runs.collect([str(made)])
    assert len(pictures.kernels(c).pictures) == 3
    assert limits == [2.0] * 3
    found = pictures.attention(c, c.sentence)
    assert [one.drawing.uri for one in found.pictures] == ["[CLS] the cat sat [SEP]"] * 3
    said = "absolute, composite, fixed: no maps of this sentence, and no checkpoint to make them with"
    assert pictures.attention(c, "another").lacking == [said]
