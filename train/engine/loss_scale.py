"""fp16's loss scale on the device, so that no step waits for the host to choose it."""

import torch
from torch import Tensor

INITIAL, DOUBLED_AFTER = 2.0**16, 1000  # steps; as DeepSpeed and torch.amp have them, but for torch's 2000


class LossScale:
    """What a loss is multiplied by, so that fp16 holds its gradients: halved where they overflow, doubled after 1000 steps without.

    `value` is a scalar on the device, at least 1.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), INITIAL, device=device)
        self._steady = torch.zeros((), dtype=torch.int32, device=device)  # steps since the scale was changed

    def update(self, overflowed: Tensor) -> None:
        """After a step; overflowed: a scalar on the device, 0 or 1."""
        torch._amp_update_scale_(self.value, self._steady, overflowed, 2.0, 0.5, DOUBLED_AFTER)
        self.value.clamp_(min=1.0)

    def state(self) -> dict[str, float]:
        """In the terms of DeepSpeed's scaler, which ZeRO 3 and offloading use: a checkpoint goes on at another stage."""
        return {"cur_scale": float(self.value), "cur_iter": int(self._steady), "last_overflow_iter": -1}

    def load(self, state: dict[str, float]) -> None:
        self.value.fill_(state["cur_scale"])
        self._steady.fill_((state["cur_iter"] - state["last_overflow_iter"] - 1) % DOUBLED_AFTER)
