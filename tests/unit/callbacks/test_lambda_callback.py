"""Plain functions as a callback."""

from __future__ import annotations

import torch

from app.callbacks.lambda_callback import LambdaCallback
from tests.support.callback_events import send_stage


def test_lambda_callback_ignores_events_without_a_function() -> None:
    received: list[object] = []
    callback = LambdaCallback(on_run_end=received.append)
    send_stage(callback, [((torch.zeros(1),), None)])
    callback.on_run_end([])
    assert received == [[]]
