"""Derive seeds from the position in a run (seed, epoch, rank), never from earlier random draws."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part; similar parts give unrelated seeds."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed Python, NumPy and torch on all devices."""
    seed_cpu(*parts)
    torch.manual_seed(derive_seed(*parts))


def seed_cpu(*parts: int | str) -> None:
    """Seed Python, NumPy and torch's CPU generator."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the states of all generators as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "host": torch.default_generator.get_state(),
        "device": torch.cuda.get_rng_state() if uses_cuda else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the generator states returned by `rng_state`."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.default_generator.set_state(state["host"])
    if state["device"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device"])
