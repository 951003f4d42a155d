"""What the figures of runs, simulations and studies share."""

import pytest

from fpo_train.report import figures


@pytest.mark.parametrize("columns", [1, 5, 9])
def test_a_legend_keeps_inside_its_figure_and_its_order_along_rows(columns):
    with figures.style():
        figure, (axes,) = figures.new_figure(width=8, height=3)
        names = [f"penalty number {n}" for n in range(9)]
        for name in names:
            axes.plot([0, 1], label=name)
        figures.legend_below(figure, axes, columns=columns)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    places = [(-round(text.get_window_extent().y0), text.get_window_extent().x0) for text in legend.get_texts()]
    order = [text.get_text() for _, text in sorted(zip(places, legend.get_texts(), strict=True), key=lambda p: p[0])]
    assert order == names
    assert len({x for _, x in places}) <= columns
