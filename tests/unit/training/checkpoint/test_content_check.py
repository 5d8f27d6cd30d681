"""Checks of values before they are saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.runtime.errors import UserError
from app.training.checkpoint.content_check import check_savable


def test_check_savable_with_unsupported_type_names_key() -> None:
    check_savable("task", {"a": [torch.ones(1), 1, 0.5, "x", None, (True,)]})
    for value in ({1}, b"x", np.float64(1), {("a", 1): 2}, [1j]):
        with pytest.raises(UserError, match=r"task\.a.*cannot be saved; allowed"):
            check_savable("task", {"a": value})
