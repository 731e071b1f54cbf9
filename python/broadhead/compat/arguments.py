"""The one table of foreign arguments without a counterpart here: which values change nothing, and what else to do."""

from __future__ import annotations

from typing import NamedTuple


class Neutral(NamedTuple):
    """A foreign argument without a counterpart."""

    values: tuple[object, ...] | None  # these pass, all others are refused; None: any value passes, it decides nothing
    advice: str  # why the others are refused, or why nothing depends on the argument


_MODIFIER = "functions and masks that are compiled into FlashAttention-4's kernels are not available"
_SPARSE = "block-sparse and gathered keys are not available"
_PARALLEL = "context-parallel masks inside the kernel are not available; attend to each part and use merge_attn_states"
_TILES = "it sizes the tiles of other kernels"

#: By name, for every surface.
NEUTRAL: dict[str, Neutral] = {
    "dropout_p": Neutral((0.0,), "attention dropout is not available; pass 0.0"),
    "rng_state": Neutral(None, "it is the state of a dropout that did not happen"),
    "alibi_slopes": Neutral((None,), "ALiBi is not available; pass None"),
    "return_softmax": Neutral((False,), "it returns the mask of a dropout, which is not available; pass False"),
    "zero_tensors": Neutral((False,), "outputs are not cleared; pass False and clear them where it matters"),
    "fa_version": Neutral((2, 3, 4), "2, 3 and 4 are the versions that there are; it selects nothing here"),
    "ver": Neutral((3, 4), "3 and 4 are the versions that there are; it selects nothing here"),
    "only_qv": Neutral((False,), "q and k are always read; pass qv as q and v as k instead"),
    "score_mod": Neutral((None,), _MODIFIER + "; softcap and sinks are arguments"),
    "score_mod_bwd": Neutral((None,), _MODIFIER),
    "mask_mod": Neutral(
        (None,), _MODIFIER + "; use window_size, or broadhead's query_ranges, prefix_lens or tree_mask"
    ),
    "aux_tensors": Neutral((None,), "only score_mod and mask_mod read them"),
    "aux_scalars": Neutral((None,), "only score_mod and mask_mod read them"),
    "block_sparse_tensors": Neutral((None,), _SPARSE),
    "block_sparse_tensors_bwd": Neutral((None,), _SPARSE),
    "gather_kv_indices": Neutral((None,), _SPARSE),
    "gather_bwd_recompute_p": Neutral((False,), _SPARSE),
    "gather_bwd_token_chunk": Neutral((None,), _SPARSE),
    "min_seqlen_k": Neutral(None, "it helps gathered keys only"),
    "disable_scheduler_metadata": Neutral(None, "metadata of other kernels is never read"),
    "cp_world_size": Neutral((1,), _PARALLEL),
    "cp_rank": Neutral((0,), _PARALLEL),
    "cp_tot_seqused_k": Neutral((None,), _PARALLEL),
    "virtual_batch_idx": Neutral((None,), "sequences are merged in their order; pass None"),
    "cu_seqlens": Neutral((None,), "rows past the sequences are merged as well; pass None and ignore them"),
    "seqused": Neutral((None,), "rows past the sequences are merged as well; pass None and ignore them"),
    "_arch": Neutral(None, "the device says it"),
}
#: FlashAttention-4's names of what its kernels are built with.
NEUTRAL |= {
    name: Neutral(None, _TILES)
    for name in (
        "tile_mn", "mma_pv_is_rs", "intra_wg_overlap", "num_threads", "m_block_size", "n_block_size", "num_stages_Q",
        "num_stages_dO", "SdP_swapAB", "dKV_swapAB", "dQ_swapAB", "AtomLayoutMSdP", "AtomLayoutNdKV", "AtomLayoutMdQ",
        "V_in_regs",
    )
}  # fmt: skip
