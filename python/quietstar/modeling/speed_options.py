"""Options of a model that change how fast it runs and what it holds, and no result."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from quietstar.thinking.checkpointing import keeps_products, with_policy
from quietstar.thinking.cuda_graphs import forget
from quietstar.thinking.fused_layers import HIDES_PRODUCTS, fuse_layers, unfused_for, uses_liger
from quietstar.thinking.kept_outputs import NOT_WITH_LIGER, reuse_rollout


class SpeedOptionsMixin:
    """Fused layers, outputs of the rollout that the packed pass takes, and what checkpointing keeps."""

    base: PreTrainedModel

    def fuse_layers(self, way: str = "auto") -> None:
        """Run the decoder's norms, rotary embeddings, gates and residual adds as fused kernels.

        Args:
            way: ``"compile"`` (torch.compile, layer by layer, in passes with thoughts), ``"liger"``
                (liger-kernel, for families that it knows, on CUDA), ``"auto"`` (compiled wherever the
                model is on a CUDA device), or ``"off"``.

        Raises:
            ValueError: for another way, or one that does not fit the decoder.
            ImportError: for ``"liger"`` without liger-kernel.
        """
        forget(self.base)
        fuse_layers(self.base, way)

    def reuse_rollout(self, on: bool = True) -> int:
        """While training, let linear layers take their outputs of the rollout's rows from the rollout,
        for the memory of these outputs (:mod:`quietstar.thinking.kept_outputs`).

        Before the model is sharded, and not with liger-kernel.

        Returns:
            How many layers do; those that are more than a product do not.

        Raises:
            ValueError: if liger-kernel is in the layers.
        """
        if on and uses_liger(self.base):
            raise ValueError(NOT_WITH_LIGER)
        forget(self.base)
        return reuse_rollout(self.base, on)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **options: Any
    ) -> None:
        """As transformers', with ``keep`` among the settings of ``activation_checkpointing_enable``
        (:mod:`quietstar.thinking.checkpointing`)."""
        if enable:
            gradient_checkpointing_func = with_policy(gradient_checkpointing_func)
            if keeps_products(gradient_checkpointing_func):
                unfused_for(self.base, "checkpointing keeps products", f"where {HIDES_PRODUCTS}")
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable, gradient_checkpointing_func=gradient_checkpointing_func, **options
        )
