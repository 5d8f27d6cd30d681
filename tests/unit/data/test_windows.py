"""Sliding windows and inference on windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from app.data.split import dataset_size
from app.data.windows import PatchInference, WindowDataset, reversed_sliding_window, sliding_window
from app.runtime.errors import UserError
from tests.support.toy_datasets import CountingDataset


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
def test_reversed_sliding_window_restores_input(
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


def test_sliding_window_is_row_major_and_last_window_ends_at_border() -> None:
    x = torch.arange(35).reshape(5, 7)
    corners = sliding_window(x, (2, 3), (2, 3))[:, 0, 0].tolist()
    rows, columns = (0, 2, 3), (0, 3, 4)
    assert corners == [7 * row + column for row, column in itertools.product(rows, columns)]


def test_sliding_window_of_input_size_gives_one_window() -> None:
    x = torch.rand(2, 4, 4)
    assert torch.equal(sliding_window(x, (4, 4), (1, 1)), x[None])


def test_reversed_sliding_window_averages_overlaps() -> None:
    windows = torch.tensor([[0.0, 0.0, 0.0], [6.0, 6.0, 6.0], [12.0, 12.0, 12.0]])
    # Windows start at 0, 2 and 3, and cover 0-2, 2-4 and 3-5.
    assert reversed_sliding_window(windows, (6,), (2,)).tolist() == [0, 0, 3, 9, 9, 12]


def test_reversed_sliding_window_accepts_other_leading_dimensions() -> None:
    windows = sliding_window(torch.rand(3, 8, 8), (4, 4), (2, 2))
    assert reversed_sliding_window(windows[:, :1], (8, 8), (2, 2)).shape == (1, 8, 8)


def test_reversed_sliding_window_sums_half_precision_in_float32() -> None:
    # 1024 windows, of 0 and 2 in turn, cover the middle; in bfloat16 256 + 1 is 256.
    values = torch.tensor([0.0, 2.0], dtype=torch.bfloat16).repeat(512)
    merged = reversed_sliding_window(values[:, None].expand(-1, 1024), (2047,), (1,))
    assert merged.dtype == torch.bfloat16
    assert merged[1023] == 1


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        ((6, 2), (1, 1), r"size=\[6, 2\] must be between 1 and the shape \[5, 5\]"),
        ((0, 2), (1, 1), r"size=\[0, 2\] must be between 1"),
        ((2, 2), (2, 3), r"stride=\[2, 3\] must be between 1 and the size \[2, 2\]"),
        ((2, 2), (0, 1), r"stride=\[0, 1\] must be between 1"),
        ((2, 2), (1,), r"stride=\[1\] must have a number for each of the 2 dimensions"),
        ((), (), r"must have a number for each of the 0 dimensions"),
        ((2, 2, 2, 2), (1, 1, 1, 1), r"for each of the 3 dimensions of \[3, 5, 5\]"),
    ],
)
def test_sliding_window_refuses_invalid_size_and_stride(
    window: Sequence[int], stride: Sequence[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_window(torch.zeros(3, 5, 5), window, stride)


@pytest.mark.parametrize(
    ("windows", "shape", "message"),
    [
        (torch.zeros(3, 2, 2), (4, 4), "3 windows, but .* make 4"),
        (torch.zeros(4, 2, 2, dtype=torch.int64), (4, 4), r"torch\.int64 cannot be averaged"),
        (torch.zeros(4, 2), (4, 4), r"shape=\[4, 4\] has too many dimensions"),
    ],
)
def test_reversed_sliding_window_refuses_windows_that_do_not_match(
    windows: Tensor, shape: Sequence[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reversed_sliding_window(windows, shape, (2, 2))


def test_windows_cuts_images_and_masks_at_same_positions() -> None:
    masks = torch.arange(2 * 35).reshape(2, 5, 7)
    dataset = WindowDataset(TensorDataset(masks.float()[:, None], masks), [2, 3], [2, 3])
    assert dataset_size(dataset) == 18
    for index in range(18):
        x, y = dataset[index]
        assert x.shape == (1, 2, 3)
        assert torch.equal(x[0].long(), y)
    expected = sliding_window(masks[1], (2, 3), (2, 3))
    assert torch.equal(torch.stack([dataset[9 + index][1] for index in range(9)]), expected)


def test_windows_keeps_label_of_sample() -> None:
    dataset = WindowDataset(TensorDataset(torch.zeros(3, 1, 8), torch.tensor([5, 6, 7])), [4], [4])
    assert [int(dataset[index][1]) for index in range(len(dataset))] == [5, 5, 6, 6, 7, 7]
    with pytest.raises(IndexError, match=r"window index 6 is out of range \(6 windows\)"):
        dataset[6]


def test_windows_refuses_samples_of_different_shapes() -> None:
    dataset = WindowDataset(
        CountingDataset([torch.zeros(1, 4, 4), torch.zeros(1, 6, 4)], [0, 1]), [4, 4], [4, 4]
    )
    with pytest.raises(
        UserError, match=r"sample 1 has shape \[1, 6, 4\], sample 0 has \[1, 4, 4\]"
    ):
        dataset[1]
    with pytest.raises(UserError, match="no samples"):
        WindowDataset(CountingDataset([], []), [4, 4], [4, 4])


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
def test_patch_inference_matches_monai(
    shape: tuple[int, ...], window: tuple[int, ...], overlap: float
) -> None:
    inferers = pytest.importorskip("monai.inferers", reason="the reference is MONAI")
    torch.manual_seed(0)
    convolution = nn.Conv2d if len(shape) == 2 else nn.Conv3d
    model = nn.Sequential(convolution(2, 4, 3, padding=1), nn.ReLU(), convolution(4, 3, 1))
    x = torch.rand(3, 2, *shape)
    with torch.no_grad():
        outputs = PatchInference(window, overlap, batch_size=5)(model, x)
        expected = inferers.sliding_window_inference(
            x, window, 4, model, overlap=overlap, mode="constant"
        )
    assert outputs.shape == (3, 3, *shape)
    # The same terms are summed in another order.
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


def test_patch_inference_passes_at_most_batch_size_windows_to_model() -> None:
    batch_sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        batch_sizes.append(len(x))
        return x

    x = torch.rand(2, 1, 10)
    assert torch.equal(PatchInference([5], 0.0, batch_size=3)(model, x), x)
    assert batch_sizes == [3, 1]


def test_patch_inference_rounds_stride_despite_floating_point_error() -> None:
    batch_sizes: list[int] = []

    def model(x: Tensor) -> Tensor:
        batch_sizes.append(len(x))
        return x

    # The stride is 2, though 20 * (1 - 0.9) is slightly less: windows start at 0, 2, ..., 20.
    PatchInference([20], 0.9, batch_size=100)(model, torch.rand(1, 1, 40))
    assert batch_sizes == [11]


def test_patch_inference_refuses_outputs_of_other_size() -> None:
    with pytest.raises(ValueError, match=r"gave an output of shape \[4, 1, 2, 2\]; allowed: \(4"):
        PatchInference([4, 4], 0.0)(nn.MaxPool2d(2), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"gave an output of shape \[4, 16\]"):
        PatchInference([4, 4], 0.0)(nn.Flatten(), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"windows of torch\.int64 cannot be averaged"):
        PatchInference([4, 4])(lambda x: x.long(), torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, r"overlap=1\.0 must be at least 0 and below 1"),
        ({"overlap": -0.1}, r"overlap=-0\.1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"size": [4, 0]}, r"size=\[4, 0\]"),
    ],
)
def test_patch_inference_refuses_arguments_out_of_range(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PatchInference(**({"size": [4, 4]} | options))


def test_patch_inference_refuses_inputs_with_other_number_of_dimensions() -> None:
    with pytest.raises(ValueError, match=r"needs inputs of shape \(N, C\) and 2 more dimensions"):
        PatchInference([4, 4])(nn.Identity(), torch.rand(1, 8, 8))
