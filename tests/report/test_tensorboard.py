"""What TensorBoard gets, read back with its own reader."""

import io

import numpy as np
import pytest
from PIL import Image
from report_pages import FIGURES, everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lit_rlhf.report import Plot, Series, lines
from lit_rlhf.report.draw import draw
from lit_rlhf.report.raster import raster
from lit_rlhf.report.style import LIGHT, LIGHT_COLOURS
from lit_rlhf.report.tensorboard import add_report, publish, read_curves


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_figures_are_images_and_tables_are_text(tmp_path):
    writer = SummaryWriter(tmp_path)
    add_report(writer, everything(), 7)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == [f"report/Figures/{figure.title}" for figure in FIGURES]
    image = events.Images("report/Figures/Scores")[0]
    assert image.step == 7 and Image.open(io.BytesIO(image.encoded_image_string)).width == 2 * 380
    (table,) = (tag for tag in tags["tensors"] if "Checks" in tag)
    text = events.Tensors(table)[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| check | status | value | why |" and "0.50 &#40;0.40 to 0.60&#41;" in text and "<script" not in text


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_the_image_has_the_drawings_size_and_colours(figure):
    drawing = draw(figure)
    image = raster(drawing)
    assert image.shape == (round(drawing.height * 2), 760, 3) and image.dtype == np.uint8
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_a_line_is_where_the_svg_has_it():
    # as in test_figures: (5, 0.5) lies at 204, 106, here at twice that
    image = raster(draw(lines("t", "x", "y", {"a": [(0, 0.0), (5, 0.5), (10, 1.0)]})))
    assert image[212, 408].tolist() == rgb(LIGHT_COLOURS[0]) and image[212, 600].tolist() in (rgb(LIGHT["rule"]), rgb(LIGHT["card"]))


def test_dashes_leave_gaps():
    figure = Plot("t", "x", "y", [Series("a", [0, 10], [0.5, 0.5], kind="dashed"), Series("b", [0, 10], [0.0, 1.0])])
    drawing = draw(figure)
    height = next(mark.at[0][1] for mark in drawing.marks if mark.style == "dashed0" and mark.at[0][0] > 30)
    row = raster(drawing)[round(height * 2), 100:700]
    blue = (row == rgb(LIGHT_COLOURS[0])).all(axis=1).mean()
    assert 0.4 < blue < 0.7  # 5 on, 4 off: 0.56


def test_curves_are_read_back(tmp_path):
    writer = SummaryWriter(tmp_path / "version_0")
    for step in range(3):
        writer.add_scalar("train/loss", step / 2, step)
    writer.close()
    assert read_curves(tmp_path) == {"train/loss": [(0, 0.0), (1, 0.5), (2, 1.0)]}
    assert read_curves(tmp_path / "none") == {}


def test_publishing_twice_leaves_one_event_file(tmp_path):
    (tmp_path / "events.out.tfevents.1.of_another_run").write_bytes(b"")
    for _ in range(2):
        assert publish(everything(), tmp_path) == tmp_path / "report.html"
    assert len(list(tmp_path.glob("events.*.report"))) == 1 and len(list(tmp_path.glob("events.*"))) == 2
    events = EventAccumulator(str(next(tmp_path.glob("events.*.report"))))
    events.Reload()
    assert len(events.Tags()["images"]) == len(FIGURES)
