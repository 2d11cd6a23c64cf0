"""Argument checks shared by the operators: one clear sentence that names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar_ext.derivatives import in_vmap

LARGEST = torch.finfo(torch.float32).max
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    tensor: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Require a strided tensor of the given shape (a string stands for a dimension of any size).

    Raises ``TypeError`` if it is not a tensor, ``ValueError`` if its layout, shape, dtype or device is
    wrong.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a {kind} tensor; expected a dense one")
    got = tensor.shape
    if len(got) != len(shape) or any(
        not isinstance(want, str) and want != have for want, have in zip(shape, got, strict=True)
    ):
        raise ValueError(f"{name} has shape {list(got)}; expected [{', '.join(map(str, shape))}]")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = ", ".join(map(dtype_name, dtypes))
        raise ValueError(f"{name} has dtype {dtype_name(tensor.dtype)}; expected {names}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device} like the others")


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def check_option(name: str, value: object, options: Sequence[str]) -> None:
    """Require one of a few words."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(options)}")


def check_number(name: str, value: object) -> None:
    """Require a number: ``TypeError`` if it is not one, ``ValueError`` if float32 cannot hold it."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} is {value!r}; expected a number")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise ValueError(f"{name} is {value}; expected a finite number in the range of float32")


def check_whole(name: str, value: object, least: int = -(2**63)) -> None:
    """Require a whole number from ``least`` on that fits in 64 bits with a sign."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} is {value!r}; expected a whole number")
    if isinstance(value, int) and not least <= value < 2**63:
        expected = f"{least} or more" if value < least else "a number that fits in 64 bits"
        raise ValueError(f"{name} is {value}; expected {expected}")


def check_positive(name: str, value: object) -> None:
    """Require a finite number greater than zero."""
    check_number(name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{name} is {value}; expected a number greater than 0")


def check_scaling(softcap: float | None, logit_scale: float) -> tuple[float | None, float]:
    """Check what scales and caps logits, and return both as floats."""
    if softcap is not None:
        check_positive("softcap", softcap)
    check_number("logit_scale", logit_scale)
    return None if softcap is None else float(softcap), float(logit_scale)


def check_index_range(name: str, indices: torch.Tensor, stop: int, also: int | None = None) -> None:
    """Require ``0 <= index < stop`` everywhere; the value ``also`` is allowed too.

    Looks only where looking is possible and cheap: at CPU tensors outside ``torch.compile`` and
    ``vmap``, because reading a CUDA tensor would wait for the device.
    """
    if not _can_look(indices) or indices.numel() == 0:
        return
    outside = (indices < 0) | (indices >= stop)
    if also is not None:
        outside &= indices != also
    if outside.any():
        value = int(indices[outside][0])
        exception = "" if also is None else f" or {also}"
        raise ValueError(f"{name} contains {value}; expected values from 0 to {stop - 1}{exception}")


def _can_look(indices: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling() and indices.device.type == "cpu" and not in_vmap()


def reject_vmap(operator: str) -> None:
    """Raise an error under ``torch.func.vmap``, where every element would draw the same numbers."""
    if in_vmap():
        raise RuntimeError(
            f"{operator} cannot be used under vmap, where every element would draw the same random"
            " numbers; flatten the batch into rows"
        )


def banned_ids(
    banned: torch.Tensor | Sequence[int] | None, vocabulary: int, device: torch.device
) -> torch.Tensor | None:
    """Return the banned ids as an int64 tensor [n] on ``device``, or None if there are none."""
    if banned is None:
        return None
    if not isinstance(banned, torch.Tensor):
        if not isinstance(banned, Sequence):
            raise TypeError(f"banned is {banned!r}; expected an int64 tensor or a list of token ids")
        for token in banned:
            check_whole("an id in banned", token)
        banned = torch.tensor(banned, dtype=torch.int64, device=device)
    check_tensor("banned", banned, ["n"], [torch.int64], device)
    check_index_range("banned", banned, vocabulary)
    if _can_look(banned) and banned.numel() >= vocabulary and banned.unique().numel() == vocabulary:
        raise ValueError(f"banned has all {vocabulary} ids; expected at least one left")
    return banned if banned.numel() else None
