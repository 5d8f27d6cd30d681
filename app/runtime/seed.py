"""Randomness as a function of where the run is: (seed, epoch, rank), never of what came before."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A number of 63 bits that depends on every part, and is unlike for like parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch (every device) alike."""
    seed_cpu(*parts)
    torch.manual_seed(derive_seed(*parts))


def seed_cpu(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch's generator of the host."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Where all generators are, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "host": torch.default_generator.get_state(),
        "device": torch.cuda.get_rng_state() if on_device else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts them back there."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.default_generator.set_state(state["host"])
    if state["device"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device"])
