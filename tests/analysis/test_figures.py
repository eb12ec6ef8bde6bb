"""Pictures: what is on them, shared scales, reproducible bytes, modules that cannot be drawn."""

import sys

import pytest
import torch

from builders import SHAPES, adapter_parts, make_adapter
from lora_merge.adapters.adapter import build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.analysis.compare import compare
from lora_merge.analysis.comparison_figure import draw_comparison
from lora_merge.analysis.figures import draw
from lora_merge.errors import LoraMergeError, OutputError
from lora_merge.files.pages.pictures import check_pictures, write_pictures
from lora_merge.files.tensor_file import TensorDict


def test_axes_have_titles_and_units_and_one_scale():
    spectra = [adapter_spectra(make_adapter(n, r=r, seed=r)) for n, r in (("one", 3), ("two", 6))]
    figure = draw(spectra)
    plots = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert len(plots) == 6
    assert all(a.get_title() and a.get_xlabel() for a in plots)
    for column in (1, 2):
        assert plots[column].get_xlim() == plots[3 + column].get_xlim()
        assert plots[column].get_ylim() == plots[3 + column].get_ylim()
    images = [a.images[0] for a in plots if a.images]
    assert len({(i.norm.vmin, i.norm.vmax) for i in images}) == 1
    medians = plots[2].lines[0].get_ydata()
    assert medians[-1] == pytest.approx(100)


def test_equal_input_gives_equal_files(tmp_path):
    spectra = [adapter_spectra(make_adapter("<b>", r=3))]
    for name in ("one", "two"):
        write_pictures(
            lambda: draw(spectra), svg=tmp_path / f"{name}.svg", png=tmp_path / f"{name}.png"
        )
    for kind in ("svg", "png"):
        one = (tmp_path / f"one.{kind}").read_bytes()
        assert one == (tmp_path / f"two.{kind}").read_bytes() and len(one) > 1000


def test_zero_and_damaged_modules_do_not_stop_a_picture(tmp_path):
    config, tensors = adapter_parts()
    keys = [f"base_model.model.{name}.lora_B.weight" for name in SHAPES]
    tensors[keys[0]] = tensors[keys[0]] * 0
    tensors[keys[1]] = torch.full_like(tensors[keys[1]], float("nan"))
    opened = build_adapter("a", parse_config(config, "a"), TensorDict(tensors))
    write_pictures(lambda: draw([adapter_spectra(opened)], "stable"), png=tmp_path / "a.png")
    dead = {k: t * 0 for k, t in adapter_parts()[1].items()}
    opened = build_adapter("dead", parse_config(config, "dead"), TensorDict(dead))
    write_pictures(lambda: draw([adapter_spectra(opened)]), png=tmp_path / "dead.png")


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    spectra = [adapter_spectra(make_adapter())]
    with pytest.raises(OutputError):
        write_pictures(lambda: draw(spectra), svg=tmp_path / "missing" / "a.svg")
    with pytest.raises(OutputError, match="does not exist"):
        check_pictures(None, tmp_path / "missing" / "a.svg")
    with pytest.raises(OutputError, match="is a directory"):
        check_pictures(tmp_path)
    check_pictures(None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LoraMergeError) as caught:
        draw(spectra)
    assert "lora-merge[plot]" in caught.value.remedy
    with pytest.raises(LoraMergeError, match="matplotlib"):
        check_pictures(tmp_path / "a.svg")
    check_pictures(None)


@pytest.mark.parametrize("count", [2, 5, 13])
def test_a_comparison_is_drawn_on_whole_scales_in_the_order_of_its_tree(count):
    adapters = [make_adapter(f"a{i}", r=3, seed=i // 2) for i in range(count)]
    comparison = compare(adapters)
    figure = draw_comparison(comparison)
    plots = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert len(plots) == (3 if count > 2 else 2)
    cosines, interference = (a.images[0] for a in plots[-2:])
    assert (cosines.norm.vmin, cosines.norm.vmax) == (-1, 1)
    assert interference.norm.vmin == 0 and interference.norm.vmax >= 2
    names = [label.get_text() for label in plots[-1].get_yticklabels()]
    order = [int(name[1:]) for name in names]
    assert sorted(order) == list(range(count))
    expected = comparison.total.cosine[order][:, order].numpy()
    assert cosines.get_array().data == pytest.approx(expected)
    assert bool(plots[-1].texts) == (count <= 12)
    if count > 2:
        twins = [order.index(i + 1) - order.index(i) for i in range(0, count - 1, 2)]
        assert {abs(step) for step in twins} == {1}  # the same seed: side by side
