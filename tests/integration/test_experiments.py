"""Every experiment of `conf/experiment`, run on a few batches, and what is peculiar to each."""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from torch import Tensor, nn

from app.config.instantiate import Instantiator
from app.data.mnist import digit_and_parity
from app.experiment import run
from app.experiment.factory import make_components
from app.losses.ssim import SSIMLoss
from app.models.dcgan import DCGAN
from app.runtime.errors import UserError
from app.training.dcgan_task import AdversarialTask
from app.training.events import Callback, EpochEnd
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.trainer import Trainer
from tests.support.runs import job_for

EXPERIMENTS = {  # what makes each of them small
    "fashion_mnist_alexnet": ("data.batch_size=4", "data.split.valid=8", "model.width=0.125"),
    "mnist_alexnet": ("data.batch_size=16",),
    "mnist_alexnet_sgd": ("data.batch_size=16",),
    "mnist_autoencoder": ("data.batch_size=16",),
    "mnist_dcgan": ("data.batch_size=16",),
    "mnist_multitask": ("data.batch_size=16",),
    "shapes_patches": ("data.batch_size=4", "data.image_size=32", "task.patches.size=[16,16]"),
    "shapes_unet": ("data.batch_size=4", "data.image_size=32"),
    "transfer": ("data.batch_size=8", "data.resize=32", "model.weights=null"),
}
CLASSIFICATIONS = ("fashion_mnist_alexnet", "mnist_alexnet", "mnist_alexnet_sgd", "transfer")
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of an experiment, which is run where a test asks for it first."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                if name == "fashion_mnist_alexnet":
                    write_fashion_mnist(tmp_path_factory.mktemp("datasets"), patch)
                execute(folders[name], name, "debug=fast", *EXPERIMENTS[name])
        return folders[name]

    return folder_of


def execute(folder: Path, name: str, *words: str) -> None:
    fixed = ("trainer.accelerator=cpu", "~callbacks.plots")
    run.execute(job_for(f"experiment={name}", *fixed, *words), folder)


def write_fashion_mnist(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Twenty images in its file format; the MD5s that are expected are theirs."""
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


class Snapshots(Callback):
    """Keeps the model's weights and buffers: at the start, and after each epoch.

    Args:
        model: In training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept = [self.now()]

    def now(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def on_epoch_end(self, end: EpochEnd) -> None:  # noqa: ARG002
        self.kept.append(self.now())


def fit(folder: Path, name: str, *words: str) -> tuple[Trainer, Snapshots]:
    job = job_for(f"experiment={name}", "trainer.accelerator=cpu", *words)
    parts = make_components(job.config, Instantiator(job.trusted), torch.device("cpu"))
    snapshots = Snapshots(parts.task.model)
    trainer = run.make_trainer(job, Instantiator(job.trusted), parts, snapshots, folder)
    trainer.fit(parts.loaders["train"], parts.loaders["valid"])
    return trainer, snapshots


def train_losses(trainer: Trainer) -> list[float]:
    rows = [row for row in trainer.state.history if row["stage"] == "train"]
    return [float(row["loss_mean"]) for row in rows]


def columns(folder: Path, stage: str) -> list[str]:
    return pd.read_csv(folder / "epoch_details" / f"epoch001_{stage}.csv").columns.to_list()


# ---- all


def test_every_experiment_is_run_here() -> None:
    files = (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml")
    assert sorted(EXPERIMENTS) == sorted(path.stem for path in files)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_stage_of_an_experiment_runs(name: str, ran: Folder) -> None:
    folder = ran(name)
    summary = pd.read_csv(folder / "summary_table.csv")
    assert list(summary["stage"]) == ["train", "valid", "test"]
    assert summary["loss_mean"].notna().all()
    assert (folder / "checkpoints" / "best.pt").is_file()
    for stage in ("train", "valid", "test"):
        assert ("total_correct" in columns(folder, stage)) == (name in CLASSIFICATIONS)


# ---- AlexNet at 224 pixels


def test_fashion_mnist_is_learned_by_the_published_alexnet() -> None:
    config = job_for("experiment=fashion_mnist_alexnet").config
    with torch.device("meta"):  # no weights are drawn
        ours = Instantiator()("model", config.model).state_dict()
        published = torchvision.models.alexnet(num_classes=10).state_dict()
    assert ours.pop("features.0.weight").shape == (64, 1, 11, 11)  # grey images
    published.pop("features.0.weight")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in published.items()}
    assert config.data.input_shape == [1, 224, 224]


# ---- segmentation


def test_a_unet_measures_overlap(ran: Folder) -> None:
    assert columns(ran("shapes_unet"), "train")[5:7] == ["mean_iou", "lr"]
    summary = pd.read_csv(ran("shapes_unet") / "test_summary_table.csv")
    assert {"mean_iou", "dice", "instance_iou"} <= set(summary)


def test_a_unet_learns_shapes(tmp_path: Path) -> None:
    few = ("model.width=4", "trainer.limit_train_batches=6", "trainer.limit_valid_batches=1")
    words = (*EXPERIMENTS["shapes_unet"], *few, "trainer.max_epochs=2")
    faster = ("optimizer.lr=0.003", "scheduler=constant")
    losses = train_losses(fit(tmp_path, "shapes_unet", *words, *faster)[0])
    assert losses[-1] < losses[0]


def test_windows_change_the_evaluation_alone(ran: Folder) -> None:
    whole, windows = (
        pd.read_csv(ran(name) / "summary_table.csv").set_index("stage")["loss_mean"]
        for name in ("shapes_unet", "shapes_patches")
    )
    assert whole["train"] == windows["train"]
    assert whole["valid"] != windows["valid"]


# ---- images from images


def test_an_autoencoder_has_a_column_for_each_term(ran: Folder) -> None:
    steps = pd.read_csv(ran("mnist_autoencoder") / "epoch_details" / "epoch001_valid.csv")
    assert {"mse_loss", "ssim_loss", "ssim"} <= set(steps)
    # The same quantity twice, as loss and as metric.
    assert (1 - steps["ssim_loss"]).to_list() == pytest.approx(steps["ssim"].to_list(), abs=1e-6)
    total = steps["mse_loss"] + 0.1 * steps["ssim_loss"]
    assert steps["loss"].to_list() == pytest.approx(total.to_list())  # added in float32


def test_an_autoencoder_learns_its_inputs(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=8", "trainer.limit_valid_batches=1")
    words = (*EXPERIMENTS["mnist_autoencoder"], *few, "trainer.max_epochs=2")
    faster = ("optimizer.lr=0.003", "scheduler=constant")
    losses = train_losses(fit(tmp_path, "mnist_autoencoder", *words, *faster)[0])
    assert losses[-1] < losses[0]


def test_an_autoencoder_predicts_pictures(ran: Folder, tmp_path: Path) -> None:
    words = ("mode=predict", f"ckpt={ran('mnist_autoencoder')}")
    run.execute(job_for(*words, "predict.images=" + str(digits(tmp_path))), tmp_path)
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["0.png"]


def digits(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir()
    torchvision.transforms.functional.to_pil_image(torch.rand(1, 28, 28)).save(images / "0.png")
    return images


def test_similarity_is_0_of_equal_images_and_has_gradients() -> None:
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


# ---- two targets


def test_parity_belongs_to_its_digit() -> None:
    images, digits, parity = digit_and_parity(train=False).tensors
    assert images.shape == (10_000, 1, 28, 28)
    assert torch.equal(digits.remainder(2), parity)
    assert digits.dtype == parity.dtype == torch.int64


def test_two_targets_have_losses_weights_and_accuracies_of_their_own(ran: Folder) -> None:
    details = ran("mnist_multitask") / "epoch_details"
    steps = pd.read_csv(details / "epoch001_train.csv")
    assert {"digit", "parity", "digit_accuracy", "parity_accuracy"} <= set(steps)
    for name in ("digit_weight", "parity_weight"):
        assert steps[name][0] != 1  # as it was after the first step
        assert steps[name][0] != steps[name][1]
    # The weights that were learned are those of the checkpoint that is tested.
    tested = pd.read_csv(details / "epoch001_test.csv")
    valid = pd.read_csv(details / "epoch001_valid.csv")
    assert tested["digit_weight"][0] == valid["digit_weight"][0]


def test_two_targets_are_tested_again_to_the_last_digit(ran: Folder, tmp_path: Path) -> None:
    folder = ran("mnist_multitask")
    run.execute(job_for("mode=test", f"ckpt={folder}"), tmp_path)
    first, again = (pd.read_csv(place / "test_summary_table.csv") for place in (folder, tmp_path))
    for name in ("loss_mean", "digit_accuracy", "parity_accuracy"):
        assert first[name].to_list() == again[name].to_list()


# ---- two networks against each other


def test_each_network_has_a_loss_and_a_learning_rate(ran: Folder) -> None:
    steps = pd.read_csv(ran("mnist_dcgan") / "epoch_details" / "epoch001_train.csv")
    assert {"lr_generator", "lr_discriminator"} <= set(steps)
    assert "lr" not in steps
    total = steps["generator_loss"] + steps["discriminator_loss"]
    assert steps["loss"].to_list() == pytest.approx(total.to_list())  # added in float32
    assert pd.read_csv(ran("mnist_dcgan") / "test_summary_table.csv")["fid"][0] > 0


def test_new_digits_are_pictures(ran: Folder, tmp_path: Path) -> None:
    folder = ran("mnist_dcgan")
    words = ("mode=predict", f"ckpt={folder}", f"predict.images={digits(tmp_path)}")
    run.execute(job_for(*words), tmp_path)
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 1


def adversaries(generator_rate: float, discriminator_rate: float) -> AdversarialTask:
    """With batches accumulated, so that the gradients of a step can be seen."""
    torch.manual_seed(0)
    task = AdversarialTask(DCGAN(1, 8, latent=4, width=4), latent=4)
    parts = {"generator": task.generator, "discriminator": task.discriminator}
    rates = {"generator": generator_rate, "discriminator": discriminator_rate}
    task.optimizers = OptimWrapperDict(
        {
            name: OptimWrapper(
                torch.optim.SGD(part.parameters(), lr=rates[name]),
                batch_size=8,
                owns_all_parameters=False,
            )
            for name, part in parts.items()
        }
    )
    return task


@pytest.mark.parametrize("learns", ["generator", "discriminator"])
def test_each_network_learns_from_its_own_loss_alone(learns: str) -> None:
    task = adversaries(float(learns == "generator"), float(learns == "discriminator"))
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    task.train_step((torch.rand(8, 1, 8, 8), torch.zeros(8)))
    for name, parameter in task.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith(learns)), name


def test_the_generators_loss_leaves_no_gradient_in_the_discriminator() -> None:
    task = adversaries(0.0, 0.0)
    assert task.optimizers is not None
    for optimization in task.optimizers.wrappers.values():
        optimization.accumulate = 2  # the gradients stay
    real = torch.rand(8, 1, 8, 8)
    torch.manual_seed(1)
    task.train_step((real, torch.zeros(8)))
    found = [p.grad for p in task.discriminator.parameters()]

    other = adversaries(0.0, 0.0)
    torch.manual_seed(1)
    other.discriminator_loss(real, other.generate(real).detach()).backward()
    for one, parameter in zip(found, other.discriminator.parameters(), strict=True):
        assert one is not None
        assert parameter.grad is not None
        assert torch.equal(one, parameter.grad)


def test_a_model_without_both_networks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has not the parts 'generator' and"):
        AdversarialTask(nn.Linear(1, 1), latent=4)


# ---- transfer


def test_all_but_the_last_layer_is_frozen_for_two_epochs(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=1", "trainer.limit_valid_batches=1")
    words = (*EXPERIMENTS["transfer"], "trainer.max_epochs=3", "scheduler=constant", *few)
    trainer, snapshots = fit(tmp_path, "transfer", *words)
    start, first, second, third = snapshots.kept
    head = {"fc.weight", "fc.bias"}
    for name in start:
        frozen = torch.equal(start[name], first[name]) and torch.equal(first[name], second[name])
        assert frozen == (name not in head), name
    for name, _ in trainer.task.model.named_parameters():
        assert not torch.equal(second[name], third[name]), name


def test_weights_are_those_of_the_file_that_torch_hub_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    kept = tmp_path / "torch" / "hub" / "checkpoints"
    kept.mkdir(parents=True)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, kept / "resnet18-f37072fd.pth")
    # Its hash is not that of the real one, which is not at hand; test_models.py looks at that.
    monkeypatch.setattr("app.models.pretrained._check_hash", lambda file: None)  # noqa: ARG005
    words = ("trainer.max_epochs=1", "debug=fast", "data.batch_size=8", "data.resize=32")
    _, snapshots = fit(tmp_path, "transfer", *words)
    ours = snapshots.kept[-1]  # still frozen
    assert ours["fc.weight"].shape == (10, 512)
    assert all(torch.equal(ours[n], t) for n, t in theirs.items() if not n.startswith("fc."))


def test_weights_that_cannot_be_had_are_named_with_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers proxies
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nothing listens there
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth cannot be downloaded") as caught:
        execute(tmp_path, "transfer", "debug=fast")
    assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)
    assert "\n" not in str(caught.value)
