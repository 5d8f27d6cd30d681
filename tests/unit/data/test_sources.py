"""Parts of data: windows, weights for drawing, caching, Hugging Face's datasets, shapes."""

from __future__ import annotations

import itertools
import math
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from app.data.cached import cached
from app.data.hugging_face import hugging_face
from app.data.sampling import BalancedClasses, ClassWeights, SampleWeights, draw
from app.data.shapes import shapes
from app.data.split import size
from app.data.windows import PatchInference, Windows, reversed_sliding_window, sliding_window
from app.runtime.errors import UserError

# ---- windows


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [
        ((13,), (5,), (3,)),
        ((9, 11), (4, 5), (4, 2)),
        ((5, 7, 6), (2, 7, 4), (1, 5, 3)),
        ((4, 5, 3, 6), (2, 3, 3, 4), (2, 2, 1, 3)),
    ],
)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_windows_put_together_are_what_was_cut(
    shape: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    leading: tuple[int, ...],
) -> None:
    x = torch.rand(*leading, *shape, dtype=torch.float64)
    windows = sliding_window(x, window, stride)
    counts = [math.ceil((n - w) / s) + 1 for n, w, s in zip(shape, window, stride, strict=True)]
    assert windows.shape == (math.prod(counts), *leading, *window)
    # Sums of up to eight equal values, divided by their number: rounded in the last digit.
    torch.testing.assert_close(reversed_sliding_window(windows, shape, stride), x)


def test_windows_come_row_by_row_and_the_last_ends_at_the_border() -> None:
    x = torch.arange(35).reshape(5, 7)
    corners = sliding_window(x, (2, 3), (2, 3))[:, 0, 0].tolist()
    rows, columns = (0, 2, 3), (0, 3, 4)
    assert corners == [7 * row + column for row, column in itertools.product(rows, columns)]


def test_a_window_of_the_whole_is_one_window() -> None:
    x = torch.rand(2, 4, 4)
    assert torch.equal(sliding_window(x, (4, 4), (1, 1)), x[None])


def test_overlaps_are_averaged() -> None:
    windows = torch.tensor([[0.0, 0.0, 0.0], [6.0, 6.0, 6.0], [12.0, 12.0, 12.0]])
    # Windows from 0, 2 and 3: places 0-2, 2-4, 3-5.
    assert reversed_sliding_window(windows, (6,), (2,)).tolist() == [0, 0, 3, 9, 9, 12]


def test_other_leading_dimensions_come_back() -> None:
    windows = sliding_window(torch.rand(3, 8, 8), (4, 4), (2, 2))
    assert reversed_sliding_window(windows[:, :1], (8, 8), (2, 2)).shape == (1, 8, 8)


def test_half_precision_is_summed_in_single() -> None:
    # 1024 windows over the place in the middle, 0 and 2 in turn; in bfloat16 256 + 1 is 256.
    values = torch.tensor([0.0, 2.0], dtype=torch.bfloat16).repeat(512)
    whole = reversed_sliding_window(values[:, None].expand(-1, 1024), (2047,), (1,))
    assert whole.dtype == torch.bfloat16
    assert whole[1023] == 1


@pytest.mark.parametrize(
    ("window", "stride", "said"),
    [
        ((6, 2), (1, 1), r"size=\[6, 2\] must be between 1 and the shape \[5, 5\]"),
        ((0, 2), (1, 1), r"size=\[0, 2\] must be between 1"),
        ((2, 2), (2, 3), r"stride=\[2, 3\] must be between 1 and the size \[2, 2\]"),
        ((2, 2), (0, 1), r"stride=\[0, 1\] must be between 1"),
        ((2, 2), (1,), r"stride=\[1\] must have a number for each of the 2 dimensions"),
        ((), (), r"must have a number for each of the 0 dimensions"),
        ((2, 2, 2, 2), (1, 1, 1, 1), r"has more dimensions than shape \[3, 5, 5\]"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    window: Sequence[int], stride: Sequence[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        sliding_window(torch.zeros(3, 5, 5), window, stride)


@pytest.mark.parametrize(
    ("windows", "shape", "said"),
    [
        (torch.zeros(3, 2, 2), (4, 4), "3 windows, but .* make 4"),
        (torch.zeros(4, 2, 2, dtype=torch.int64), (4, 4), r"torch\.int64 cannot be averaged"),
        (torch.zeros(4, 2), (4, 4), r"shape=\[4, 4\] has too many dimensions"),
    ],
)
def test_windows_that_do_not_make_the_whole_are_refused(
    windows: Tensor, shape: Sequence[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        reversed_sliding_window(windows, shape, (2, 2))


def test_windows_of_images_and_masks_are_cut_alike() -> None:
    masks = torch.arange(2 * 35).reshape(2, 5, 7)
    dataset = Windows(TensorDataset(masks.float()[:, None], masks), [2, 3], [2, 3])
    assert size(dataset) == 18
    for index in range(18):
        x, y = dataset[index]
        assert x.shape == (1, 2, 3)
        assert torch.equal(x[0].long(), y)
    cut = sliding_window(masks[1], (2, 3), (2, 3))
    assert torch.equal(torch.stack([dataset[9 + index][1] for index in range(9)]), cut)


def test_windows_keep_the_label_of_their_sample() -> None:
    dataset = Windows(TensorDataset(torch.zeros(3, 1, 8), torch.tensor([5, 6, 7])), [4], [4])
    assert [int(dataset[index][1]) for index in range(len(dataset))] == [5, 5, 6, 6, 7, 7]
    with pytest.raises(IndexError, match="window 6 of 6"):
        dataset[6]


class Samples(Dataset[tuple[Tensor, Any]]):
    """Counts how often it is read."""

    def __init__(self, inputs: Sequence[Any], targets: Sequence[Any]) -> None:
        self.samples, self.reads = list(zip(inputs, targets, strict=True)), 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        self.reads += 1
        return self.samples[index]


def test_windows_of_samples_of_two_shapes_are_refused() -> None:
    dataset = Windows(Samples([torch.zeros(1, 4, 4), torch.zeros(1, 6, 4)], [0, 1]), [4, 4], [4, 4])
    with pytest.raises(
        UserError, match=r"sample 1 has shape \[1, 6, 4\], sample 0 has \[1, 4, 4\]"
    ):
        dataset[1]
    with pytest.raises(UserError, match="no samples"):
        Windows(Samples([], []), [4, 4], [4, 4])


# ---- patch inference


@pytest.mark.parametrize(
    ("shape", "window", "overlap"),
    [
        ((17, 23), (8, 8), 0.25),
        ((16, 16), (8, 4), 0.0),
        ((20, 33), (20, 10), 0.5),
        ((5, 19), (8, 8), 0.25),  # smaller than a window
        ((9, 8, 11), (4, 5, 6), 0.5),
    ],
)
def test_patch_inference_agrees_with_monai(
    shape: tuple[int, ...], window: tuple[int, ...], overlap: float
) -> None:
    inferers = pytest.importorskip("monai.inferers", reason="MONAI is what this compares with")
    torch.manual_seed(0)
    convolution = nn.Conv2d if len(shape) == 2 else nn.Conv3d
    model = nn.Sequential(convolution(2, 4, 3, padding=1), nn.ReLU(), convolution(4, 3, 1))
    x = torch.rand(3, 2, *shape)
    with torch.no_grad():
        found = PatchInference(window, overlap, batch_size=5)(model, x)
        expected = inferers.sliding_window_inference(
            x, window, 4, model, overlap=overlap, mode="constant"
        )
    assert found.shape == (3, 3, *shape)
    # The same sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_patch_inference_gives_the_model_no_more_windows_than_told() -> None:
    seen: list[int] = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    x = torch.rand(2, 1, 10)
    assert torch.equal(PatchInference([5], 0.0, batch_size=3)(model, x), x)
    assert seen == [3, 1]


def test_patch_inference_steps_by_the_exact_share() -> None:
    seen: list[int] = []

    def model(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    # A step of 2, though 20 * (1 - 0.9) is a little less: starts 0, 2, ..., 20.
    PatchInference([20], 0.9, batch_size=100)(model, torch.rand(1, 1, 40))
    assert seen == [11]


def test_patch_inference_refuses_outputs_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"became an output of shape \[4, 1, 2, 2\]; allowed: \(4"):
        PatchInference([4, 4], 0.0)(nn.MaxPool2d(2), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"became an output of shape \[4, 16\]"):
        PatchInference([4, 4], 0.0)(nn.Flatten(), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"outputs of torch\.int64 cannot be averaged"):
        PatchInference([4, 4])(lambda x: x.long(), torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"overlap": 1.0}, r"overlap=1\.0 must be at least 0 and below 1"),
        ({"overlap": -0.1}, r"overlap=-0\.1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"size": [4, 0]}, r"size=\[4, 0\]"),
    ],
)
def test_patch_inference_refuses_wrong_numbers(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PatchInference(**({"size": [4, 4]} | options))


def test_patch_inference_refuses_inputs_of_other_dimensions() -> None:
    with pytest.raises(ValueError, match=r"needs inputs of shape \(N, C\) and 2 more dimensions"):
        PatchInference([4, 4])(nn.Identity(), torch.rand(1, 8, 8))


# ---- weights


def test_balanced_draws_each_class_alike() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    drawn = labels[draw(BalancedClasses()(labels), 30_000, seed=0)].bincount()
    # Five standard deviations of a count of 10,000 of 30,000: 5 * sqrt(30,000 * 1/3 * 2/3).
    assert (drawn[[0, 1, 3]] - 10_000).abs().max() < 410
    assert drawn[2] == 0


def test_class_weights_are_those_of_the_labels() -> None:
    weights = ClassWeights([1, 0.5, 0])(torch.tensor([2, 0, 1, 1]))
    assert weights.dtype == torch.float64
    assert weights.tolist() == [0, 1, 0.5, 0.5]


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 4.0, 0.0])
    drawn = draw(weights, 50_000, seed=3)
    assert drawn.dtype == torch.int64
    expected = weights / weights.sum() * 50_000
    counts, drawable = drawn.bincount(minlength=7), weights > 0
    assert counts[~drawable].sum() == 0
    chi_square = ((counts - expected)[drawable].square() / expected[drawable]).sum()
    assert chi_square < 16.27  # exceeded once in a thousand times, for three degrees of freedom


def test_a_sample_of_weight_0_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = torch.tensor([0.0, 0.25], dtype=torch.float64)  # where samples begin
    monkeypatch.setattr(torch, "rand", lambda *_, **__: shares)
    assert draw(torch.tensor([0.0, 1.0, 0.0, 3.0]), 2, seed=0).tolist() == [1, 3]


def test_draws_depend_on_the_seed_alone() -> None:
    weights = torch.rand(100)
    first = draw(weights, 50, seed=1)
    torch.rand(7)
    assert torch.equal(draw(weights, 50, seed=1), first)
    assert not torch.equal(draw(weights, 50, seed=2), first)
    before = torch.get_rng_state()
    draw(weights, 50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_from_more_samples_than_multinomial_takes() -> None:
    weights = torch.zeros(2**24 + 5, dtype=torch.float32)
    weights[-2:] = 1
    assert draw(weights, 100, seed=0).unique().tolist() == [2**24 + 3, 2**24 + 4]


@pytest.mark.parametrize("text", ["0.5\n1\n2\n", "weight\n0.5\n1\n2\n", "0.5\n1\n2"])
def test_sample_weights_are_read_from_a_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "weights.csv"
    path.write_text(text)
    assert SampleWeights(str(path))(torch.zeros(3)).tolist() == [0.5, 1, 2]


def test_sample_weights_are_read_from_an_array(tmp_path: Path) -> None:
    path = tmp_path / "weights.npy"
    np.save(path, np.array([3, 0, 1], np.int32))
    weights = SampleWeights(str(path))(torch.zeros(3))
    assert weights.dtype == torch.float64
    assert weights.tolist() == [3, 0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1\n2\n", "2 weights for 3 samples"),
        ("1\n-2\n3\n", "-2 at 1; allowed: finite numbers from 0 on"),
        ("1\ninf\n3\n", "inf at 1"),
        ("0\n0\n0\n", "all are 0"),
        ("1\nx\n3\n", "line 2: x is no number"),
        ("1\n\n3\n", "line 2: nan is no number"),
        ("1,2\n3,4\n5,6\n", "2 columns; allowed: 1"),
        ("", "cannot be read as weights"),
    ],
)
def test_sample_weights_that_cannot_be_used_are_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "weights.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        SampleWeights(str(path))(torch.zeros(3))


def test_sample_weights_of_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "weights.txt").write_text("1")
    for name, said in {
        "square.npy": r"no array of numbers of shape \(N,\)",
        "damaged.npy": "cannot be read as weights",
        "weights.txt": r"allowed: \.csv, \.npy",
        "none.csv": "is not a file",
    }.items():
        with pytest.raises(UserError, match=said):
            SampleWeights(str(tmp_path / name))(torch.zeros(2))


def test_class_weights_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UserError, match="-1 at 0"):
        ClassWeights([-1, 2])
    with pytest.raises(UserError, match="weights has 2 numbers, but the samples have the label 2"):
        ClassWeights([1, 2])(torch.tensor([0, 2]))
    with pytest.raises(UserError, match="weights of the classes that have samples: all are 0"):
        ClassWeights([1, 0])(torch.tensor([1, 1]))


@pytest.mark.parametrize(
    "labels", [torch.rand(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, -1])]
)
def test_what_is_no_label_is_refused(labels: Tensor) -> None:
    with pytest.raises(UserError, match=r"are no labels|is negative"):
        BalancedClasses()(labels)


# ---- cached


def samples(count: int = 5) -> Samples:
    return Samples([np.full((2, 3), i, np.float32) for i in range(count)], range(count))


def test_cached_reads_every_sample_once() -> None:
    dataset = samples()
    x, y = cached(dataset).tensors
    assert dataset.reads == 5
    assert (x.shape, x.dtype, x[:, 0, 0].tolist()) == ((5, 2, 3), torch.float32, [0, 1, 2, 3, 4])
    assert (y.dtype, y.tolist()) == (torch.int64, [0, 1, 2, 3, 4])


def test_cached_reads_alike_with_workers() -> None:
    for one, other in zip(
        cached(samples(), num_workers=2).tensors, cached(samples()).tensors, strict=True
    ):
        assert torch.equal(one, other)


def test_cached_leaves_the_randomness_as_it_was() -> None:
    before = torch.get_rng_state()
    cached(samples())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_file_is_read_in_place_of_the_dataset(tmp_path: Path) -> None:
    file = str(tmp_path / "folder" / "cache.npz")
    first = cached(samples(), file).tensors
    again = samples()
    second = cached(again, file).tensors
    assert again.reads == 0
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["cache.npz"]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "array", "names", "objects"])
def test_a_damaged_cache_file_is_refused(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "cache.npz"
    cached(samples(), str(file))
    content = file.read_bytes()
    flipped = content.index(np.full(6, 1, np.float32).tobytes())
    if damage == "array":
        with file.open("wb") as opened:
            np.save(opened, np.zeros(5))
    elif damage == "names":
        np.savez(file, inputs=np.zeros(5))
    elif damage == "objects":
        np.savez(file, inputs=np.array([{}] * 5), targets=np.zeros(5))
    else:
        bit = content[:flipped] + bytes([content[flipped] ^ 1]) + content[flipped + 1 :]
        file.write_bytes({"cut": content[:-30], "empty": b"", "bit": bit}[damage])
    with pytest.raises(UserError, match=r"cache\.npz is damaged: .*delete it"):
        cached(samples(), str(file))


def test_a_cache_file_of_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "cache.npz")
    cached(samples(5), file)
    with pytest.raises(UserError, match=r"inputs of shape \[5, 2, 3\], but the dataset has 6"):
        cached(samples(6), file)


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        ([torch.zeros(2, 3), torch.zeros(3, 2)], [0, 1], r"sample 1: inputs have shape \[3, 2\]"),
        ([torch.zeros(2), torch.zeros(2)], [0, 0.5], r"sample 1: targets .*torch\.float32"),
        ([Image.new("L", (2, 2))], [0], r"sample 0 \(Image, int\) cannot become tensors"),
        ([], [], "no samples"),
    ],
)
def test_samples_that_are_not_alike_are_refused(
    inputs: list[Any], targets: list[Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        cached(Samples(inputs, targets))


# ---- Hugging Face


def picture(value: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (6, 4), value if mode == "L" else (value, 0, 255))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("datasets", reason="needs the extra hugging_face")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def saved(tmp_path: Path, library: Any) -> str:
    """Two splits, as `save_to_disk` writes them."""
    names = library.ClassLabel(names=["cat", "dog"])
    columns: dict[str, Any] = {"image": library.Image(), "label": names}
    features = library.Features(
        columns | {"mask": library.Image(), "score": library.Value("float32")}
    )
    rows = {
        "image": [picture(value) for value in (1, 2, 3)],
        "label": [0, 1, 1],
        "mask": [picture(value, "L") for value in (0, 1, 2)],
        "score": [0.5, 1.5, 2.5],
    }
    train = library.Dataset.from_dict(rows, features=features)
    path = str(tmp_path / "saved")
    library.DatasetDict(train=train, test=train.select([2])).save_to_disk(path)
    return path


def test_saved_images_become_bytes_and_labels(saved: str) -> None:
    dataset = hugging_face(saved, "train")
    x, y = dataset[1]
    assert (x.shape, x.dtype) == ((3, 4, 6), torch.uint8)
    assert x[:, 0, 0].tolist() == [2, 0, 255]
    assert type(y) is int
    assert y == 1
    assert (size(dataset), size(hugging_face(saved, "test"))) == (3, 1)


def test_saved_labels_are_known_without_reading_samples(saved: str) -> None:
    dataset = hugging_face(saved, "train")
    assert dataset.classes == ["cat", "dog"]
    assert dataset.targets == [0, 1, 1]


def test_images_are_converted_and_transformed(saved: str) -> None:
    steps = {"crop": lambda x: x[:, :2, :2]}
    x, _ = hugging_face(saved, "train", image_mode="L", transforms=steps)[0]
    assert x.shape == (1, 2, 2)


def test_images_as_targets_become_masks(saved: str) -> None:
    dataset = hugging_face(saved, "train", targets="mask")
    mask = dataset[2][1]
    assert (mask.shape, mask.dtype, int(mask[0, 0])) == ((4, 6), torch.int64, 2)
    assert dataset.targets is None
    with pytest.raises(UserError, match="a mask of 3 channels; allowed: 1"):
        hugging_face(saved, "train", inputs="mask", targets="image")[0]


def test_numbers_become_tensors(saved: str) -> None:
    x, y = hugging_face(saved, "train", inputs="score", targets="score")[1]
    assert x.item() == y.item() == 1.5


def test_lists_become_tensors_and_one_saved_split_is_enough(tmp_path: Path, library: Any) -> None:
    path = str(tmp_path / "rows")
    library.Dataset.from_dict({"x": [[1.0, 2.0]], "y": [4]}).save_to_disk(path)
    dataset = hugging_face(path, "train", inputs="x", targets="y")
    x, y = dataset[0]
    assert (x.tolist(), y) == ([1, 2], 4)
    assert (dataset.targets, dataset.classes) == ([4], None)
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        hugging_face(path, "test", inputs="x", targets="y")


def test_a_file_of_rows_is_read(tmp_path: Path, library: Any) -> None:  # noqa: ARG001
    (tmp_path / "rows.csv").write_text("a,label\n1.5,0\n2.5,1\n")
    dataset = hugging_face(str(tmp_path / "rows.csv"), "train", inputs="a")
    assert [(x.item(), y) for x, y in (dataset[0], dataset[1])] == [(1.5, 0), (2.5, 1)]


def test_a_folder_of_images_is_read(tmp_path: Path, library: Any) -> None:  # noqa: ARG001
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        picture(7).save(tmp_path / "pets" / "train" / name / "1.png")
    dataset = hugging_face(str(tmp_path / "pets"), "train")
    assert dataset.classes == ["cat", "dog"]
    assert dataset[1][0][0, 0, 0] == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "tets"}, "no split 'tets'; it has: test, train"),
        (
            {"inputs": "img"},
            "no column 'img'; it has: image, label, mask, score; did you mean 'image'",
        ),
        ({"targets": "labels"}, "no column 'labels'; .*did you mean 'label'"),
        ({"image_mode": "RBG"}, "image_mode='RBG' is not known; allowed: .*did you mean 'RGB'"),
    ],
)
def test_what_saved_data_do_not_have_is_named(
    saved: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        hugging_face(saved, **({"split": "train"} | options))


def test_a_column_of_text_is_refused(tmp_path: Path, library: Any) -> None:
    path = str(tmp_path / "rows")
    library.Dataset.from_dict({"x": [1.0], "y": ["cat"]}).save_to_disk(path)
    with pytest.raises(UserError, match=r"sample 0, column 'y' is of type str; allowed: images"):
        hugging_face(path, "train", inputs="x", targets="y")[0]


def test_a_label_without_a_value_is_refused(tmp_path: Path, library: Any) -> None:
    path = str(tmp_path / "rows")
    library.Dataset.from_dict({"x": [1.0, 2.0], "y": [1, None]}).save_to_disk(path)
    with pytest.raises(UserError, match="sample 1 has no value in 'y'"):
        hugging_face(path, "train", inputs="x", targets="y")


def test_an_image_that_is_damaged_is_named(tmp_path: Path, library: Any) -> None:
    path = str(tmp_path / "rows")
    columns: dict[str, Any] = {"image": library.Image(), "label": library.Value("int64")}
    rows = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    features = library.Features(columns)
    library.Dataset.from_dict(rows, features=features).save_to_disk(path)
    with pytest.raises(UserError, match="sample 0 cannot be read"):
        hugging_face(path, "train")[0]


def test_a_hub_out_of_reach_is_one_line_soon(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.config, "HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens
    offline, start = library.config.HF_HUB_OFFLINE, time.monotonic()
    with pytest.raises(
        UserError, match=r"path='some/data' is no file .*cannot be reached"
    ) as caught:
        hugging_face("some/data", "train")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10
    assert offline == library.config.HF_HUB_OFFLINE


def test_folders_without_data_are_one_line(tmp_path: Path, library: Any) -> None:  # noqa: ARG001
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        hugging_face(str(tmp_path / "empty"), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [None, types.ModuleType("datasets")])
def test_the_extra_is_named_where_the_library_is_missing(
    monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None
) -> None:
    # None: not there. An empty module: what a folder of that name imports as.
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match=r'pip install -e "\.\[hugging_face\]"'):
        hugging_face("pets", "train")


# ---- shapes


def test_shapes_are_images_with_masks_of_three_classes() -> None:
    images, masks = shapes(200, size=32).tensors
    assert (images.shape, images.dtype) == ((200, 1, 32, 32), torch.float32)
    assert (masks.shape, masks.dtype) == ((200, 32, 32), torch.int64)
    assert 0 <= images.min() < images.max() <= 1
    shares = masks.flatten().bincount() / masks.numel()
    assert len(shares) == 3
    assert shares[1:].min() > 0.05
    assert shares[0] > 0.5


def test_shapes_depend_on_the_seed_alone() -> None:
    first = shapes(10, size=32, seed=4).tensors
    torch.rand(3)
    for one, other in zip(first, shapes(10, size=32, seed=4).tensors, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first[1], shapes(10, size=32, seed=5).tensors[1])


def test_shapes_without_noise_are_brighter_than_their_background() -> None:
    images, masks = shapes(50, size=32, noise=0.0).tensors
    images = images[:, 0]
    assert images[masks > 0].min() >= 0.5
    assert images[masks == 0].max() <= 0.3


def test_a_small_model_learns_shapes() -> None:
    torch.manual_seed(0)
    images, masks = shapes(32, size=32).tensors
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=4, dilation=4),
        nn.ReLU(),
        nn.Conv2d(16, 3, 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), masks).backward()
        optimizer.step()
    majority = (masks == 0).double().mean()
    accuracy = (model(images).argmax(1) == masks).double().mean()
    assert accuracy > majority + 0.05


@pytest.mark.parametrize("options", [{"count": 0}, {"size": 8}, {"noise": -1.0}])
def test_shapes_that_cannot_be_made_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed: at least 1, 16 and 0"):
        shapes(**({"count": 1} | options))
