import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from convattn_jax import plots
from convattn_jax.plots import LESS, MORE, Kernel, plot_kernels, plot_losses
from convattn_jax.taps import census, centred, describe

PNG = b"\x89PNG\r\n"
N = 4
PLACES = np.arange(-N, N + 1)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in small."""
    saved = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        saved.append(self)
        self.set_dpi(30)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def kernel(layers, heads, taps, spread=False):
    mean = np.broadcast_to(np.asarray(taps, float), (layers, heads, len(taps)))
    return Kernel(mean, np.full_like(mean, 0.25) if spread else None)


def texts(thing):
    return [text.get_text() for text in thing.texts]


# --- words ---


def test_centring_makes_zero_the_level_of_everything_out_of_reach():
    taps = np.array([1.0, 5.0, 3.0])
    np.testing.assert_allclose(centred(taps), [-1.0, 3.0, 1.0])
    np.testing.assert_allclose(centred(taps + 7.0), centred(taps))


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        (3.0 * (PLACES == -1), "previous"),
        (3.0 * (PLACES == 1), "next"),
        (3.0 * (PLACES == 0), "itself"),
        (-3.0 * (PLACES == 0), "not itself"),
        (3.0 * (PLACES == 1) - 2.0 * (PLACES == 0), "next, not itself"),
        (3.0 * (PLACES == 1) - 1.0 * (PLACES == 0), "next"),
        (3.0 * (abs(PLACES) == 1), "neighbours"),
        (3.0 * (PLACES == 2), "2 ahead"),
        (3.0 * np.isin(PLACES, (-3, -2)), "2–3 back"),
        (3.0 * (abs(PLACES) <= 2), "window ±2"),
        (3.0 * np.isin(PLACES, (-1, 0)), "−1 to 0"),
        (-1.0 * np.sign(PLACES), "before, not after"),
        (0.2 * (PLACES == 0), "flat"),
    ],
)
def test_a_kernel_is_described_by_what_it_looks_at(taps, words):
    assert describe(taps) == words


def test_the_census_counts_the_heads_by_what_they_look_at():
    kinds = [3.0 * (PLACES == -1)] * 3 + [3.0 * (PLACES == 2), 3.0 * (PLACES == 3)] + [0.0 * PLACES]
    assert census(np.array(kinds).reshape(2, 3, -1)) == "6 heads:  3 previous  ·  2 further ahead  ·  1 flat"


# --- kernels ---


def test_one_panel_per_layer_and_head_shows_the_centred_taps(tmp_path, figures):
    taps = 2.0 + 3.0 * (PLACES == -1) - 2.5 * (PLACES == 0)
    terms = {"fixed": kernel(3, 2, taps), "dynamic_query": kernel(3, 2, taps, spread=True)}
    assert plot_kernels(terms, tmp_path / "kernels.png", "a title")
    assert (tmp_path / "kernels.png").read_bytes().startswith(PNG)
    (figure,) = figures
    assert len(figure.axes) == 2 * 3 * 2
    for axes in figure.axes:
        bars = axes.patches[-len(PLACES) :]
        np.testing.assert_allclose([bar.get_height() for bar in bars], taps - 2.0)
        np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in bars], PLACES)
        assert to_hex(bars[N - 1].get_facecolor()) == MORE
        assert to_hex(bars[N].get_facecolor()) == LESS
        assert texts(axes) == ["previous, not itself", "+3.0", "−2.5"]
    assert {"a title", "fixed kernel", "query-dynamic kernel", "layer 3", "head 2"} <= set(texts(figure))
    ticks = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert ticks == ["≤−4", "−2", "0", "+2", "≥4"]


def test_long_words_of_a_head_end_where_the_next_begin(tmp_path, figures):
    places = np.arange(-32, 33)
    taps = 3.0 * ((places > 2) & (places < 16)) - 3.0 * ((places >= 0) & (places < 2))
    plot_kernels(
        {"fixed": kernel(1, 4, taps), "dynamic_query": kernel(1, 4, taps)}, tmp_path / "kernels.png", "a title"
    )
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.texts[0].get_window_extent(renderer) for axes in figure.axes]
    assert texts(figure.axes[0])[0] == "3–15 ahead, not 0 to +1"
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_the_y_axis_is_shared_within_a_term(tmp_path, figures):
    mean = np.zeros((1, 2, 3))
    mean[0, :, 1] = 1.0, 4.0
    plot_kernels({"fixed": Kernel(mean), "dynamic_key": Kernel(mean / 10)}, tmp_path / "k.png", "")
    limits = [axes.get_ylim() for axes in figures[0].axes]
    assert limits[0] == limits[1] != limits[2] == limits[3]
    assert limits[0][1] > 4.0


def test_whiskers_are_drawn_only_where_there_is_a_spread(tmp_path, figures):
    taps = 3.0 * (PLACES == 1)
    plot_kernels({"fixed": kernel(1, 1, taps), "dynamic_key": kernel(1, 1, taps, spread=True)}, tmp_path / "k.png", "")
    fixed, dynamic = figures[0].axes
    assert not fixed.collections
    (whiskers,) = dynamic.collections
    np.testing.assert_allclose(whiskers.get_segments()[N + 1], [[1, 2.75], [1, 3.25]])
    assert "Whiskers" in " ".join(texts(figures[0]))


def test_many_heads_become_one_strip_per_layer_sorted_by_where_they_look(tmp_path, figures):
    rng = np.random.default_rng(0)
    peaks = np.array([rng.permutation(12) % 5 - 2 for _ in range(12)])
    mean = 3.0 * (peaks[..., None] == PLACES) + 1.0
    assert plot_kernels({"fixed": Kernel(mean), "dynamic_query": Kernel(mean)}, tmp_path / "k.png", "")
    strips = [axes for axes in figures[0].axes if axes.get_title(loc="left").startswith("layer")]
    assert len(strips) == 2 * 12
    for layer, axes in enumerate(strips[:12]):
        image = axes.images[0]
        assert image.norm.vmin == -image.norm.vmax
        heads = [int(label.get_text()) - 1 for label in axes.get_yticklabels()]
        assert sorted(heads) == list(range(12))
        assert list(peaks[layer, heads]) == sorted(peaks[layer])
        np.testing.assert_allclose(image.get_array(), mean[layer, heads] - 1.0)
        assert [line.get_xdata()[0] for line in axes.lines] == sorted(peaks[layer])


@pytest.mark.parametrize("size", [(1, 1, 3), (9, 2, 17), (7, 17, 5), (1, 9, 3)])
def test_every_size_gives_a_picture(tmp_path, figures, size):
    mean = np.random.default_rng(0).normal(size=size)
    terms = {name: Kernel(mean) for name in ("fixed", "dynamic_query", "dynamic_key")}
    assert plot_kernels(terms, tmp_path / "k.png", "")
    for axes in figures[0].axes:
        box = axes.get_position()
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1


def test_without_usable_taps_there_is_no_picture(tmp_path):
    assert plot_kernels({}, tmp_path / "k.png", "") is False
    assert plot_kernels({"fixed": Kernel(np.zeros((0, 2, 3)))}, tmp_path / "k.png", "") is False
    assert plot_kernels({"fixed": Kernel(np.full((1, 2, 3), np.nan))}, tmp_path / "k.png", "") is False
    assert not list(tmp_path.iterdir())


# --- losses ---

ROWS = [
    {"step": 1, "loss": 9.0},
    {"step": 2, "loss": 7.0},
    {"step": 2, "eval_loss": 6.5},
    {"step": 3, "loss": 6.0},
    {"step": 4, "loss": 5.0},
    {"step": 4, "eval_loss": 4.5},
]


def lines_by_name(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_the_losses_and_the_unigram_loss_are_drawn_and_labelled(tmp_path, figures):
    assert plot_losses(ROWS, tmp_path / "loss.png", "a title", unigram_loss=6.25)
    (figure,) = figures
    drawn = lines_by_name(figure)
    np.testing.assert_allclose(drawn["training"].get_xydata(), [(1, 9), (2, 7), (3, 6), (4, 5)])
    np.testing.assert_allclose(drawn["held-out"].get_xydata(), [(2, 6.5), (4, 4.5)])
    assert set(drawn["unigram"].get_ydata()) == {6.25}
    assert drawn["held-out"].get_linewidth() > drawn["training"].get_linewidth()
    assert texts(figure.axes[0]) == ["held-out 4.50", "training 5.00", "unigram 6.25"]
    assert figure.axes[0].get_legend() is None
    assert "a title" in texts(figure)
    assert any("ends 1.75 under the unigram model" in text for text in texts(figure))


def test_labels_of_close_curves_do_not_overlap(tmp_path, figures):
    rows = [{"step": s, "loss": 9.0 - s} for s in range(6)] + [{"step": 5, "eval_loss": 4.001}]
    plot_losses(rows, tmp_path / "loss.png", "", unigram_loss=4.002)
    heights = [text.xy[1] for text in figures[0].axes[0].texts]
    assert np.diff(heights).min() > 0.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_gap_and_is_told(tmp_path, figures, bad):
    rows = [*ROWS, {"step": 5, "loss": bad}, {"step": 6, "loss": 4.0}, {"step": 6, "eval_loss": bad}]
    assert plot_losses(rows, tmp_path / "loss.png", "", unigram_loss=bad)
    assert "held-out 4.50" in texts(figures[0].axes[0])
    assert np.isnan(lines_by_name(figures[0])["training"].get_ydata()[4])
    assert any("in 1 rows, first at step 5" in text for text in texts(figures[0]))


def test_without_a_finite_loss_there_is_no_picture(tmp_path):
    assert plot_losses([], tmp_path / "loss.png", "", None) is False
    assert plot_losses([{"step": 1, "loss": float("nan")}], tmp_path / "loss.png", "", 6.0) is False
    assert not list(tmp_path.iterdir())


# --- files ---


def test_a_failed_picture_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")

    def fail(self, file, **_):
        with open(file, "wb") as stream:
            stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_losses(ROWS, path, "", None)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["loss.png"]


def test_neither_pyplot_nor_jax_is_loaded():
    code = (
        "import sys, convattn_jax.plots, convattn_jax.console; "
        "sys.exit(' '.join({'matplotlib.pyplot', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert plots.WIDTH * plots.DPI == 1800
