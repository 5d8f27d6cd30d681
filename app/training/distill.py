"""Knowledge distillation: learn from the outputs of a trained model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from app.config.rules import DISTILL_COLUMNS
from app.losses.kl_divergence import KLDivLoss
from app.runtime.errors import UserError
from app.runtime.nested import Nested, describe
from app.training.supervised import SupervisedTask, call_model

# Losses of outputs that are independent probabilities, not a distribution over classes.
BINARY_LOSSES = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)


class DistillTask(SupervisedTask):
    """Trains a model on the targets and on the outputs of a trained teacher.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network": the loss of a
    training step is `(1 - alpha) * L + alpha * T^2 * KL(teacher / T || model / T)`, where L is the
    loss of the task, and the KL divergence is that of the softmax of both logits. Evaluation and
    prediction use the model and L alone.

    The teacher is evaluated without gradients, in the precision of the model; checkpoints do not
    contain it. With `mix` it gets the mixed inputs, too, as in Beyer et al. 2022, "Knowledge
    distillation: A good teacher is patient and consistent".

    Args:
        teacher: Maps inputs to logits of shape (N, C, ...), as the model does; None for a task
            that is not trained.
        temperature: Temperature T, above 0.
        alpha: Weight of the teacher, from 0 to 1.
        **kwargs: Arguments of `SupervisedTask`.

    Raises:
        ValueError: If a value is out of its range, L is that of independent probabilities, or a
            metric or a loss term has the name of a column.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        temperature: float = 4.0,
        alpha: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is not valid; allowed: 0 to 1")
        for name, term in self.loss.terms.items():
            if isinstance(term.function, BINARY_LOSSES):
                kind = type(term.function).__name__
                raise ValueError(f"loss.{name}: the outputs of {kind} are no logits of classes")
        for name in DISTILL_COLUMNS:
            if name in self.loss.columns | self.metrics["train"].output_metrics.keys():
                raise ValueError(f"{name!r} is the name of another column; rename it")
        self.divergence, self.alpha = KLDivLoss(temperature, "logits"), alpha
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    def training_loss(
        self, inputs: Nested, outputs: Nested, targets: Nested
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        task_loss, terms = self.loss(outputs, targets, is_part=True)
        distillation_loss = self.distillation_loss(inputs, outputs)
        loss = (1 - self.alpha) * task_loss + self.alpha * distillation_loss
        columns = dict(zip(DISTILL_COLUMNS, (task_loss, distillation_loss), strict=True))
        return loss, terms | columns, None

    def distillation_loss(self, inputs: Nested, outputs: Nested) -> Tensor:
        """Return the KL divergence of the outputs from those of the teacher, times T^2.

        Raises:
            UserError: If the teacher cannot take the inputs, or has outputs of another shape.
        """
        assert self.teacher is not None, "a task that is trained needs a teacher"
        with torch.no_grad():
            taught = call_model("teacher", type(self.teacher).__name__, self.teacher, inputs)
        both_tensors = isinstance(taught, Tensor) and isinstance(outputs, Tensor)
        if not both_tensors or taught.shape != outputs.shape or not _has_classes(outputs):
            raise UserError(
                f"teacher: its outputs ({describe(taught)}) and those of the model "
                f"({describe(outputs)}) must be logits of the same shape, of at least two classes"
            )
        loss: Tensor = self.divergence(outputs, taught)
        return loss

    def to(self, device: torch.device) -> None:
        super().to(device)
        if self.teacher is not None:
            self.teacher.to(device)


def _has_classes(outputs: Tensor) -> bool:
    return outputs.ndim > 1 and outputs.shape[1] > 1
