"""Dynamic loss scaling for fp16 on the device, without synchronising with the host."""

import torch
from torch import Tensor

INITIAL = 2.0**16  # as in DeepSpeed and torch.amp
DOUBLED_AFTER = 1000  # DeepSpeed's default (torch.amp: 2000)


class LossScale:
    """The factor that keeps gradients in fp16's range: halved at an overflow, doubled after 1000 steps without one.

    As in DeepSpeed's scaler (ZeRO 3, offloading), the first step and a step after an overflow do not count towards the
    1000, so that the scale is the same at any stage. `value` is a scalar on the device, at least 1.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), INITIAL, device=device)
        # Steps that count since the scale was changed, -1 before the step that does not count.
        self._steady = torch.full((), -1, dtype=torch.int32, device=device)

    def update(self, overflowed: Tensor) -> None:
        """Adapt the scale after a step. overflowed: a scalar on the device, 0 or 1."""
        torch._amp_update_scale_(self.value, self._steady, overflowed, 2.0, 0.5, DOUBLED_AFTER)
        self._steady.sub_(overflowed.int())  # an overflow has set it to 0
        self.value.clamp_(min=1.0)

    def state(self) -> dict[str, float]:
        """The state in the form of DeepSpeed's scaler, so that it can be loaded at any stage."""
        return {"cur_scale": float(self.value), "cur_iter": int(self._steady) + 1, "last_overflow_iter": -1}

    def load(self, state: dict[str, float]) -> None:
        """Restore a state returned by `state` or by DeepSpeed's scaler."""
        self.value.fill_(state["cur_scale"])
        steps = state["cur_iter"] - state["last_overflow_iter"] - 1
        self._steady.fill_((steps - 1) % DOUBLED_AFTER if steps else -1)
