"""Heat maps: what is drawn is what was given, and drawing leaves no trace in matplotlib's global state."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pyarith.errors import InputError
from pyarith.plots import attention_figure, cosines_figure, effects_figure, effects_panels, knockout_figure


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


# knock-out curves, attention, cosines


def some_curve(draws=3, ks=(1, 5, 10)):
    rng = np.random.default_rng(0)

    def arm(n, low):
        return SimpleNamespace(accuracy=rng.uniform(low, low + 0.2, (n, len(ks))))

    arms = {"key": arm(1, 0.2), "random": arm(draws, 0.8), "same_layer": arm(draws, 0.5), "bottom": arm(1, 0.8)}
    return SimpleNamespace(ks=np.array(ks), arms=arms, n_prompts=40, all_ablated=(0.1, 0.0))


def some_mass(heads=("2.7", "3.3")):
    roles = ("operand_a", "operand_b", "operator", "first", "special", "other")
    mean = np.tile([0.5, 0.2, 0.1, 0.1, 0.0, 0.1], (len(heads), 1))
    return SimpleNamespace(heads=heads, roles=roles, mean=mean)


def some_cosines(layers=6, points=(2, 3, 5)):
    curves = {
        name: np.linspace(0, top, layers) for name, top in (("operand_a", 0.1), ("operand_b", 0.2), ("answer", 0.6))
    }
    return SimpleNamespace(mean=curves, spread={name: 0.1 + 0 * one for name, one in curves.items()}, points=points)


def no_text_outside_or_on_text(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    inside = figure.bbox.padded(2)
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        if axes.get_visible():
            texts += [axes._left_title, axes.xaxis.label, axes.yaxis.label]
    texts += [figure._suptitle] * (figure._suptitle is not None)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    for number, (text, box) in enumerate(boxes):
        assert inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1), text
        for other, beside in boxes[:number]:
            assert not box.overlaps(beside), (text, other)


def test_knockout_curves_show_the_mean_and_a_band_from_worst_to_best_draw():
    curve = some_curve()
    figure = knockout_figure({"addition +": curve}, title="t")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    key, random = lines["top k: key heads"], lines["random heads (mean and range of 3 draws)"]
    np.testing.assert_allclose(key.get_ydata(), 100 * curve.arms["key"].accuracy[0])
    np.testing.assert_allclose(random.get_ydata(), 100 * curve.arms["random"].accuracy.mean(0))
    assert lines["all heads ablated"].get_ydata()[0] == 10
    assert len(axes.collections) == 2, "bands for the two controls with draws"
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(100 * curve.arms["random"].accuracy.min())
    assert band.max() == pytest.approx(100 * curve.arms["random"].accuracy.max())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "10"]


def test_attention_bars_add_up_and_keep_their_colours():
    figure = attention_figure({"a": some_mass(), "b": some_mass(("12.22",))})
    first, second = figure.axes
    widths = np.array([bar.get_width() for bar in first.patches]).reshape(-1, 2)
    np.testing.assert_allclose(widths.sum(0), 100)
    assert [label.get_text() for label in second.get_yticklabels()] == ["12.22"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "operand A",
        "operand B",
        "operator",
        "first",
        "other",
    ]  # "special" gets nothing
    assert first.patches[0].get_facecolor() == second.patches[0].get_facecolor()


def test_cosines_mark_the_three_points():
    found = some_cosines()
    axes = cosines_figure({"addition +": found, "flat": some_cosines(points=None)}).axes
    answer = next(line for line in axes[0].lines if "answer" in line.get_label())
    np.testing.assert_allclose(answer.get_ydata(), found.mean["answer"])
    assert [line.get_xdata()[0] for line in axes[0].lines if line.get_linestyle() == ":"] == [2, 3, 5]
    assert "start 2, inflection 3, end 5" in axes[0].get_title(loc="left") and "flat" in axes[1].get_title(loc="left")


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
def test_new_pictures_have_no_text_on_text(panels):
    names = ["addition +", "subtraction -", "multiplication *", "division /"][:panels]
    no_text_outside_or_on_text(knockout_figure({name: some_curve(10) for name in names}, title="a model: knock-out"))
    no_text_outside_or_on_text(attention_figure({name: some_mass() for name in names}, title="a model: attention"))
    points = (113, 118, 128)
    no_text_outside_or_on_text(cosines_figure({name: some_cosines(130, points) for name in names}, title="a model"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: knockout_figure({}), "curves: expected at least one"),
        (
            lambda: knockout_figure({"x": SimpleNamespace(**vars(some_curve()) | {"ks": [1]})}),
            r"expected accuracy \[draw, 1\]",
        ),
        (lambda: attention_figure({}), "masses: expected at least one"),
        (
            lambda: attention_figure({"x": SimpleNamespace(**vars(some_mass()) | {"heads": ("1.1",)})}),
            r"shape \(1, 6\)",
        ),
        (lambda: cosines_figure({}), "cosines: expected at least one"),
    ],
)
def test_new_pictures_refuse_wrong_input(call, words):
    with pytest.raises(InputError, match=words):
        call()
