"""Pictures are legible: nothing is written over anything else, and lines stand where clips are."""

import dataclasses
import itertools
import struct

import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.calibration import (
    RULES,
    Bars,
    Model,
    OperandRanges,
    RuleRange,
    calibration_report,
    collect,
    plot,
    plot_ranges,
)
from quantjax.ranges import LSQ, MIN_MAX, SAWB, percentile, sigma
from tests.calibration import tiny

pytestmark = pytest.mark.thinned(2)


def made(
    *widths: float, groups: int = 1, bend: float = np.inf, name: str = "rule"
) -> OperandRanges:
    """An operand with these ranges, on values from -1 to 1."""
    rules = []
    for index, width in enumerate(widths):
        high = np.linspace(width, 1.5 * width, groups, dtype=np.float32)
        ends = (-high, high, -high, high)
        rules.append(RuleRange(f"{name}{index}", *ends, 0.001 * index, float(index)))
    bars = Bars(np.linspace(-1.0, 1.0, 101), np.arange(100.0) + 1.0, bend)
    return OperandRanges(
        "w", "weight", (), "int4/channel", 4, groups, 5050, -1.0, 1.0, bars, tuple(rules)
    )


@pytest.fixture(scope="module")
def everything():
    """All rules on a ReLU's output: every one of them has an upper end of its own."""
    model, _, collected = tiny.seen("relu")
    report = calibration_report(collected.plan, collected.state, model.params, weight_bits=0)
    (operand,) = report
    assert len(operand.rules) == len(RULES) >= 15
    return operand


def panels(operand):
    figure = plot.figure(operand)
    ranges, counts = figure.axes
    return figure, ranges, counts


def boxes(figure):
    """Text and its place on the page, in pixels; labels of ticks beyond the axis are not drawn."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [
                tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
            ]
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_visible() and text.get_text()
    ]


def assert_legible(operand):
    figure, *_ = panels(operand)
    page = figure.bbox
    found = boxes(figure)
    for text, box in found:
        assert 0 <= box.x0 < box.x1 <= page.x1, f"{text} leaves the page"
        assert 0 <= box.y0 < box.y1 <= page.y1, f"{text} leaves the page"
    for (one, a), (other, b) in itertools.combinations(found, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 1 or along < 3, f"{one!r} is written over {other!r}"


def test_all_rules_of_one_sided_data_are_legible(everything):
    assert_legible(everything)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("key", ["weight", "activation"])
def test_every_kind_of_data_is_legible(kind, key):
    model, _, collected = tiny.seen(kind)
    rules = [MIN_MAX, SAWB, LSQ, sigma(3.0), percentile(0.999), percentile(0.9999)]
    report = calibration_report(collected.plan, collected.state, model.params, rules=rules)
    assert_legible(report["w", key])


@pytest.mark.parametrize("rules", [1, 2, 16, 40])
@pytest.mark.parametrize("groups", [1, 7])
def test_any_number_of_rules_is_legible(rules, groups):
    assert_legible(made(*np.linspace(0.1, 1.2, rules), groups=groups))


def test_rules_that_agree_have_rows_of_their_own():
    operand = made(0.5, 0.5, 0.5, 0.5)
    assert_legible(operand)
    _, ranges, _ = panels(operand)
    rows = [text for text in ranges.texts if text.get_text().startswith("rule")]
    assert len({text.get_position()[1] for text in rows}) == len(rows) == 5  # and the head


def test_long_names_and_small_numbers_are_legible():
    operand = made(1.2345e-7, 2.3456e-4, groups=3, name="percentile(0.9999) ")
    assert_legible(dataclasses.replace(operand, site="params/" + 9 * "encoder_layer/" + "kernel"))


def test_letters_that_the_font_lacks_are_no_warning(tmp_path):
    operand = dataclasses.replace(made(0.25, 0.5), site="params/名前/kernel")
    plot_ranges(operand, tmp_path / "a.png")  # warnings are errors here
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("bend", [0.05, 1e-3, 1e-7, 1e-12])
def test_ticks_of_a_bent_axis_are_legible(bend):
    assert_legible(made(bend, 0.5, bend=bend))


def test_outliers_have_an_axis_that_bends():
    operand = made(0.01, 0.1, 0.9, bend=0.05)
    assert_legible(operand)
    _, ranges, counts = panels(operand)
    assert ranges.get_xscale() == counts.get_xscale() == "asinh"
    assert "linear to ±0.05" in ranges.get_xlabel()
    assert panels(made(0.5))[1].get_xscale() == "linear"
    inside = [ranges.transData.transform((x, 0))[0] for x in (-0.05, 0.05, -1.0, 1.0)]
    assert inside[1] - inside[0] > 0.2 * (inside[3] - inside[2])


def lines(panel):
    """Where vertical lines stand."""
    return sorted(line.get_xdata()[0] for line in panel.lines)


def test_lines_stand_at_the_clips():
    _, _, counts = panels(made(0.25, 0.5, 1.0))
    assert lines(counts) == [-1.0, -0.5, -0.25, 0.25, 0.5, 1.0]


def test_lines_of_groups_stand_at_the_median(everything):
    operand = made(0.4, groups=5)
    _, ranges, counts = panels(operand)
    np.testing.assert_allclose(lines(counts), [-0.5, 0.5])
    assert "median over 5 groups" in ranges.get_xlabel()
    spans = [np.ptp(path.vertices[:, 0]) for c in ranges.collections for path in c.get_paths()]
    np.testing.assert_allclose(max(spans), 1.2)  # the widest, thin
    assert panels(everything)[1].get_xlabel() == ""


def test_counts_have_a_logarithmic_axis_and_are_those_of_the_bars():
    operand = made(0.5)
    _, _, counts = panels(operand)
    assert counts.get_yscale() == "log"
    heights = [patch.get_height() for patch in counts.patches]
    np.testing.assert_array_equal(heights, operand.bars.counts)
    np.testing.assert_allclose([p.get_x() for p in counts.patches], operand.bars.edges[:-1])


def test_rows_are_ordered_by_what_they_hold_and_the_best_is_bold():
    _, ranges, _ = panels(made(0.9, 0.3, 0.6))
    names = ["rule0", "rule1", "rule2"]
    rows = {t.get_text(): t for t in ranges.texts if t.get_text() in names}
    assert [rows[name].get_position()[1] for name in names] == [2, 0, 1]
    assert [rows[name].get_fontweight() for name in names] == ["normal", "normal", "bold"]
    texts = [text.get_text() for text in ranges.texts]
    assert {"-0.3", "0.3", "0.1 %", "1.00", "saturated", "SQNR dB"} <= set(texts)


def test_the_axis_shows_all_that_was_seen_and_clips_not_far_beyond():
    for width, high in ((0.5, 1.0), (1.2, 1.2), (50.0, 1.4)):
        _, ranges, _ = panels(made(width))
        left, right = ranges.get_xlim()
        assert -left == pytest.approx(right) == pytest.approx(1.04 * high, rel=0.01)


def test_a_constant_is_shown_in_the_middle():
    model = Model(tiny.product, {"w": jnp.ones((4, 2))})
    collected = collect(model, [(np.full((8, 4), 3.0, np.float32),)], qj.uniform_policy())
    report = calibration_report(collected.plan, collected.state, model.params, rules=[MIN_MAX])
    for one in report:
        assert_legible(one)
        left, right = panels(one)[1].get_xlim()
        assert left < one.low < right


def test_the_picture_is_written_in_the_size_that_its_rules_need(everything, tmp_path):
    from matplotlib.image import imread

    for operand, name in ((everything, "many.png"), (made(0.5), "one.png")):
        path = tmp_path / "new" / name
        plot_ranges(operand, path)
        raw = path.read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", raw[16:24])
        rows = plot.ROW * (len(operand.rules) - 0.4 + plot.HEAD)
        inches = plot.BELOW + rows + plot.COUNTS + plot.ABOVE
        assert width == plot.WIDTH * plot.DPI
        assert height == pytest.approx(inches * plot.DPI, abs=1)
        image = imread(path)[..., :3]
        assert 0.01 < np.mean(image.mean(axis=-1) < 0.9) < 0.4
        colored = np.ptp(image, axis=-1) > 0.2  # lines of the rules
        assert colored.any()
