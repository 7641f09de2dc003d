"""Heat maps: what is drawn is what was given, and drawing leaves no trace in matplotlib's global state."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pyarith.errors import InputError
from pyarith.plots import effects_figure, effects_panels


def effects(layers=6, heads=8, seed=0):
    rng = np.random.default_rng(seed)
    found = rng.normal(0, 0.004, (layers, heads))
    found[layers - 2, 1], found[layers - 1, heads - 1], found[0, 0] = -0.21, -0.06, 0.03
    return found, rng.normal(0, 0.3, layers)


def parts(figure):
    """The heat map's axes, the MLPs' axes and the colour bar's."""
    by_label = {axes.get_xlabel(): axes for axes in figure.axes}
    return by_label.get("head"), by_label.get("MLP"), next((a for a in figure.axes if "change" in a.get_ylabel()), None)


def outlined(axes):
    """(layer, head) of every outlined cell."""
    boxes = [path.get_extents() for collection in axes.collections for path in collection.get_paths()]
    return sorted((round((box.y0 + box.y1) / 2), round((box.x0 + box.x1) / 2)) for box in boxes)


def test_heat_map_shows_the_effects_in_percent_with_layers_downwards():
    heads, mlps = effects()
    figure = effects_figure(heads, mlps, title="Addition")
    map_axes, mlp_axes, bar = parts(figure)
    image = map_axes.images[0]
    np.testing.assert_allclose(image.get_array(), 100 * heads)
    assert map_axes.get_ylim()[0] > map_axes.get_ylim()[1]
    assert image.norm.vmin == -image.norm.vmax == pytest.approx(-21)
    assert image.cmap.name == "RdBu"  # red below 0
    assert all(tick.get_text().endswith("%") for tick in bar.get_yticklabels())
    assert figure.get_suptitle() == "Addition"
    widths = [bar.get_width() for bar in mlp_axes.patches]
    np.testing.assert_allclose(widths, 100 * mlps)
    assert [round(bar.get_y() + bar.get_height() / 2) for bar in mlp_axes.patches] == list(range(6))
    assert mlp_axes.get_ylim() == map_axes.get_ylim()
    assert mlp_axes.get_xlim()[0] == -mlp_axes.get_xlim()[1]


def test_colours_tell_the_sign():
    heads, mlps = np.array([[-0.2, 0.2, 0.0]]), np.array([-0.1])
    figure = effects_figure(heads, mlps)
    map_axes, mlp_axes, _ = parts(figure)
    lower, higher, none = map_axes.images[0].to_rgba(100 * heads)[0, :, :3]
    assert lower[0] > lower[2] and higher[2] > higher[0] and min(none) > 0.9
    red, _, blue, _ = mlp_axes.patches[0].get_facecolor()
    assert red > blue


@pytest.mark.parametrize(("threshold", "keys"), [(-0.05, [(4, 1), (5, 7)]), (-0.1, [(4, 1)]), (-0.5, [])])
def test_key_heads_are_outlined(threshold, keys):
    heads, mlps = effects()
    map_axes, _, _ = parts(effects_figure(heads, mlps, threshold=threshold))
    assert outlined(map_axes) == keys


def test_small_grids_show_numbers_and_large_ones_do_not():
    map_axes, _, _ = parts(effects_figure(*effects()))
    assert {"-21", "-6.0", "3.0"} <= {text.get_text() for text in map_axes.texts}
    map_axes, _, _ = parts(effects_figure(*effects(32, 32)))
    assert not map_axes.texts


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (6, 8), (12, 12), (32, 32), (80, 64), (4, 128)])
def test_every_size_gives_a_readable_picture(shape):
    figure = effects_figure(*effects(*shape) if min(shape) > 1 else (np.zeros(shape), np.zeros(shape[0])), title="t")
    width, height = figure.get_size_inches()
    assert 2.5 <= width <= 18 and 2.5 <= height <= 14
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in figure.axes:
        assert axes.get_window_extent(renderer).width > 4 and axes.get_window_extent(renderer).height > 20
        inside = figure.bbox.padded(2)
        for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()[1:-1]):
            if text.get_text():
                box = text.get_window_extent(renderer)
                assert inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1), text.get_text()
    map_axes, _, _ = parts(figure)
    boxes = [tick.get_window_extent(renderer) for tick in map_axes.get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_unknown_effects_are_grey_and_do_not_spoil_the_scale():
    heads, mlps = effects()
    heads[2], mlps[3] = np.nan, np.nan
    map_axes, _, _ = parts(effects_figure(heads, mlps))
    image = map_axes.images[0]
    assert image.norm.vmax == pytest.approx(21)
    red, green, blue, _ = image.to_rgba(np.ma.masked_invalid(100 * heads))[2, 0]
    assert red == green == blue < 0.9
    effects_figure(np.full((2, 2), np.nan), None).savefig("/dev/null", format="png")


def test_heads_or_mlps_alone():
    heads, mlps = effects()
    map_axes, mlp_axes, bar = parts(effects_figure(heads, None))
    assert map_axes and bar and mlp_axes is None
    map_axes, mlp_axes, bar = parts(effects_figure(None, mlps))
    assert mlp_axes and map_axes is None and bar is None


def test_panels_share_one_scale():
    panels = {"addition +": effects(seed=1), "division /": (2 * effects()[0], effects()[1]), "third": effects()}
    figure = effects_panels(panels, title="all")
    maps = [axes for axes in figure.axes if axes.get_xlabel() == "head"]
    assert [axes.get_title(loc="left") for axes in maps] == list(panels)
    assert {axes.images[0].norm.vmax for axes in maps} == {42.0}
    assert len({axes.get_xlim() for axes in figure.axes if axes.get_xlabel() == "MLP"}) == 1
    for axes, (heads, _) in zip(maps, panels.values(), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), 100 * heads)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: effects_figure(None, None), "at least one of the two"),
        (lambda: effects_figure(np.zeros(3), None), r"head_effects: expected \[n_layers, n_heads\], got shape \(3,\)"),
        (lambda: effects_figure(np.zeros((3, 2)), np.zeros(2)), r"mlp_effects: expected \[3\], got shape \(2,\)"),
        (lambda: effects_panels({}), "at least one panel"),
        (lambda: effects_panels({"x": (None, None)}), "panel 'x'"),
    ],
)
def test_wrong_shapes_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    code = f"""
import sys
import matplotlib
def settings():  # asking for the backend would import pyplot
    return {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()
import numpy as np
from pyarith.plots import effects_figure, effects_panels
effects_figure(np.zeros((2, 2)), np.zeros(2), title="x").savefig({str(tmp_path / "a.png")!r})
effects_panels({{"a": (np.zeros((2, 2)), np.zeros(2))}}).savefig({str(tmp_path / "b.png")!r})
assert settings() == before, "rcParams changed"
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
