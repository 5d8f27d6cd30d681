"""Starting from the weights of a file: which tensors are taken, and which files are understood."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app.runtime.errors import UserError
from app.training.checkpoint.checkpoint import Checkpoint, save_checkpoint
from app.training.checkpoint.convert_torch_file import find_state_dict
from app.training.checkpoint.initial_weights import (
    load_initial_weights,
    read_weights,
    strip_wrappers,
)
from app.training.checkpoint.rotation import BEST_CHECKPOINT, CHECKPOINT_DIR
from app.training.checkpoint.weights_file import WeightsFormat, find_weights_file, read_format

StateDict = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, num_classes)


def make_net(num_classes: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(num_classes)


def save_own(path: Path, model: nn.Module) -> Path:
    save_checkpoint(path, Checkpoint(None, model.state_dict(), {}, 1, [], None))
    return path


def save_foreign(path: Path, model: nn.Module) -> Path:
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (save_own, WeightsFormat.CHECKPOINT),
        (save_foreign, WeightsFormat.SAFETENSORS),
    ],
)
def test_read_weights_returns_tensors_of_each_format(
    tmp_path: Path, save: Callable[[Path, nn.Module], Path], kind: WeightsFormat
) -> None:
    model = make_net()
    file = save(tmp_path / "w.file", model)
    assert read_format(file) is kind
    read = read_weights(file)
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


def test_load_initial_weights_with_other_classes_leaves_out_the_last_layer(tmp_path: Path) -> None:
    source, model = make_net(2), make_net(5, seed=1)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = save_own(tmp_path / "a.safetensors", source)
    initial = load_initial_weights(model, file, [])
    for name, tensor in model.state_dict().items():
        expected = fresh if name.startswith("fc.") else source.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert initial.counts == {"taken": 7, "other shape": 2}
    assert len(initial.sha256) == 64
    assert f"initial weights: 7 taken, 2 other shape (tensors of {file}" in initial.describe()
    assert "other shape fc.weight: [2, 4] in the file, [5, 4] in the model" in initial.describe()


def test_load_initial_weights_lists_skipped_missing_and_unused(tmp_path: Path) -> None:
    source = make_net().state_dict()
    source["head.weight"] = source.pop("fc.weight")
    save_file(source, tmp_path / "w.safetensors")
    initial = load_initial_weights(make_net(), tmp_path / "w.safetensors", ["norm.running_*"])
    found = {tensor.name: str(tensor.match) for tensor in initial.tensors}
    assert found == {
        "features.weight": "taken",
        "features.bias": "taken",
        "norm.weight": "taken",
        "norm.bias": "taken",
        "norm.running_mean": "skipped",
        "norm.running_var": "skipped",
        "norm.num_batches_tracked": "taken",
        "fc.weight": "missing",
        "fc.bias": "taken",
        "head.weight": "unused",
    }


def test_load_initial_weights_that_fit_nothing_is_an_error(tmp_path: Path) -> None:
    file = save_foreign(tmp_path / "w.safetensors", nn.Linear(7, 7))
    with pytest.raises(UserError) as error:
        load_initial_weights(make_net(), file, [])
    assert str(error.value) == (
        f"init.weights='{file}': no tensor fits the model; the file has bias [7], weight [7, 7]; "
        "the model has features.weight [4, 3], features.bias [4], norm.weight [4], ..."
    )


def test_load_initial_weights_with_wrong_skip_names_the_nearest_part(tmp_path: Path) -> None:
    file = save_foreign(tmp_path / "w.safetensors", make_net())
    with pytest.raises(UserError, match=r"init.skip='feature' matches no tensor .*'features'\?"):
        load_initial_weights(make_net(), file, ["feature"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_strip_wrappers_removes_what_wrappers_add(prefix: str) -> None:
    own = make_net().state_dict()
    wrapped = {f"{prefix}{name}": tensor for name, tensor in own.items()}
    assert strip_wrappers(wrapped, own) == own


def test_strip_wrappers_keeps_names_that_fit_or_never_do() -> None:
    tensor = torch.zeros(1)
    own = {"module.a": tensor, "b": tensor}
    assert strip_wrappers({"module.a": tensor}, own).keys() == {"module.a"}
    assert strip_wrappers({"x.y.z": tensor}, own).keys() == {"x.y.z"}
    assert strip_wrappers({"a._orig_mod.b": tensor}, {"a.b": tensor}).keys() == {"a.b"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "args": None},
        lambda state: {"model_state_dict": state, "loss": torch.zeros(1)},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_find_state_dict_looks_into_common_wrappings(wrap: Callable[[StateDict], Any]) -> None:
    state = make_net().state_dict()
    assert find_state_dict(wrap(state)) == state


@pytest.mark.parametrize("content", [3, [torch.zeros(1)], {}, {"model": {}}, {"epoch": 1}])
def test_find_state_dict_without_tensors_is_an_error(content: Any) -> None:
    with pytest.raises(ValueError, match="it contains no state dict"):
        find_state_dict(content)


def test_find_weights_file_of_a_run_is_its_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_DIR).mkdir()
    file = save_own(tmp_path / CHECKPOINT_DIR / BEST_CHECKPOINT, make_net())
    assert find_weights_file(tmp_path) == find_weights_file(file) == file


def test_find_weights_file_refuses_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no weights")
    allowed = "allowed: a run folder, a checkpoint, a .pt or .safetensors file"
    problems = {
        "nope.txt": f"does not exist; {allowed}; did you mean 'note.txt'?",
        "note.txt": f"; {allowed}",
        "": "contains no checkpoint: no checkpoints/best.safetensors or last.safetensors",
    }
    for name, problem in problems.items():
        with pytest.raises(UserError) as error:
            find_weights_file(tmp_path / name)
        assert str(error.value).startswith("init.weights")
        assert str(tmp_path / name) in str(error.value)
        assert str(error.value).endswith(problem)
