"""Tables and plots say what the rows say."""

import math

import numpy as np
import pytest

from quantjax import errors
from quantjax.sweep import FLOAT_CELL, Cell, Row, summarize, table
from quantjax.sweep.plot import plot_accuracy


def rows(seeds=(0, 1, 2)):
    cells = [FLOAT_CELL] + [
        Cell(w, a, rule) for rule in ("min_max", "moving_average") for w in (2, 8) for a in (4, 8)
    ]
    return [
        Row("f", "s", seed, *cell, (cell.weight_bits or 9) / 10 + seed / 100, 0, 100)
        for seed in seeds
        for cell in cells
    ]


def test_mean_and_spread_over_seeds():
    summary = {s.cell: s for s in summarize(rows())}[Cell(8, 4, "min_max")]
    values = [0.80, 0.81, 0.82]
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.spread == pytest.approx(np.std(values, ddof=1))
    assert summary.seeds == 3


def test_one_seed_has_no_spread():
    assert all(math.isnan(summary.spread) for summary in summarize(rows(seeds=(0,))))
    assert "±" not in table(rows(seeds=(0,)))


def test_the_table_has_a_block_for_each_rule():
    assert table(rows()).splitlines() == [
        "float  91.00 ±1.00  (3 seeds)",
        "",
        "min_max  A4           A8",
        "W2       21.00 ±1.00  21.00 ±1.00",
        "W8       81.00 ±1.00  81.00 ±1.00",
        "",
        "moving_average  A4           A8",
        "W2              21.00 ±1.00  21.00 ±1.00",
        "W8              81.00 ±1.00  81.00 ±1.00",
    ]


def test_a_missing_cell_is_an_empty_place():
    some = [row for row in rows() if row.cell != Cell(2, 8, "min_max")]
    assert "W2       21.00 ±1.00" in table(some).splitlines()


def test_zero_bits_print_as_float():
    extra = Row("f", "s", 0, 0, 4, "min_max", 0.5, 0, 0)
    assert any(line.startswith("W float") for line in table([*rows(), extra]).splitlines())


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_plot_is_written_and_shows_something(tmp_path, seeds):
    from matplotlib.image import imread

    path = tmp_path / "new" / "plot.png"
    plot_accuracy(rows(seeds), path, title="a title")
    image = imread(path)[..., :3]
    assert image.shape[0] > 400
    assert image.shape[1] > 1000  # two panels
    dark = np.mean(image.mean(axis=-1) < 0.9)
    assert 0.005 < dark < 0.3


def test_what_stays_float_stands_behind_the_widest(tmp_path, monkeypatch):
    """At 0 bits it stood in front of all others, and 1 bit looked like a fall from it."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    extra = [
        Row("f", "s", 0, weights, activations, "min_max", 0.5, 0, 0)
        for weights, activations in ((0, 4), (0, 0), (2, 0))
    ]
    plot_accuracy([*rows((0,)), *extra], tmp_path / "plot.png", title="")
    panel = drawn[0].axes[0]
    ticks = [text.get_text() for text in panel.get_xticklabels()]
    assert ticks[-1] == "float"
    assert ticks[:-1] == sorted(ticks[:-1], key=int)
    assert panel.get_xticks()[-1] == max(panel.get_xticks())
    labels = [label for label in panel.get_legend_handles_labels()[1] if label != "float"]
    assert labels[-1] == "A float"


@pytest.mark.parametrize("rules", [1, 2])
def test_a_long_title_is_not_cut(tmp_path, monkeypatch, rules):
    from matplotlib.figure import Figure

    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), real(figure, *a, **k))
    )
    title = "fashion_mnist_resnet20_cosine_lr: accuracy against bits, mean ± standard deviation of "
    title += "10 seeds"
    some = [row for row in rows((0, 1)) if rules == 2 or row.cell.rule in ("float", "min_max")]
    plot_accuracy(some, str(tmp_path / "plot.png"), title=title)
    (figure,) = drawn
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert figure._suptitle.get_text().split() == title.split()


@pytest.mark.parametrize("some", [[], [Row("f", "s", 0, 0, 0, "float", 0.5, 0, 0)]])
def test_rows_without_a_cell_are_no_plot(tmp_path, some):
    with pytest.raises(errors.SweepError, match="none of a cell to draw"):
        plot_accuracy(some, tmp_path / "plot.png", title="")
