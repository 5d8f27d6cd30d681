"""Models of timm by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from app.config.instantiate import Instantiator
from app.models.timm_models import published_input, timm_model
from app.runtime.errors import UserError
from tests.support.hostile_files import MaliciousPickle
from tests.support.published_weights import hub_folder, random_tensors, save_with_hash, sha256_of

__all__ = ["hub_folder"]
timm = pytest.importorskip("timm", reason="needs the extra timm")
TINY = "test_resnet"  # a model for tests, whose file on the hub has no hash in its name


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where timm reads a file or asks a hub by itself."""
    builder = timm.models._builder
    for name in ("load_state_dict_from_hf", "load_state_dict_from_url", "load_state_dict"):
        monkeypatch.setattr(builder, name, lambda *_, **__: pytest.fail("timm reads by itself"))


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18.a1_in1k", 32), ("vit_tiny_patch16_224", 32)],
)
def test_timm_model_equals_timm(name: str, size: int) -> None:
    fixed = {"img_size": size} if name.startswith("vit") else {}
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=7, in_chans=1, **fixed)
        model = timm_model(name, 7, in_channels=1, image_size=size)
        assert model(torch.rand(2, 1, size, size)).shape == (2, 7)
        assert timm_model(name, None)(torch.rand(2, 3, 224, 224)).shape == (2, 1)
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (expected, model)]
    assert shapes[0] == shapes[1]


def test_timm_model_passes_rates_and_pooling() -> None:
    with torch.device("meta"):
        model: Any = timm_model(
            "vit_tiny_patch16_224", 7, drop_path=0.2, dropout=0.3, global_pool="avg"
        )
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.head_drop.p == 0.3
    assert model.global_pool == "avg"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnt18"}, "name='resnt18' is not one of .*; did you mean 'resnet18', '"),
        ({"name": "hf_hub:evil/model"}, "is not one of"),
        ({"name": "hf-hub:timm/resnet18.a1_in1k"}, "is not one of"),
        ({"name": "local-dir:/tmp/model"}, "is not one of"),
        ({"name": "https://evil.example/resnet18"}, "is not one of"),
        ({"name": "../resnet18"}, "is not one of"),
        ({"name": "timm/resnet18"}, "is not one of"),
        ({"name": "resnet18.evil"}, "is not one of"),
        ({"weights": "a1_in1k"}, "does not exist for resnet18; allowed: DEFAULT, or null"),
        ({"name": "vgg11", "drop_path": 0.1}, "name='vgg11' cannot be built like this: TypeError"),
        ({"global_pool": "none"}, "name='resnet18' cannot be built like this: "),
    ],
)
def test_timm_model_refuses_arguments(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "." in arguments.get("name", "") or ":" in arguments.get("name", ""):
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("passed to timm"))
    with torch.device("meta"), pytest.raises(UserError, match=message):
        timm_model(**{"name": "resnet18", "num_classes": 7} | arguments)


@pytest.mark.parametrize(
    "name",
    [
        *("features_only", "checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"),
        *("pretrained_cfg_overlay", "pretrained_cfg.file", "exportable"),
    ],
)
def test_timm_model_passes_no_other_argument(name: str) -> None:
    node = {"_target_": "app.models.timm_models.timm_model", "name": TINY, "num_classes": 7}
    assert isinstance(Instantiator()("model", node), nn.Module)
    with pytest.raises(UserError, match="unexpected keyword argument"):
        Instantiator()("model", node | {name: "x"})


@pytest.mark.parametrize("target", ["timm.create_model", "timm.models.resnet18"])
def test_target_of_timm_is_refused(target: str) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        Instantiator()("model", {"_target_": target})


@pytest.mark.parametrize(("classes", "channels"), [(1000, 3), (7, 1)])
def test_weights_from_hub_need_their_hash(classes: int, channels: int, hub_folder: Path) -> None:
    tensors = random_tensors(timm.create_model(TINY).state_dict())
    file = hub_folder / "test_resnet.r160_in1k.safetensors"
    save_file(tensors, file)
    model = timm_model(TINY, classes, channels, weights="DEFAULT", sha256=sha256_of(file))
    state = model.state_dict()
    expected = tensors["conv1.0.weight"]
    expected = expected.sum(1, keepdim=True) if channels == 1 else expected
    assert torch.equal(state.pop("conv1.0.weight"), expected)
    new = [name for name, tensor in state.items() if not torch.equal(tensor, tensors[name])]
    assert new == ([] if classes == 1000 else ["fc.weight", "fc.bias"])
    assert "state_dict" not in model.pretrained_cfg  # type: ignore[operator]
    with pytest.raises(UserError, match=r"timm/test_resnet\.r160_in1k/resolve/main/model\.safet"):
        timm_model(TINY, classes, weights="DEFAULT")


def test_weights_with_hash_in_url_are_read(
    hub_folder: Path, tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(timm.create_model(TINY).state_dict())
    file = save_with_hash(tensors, hub_folder, TINY)
    published(monkeypatch, url=f"http://127.0.0.1:1/{file.name}")
    state = timm_model(TINY, 1000, weights="DEFAULT").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    torch.save(MaliciousPickle(), file)
    with pytest.raises(UserError, match="is damaged or a different file"):
        timm_model(TINY, 1000, weights="DEFAULT")
    published(monkeypatch, url="http://127.0.0.1:1/no_hash.npz", hf_hub_id=None)
    with pytest.raises(UserError, match="without a known SHA-256"):
        timm_model(TINY, 1000, weights="DEFAULT")
    assert not (tmp_cwd / "was_here").exists()


def published(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    """Change where the weights of the tiny model are published."""
    registry = timm.models._registry._model_pretrained_cfgs
    for name in (TINY, f"{TINY}.r160_in1k"):
        monkeypatch.setitem(registry, name, dataclasses.replace(registry[name], **changes))


@pytest.mark.usefixtures("hub_folder")
def test_weights_without_network_say_what_to_put_where() -> None:
    with pytest.raises(
        UserError, match=r"put https://.*resnet18_a1_0-d63eafa0\.pth into "
    ) as error:
        timm_model("resnet18", 7, weights="DEFAULT")
    assert "\n" not in str(error.value)


def test_published_input_is_that_of_the_weights() -> None:
    found = published_input({"name": "vit_base_patch16_384"})
    assert found["image_size"] == 384
    assert found["mean"] == [0.5, 0.5, 0.5]
    assert published_input({"name": "resnet18.tv_in1k"})["eval_crop"] == 0.875
