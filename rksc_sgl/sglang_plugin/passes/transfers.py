"""What the host decided, brought to the device in one transfer that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(numbers: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Several arrays or lists of whole numbers as int64 tensors on a device, in one transfer.

    Tensors for a pass must not be made one by one: each is a transfer of its own, which costs more than what it brings.
    """
    arrays: list[NDArray[np.int64]] = [np.asarray(one, dtype=np.int64) for one in numbers]
    sent = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        sent = sent.pin_memory()
    return sent.to(device, non_blocking=True).split([one.size for one in arrays])
