"""What a computation allocates, seen operation by operation."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Notes every operator that is called and the largest tensor that comes out of any."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.largest = (0, "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.called.add(str(func).removesuffix(".default"))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                # What is held, not what a view or an expanded tensor pretends to be.
                self.largest = max(self.largest, (value.untyped_storage().nbytes() // 4, str(func)))
        return out
