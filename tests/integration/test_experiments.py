"""Every experiment of `conf/experiment`, run on a few batches, and what is specific to each."""

from __future__ import annotations

import gzip
import hashlib
import math
import pickle
import re
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from torch import Tensor, nn

from app.config.instantiate import Instantiator
from app.config.optimizers import optimizer_arguments
from app.config.resolve import get_by_path
from app.config.validate import fill_auto
from app.data.mnist import digit_and_parity
from app.experiment import run
from app.experiment.factory import make_components
from app.losses.ssim import SSIMLoss
from app.models.dcgan import DCGAN
from app.runtime.errors import UserError
from app.training.dcgan_task import AdversarialTask
from app.training.events import Callback, EpochEnd
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.trainer import Trainer
from tests.support.image_files import write_image_folder, write_mask_folder
from tests.support.published_weights import hub_folder, save_with_hash
from tests.support.runs import job_for

__all__ = ["hub_folder"]

EXPERIMENTS = {  # overrides that make each of them small
    "cifar10_resnet18": ("data.batch_size=4", "data.split.valid=8", "model.width=8"),
    "csv_regression": ("data.path=houses.csv", "data.source.train.target=price"),
    "fashion_mnist_alexnet": ("data.batch_size=4", "data.split.valid=8", "model.width=0.125"),
    "finetune": ("data.image_size=32", "data.loader.num_workers=0", "model.weights=null"),
    "imagenet_resnet50": (
        *("data.image_size=32", "data.loader.num_workers=0", "data.batch_size=4"),
        *("model.name=resnet18", "optimizer.lr=0.001"),
    ),
    "masks_unet": ("data.batch_size=4", "data.image_size=32", "data.loader.num_workers=0"),
    "mnist_speedrun": (
        *("data.batch_size=16", "model.channels=[4,4,4,4]"),
        "trainer.cuda_graph=false",
    ),
    "mnist_99_7": ("data.batch_size=16", "model.channels=[4,4,4,4]"),
    "mnist_alexnet": ("data.batch_size=16",),
    "mnist_alexnet_sgd": ("data.batch_size=16",),
    "mnist_autoencoder": ("data.batch_size=16",),
    "mnist_dcgan": ("data.batch_size=16",),
    "mnist_multitask": ("data.batch_size=16",),
    "shapes_detection": (
        *("data.batch_size=4", "data.image_size=32", "data.source.train.count=70"),
        "data.source.test.count=8",
    ),
    "shapes_patches": ("data.batch_size=4", "data.image_size=32", "task.patches.size=[16,16]"),
    "shapes_unet": ("data.batch_size=4", "data.image_size=32"),
    "transfer": ("data.batch_size=8", "data.resize=32", "model.weights=null"),
}
CLASSIFICATION = (
    *("cifar10_resnet18", "fashion_mnist_alexnet", "finetune", "imagenet_resnet50"),
    *("mnist_99_7", "mnist_alexnet", "mnist_alexnet_sgd", "mnist_speedrun", "transfer"),
)
NEEDS_TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="needs the extra timm")
NEEDS_COCO = pytest.mark.skipif(find_spec("pycocotools") is None, reason="needs detection")
MARKS = {"finetune": NEEDS_TIMM, "shapes_detection": NEEDS_COCO}
EXPERIMENTS_PAGE = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
RunFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Function that returns the run folder of an experiment, and runs it on the first call."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[name])
                write_houses(100)
                if name == "fashion_mnist_alexnet":
                    write_fashion_mnist(tmp_path_factory.mktemp("datasets"), patch)
                if name == "cifar10_resnet18":
                    write_cifar10(tmp_path_factory.mktemp("datasets"), patch)
                files = write_pictures(folders[name], name)
                execute(folders[name], name, "debug=fast", *EXPERIMENTS[name], *files)
        return folders[name]

    return folder_of


def execute(folder: Path, name: str, *overrides: str) -> None:
    fixed = ("trainer.accelerator=cpu", "~callbacks.plots")
    run.execute(job_for(f"experiment={name}", *fixed, *overrides), folder)


def write_pictures(folder: Path, name: str) -> list[str]:
    """Write the pictures that an experiment reads, and return the override that names them."""
    if name == "masks_unet":
        write_mask_folder(folder / "files", 20)
    elif name == "finetune":
        write_image_folder(folder / "files", {"cat": 20, "dog": 20})
    elif name == "imagenet_resnet50":
        for stage in ("train", "val"):
            counts = {"n01440764": 6, "n01443537": 6}
            write_image_folder(folder / "files" / stage, counts, suffix="JPEG")
    return [f"data.path={folder / 'files'}"] if (folder / "files").exists() else []


def write_cifar10(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Write forty random images in the format of CIFAR-10, and expect their MD5 sums."""
    source = torchvision.datasets.CIFAR10
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    patch.setenv("APP_DATA", str(root))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    batch = {"data": pixels, "labels": [index % 10 for index in range(20)]}
    contents = {"data_batch_1": batch, "test_batch": batch, "batches.meta": {"label_names": ["a"]}}
    md5 = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    patch.setattr(source, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    patch.setattr(source, "test_list", [["test_batch", md5["test_batch"]]])
    patch.setattr(source, "meta", source.meta | {"md5": md5["batches.meta"]})


def write_fashion_mnist(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Write twenty random images in the format of Fashion-MNIST, and expect their MD5 sums."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    patch.setenv("APP_DATA", str(root))
    random = torch.Generator().manual_seed(0)
    resources = []
    for prefix in ("train", "t10k"):
        images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8, generator=random)
        labels = torch.arange(20, dtype=torch.uint8) % 10
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            path = raw / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.numpy().tobytes()))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    patch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)


def write_houses(count: int) -> None:
    """Draw the table of docs/experiments.md."""
    (block,) = re.findall(r"```python\n# draw_houses.py\n(.*?)```", EXPERIMENTS_PAGE, re.DOTALL)
    exec(block.replace("500", str(count)))


class StateDictRecorder(Callback):
    """Copies the model's state dict at the start and after each epoch.

    Args:
        model: The model in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state_dicts = [self.copy_state_dict()]

    def copy_state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def on_epoch_end(self, end: EpochEnd) -> None:  # noqa: ARG002
        self.state_dicts.append(self.copy_state_dict())


def fit(folder: Path, name: str, *overrides: str) -> tuple[Trainer, StateDictRecorder]:
    job = job_for(f"experiment={name}", "trainer.accelerator=cpu", *overrides)
    components = make_components(job.config, Instantiator(job.trusted), torch.device("cpu"))
    recorder = StateDictRecorder(components.task.model)
    trainer = run.make_trainer(job, Instantiator(job.trusted), components, recorder, folder)
    trainer.fit(components.loaders["train"], components.loaders["valid"])
    return trainer, recorder


def train_losses(trainer: Trainer) -> list[float]:
    rows = [row for row in trainer.state.history if row["stage"] == "train"]
    return [float(row["loss_mean"]) for row in rows]


def columns(folder: Path, stage: str) -> list[str]:
    return pd.read_csv(folder / "epoch_details" / f"epoch001_{stage}.csv").columns.to_list()


# ---- all experiments


def test_all_experiments_of_conf_are_tested() -> None:
    files = (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml")
    assert sorted(EXPERIMENTS) == sorted(path.stem for path in files)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in EXPERIMENTS]
)
def test_experiment_runs_train_valid_and_test(name: str, run_folder: RunFolder) -> None:
    folder = run_folder(name)
    summary = pd.read_csv(folder / "summary_table.csv")
    stages = ["train", "valid", "test"]
    stages = stages[:2] if name == "imagenet_resnet50" else stages  # its test set has no labels
    assert list(summary["stage"]) == stages
    has_loss = [stage == "train" or name != "shapes_detection" for stage in stages]
    assert summary["loss_mean"].notna().tolist() == has_loss
    assert (folder / "checkpoints" / "best.safetensors").is_file()
    for stage in stages:
        assert ("total_correct" in columns(folder, stage)) == (name in CLASSIFICATION)


# ---- published recipes

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
RECIPES: dict[str, tuple[dict[str, object], dict[int, float]]] = {  # values; lr of some epochs
    "cifar10_resnet18": (
        {"data.batch_size": 128, "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4}
        | {"trainer.max_epochs": 200, "data.augment.shift.pixels": 4},
        {1: 0.1, 101: 0.05, 200: 0.1 * (1 + math.cos(math.pi * 199 / 200)) / 2},
    ),
    "finetune": (
        {"data.batch_size": 4, "optimizer.momentum": 0.9, "optimizer.weight_decay": 0.0}
        | {"trainer.max_epochs": 25, "data.image_size": 224, "data.eval_crop": 0.95}
        | {"data.normalize": IMAGENET, "model.weights": "DEFAULT"},
        {1: 1e-3, 7: 1e-3, 8: 1e-4, 15: 1e-5, 25: 1e-6},
    ),
    "imagenet_resnet50": (
        {"data.batch_size": 256, "optimizer.momentum": 0.9, "optimizer.weight_decay": 1e-4}
        | {"trainer.max_epochs": 90, "data.image_size": 224, "data.eval_crop": 224 / 256}
        | {"data.normalize": IMAGENET, "model.weights": None, "model.name": "resnet50"}
        | {"trainer.sync_batchnorm": False, "trainer.precision": "fp32"},
        {1: 0.1, 30: 0.1, 31: 0.01, 60: 0.01, 61: 0.001, 90: 0.001},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in RECIPES]
)
def test_recipe_has_the_values_of_its_source(name: str, tmp_path: Path) -> None:
    values, rates = RECIPES[name]
    job = job_for(f"experiment={name}", *write_pictures(tmp_path, name))
    assert {key: get_by_path(job.plain, key) for key in values} == values
    instantiate, scheduler = Instantiator(), job.plain["scheduler"]
    assert (scheduler["interval"], scheduler["warmup_steps"]) == ("epoch", 0)
    node = optimizer_arguments(job.plain["optimizer"])
    optimizer = instantiate("optimizer", node, [nn.Parameter(torch.zeros(1))])
    node = fill_auto(scheduler["lr_scheduler"], values["trainer.max_epochs"])
    schedule = LRSchedule(optimizer, instantiate("lr_scheduler", node, optimizer), per_epoch=True)
    actual = {}
    for epoch in range(1, max(rates) + 1):
        actual[epoch] = schedule.lr
        optimizer.step()
        schedule.on_epoch_end(None)
    assert {epoch: actual[epoch] for epoch in rates} == pytest.approx(rates)


# ---- regression


def test_csv_regression_measures_errors_in_units_of_the_target(
    tmp_cwd: Path,
) -> None:
    write_houses(200)
    execute(tmp_cwd / "run", "csv_regression", *EXPERIMENTS["csv_regression"])
    summary = pd.read_csv(tmp_cwd / "run" / "test_summary_table.csv")
    assert summary["total_samples"].tolist() == [20]
    assert summary["mse"].item() == pytest.approx(summary["loss_mean"].item(), rel=1e-4)
    assert summary["mae"].item() < 1.0


# ---- AlexNet at 224 pixels


def test_fashion_mnist_alexnet_has_published_architecture() -> None:
    config = job_for("experiment=fashion_mnist_alexnet").config
    with torch.device("meta"):  # skips weight initialization
        ours = Instantiator()("model", config.model).state_dict()
        published = torchvision.models.alexnet(num_classes=10).state_dict()
    assert ours.pop("features.0.weight").shape == (64, 1, 11, 11)  # grayscale images
    published.pop("features.0.weight")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in published.items()}
    assert config.data.input_shape == [1, 224, 224]


# ---- segmentation


def test_shapes_unet_reports_overlap_metrics(run_folder: RunFolder) -> None:
    assert columns(run_folder("shapes_unet"), "train")[5:7] == ["mean_iou", "lr"]
    summary = pd.read_csv(run_folder("shapes_unet") / "test_summary_table.csv")
    assert {"mean_iou", "dice", "instance_iou"} <= set(summary)


def test_shapes_unet_train_loss_falls(tmp_path: Path) -> None:
    few = ("model.width=4", "trainer.limit_train_batches=6", "trainer.limit_valid_batches=1")
    overrides = (*EXPERIMENTS["shapes_unet"], *few, "trainer.max_epochs=2")
    faster = ("optimizer.lr=0.003", "scheduler=constant")
    losses = train_losses(fit(tmp_path, "shapes_unet", *overrides, *faster)[0])
    assert losses[-1] < losses[0]


def test_shapes_patches_changes_evaluation_only(run_folder: RunFolder) -> None:
    full, windows = (
        pd.read_csv(run_folder(name) / "summary_table.csv").set_index("stage")["loss_mean"]
        for name in ("shapes_unet", "shapes_patches")
    )
    assert full["train"] == windows["train"]
    assert full["valid"] != windows["valid"]


# ---- autoencoder


def test_autoencoder_reports_each_loss_term(run_folder: RunFolder) -> None:
    steps = pd.read_csv(run_folder("mnist_autoencoder") / "epoch_details" / "epoch001_valid.csv")
    assert {"mse_loss", "ssim_loss", "ssim"} <= set(steps)
    # The same quantity, as a loss and as a metric.
    assert (1 - steps["ssim_loss"]).to_list() == pytest.approx(steps["ssim"].to_list(), abs=1e-6)
    total = steps["mse_loss"] + 0.1 * steps["ssim_loss"]
    assert steps["loss"].to_list() == pytest.approx(total.to_list())  # added in float32


def test_autoencoder_train_loss_falls(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=8", "trainer.limit_valid_batches=1")
    overrides = (*EXPERIMENTS["mnist_autoencoder"], *few, "trainer.max_epochs=2")
    faster = ("optimizer.lr=0.003", "scheduler=constant")
    losses = train_losses(fit(tmp_path, "mnist_autoencoder", *overrides, *faster)[0])
    assert losses[-1] < losses[0]


def test_autoencoder_predict_writes_images(run_folder: RunFolder, tmp_path: Path) -> None:
    overrides = ("mode=predict", f"ckpt={run_folder('mnist_autoencoder')}")
    run.execute(job_for(*overrides, "predict.images=" + str(write_image(tmp_path))), tmp_path)
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["0.png"]


def write_image(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir()
    torchvision.transforms.functional.to_pil_image(torch.rand(1, 28, 28)).save(images / "0.png")
    return images


def test_ssim_loss_is_zero_for_equal_images_and_differentiable() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 1, 16, 16)
    loss = SSIMLoss()
    assert loss(images, images).item() == pytest.approx(0, abs=1e-6)
    other = torch.rand(2, 1, 16, 16, requires_grad=True)
    loss(other, images).backward()
    assert other.grad is not None
    assert other.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(other.bfloat16(), images).dtype == torch.float32
    with pytest.raises(ValueError, match="data_range=0 must be above 0"):
        SSIMLoss(0)


# ---- multitask


def test_digit_and_parity_targets_agree() -> None:
    images, digits, parity = digit_and_parity(train=False).tensors
    assert images.shape == (10_000, 1, 28, 28)
    assert torch.equal(digits.remainder(2), parity)
    assert digits.dtype == parity.dtype == torch.int64


def test_multitask_reports_loss_weight_and_accuracy_per_target(run_folder: RunFolder) -> None:
    details = run_folder("mnist_multitask") / "epoch_details"
    steps = pd.read_csv(details / "epoch001_train.csv")
    assert {"digit", "parity", "digit_accuracy", "parity_accuracy"} <= set(steps)
    for name in ("digit_weight", "parity_weight"):
        assert steps[name][0] != 1  # updated by the first step
        assert steps[name][0] != steps[name][1]
    # The learned loss weights are saved in the checkpoint that is tested.
    tested = pd.read_csv(details / "epoch001_test.csv")
    valid = pd.read_csv(details / "epoch001_valid.csv")
    assert tested["digit_weight"][0] == valid["digit_weight"][0]


def test_multitask_mode_test_reproduces_results_exactly(
    run_folder: RunFolder, tmp_path: Path
) -> None:
    folder = run_folder("mnist_multitask")
    run.execute(job_for("mode=test", f"ckpt={folder}"), tmp_path)
    first, again = (pd.read_csv(path / "test_summary_table.csv") for path in (folder, tmp_path))
    for name in ("loss_mean", "digit_accuracy", "parity_accuracy"):
        assert first[name].to_list() == again[name].to_list()


# ---- DCGAN


def test_dcgan_reports_loss_and_lr_of_each_network(run_folder: RunFolder) -> None:
    steps = pd.read_csv(run_folder("mnist_dcgan") / "epoch_details" / "epoch001_train.csv")
    assert {"lr_generator", "lr_discriminator"} <= set(steps)
    assert "lr" not in steps
    total = steps["generator_loss"] + steps["discriminator_loss"]
    assert steps["loss"].to_list() == pytest.approx(total.to_list())  # added in float32
    assert pd.read_csv(run_folder("mnist_dcgan") / "test_summary_table.csv")["fid"][0] > 0


def test_dcgan_predict_writes_images(run_folder: RunFolder, tmp_path: Path) -> None:
    folder = run_folder("mnist_dcgan")
    overrides = ("mode=predict", f"ckpt={folder}", f"predict.images={write_image(tmp_path)}")
    run.execute(job_for(*overrides), tmp_path)
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 1


def make_dcgan_task(generator_lr: float, discriminator_lr: float) -> AdversarialTask:
    """Return a small DCGAN task with one SGD optimizer for each network."""
    torch.manual_seed(0)
    task = AdversarialTask(DCGAN(1, 8, latent=4, width=4), latent=4)
    networks = {"generator": task.generator, "discriminator": task.discriminator}
    lrs = {"generator": generator_lr, "discriminator": discriminator_lr}
    task.prepare_training(
        OptimWrapperDict(
            {
                name: OptimWrapper(
                    torch.optim.SGD(network.parameters(), lr=lrs[name]),
                    batch_size=8,
                    owns_all_parameters=False,
                )
                for name, network in networks.items()
            }
        )
    )
    return task


@pytest.mark.parametrize("trained", ["generator", "discriminator"])
def test_dcgan_train_step_changes_only_network_with_nonzero_lr(trained: str) -> None:
    task = make_dcgan_task(float(trained == "generator"), float(trained == "discriminator"))
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    task.train_step((torch.rand(8, 1, 8, 8), torch.zeros(8)))
    for name, parameter in task.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith(trained)), name


def test_dcgan_generator_loss_leaves_no_discriminator_gradients() -> None:
    task = make_dcgan_task(0.0, 0.0)
    assert task.optimizers is not None
    for wrapper in task.optimizers.wrappers.values():
        wrapper.accumulate = 2  # keeps the gradients after the step
    real = torch.rand(8, 1, 8, 8)
    torch.manual_seed(1)
    task.train_step((real, torch.zeros(8)))
    gradients = [p.grad for p in task.discriminator.parameters()]

    other = make_dcgan_task(0.0, 0.0)
    torch.manual_seed(1)
    other.discriminator_loss(real, other.generate(real).detach()).backward()
    for gradient, parameter in zip(gradients, other.discriminator.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)


def test_adversarial_task_without_both_networks_is_rejected() -> None:
    with pytest.raises(ValueError, match="Linear must have the submodules 'generator' and"):
        AdversarialTask(nn.Linear(1, 1), latent=4)


# ---- transfer learning


def test_transfer_freezes_all_but_last_layer_for_two_epochs(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=1", "trainer.limit_valid_batches=1")
    overrides = (*EXPERIMENTS["transfer"], "trainer.max_epochs=3", "scheduler=constant", *few)
    trainer, recorder = fit(tmp_path, "transfer", *overrides)
    start, first, second, third = recorder.state_dicts
    head = {"fc.weight", "fc.bias"}
    for name in start:
        frozen = torch.equal(start[name], first[name]) and torch.equal(first[name], second[name])
        assert frozen == (name not in head), name
    for name, _ in trainer.task.model.named_parameters():
        assert not torch.equal(second[name], third[name]), name


def test_transfer_loads_published_weights(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    published = torchvision.models.resnet18().state_dict()
    file = save_with_hash(published, hub_folder, "resnet18")
    entry = SimpleNamespace(
        url=f"http://127.0.0.1:1/{file.name}", meta={"categories": ["class"] * 1000}
    )
    monkeypatch.setattr("app.models.torchvision_models._weights_of", lambda _: {"DEFAULT": entry})
    overrides = ("trainer.max_epochs=1", "debug=fast", "data.batch_size=8", "data.resize=32")
    _, recorder = fit(tmp_path, "transfer", *overrides)
    ours = recorder.state_dicts[-1]  # still frozen
    assert ours["fc.weight"].shape == (10, 512)
    assert all(torch.equal(ours[n], t) for n, t in published.items() if not n.startswith("fc."))


def test_transfer_without_network_names_file_and_folder(hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth cannot be downloaded") as caught:
        execute(tmp_path, "transfer", "debug=fast")
    assert str(hub_folder) in str(caught.value)
    assert "\n" not in str(caught.value)
