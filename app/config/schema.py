"""Typed schema of the configuration. Default values are in `conf/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

Node = dict[str, Any]  # a component: `_target_` and its arguments
Nodes = dict[str, Node | None]  # components by name; null removes one

STAGES = ("train", "valid", "test")
AUTO: Final = "auto"  # lets the program choose the value of a key
# Keys of data that may be `auto`
DATA_FACTS = ("num_classes", "class_names", "input_shape", "class_weights")

STRICT = {"strict": True, "extra": "forbid"}  # pydantic's options; groups inherit those of Config
Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
MAX_INT64 = 2**63 - 1  # the largest integer that checkpoints and loggers can store
# Number of batches or samples, a fraction of all, or null.
Limit = Positive | Annotated[float, Gt(0.0), Le(1.0)] | None
# Selects a part of a batch, see `app.runtime.nested.pick`.
BatchKey = int | str | list[Any] | dict[str, Any] | None
Mode = Literal["train", "valid", "test", "predict", "export", "find_lr", "find_batch_size", "check"]


@dataclass(frozen=True)
class MonitorConfig:
    """A metric, and whether higher or lower is better."""

    __pydantic_config__ = STRICT

    metric: str
    mode: Literal["max", "min"]

    @property
    def stage(self) -> str:
        """Stage that computes the metric: `valid` unless prefixed, as in `train/loss`."""
        return self.metric.split("/")[0] if "/" in self.metric else "valid"

    @property
    def name(self) -> str:
        """Name of the metric without its stage."""
        return self.metric.split("/", 1)[-1]


@dataclass(frozen=True)
class GoalConfig(MonitorConfig):
    """The monitored metric of a run.

    Best checkpoint, early stopping, plateau schedules and sweeps all use it.
    """

    patience: Positive | None = None
    min_delta: Annotated[float, Ge(0.0)] = 0.0
    threshold: float | None = None


@dataclass(frozen=True)
class InitConfig:
    """Weights that a new training starts from."""

    weights: str | None
    skip: list[str]


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_n_epochs: Positive
    every_n_steps: Positive | None
    every_n_minutes: Annotated[float, Gt(0.0)] | None
    keep_last: Positive
    save_top_k: Annotated[int, Ge(-1)]
    asynchronous: bool
    monitors: dict[str, MonitorConfig | None]


@dataclass(frozen=True)
class FreezeConfig:
    """Parameters to freeze, and the range of epochs: `from_epoch <= epoch < until_epoch`."""

    parameters: str
    from_epoch: Positive = 1
    until_epoch: Positive | None = None

    def is_frozen_at(self, epoch: int) -> bool:
        """Return whether the parameters are frozen in an epoch, counted from 1."""
        return self.from_epoch <= epoch and (self.until_epoch is None or epoch < self.until_epoch)


@dataclass(frozen=True)
class PredictConfig:
    """Inputs of `mode=predict`, and the format of its predictions."""

    stage: Literal["train", "valid", "test"]
    images: str | None
    format: Literal["auto", "csv", "png", "npz"]


@dataclass(frozen=True)
class ExportConfig:
    """File format of `mode=export`."""

    format: Literal["safetensors", "torch_export", "onnx"]


@dataclass(frozen=True)
class TunerConfig:
    """Search ranges of `mode=find_lr` and `mode=find_batch_size`."""

    lr_from: Annotated[float, Gt(0.0)]
    lr_to: Annotated[float, Gt(0.0)]
    steps: Annotated[int, Ge(10)]
    batch_size_to: Positive
    batches: Positive


@dataclass(frozen=True)
class SplitConfig:
    """Subsets split off the training data for stages without a dataset of their own."""

    valid: Limit
    test: Limit
    seed: Annotated[int, Ge(-MAX_INT64), Le(MAX_INT64)]
    stratify: bool
    group_pattern: str | None


@dataclass(frozen=True)
class NormalizeConfig:
    """Mean and std per channel after scaling to [0, 1]; `auto`: those of the training data."""

    mean: list[float] | Literal["auto"]
    std: list[Annotated[float, Gt(0.0)]] | Literal["auto"]


@dataclass(frozen=True)
class LoaderConfig:
    """How data is read sample by sample: by `torch.utils.data.DataLoader`, and for how long."""

    num_workers: NonNegative | Literal["auto"]
    pin_memory: bool
    persistent_workers: bool
    prefetch_factor: Positive | None
    timeout: Annotated[float, Gt(0.0)]


@dataclass(frozen=True)
class SourceConfig:
    """Dataset of each stage."""

    train: Node | None
    valid: Node | None
    test: Node | None


@dataclass(frozen=True)
class TransformsConfig:
    """Transforms of single samples: those of training, and those of all other stages."""

    train: Nodes
    eval: Nodes


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become batches.

    The `auto` values of `DATA_FACTS` are found before a run starts, see
    `app.experiment.data_facts`; nothing that runs meets them.
    """

    name: str
    num_classes: Positive | Literal["auto"] | None
    class_names: list[str] | Literal["auto"] | None
    class_weights: list[Annotated[float, Ge(0.0)]] | Literal["auto"] | None
    class_weight_power: Annotated[float, Ge(0.0)]
    ignore_index: int | None
    colors: dict[str, str | list[int]] | list[str | list[int]] | None
    path: str | None
    input_shape: list[Positive] | Literal["auto"]
    channels: Positive | None
    image_size: Positive | None
    resize: Positive | None
    eval_crop: Annotated[float, Gt(0.0), Le(1.0)] | None
    source: SourceConfig
    split: SplitConfig
    folds: Annotated[int, Ge(2)] | None
    fold: NonNegative
    inputs: int | str | list[int | str] | None
    targets: BatchKey
    batch_size: Positive
    eval_batch_size: Positive | None
    drop_last: bool
    sampling: Node | None
    transforms: TransformsConfig
    normalize: NormalizeConfig | None
    augment: Nodes
    memory: Literal["auto", "host", "device"]
    cache: Literal["memory", "disk"] | None
    cache_size: Positive | list[Positive] | None
    cache_folder: str
    loader: LoaderConfig


@dataclass(frozen=True)
class ParameterGroup:
    """Which parameters a group contains, and a factor of their learning rate.

    A parameter must match all that is given. Further keys of a group are options of its optimizer.
    """

    __pydantic_config__ = STRICT

    parameters: str | list[str] | None = None
    module_type: str | list[str] | None = None
    ndim: NonNegative | list[NonNegative] | None = None
    hidden: bool = False
    lr_scale: Annotated[float, Gt(0.0)] = 1.0


@dataclass(frozen=True)
class OptimizerOptions:
    """Keys of an optimizer that are options of this program, not arguments of its class."""

    __pydantic_config__ = STRICT

    groups: dict[str, ParameterGroup | None] = field(default_factory=dict)
    decay_norm_and_bias: bool = True
    layer_decay: Annotated[float, Gt(0.0), Le(1.0)] | None = None
    lr_base_size: Positive | None = None
    lr_base_scale: Literal["linear", "sqrt"] = "linear"


@dataclass(frozen=True)
class SchedulerConfig:
    """Learning rate schedule."""

    interval: Literal["step", "epoch"]
    warmup_steps: NonNegative | Annotated[float, Gt(0.0), Lt(1.0)]
    warmup_epochs: Annotated[float, Gt(0.0)] | None
    lr_scheduler: Node | None


CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
PrecisionName = (
    Literal["auto", "fp32", "bf16", "fp16", "bf16-true"]
    | Literal["32-true", "16-mixed", "bf16-mixed", "32", "16", 32, 16]
)
# Other names of `trainer.precision`, as Lightning has them.
PRECISION_ALIASES = {
    "32": "fp32",
    "32-true": "fp32",
    "16": "fp16",
    "16-mixed": "fp16",
    "bf16-mixed": "bf16",
}


@dataclass(frozen=True)
class CompileConfig:
    """Arguments of `torch.compile`; its `options` can name programs, and are not among them."""

    mode: CompileMode | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    backend: Literal["inductor", "cudagraphs", "aot_eager", "eager"] = "inductor"


@dataclass(frozen=True)
class TrainerConfig:
    """Training length, device, precision and optimization settings."""

    max_epochs: Positive | None
    max_steps: Positive | None
    min_epochs: NonNegative
    valid_every_n_epochs: Positive | None
    valid_every_n_steps: Positive | None
    sanity_valid_batches: NonNegative
    log_every_n_steps: Positive
    log_every: Annotated[float, Gt(0.0)]
    accumulate_grad_batches: Positive
    gradient_clip_norm: Annotated[float, Gt(0.0)] | None
    gradient_clip_value: Annotated[float, Gt(0.0)] | None
    gradient_clip_agc: Annotated[float, Gt(0.0)] | None
    gradient_norm: bool
    zero_non_finite_gradients: bool
    on_nonfinite: Literal["stop", "skip", "raise"]
    batch_size_finder: bool
    limit_train_batches: Limit
    limit_valid_batches: Limit
    limit_test_batches: Limit
    overfit_batches: NonNegative
    fast_dev_run: bool | Positive
    max_time: str | Annotated[float, Gt(0.0)] | None
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    devices: Literal["auto"] | Positive | list[NonNegative] | None
    strategy: Literal["ddp", "fsdp"]
    sync_batchnorm: bool
    find_unused_parameters: bool
    timeout: Annotated[float, Gt(0.0)]
    requeue: bool
    precision: PrecisionName
    matmul_precision: Literal["highest", "high", "medium"]
    channels_last: Literal["auto"] | bool
    profile: bool | Positive
    compile: bool | CompileMode | CompileConfig
    cuda_graph: bool
    gradient_checkpointing: bool | list[str]
    deterministic: bool


@dataclass(frozen=True)
class MetricConfig:
    """Metrics of each stage, by name."""

    train: Nodes
    valid: Nodes
    test: Nodes


@dataclass(frozen=True)
class OptunaTrial:
    """Optuna trial that a job belongs to, so that the job can report values and be pruned."""

    storage: str
    study: str
    number: NonNegative
    pruner: Node


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep resumes and handles failed jobs, and which keys vary together."""

    resume: str | None
    force: bool
    on_error: Literal["continue", "stop"]
    max_retries: NonNegative
    together: list[list[str]]
    trial: OptunaTrial | None


@dataclass(frozen=True)
class Config:
    """Validated configuration of a run."""

    __pydantic_config__ = STRICT

    mode: Mode
    check: Literal["samples", "config"]
    ckpt: str | None
    resume: str | None
    init: InitConfig
    teacher: str | None
    output: str
    launch: Literal["auto", "inline", "local", "torchrun", "srun"]
    seed: Annotated[int, Ge(0), Le(MAX_INT64)]
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


class Change(NamedTuple):
    """A key of a saved run whose value an override has changed, and both values as short texts."""

    key: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"

    def is_below(self, *groups: str) -> bool:
        """Return whether the key is one of these groups, or inside one."""
        return f"{self.key}.".startswith(tuple(f"{group}." for group in groups))


@dataclass(frozen=True)
class Job:
    """Everything a run needs, as plain values that can be pickled to another process.

    Attributes:
        config: Validated, typed configuration.
        plain: The same as a resolved dict; this is `config.yaml` of the run folder.
        saved: The same with references to other keys, to apply overrides to it later; this is in
            checkpoints. See `app.config.saved`.
        trusted: Modules outside this program that the user trusts by name.
        differences: Differences from the saved run that is tested or resumed.
        damaged_checkpoints: Newer checkpoints that could not be read when resuming, one line each.
        data_warnings: What is suspicious about the user's data, one line each.
        overrides: Overrides of the command line, those of a sweep with the values of this job.
    """

    config: Config
    plain: dict[str, Any]
    saved: dict[str, Any]
    trusted: list[str]
    differences: list[Change]
    damaged_checkpoints: list[str] = field(default_factory=list)
    data_warnings: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
