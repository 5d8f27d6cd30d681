"""Gradient checkpointing: compute the activations of blocks again in the backward pass.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from app.runtime.errors import UserError, did_you_mean, join_choices

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def checkpoint_blocks(model: nn.Module, blocks: bool | Sequence[str]) -> list[str]:
    """Checkpoint blocks of a model, and return their names.

    Between them only the inputs of the blocks are kept, which saves memory for the time of a second
    forward pass. Weights, outputs and batch norm statistics are those of a model without it.

    Args:
        model: Model whose modules are changed in place.
        blocks: Names of modules, in which `*` matches any characters; True chooses the items of
            each `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict` that consist of several layers;
            False chooses none.

    Raises:
        UserError: There is no such module.
    """
    if blocks is False:
        return []
    names = _items(model) if blocks is True else _matching(model, blocks)
    if not names:
        raise UserError(
            f"trainer.gradient_checkpointing=True: {type(model).__name__} has no nn.Sequential, "
            "nn.ModuleList or nn.ModuleDict whose items consist of several layers; name modules: "
            f"trainer.gradient_checkpointing=[...] of: {join_choices(_parts(model))}"
        )
    outermost = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    for name in outermost:
        block = model.get_submodule(name)
        block.forward = partial(_checkpointed, block.forward)
    return outermost


def _items(model: nn.Module) -> list[str]:
    return [
        f"{name}.{item}" if name else item
        for name, module in model.named_modules()
        if isinstance(module, CONTAINERS)
        for item, child in module.named_children()
        if any(True for _ in child.children()) and any(True for _ in child.parameters())
    ]


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    parts = _parts(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parts):
            raise UserError(
                f"trainer.gradient_checkpointing={pattern!r} matches no module of the model; "
                f"modules: {join_choices(parts)}{did_you_mean(pattern, parts)}"
            )
    return [name for name in parts if any(fnmatchcase(name, p) for p in patterns)]


def _parts(model: nn.Module) -> list[str]:
    """Return the names of the modules that can be called."""
    return [
        name
        for name, module in model.named_modules()
        if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    ]


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the forward method of a block, and checkpoint it if there is a backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = partial(_make_contexts, forward.__self__)  # type: ignore[attr-defined]
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _make_contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first and of the second forward pass of a block.

    The second begins with the same buffers, such as running statistics, and does not change them.
    """
    copies = [
        (module, name, buffer.clone())
        for module in block.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    return nullcontext(), _replaced_buffers(copies)


@contextmanager
def _replaced_buffers(copies: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    originals = [(module, name, getattr(module, name)) for module, name, _ in copies]
    _set_buffers(copies)
    try:
        yield
    finally:
        _set_buffers(originals)


def _set_buffers(buffers: list[tuple[nn.Module, str, Tensor]]) -> None:
    for module, name, buffer in buffers:
        setattr(module, name, buffer)
