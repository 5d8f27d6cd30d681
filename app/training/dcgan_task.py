"""Adversarial training of a generator and a discriminator, as in DCGAN."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.runtime.nested import Key, Nested, count_samples, pick
from app.training.precision import Precision
from app.training.task import MetricsLike, StepOutput, Task


class AdversarialTask(Task):
    """Trains the discriminator and then the generator of a model on each batch.

    Goodfellow et al. 2014, "Generative adversarial nets", algorithm 1 with one step of the
    discriminator per batch, and the non-saturating loss of the generator (section 3). Real and
    generated images are in [-1, 1]; metrics and predictions get them in [0, 1].

    Args:
        model: Module with the submodules `generator`, which maps latents of shape (N, latent) to
            images, and `discriminator`, which maps images to logits of shape (N,).
        latent: Size of the latents.
        metrics: Metrics by name for each stage, of generated images (outputs) and real ones
            (targets).
        precision: Precision of the forward pass; None is fp32.
        inputs: Key of the real images in a batch.

    Raises:
        ValueError: If the model does not have both submodules.
    """

    def __init__(
        self,
        model: nn.Module,
        latent: int,
        metrics: Mapping[str, MetricsLike] | None = None,
        precision: Precision | None = None,
        inputs: int | str = 0,
    ) -> None:
        super().__init__(model, metrics, precision)
        if not (hasattr(model, "generator") and hasattr(model, "discriminator")):
            raise ValueError(
                f"{type(model).__name__} must have the submodules 'generator' and "
                "'discriminator'; choose model=dcgan"
            )
        self.generator = model.get_submodule("generator")
        self.discriminator = model.get_submodule("discriminator")
        self.latent = latent
        self.inputs: Key = inputs

    def train_step(self, batch: Nested) -> StepOutput:
        assert self.optimizers is not None
        real = pick(batch, self.inputs)
        fake = self.generate(real)
        discriminator_loss = self.discriminator_loss(real, fake.detach())
        self.optimizers["discriminator"].step(discriminator_loss, len(real))
        generator_loss = self.generator_loss(fake)  # judged by the updated discriminator
        self.optimizers["generator"].step(generator_loss, len(real))
        return self.make_output("train", real, fake, generator_loss, discriminator_loss)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        real = pick(batch, self.inputs)
        fake = self.generate(real)
        losses = self.generator_loss(fake), self.discriminator_loss(real, fake)
        return self.make_output(stage, real, fake, *losses)

    def predict_step(self, batch: Nested) -> Nested:
        """Return as many generated images as there are images in the batch."""
        return to_unit_range(self.generate(pick(batch, self.inputs)))

    def generate(self, real: Tensor) -> Tensor:
        """Generate as many images from new random latents as there are real images."""
        latents = torch.randn(count_samples(real), self.latent, device=real.device)
        images: Tensor = self.generator(latents)
        return images

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the binary cross-entropy of classifying images as real and generated."""
        real_logits, fake_logits = self.discriminator(real), self.discriminator(fake)
        return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return the cross-entropy of generated images being classified as real."""
        return F.softplus(-self.discriminator(fake).float()).mean()

    def make_output(
        self,
        stage: str,
        real: Tensor,
        fake: Tensor,
        generator_loss: Tensor,
        discriminator_loss: Tensor,
    ) -> StepOutput:
        """Return the values of a step; its loss is the sum of both losses."""
        terms = {"generator_loss": generator_loss, "discriminator_loss": discriminator_loss}
        total = generator_loss + discriminator_loss
        return self.step_output(stage, to_unit_range(fake), to_unit_range(real), total, terms)


def to_unit_range(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to [0, 1]."""
    return (images.float() + 1) / 2
