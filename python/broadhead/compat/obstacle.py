"""Why no kernel of this installation runs on a device: what the availability checks of other packages ask."""

from __future__ import annotations

from typing import Any

import torch

from ..api.head_dims import _validate_head_dims

_HEAD_DIM = 128


def device_obstacle(device: Any = None) -> str | None:
    """The reason, in words that tell a missing GPU from a missing kernel; None if kernels run bf16 of head_dim 128.

    Args:
        device: as torch takes it; None: the current CUDA device.
    """
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        _validate_head_dims(_HEAD_DIM, _HEAD_DIM, torch.cuda.get_device_capability(device), dtype=torch.bfloat16)
    except AssertionError as error:
        return str(error)
    return None
