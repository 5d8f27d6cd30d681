"""Two networks against each other: one makes images, the other tells them from real ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.runtime.nested import Key, Nested, count_samples, pick
from app.training.precision import Precision
from app.training.task import MetricsLike, StepOutput, Task


class AdversarialTask(Task):
    """Trains the discriminator and the generator of a model in turn, one step each for a batch.

    Goodfellow et al. 2014, "Generative adversarial nets", algorithm 1 with one step of the
    discriminator, and the loss of the generator that does not saturate (section 3). Images lie in
    [-1, 1], as the generator's; metrics and predictions are given them in [0, 1].

    Args:
        model: With the parts `generator`, from latents (N, latent) to images, and `discriminator`,
            from images to logits (N,).
        latent: Numbers from which an image is made.
        metrics: By stage; of generated and of real images.
        precision: Of the forward pass.
        inputs: Which part of a batch are the real images.

    Raises:
        ValueError: The model has not both parts.
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
                f"{type(model).__name__} has not the parts 'generator' and 'discriminator'; "
                "choose model=dcgan"
            )
        self.generator = model.get_submodule("generator")
        self.discriminator = model.get_submodule("discriminator")
        self.latent = latent
        self.inputs: Key = inputs

    def train_step(self, batch: Nested) -> StepOutput:
        assert self.optimizers is not None
        real = pick(batch, self.inputs)
        fakes = self.generate(real)
        discriminator_loss = self.discriminator_loss(real, fakes.detach())
        self.optimizers["discriminator"].step(discriminator_loss, len(real))
        generator_loss = self.generator_loss(fakes)  # as the discriminator judges by now
        self.optimizers["generator"].step(generator_loss, len(real))
        return self.report("train", real, fakes, generator_loss, discriminator_loss)

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        real = pick(batch, self.inputs)
        fakes = self.generate(real)
        losses = self.generator_loss(fakes), self.discriminator_loss(real, fakes)
        return self.report(stage, real, fakes, *losses)

    def predict_step(self, batch: Nested) -> Nested:
        """As many new images as there are in the batch."""
        return as_pixels(self.generate(pick(batch, self.inputs)))

    def generate(self, real: Tensor) -> Tensor:
        """As many images, made from latents drawn anew."""
        latents = torch.randn(count_samples(real), self.latent, device=real.device)
        images: Tensor = self.generator(latents)
        return images

    def discriminator_loss(self, real: Tensor, fakes: Tensor) -> Tensor:
        """How far it is from calling the real images real and the others not."""
        truth, lie = self.discriminator(real), self.discriminator(fakes)
        return F.softplus(-truth.float()).mean() + F.softplus(lie.float()).mean()

    def generator_loss(self, fakes: Tensor) -> Tensor:
        """How far the discriminator is from calling its images real."""
        return F.softplus(-self.discriminator(fakes).float()).mean()

    def report(
        self,
        stage: str,
        real: Tensor,
        fakes: Tensor,
        generator_loss: Tensor,
        discriminator_loss: Tensor,
    ) -> StepOutput:
        """The row of a step; its loss is the sum of both."""
        terms = {"generator_loss": generator_loss, "discriminator_loss": discriminator_loss}
        total = generator_loss + discriminator_loss
        return self.step_output(stage, as_pixels(fakes), as_pixels(real), total, terms)


def as_pixels(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (images.float() + 1) / 2
