"""Files of predictions, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from app.callbacks.prediction_files import PredictionFileWriter, prediction_table
from app.runtime.errors import UserError


def test_dense_logits_become_palette_images(tmp_path: Path) -> None:
    logits = torch.randn(3, 4, 6, 5)
    files = PredictionFileWriter(tmp_path, classes=[None])
    for batch in logits.split(2):
        files.add(batch)
    files.close()
    paths = sorted((tmp_path / "predictions").iterdir())
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    for path, values in zip(paths, logits, strict=True):
        with Image.open(path) as image:
            assert image.mode == "P"
            assert np.array_equal(np.asarray(image), values.argmax(0).numpy())


def test_image_outputs_become_images_named_by_sample(tmp_path: Path) -> None:
    outputs = torch.rand(2, 3, 4, 4)
    files = PredictionFileWriter(tmp_path, names=["a/x.jpg", "y.png"])
    files.add(outputs)
    files.close()
    for name, expected in zip(("a/x.png", "y.png"), outputs, strict=True):
        with Image.open(tmp_path / "predictions" / name) as image:
            pixels = np.asarray(image).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(pixels, expected.numpy(), atol=0.5 / 255 + 1e-6)


def test_other_outputs_become_arrays_and_each_output_has_its_file(tmp_path: Path) -> None:
    volume, value, dense = torch.randn(3, 2, 4, 4, 4), torch.randn(3), torch.randn(3, 2, 4, 4)
    files = PredictionFileWriter(tmp_path, classes=["dense"], format="auto")
    files.add({"volume": volume, "more": (value,), "dense": dense})
    files.close()
    with np.load(tmp_path / "predictions_volume.npz") as arrays:
        assert np.array_equal(arrays["outputs"], volume.numpy())
    table = pd.read_csv(tmp_path / "predictions_more.0.csv")
    np.testing.assert_allclose(table["output"], value.numpy(), rtol=1e-6)
    assert len(list((tmp_path / "predictions_dense").iterdir())) == 3
    files = PredictionFileWriter(tmp_path / "npz", classes=[None], format="npz")
    files.add(dense)
    files.close()
    with np.load(tmp_path / "npz" / "predictions.npz") as arrays:
        assert np.array_equal(arrays["labels"], dense.argmax(1).numpy())


def test_prediction_table_of_regression_has_plain_columns() -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    columns = prediction_table(values, classes=False).columns
    assert list(columns) == ["sample", "output_0", "output_1"]
    assert prediction_table(values[:, 0], classes=False)["output"].tolist() == [1.0, 3.0]


def test_outputs_without_sample_dimension_are_skipped(tmp_path: Path) -> None:
    files = PredictionFileWriter(tmp_path)
    files.add({"values": torch.rand(3), "loss": torch.tensor(0.5), "nothing": None})
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["predictions_values.csv"]


def test_images_with_the_same_stem_do_not_overwrite_each_other(tmp_path: Path) -> None:
    files = PredictionFileWriter(tmp_path, names=["cat.jpg", "cat.png"])
    files.add(torch.rand(2, 1, 4, 4))
    files.close()
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == ["cat.jpg.png", "cat.png.png"]


def test_detections_become_a_row_for_each_box_in_pixels_of_files(tmp_path: Path) -> None:
    paths = ["a.png", "b.png", "c.png"]
    files = PredictionFileWriter(tmp_path, paths=paths, class_names=["circle", "rectangle"])
    # 100 x 40 pixels, scaled to 64 x 25.6 and padded to 64 x 64
    box = [6.4, 19.2 + 6.4, 32.0, 44.8]
    targets = {"size": torch.tensor([[40, 100]]), "frame": torch.tensor([[0, 19.2, 64, 44.8]])}
    labels, scores = torch.tensor([[1, 0, -1]]), torch.tensor([[0.9, 0.5, 0.0]])
    found = {"boxes": torch.tensor([[box, box, [0.0] * 4]]), "labels": labels, "scores": scores}
    nothing = found | {"labels": torch.full((1, 3), -1)}
    for outputs in (found, nothing, found):
        files.add(outputs, targets)
    assert files.close() == [tmp_path / "predictions.csv"]
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert [*table] == ["sample", "path", "label", "label_name", "score", "x1", "y1", "x2", "y2"]
    assert table["path"].tolist() == ["a.png", "a.png", "c.png", "c.png"]
    assert table["label_name"].tolist() == ["rectangle", "circle"] * 2
    np.testing.assert_allclose(table[["x1", "y1", "x2", "y2"]][:1], [[10, 10, 50, 40]], rtol=1e-5)
    with pytest.raises(UserError, match="format='png' does not fit boxes; allowed: auto, csv"):
        PredictionFileWriter(tmp_path, format="png").add(found, targets)
