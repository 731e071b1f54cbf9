"""The core attention of Megatron's transformer layers, for module specs: packed or not, windows, sinks, GQA, MLA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..api.attention import flash_attn_func, flash_attn_varlen_func
from ..errors import InvalidArgumentError, UnsupportedError

_CLASS = "BroadheadCoreAttention"
_CAUSAL = ("causal", "padding_causal", "causal_bottom_right")
_FULL = ("no_mask", "padding")


def _windowed(config: Any, layer_number: int) -> tuple[int, int]:
    """The window of a layer, by Megatron's ``window_size`` and ``window_attn_skip_freq``."""
    window = getattr(config, "window_size", None)
    if window is None:
        return (-1, -1)
    skip = getattr(config, "window_attn_skip_freq", None)
    if isinstance(skip, int):
        has_window = layer_number % skip != 0
    else:
        has_window = skip is None or bool(skip[layer_number - 1])
    return (int(window[0]), int(window[1])) if has_window else (-1, -1)


class BroadheadCoreAttention(torch.nn.Module):
    """Attention on broadhead between the projections of a Megatron layer, forward and backward.

    It takes the place of ``core_attention`` in a module spec, where Megatron has TEDotProductAttention, and slime
    FlashDotProductAttention: same arguments, same results. ``softmax_type="learnable"`` makes the parameter
    ``softmax_offset``, one logit a head, which the kernels take as sinks.

    Args:
        config: Megatron's TransformerConfig.
        layer_number: of the layer, from 1.
        attn_mask_type: Megatron's AttnMaskType, the default of forward.
        attention_type: "self" or "cross".
        attention_dropout: must be 0, as that of the config: dropout of probabilities has no kernel.
        softmax_scale: None: ``head_dim ** -0.5``.
        k_channels: columns of q and k of a head, for MLA; None: those of the config.
        v_channels: columns of v of a head; None: those of k.
        cp_comm_type: accepted; context parallelism is refused.
        pg_collection: process groups, of which that of tensor parallelism is read; None: Megatron's state.

    Raises:
        UnsupportedError: dropout or context parallelism is asked for.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise UnsupportedError(
                f"{_CLASS}: attention_dropout must be 0, got {dropout}: set attention_dropout=0.0 in the config"
            )
        if getattr(config, "context_parallel_size", 1) > 1:
            raise UnsupportedError(
                f"{_CLASS}: context_parallel_size must be 1, got {config.context_parallel_size}: use Transformer"
                " Engine's attention with broadhead.integrations.transformer_engine"
            )
        self.config = config
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = (
            math.sqrt(k_channels or config.kv_channels) ** -1 if softmax_scale is None else softmax_scale
        )
        if getattr(config, "apply_query_key_layer_scaling", False):
            self.softmax_scale /= self.layer_number
        self.window_size = _windowed(config, self.layer_number)
        self.softcap = float(getattr(config, "attn_logit_softcapping", None) or 0.0)
        self.current_max_attn_logits: Tensor | None = None  # Megatron's qk-clip reads it.
        self._make_offset(config, pg_collection)

    def _make_offset(self, config: Any, pg_collection: Any) -> None:
        kind = getattr(config, "softmax_type", "vanilla")
        if kind not in ("vanilla", "off-by-one", "learnable"):
            raise InvalidArgumentError(
                f"{_CLASS}: config.softmax_type must be 'vanilla', 'off-by-one' or 'learnable', got {kind!r}"
            )
        self.softmax_offset: Tensor | None = None
        if kind == "vanilla":
            return
        ranks = 1
        if pg_collection is not None:
            ranks = pg_collection.tp.size()
        elif getattr(config, "tensor_model_parallel_size", 1) > 1:
            ranks = config.tensor_model_parallel_size
        on_cpu = getattr(config, "use_cpu_initialization", False) or not torch.cuda.is_available()
        device = "cpu" if on_cpu else torch.cuda.current_device()
        zeros = torch.zeros(config.num_attention_heads // ranks, device=device, dtype=config.params_dtype)
        del self.softmax_offset
        if kind == "off-by-one":
            # A buffer follows the module to its device; checkpoints have none.
            self.register_buffer("softmax_offset", zeros, persistent=False)
            return
        self.softmax_offset = torch.nn.Parameter(zeros)
        if getattr(config, "perform_initialization", True):
            config.init_method(self.softmax_offset)
        # Megatron reads these where it shards, clips and saves parameters.
        for name, value in (("tensor_model_parallel", ranks > 1), ("partition_dim", 0), ("partition_stride", 1)):
            setattr(self.softmax_offset, name, value)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The parameters as Megatron's distributed checkpoints hold them: softmax_offset is cut by heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        if not state:
            return {}
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        made: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"softmax_offset": 0}, sharded_offsets
        )
        return made

    def _is_causal(self, attn_mask_type: Any, attention_mask: Any) -> bool:
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        name = "causal" if kind is None else str(getattr(kind, "name", kind))
        if name in _CAUSAL:
            return True
        if name == "no_mask" or (name in _FULL and attention_mask is None):
            return False
        raise UnsupportedError(
            f"{_CLASS}: attn_mask_type must be one of {', '.join((*_CAUSAL, *_FULL))}, without attention_mask unless it"
            f" is causal, got {name}: pack the sequences (thd), whose lengths then say what a mask of padding would"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``(S, B, Hq, D)``, or packed ``(T, Hq, D)`` with packed_seq_params.
            key: ``(S_k, B, Hkv, D)`` or ``(T_k, Hkv, D)``.
            value: likewise with Dv.
            attention_mask: not read under causal masks.
            attn_mask_type: Megatron's AttnMaskType; None: that of the constructor.
            attention_bias: must be None.
            packed_seq_params: Megatron's PackedSeqParams of format "thd": offsets of the sequences, and of their padded
                places where these differ.

        Returns:
            ``(S, B, Hq * Dv)``, or packed ``(T, Hq * Dv)``, as Megatron's projection takes it.

        Raises:
            UnsupportedError: a bias, or a mask that has no kernel.
        """
        if attention_bias is not None:
            raise UnsupportedError(f"{_CLASS}: attention_bias must be None: take position embeddings on q and k (RoPE)")
        for name, given in unused.items():
            if given is not None and given is not False:
                raise UnsupportedError(f"{_CLASS}: {name} must be None, got {type(given).__name__}: leave it out")
        options: dict[str, Any] = {
            "softmax_scale": self.softmax_scale,
            "causal": self._is_causal(attn_mask_type, attention_mask),
            "window_size": self.window_size,
            "softcap": self.softcap,
            "deterministic": bool(getattr(self.config, "deterministic_mode", False)),
            "sinks": self.softmax_offset,
        }
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            return self._packed(query, key, value, packed_seq_params, options)
        batch_first = (x.transpose(0, 1) for x in (query, key, value))
        out: Tensor = flash_attn_func(*batch_first, **options)
        return out.transpose(0, 1).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Any, options: dict[str, Any]) -> Tensor:
        # Some versions of Megatron keep a batch of one around packed tokens.
        query, key, value = (x.squeeze(1) if x.dim() == 4 else x for x in (query, key, value))
        cu_q, cu_k = packed.cu_seqlens_q, packed.cu_seqlens_kv
        padded_q = getattr(packed, "cu_seqlens_q_padded", None)
        padded_k = getattr(packed, "cu_seqlens_kv_padded", None)
        if padded_q is not None:
            options["seqused_q"] = (cu_q[1:] - cu_q[:-1]).to(torch.int32)
        if padded_k is not None:
            options["seqused_k"] = (cu_k[1:] - cu_k[:-1]).to(torch.int32)
        out: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_q if padded_q is None else padded_q,
            cu_k if padded_k is None else padded_k,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            **options,
        )
        return out.flatten(1)
