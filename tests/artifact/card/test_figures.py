import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.cbook import is_math_text
from matplotlib.text import Text
from PIL import Image

from tests.processes import run_command
from tscnc_hf.artifact.card.figures import layer_figure, save_figure, short_names, training_figure
from tscnc_hf.artifact.card.formatting import format_kappa, format_percent
from tscnc_hf.artifact.card.robustness_figures import examples_figure


def report_dicts(names, seed=0, deficient=(), blocks=()):
    """Reports of a made-up model as the library writes them: one weight a name, three matrices in `blocks`."""
    weights, matrices = [], []
    for i, name in enumerate(names):
        zeros = 3600 + (37 * (i + seed)) % 400
        weights.append({"name": name, "shape": [64, 64], "numel": 4096, "zeros": zeros, "sparsity": zeros / 4096})
        for block in range(3 if name in blocks else 1):
            short = name in deficient and block == 0
            kappa = 10.0 + 3 * i + block + seed
            matrices.append(
                {"name": f"{name}[{block}]" if name in blocks else name, "shape": [64, 64], "sigma_max": 2.5,
                 "sigma_min": 0.0 if short else 2.5 / kappa, "condition_number": "inf" if short else kappa,
                 "effective_condition_number": kappa, "rank": 61 if short else 64, "full_rank": 64,
                 "dead_rows": 3 if short else 0, "stable_rank": 12.0, "cnc": 0.5}
            )  # fmt: skip
    kappas = sorted(row["effective_condition_number"] for row in matrices)
    total, zeros = 4096 * len(names), sum(row["zeros"] for row in weights)
    parameters = total + 1000
    sparsity = {"rows": weights, "prunable": total, "zeros": zeros, "sparsity": zeros / total}
    sparsity |= {"parameters": parameters, "parameter_zeros": zeros, "parameter_sparsity": zeros / parameters}
    spectrum = {"rows": matrices, "median_condition_number": kappas[len(kappas) // 2],
                "max_condition_number": "inf" if deficient else kappas[-1],
                "median_effective_condition_number": kappas[len(kappas) // 2],
                "max_effective_condition_number": kappas[-1], "rank_deficient": len(deficient)}  # fmt: skip
    return sparsity, spectrum


def vit_names(depth=4):
    parts = ("attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    return [f"vit.layers.{i}.{part}.weight" for i in range(depth) for part in parts] + ["classifier.weight"]


def resnet_names():
    return [f"resnet.encoder.stages.{s}.layers.{i}.convolution.weight" for s in range(4) for i in range(2)] + [
        "fc.weight"
    ]


def axes_of(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def markers(axes, marker):
    return [x for line in axes.lines if line.get_marker() == marker for x in line.get_xdata()]


@pytest.mark.parametrize("names", [vit_names(1), vit_names(6), resnet_names(), vit_names(20), ["fc.weight"]])
def test_one_bar_a_layer_as_long_as_its_sparsity(names):
    sparsity, spectrum = report_dicts(names)
    figure = layer_figure(sparsity, spectrum)
    bars = axes_of(figure, "zeros").patches
    widths = [bar.get_width() for bar in bars if bar.get_height() < 0.7]  # the bands are taller than the bars
    assert widths == pytest.approx([row["sparsity"] for row in sparsity["rows"]])
    labels = [tick.get_text() for tick in axes_of(figure, "condition").get_yticklabels()]
    assert labels == short_names(names)
    dots = markers(axes_of(figure, "condition"), "o")
    assert dots == [row["effective_condition_number"] for row in spectrum["rows"]]


def test_fused_layer_has_one_line_and_three_dots_and_the_rank_deficient_one_stands_out():
    names = vit_names(2)
    sparsity, spectrum = report_dicts(names, deficient=names[:1], blocks=names[:1])
    axes = axes_of(layer_figure(sparsity, spectrum), "condition")
    assert len(axes.get_yticks()) == len(names)
    assert len(markers(axes, "o")) == len(names) + 1 and markers(axes, "D") == [10.0]
    assert [text.get_text() for text in axes.texts] == ["rank 61/64, 1 of 3 blocks"]


def test_dense_twin_is_drawn_behind_and_named():
    names = vit_names(2)
    sparsity, spectrum = report_dicts(names)
    other = dict(zip(("sparsity", "spectrum"), report_dicts(names, seed=5), strict=True))
    figure = layer_figure(sparsity, spectrum, other)
    assert len(markers(axes_of(figure, "condition"), "o")) == 2 * len(names)
    words = " ".join(text.get_text() for text in figure.texts)
    before, after = (s["median_effective_condition_number"] for s in (other["spectrum"], spectrum))
    assert f"median effective condition number {format_kappa(after)} (dense: {format_kappa(before)})" in words
    assert format_percent(sparsity["sparsity"]) in words


def test_matrix_without_any_condition_number_is_named_not_drawn():
    sparsity, spectrum = report_dicts(vit_names(1))
    spectrum["rows"][2] |= {"effective_condition_number": "inf", "condition_number": "inf", "rank": 0}
    sparsity["rows"].pop()  # a layer that is measured but not pruned
    figure = layer_figure(sparsity, spectrum)
    assert [text.get_text() for text in axes_of(figure, "condition").texts] == ["all zero"]
    assert "not pruned" in [text.get_text() for text in axes_of(figure, "zeros").texts]
    figure.draw_without_rendering()


@pytest.mark.parametrize("depth", [1, 20])
def test_no_two_texts_overlap_and_none_is_cut(depth):
    names = vit_names(depth)
    figure = layer_figure(*report_dicts(names, deficient=names[1::3], blocks=names[::4]))
    figure.draw_without_rendering()
    kappa, zeros = axes_of(figure, "condition"), axes_of(figure, "zeros")
    texts = [*figure.texts, *kappa.texts, *zeros.texts, *kappa.get_yticklabels(), *figure.legends[0].get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_no_layer_is_an_error():
    empty = {"rows": [], "sparsity": 0.0, "parameter_sparsity": 0.0, "parameters": 0}
    with pytest.raises(ValueError, match="no layer to draw"):
        layer_figure(empty, {"rows": []})


def test_short_names_are_short_unique_and_in_order():
    assert short_names(["vit.layers.0.q.weight", "vit.layers.0.k.weight", "head.weight"]) == [
        "layers.0.q", "layers.0.k", "head",
    ]  # fmt: skip
    assert short_names(resnet_names())[:2] == ["stages.0.layers.0", "stages.0.layers.1"]
    clash = ["model.a.weight", "model.b.weight", "a.weight"]
    assert len(set(short_names(clash))) == 3
    assert short_names(["fc.weight"]) == ["fc"]
    assert max(map(len, short_names([f"a.{'long' * 20}.{i}.weight" for i in range(3)]))) <= 36


def test_numbers_say_no_more_than_is_true():
    assert [format_kappa(v) for v in ("inf", math.inf, None, 7.264, 1234.5, 1.5e7)] == [
        "∞", "∞", "n/a", "7.26", "1,234", "1.5e7",
    ]  # fmt: skip
    assert [format_percent(v) for v in (0.0, 1.0, 0.9, 0.9996, 0.0004, None)] == [
        "0.0 %", "100.0 %", "90.0 %", "99.96 %", "0.04 %", "n/a",
    ]  # fmt: skip


def test_training_figure_draws_what_was_logged():
    steps = range(10, 60, 10)
    log = [{"loss": 2.0 / s, "natural_loss": 1.0 / s, "cnc_loss": 0.5, "sparsity": s / 100, "learning_rate": 0.1,
            "step": s} for s in steps]  # fmt: skip
    log += [
        {"eval_accuracy": 0.9, "eval_robust_accuracy": 0.5, "eval_loss": 3.0, "step": 50},
        {"train_loss": 1.0, "step": 50},
    ]
    figure = training_figure(log)
    drawn = {axes.get_title(loc="left"): {line.get_label(): line for line in axes.lines} for axes in figure.axes}
    assert {title: set(lines) for title, lines in drawn.items()} == {
        "loss terms": {"loss", "natural", "cnc"},
        "accuracy": {"accuracy", "robust accuracy"},
        "sparsity": {"sparsity"},
    }
    assert list(drawn["loss terms"]["natural"].get_ydata()) == [1.0 / s for s in steps]
    assert list(drawn["accuracy"]["robust accuracy"].get_ydata()) == [0.5]


@pytest.mark.parametrize(
    "log", [[], [{"learning_rate": 0.1, "step": 1}], [{"loss": math.nan, "step": 1}], [{"loss": 1.0}]]
)
def test_nothing_to_draw_is_none(log):
    assert training_figure(log) is None


def test_png_is_written_whole_or_not_at_all(tmp_path):
    figure = layer_figure(*report_dicts(vit_names(2)))
    path = save_figure(figure, tmp_path / "figures" / "layers.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    before = path.read_bytes()

    class Broken:
        def savefig(self, target, **_):
            target.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_figure(Broken(), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["layers.png"]


@pytest.mark.parametrize("name", ["$x^{2$", "US$ to C$", "$", r"a\$b$", "two\nlines", "{}%^"])
def test_names_of_somebody_else_are_drawn_as_they_are(name, tmp_path):
    """None is taken for mathematics, which may be an error as late as the figure is written."""
    images = torch.rand(1, 3, 8, 8)
    log = [{"loss": 1.0, f"{name}_loss": 0.5, "step": step} for step in (1, 2)]
    figures = {
        "examples": examples_figure(images, images, [name], [name], "pgd-20", "linf", 0.1),
        "training": training_figure(log),
        "layers": layer_figure(*report_dicts([f"{name}.weight", "other.weight"])),
    }
    for key, figure in figures.items():
        save_figure(figure, tmp_path / f"{key}.png", photographs=True)
        texts = [text.get_text() for text in figure.findobj(Text)]
        shown = [text for text in texts if text.replace(r"\$", "$") == name.replace("\n", " ")]
        assert shown and not any(map(is_math_text, shown)), key


def test_few_colours_make_a_small_file_that_looks_the_same(tmp_path):
    figure = layer_figure(*report_dicts(vit_names(2)))
    small, whole = (save_figure(figure, tmp_path / f"{photos}.png", photos) for photos in (False, True))
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    with Image.open(small) as few, Image.open(whole) as all_colours:
        far = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(all_colours.convert("RGB"), int))
    assert far.max() <= 24 and far.mean() < 0.5  # of 255


def test_pyplot_is_not_imported():
    code = (
        "import sys; from tscnc_hf.artifact.card.figures import training_figure; "
        "assert 'matplotlib' not in sys.modules; "
        "training_figure([{'loss': 1.0, 'step': 1}]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    run_command([sys.executable, "-c", code])
