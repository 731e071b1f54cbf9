"""Judges a generation: its tokens and logits against SDPA's, its calls against the backend they should have used."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from broadhead.demo.generate import Generation, generate_sdpa, teacher_forced_logits
from broadhead.demo.paged_cache import Dispatch

#: Logits closer than this many times the RMS error of SDPA's logits are a tie that rounding may break either way.
NEAR_TIE = 4.0
#: Our error may be this many times SDPA's own, both against the same model in the next higher precision.
ERROR_RATIO = 1.5


class Verdict(NamedTuple):
    """ok, and one sentence that says what was compared and what came out."""

    ok: bool
    text: str


def check_backend(dispatches: Counter[Dispatch], device: torch.device) -> Verdict:
    """On a GPU every attention call must have run a kernel row."""
    used = ", ".join(sorted({d.row or f"the {d.backend} fallback" for d in dispatches}))
    if device.type != "cuda":
        return Verdict(True, f"no GPU in this run, so the torch fallback is the right backend ({used})")
    wrong = [d for d in dispatches if d.backend != "cuda" or d.row is None]
    if wrong:
        return Verdict(False, f"{wrong[0].phase} at head_dim {wrong[0].head_dim} ran no kernel: {wrong[0].reason}")
    return Verdict(True, f"every attention call ran a kernel: {used}")


def check_tokens(
    model: Any, prompt: Tensor, ours: Generation, max_new_tokens: int, eos: set[int] | None = None
) -> Verdict:
    """Compare the tokens with SDPA's greedy ones.

    In fp32 they must be equal. In bf16 and fp16 a near-tie of two tokens may fall either way in both implementations,
    and one flip changes all that follows; there each of our tokens is judged on our own text (teacher forcing): it must
    be the first choice of the fp32 model, or trail it by at most NEAR_TIE times SDPA's RMS error in this dtype.
    """
    if model.dtype == torch.float32:
        theirs = generate_sdpa(model, prompt, max_new_tokens, eos)
        if theirs == ours.tokens:
            return Verdict(True, f"all {len(theirs)} tokens equal SDPA's greedy tokens")
        at = next(
            (i for i, (a, b) in enumerate(zip(ours.tokens, theirs)) if a != b), min(len(ours.tokens), len(theirs))
        )
        return Verdict(
            False,
            f"tokens differ from SDPA's from token {at} on: ours {ours.tokens[at : at + 4]}, "
            f"SDPA's {theirs[at : at + 4]}",
        )
    reference = teacher_forced_logits(_in_higher_precision(model), prompt, ours.tokens, "sdpa")
    sdpa = teacher_forced_logits(model, prompt, ours.tokens, "sdpa")
    chosen = torch.tensor(ours.tokens, device=reference.device)
    best = reference.max(dim=-1)
    gap = best.values - reference.gather(1, chosen[:, None])[:, 0]
    tolerance = NEAR_TIE * (sdpa - reference).square().mean().sqrt().item()
    equal = int((best.indices == chosen).sum())
    sdpa_equal = int((sdpa.argmax(-1) == chosen).sum())
    bad = torch.nonzero(gap > tolerance).flatten().tolist()
    count = len(ours.tokens)
    text = (
        f"{equal} of {count} tokens are the fp32 model's first choice, {sdpa_equal} of {count} are SDPA's in "
        f"{_name(model.dtype)} (teacher forcing); the largest logit gap is {gap.max().item():.3g}, a near-tie is up to "
        f"{tolerance:.3g} ({NEAR_TIE:g} times SDPA's RMS error)"
    )
    if bad:
        return Verdict(False, f"{text}; not a near-tie: token {bad[0]} of the text ({ours.tokens[bad[0]]})")
    return Verdict(True, text)


def check_logits(model: Any, prompt: Tensor, ours: Generation) -> Verdict:
    """Compare all logits with SDPA's, both against the model one precision higher, as a relative L2 error."""
    reference = teacher_forced_logits(_in_higher_precision(model), prompt, ours.tokens, "eager")
    sdpa = teacher_forced_logits(model, prompt, ours.tokens, "sdpa")
    mine = torch.stack(ours.logits)
    scale = reference.norm().item()
    error = (mine - reference).norm().item() / scale
    sdpa_error = (sdpa - reference).norm().item() / scale
    # Below this the difference is the rounding of a logit, not of attention.
    floor = torch.finfo(model.dtype).eps
    bound = ERROR_RATIO * sdpa_error + floor
    ok = error <= bound  # False for NaN
    text = (
        f"logits of {mine.shape[0]} tokens: relative error {error:.2e}, SDPA's {sdpa_error:.2e} (against eager "
        f"attention in {_name(reference.dtype)}); accepted up to {bound:.2e}"
    )
    return Verdict(ok, text)


def _in_higher_precision(model: Any) -> Any:
    """A copy in fp32 (of bf16, fp16) or fp64 (of fp32), with the same weights."""
    return copy.deepcopy(model).to(torch.float64 if model.dtype == torch.float32 else torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
