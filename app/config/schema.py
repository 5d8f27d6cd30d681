"""The fixed part of a configuration, typed. Values and their defaults stand in `conf/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from app.config.types import Range

Node = dict[str, Any]  # a part: `_target_` and its arguments
Nodes = dict[str, Node | None]  # named parts; null takes one away

Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
LARGEST = 2**63 - 1  # that a checkpoint, and those who watch, can hold
Limit = Positive | Annotated[float, Range(0.0, 1.0, above=True)] | None  # batches, share, or all
Key = (
    int | str | list[Any] | dict[str, Any] | None
)  # a part of a batch, as `app.runtime.nested.pick` takes
Mode = Literal["train", "valid", "test", "predict", "export", "find_lr", "find_batch_size", "check"]


@dataclass(frozen=True)
class MonitorConfig:
    """A metric, and which of its values is better."""

    metric: str
    mode: Literal["max", "min"]

    @property
    def stage(self) -> str:
        """The stage that measures the metric: `valid`, unless named as in `train/loss`."""
        return self.metric.split("/")[0] if "/" in self.metric else "valid"

    @property
    def name(self) -> str:
        """The metric's name inside its stage."""
        return self.metric.split("/", 1)[-1]


@dataclass(frozen=True)
class GoalConfig(MonitorConfig):
    """What "best" means, once: for checkpoints, early stopping, plateaus and sweeps."""

    patience: Positive | None = None
    min_delta: Annotated[float, Range(0.0)] = 0.0
    threshold: float | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is written, and what is kept."""

    every_n_epochs: Positive
    every_n_steps: Positive | None
    every_n_minutes: Annotated[float, Range(0.0, above=True)] | None
    keep_last: Positive
    save_top_k: Annotated[int, Range(-1)]
    asynchronous: bool
    monitors: dict[str, MonitorConfig | None]


@dataclass(frozen=True)
class FreezeConfig:
    """Parameters that do not learn from one epoch up to another."""

    parameters: str
    from_epoch: Positive = 1
    until_epoch: Positive | None = None

    def holds(self, epoch: int) -> bool:
        """Whether they are frozen in that epoch, counted from 1."""
        return self.from_epoch <= epoch and (self.until_epoch is None or epoch < self.until_epoch)


@dataclass(frozen=True)
class PredictConfig:
    """What `mode=predict` predicts, and how it is written."""

    stage: Literal["train", "valid", "test"]
    images: str | None
    format: Literal["auto", "csv", "png", "npz"]


@dataclass(frozen=True)
class ExportConfig:
    """What `mode=export` writes."""

    format: Literal["safetensors", "torch_export", "onnx"]


@dataclass(frozen=True)
class TunerConfig:
    """What `mode=find_lr` and `mode=find_batch_size` try."""

    lr_from: Annotated[float, Range(0.0, above=True)]
    lr_to: Annotated[float, Range(0.0, above=True)]
    steps: Annotated[int, Range(10)]
    batch_size_to: Positive
    batches: Positive


@dataclass(frozen=True)
class SplitConfig:
    """What is cut from the training data where a source gives no data for a stage."""

    valid: Limit
    test: Limit
    seed: Annotated[int, Range(-LARGEST, LARGEST)]


@dataclass(frozen=True)
class NormalizeConfig:
    """Per channel, after scaling to [0, 1]; `auto` measures the training data."""

    mean: list[float] | Literal["auto"]
    std: list[Annotated[float, Range(0.0, above=True)]] | Literal["auto"]


@dataclass(frozen=True)
class LoaderConfig:
    """Arguments of torch's `DataLoader`, for data that is read sample by sample."""

    num_workers: Count
    pin_memory: bool
    persistent_workers: bool
    prefetch_factor: Positive | None


@dataclass(frozen=True)
class SourceConfig:
    """A dataset for each stage."""

    train: Node | None
    valid: Node | None
    test: Node | None


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become batches."""

    name: str
    num_classes: Annotated[int, Range(2)] | None
    path: str | None
    input_shape: list[Positive]
    channels: Positive | None
    image_size: Positive | None
    resize: Positive | None
    source: SourceConfig
    split: SplitConfig
    inputs: int | str | list[int | str] | None
    targets: Key
    batch_size: Positive
    eval_batch_size: Positive | None
    drop_last: bool
    sampling: Node | None
    normalize: NormalizeConfig | None
    augment: Nodes
    memory: Literal["auto", "host", "device"]
    loader: LoaderConfig


@dataclass(frozen=True)
class SchedulerConfig:
    """How the learning rate moves."""

    interval: Literal["step", "epoch"]
    warmup_steps: Count
    lr_scheduler: Node | None


@dataclass(frozen=True)
class TrainerConfig:
    """How long and how to train."""

    max_epochs: Positive | None
    max_steps: Positive | None
    valid_every_n_epochs: Positive
    sanity_valid_batches: Count
    accumulate_grad_batches: Positive
    gradient_clip_norm: Annotated[float, Range(0.0, above=True)] | None
    gradient_clip_value: Annotated[float, Range(0.0, above=True)] | None
    gradient_norm: bool
    zero_non_finite_gradients: bool
    on_nonfinite: Literal["stop", "skip", "raise"]
    batch_size_finder: bool
    limit_train_batches: Limit
    limit_valid_batches: Limit
    limit_test_batches: Limit
    overfit_batches: Count
    fast_dev_run: bool | Positive
    max_time: str | Annotated[float, Range(0.0, above=True)] | None
    accelerator: Literal["auto", "cpu", "cuda", "mps"]
    devices: Literal["auto"] | Positive | list[Count] | None
    strategy: Literal["ddp", "fsdp"]
    sync_batchnorm: bool
    find_unused_parameters: bool
    timeout: Annotated[float, Range(0.0, above=True)]
    requeue: bool
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: Literal["auto"] | bool
    compile: bool
    deterministic: bool


@dataclass(frozen=True)
class MetricConfig:
    """Named metrics of each stage."""

    train: Nodes
    valid: Nodes
    test: Nodes


@dataclass(frozen=True)
class OptunaTrial:
    """Which trial of a search a job is, so that it can be told to end where it is hopeless."""

    storage: str
    study: str
    number: Count
    pruner: Node


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep goes on, and what it varies together."""

    resume: str | None
    force: bool
    on_error: Literal["continue", "stop"]
    max_retries: Count
    together: list[list[str]]
    trial: OptunaTrial | None


@dataclass(frozen=True)
class Config:
    """A whole configuration, checked."""

    mode: Mode
    ckpt: str | None
    resume: str | None
    launch: Literal["auto", "inline", "local", "torchrun", "srun"]
    seed: Annotated[int, Range(0, LARGEST)]
    name: str
    tags: list[str]
    notes: str
    trusted_targets: list[str]
    goal: GoalConfig
    checkpoint: CheckpointConfig
    predict: PredictConfig
    export: ExportConfig
    find: TunerConfig
    sweep: SweepConfig
    freeze: dict[str, FreezeConfig | None]
    trainer: TrainerConfig
    data: DataConfig
    model: Node
    task: Node
    loss: Nodes
    metric: MetricConfig
    optimizer: Node
    scheduler: SchedulerConfig
    average: Node | None
    callbacks: Nodes


@dataclass(frozen=True)
class Job:
    """All that a run is told; plain values, fit to be sent to another process.

    Attributes:
        config: Checked and typed.
        plain: The same as a dict; the truth about the run.
        template: The same as YAML with its interpolations, for laying other values over it.
        trusted: Modules outside this program that the user named himself.
        differences: To the run that is tested or goes on, a line each.
        damaged: What is wrong with states newer than the one that it goes on from, a line each.
    """

    config: Config
    plain: dict[str, Any]
    template: str
    trusted: list[str]
    differences: list[str]
    damaged: list[str] = field(default_factory=list)
