"""The exponential moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Averages of all parameters and buffers, in the dtype and on the device of each.

    Update n = 0, 1, ... moves the averages by 1 - d towards the weights, d = min(decay, (1 + n) / (10 + n)), so that
    the beginning is forgotten early. What is no floating-point number is copied.

    Args:
        model: starts with its weights.
        decay: in [0, 1).

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema: expected a decay of at least 0 and below 1, got {decay!r}")
        self.decay, self.updates = decay, 0
        self.averages = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = model.state_dict()
        moving = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.averages[k] for k in moving], [state[k] for k in moving], 1 - decay)
        for k, v in state.items():
            if not v.is_floating_point():
                self.averages[k].copy_(v)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """What `load_state_dict` takes."""
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        """Continue from `state_dict()`."""
        averages = state["averages"]
        assert isinstance(averages, dict) and averages.keys() == self.averages.keys()
        self.updates = int(state["updates"])  # type: ignore[arg-type]
        for k, v in averages.items():
            self.averages[k].copy_(v)
