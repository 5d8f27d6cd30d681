"""Randomness as a function of where the run is: (seed, epoch, rank), never of what came before."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """A number of 63 bits that depends on every part, and is unlike for like parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch (every device) alike."""
    seed_host(*parts)
    torch.manual_seed(seed_of(*parts))


def seed_host(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch's generator of the host."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
