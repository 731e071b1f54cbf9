"""A GPT with the attention of Gemma 4: five layers that see a window at head_dim 256, then one that sees all at 512."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import broadhead
import torch
import torch.nn.functional as F
from kernels_ran import KernelsRan
from python_text import VOCABULARY, Packing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOCAL_HEAD_DIM, GLOBAL_HEAD_DIM = 256, 512
#: Layers that see a window in front of each one that sees all tokens.
LOCAL_LAYERS = 5


class Size(NamedTuple):
    """What ``--size`` chooses."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    local_kv_heads: int
    global_kv_heads: int
    window: int  # tokens that a local layer sees, the token itself included
    context: int
    batch: int
    steps: int
    learning_rate: float


SIZES = {
    "tiny": Size(128, 256, 6, 2, 1, 1, 64, 192, 4, 100, 2e-3),
    "real": Size(2560, 8192, 6, 32, 16, 4, 1024, 4096, 1, 300, 2e-4),
}

#: ``attend(q, k, v, window, packing)`` gives out. q, k and v are (batch, tokens, heads, head_dim); window is None where
#: a token sees all that precede it.
Attend = Callable[[Tensor, Tensor, Tensor, "int | None", "Packing | None"], Tensor]


class BroadheadAttention:
    """Attention by broadhead, which counts the kernels that ran."""

    def __init__(self, backend: str | None = None, deterministic: bool = False) -> None:
        self.backend, self.deterministic = backend, deterministic
        self.ran = KernelsRan()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, packing: Packing | None) -> Tensor:
        # A token sees itself and window - 1 tokens to its left.
        sides = (-1, -1) if window is None else (window - 1, 0)
        if packing is None:
            out = broadhead.flash_attn_func(
                q, k, v, causal=True, window_size=sides, deterministic=self.deterministic, backend=self.backend
            )
        else:
            out = broadhead.flash_attn_varlen_func(
                q[0],
                k[0],
                v[0],
                cu_seqlens_q=packing.cu_seqlens,
                cu_seqlens_k=packing.cu_seqlens,
                max_seqlen_q=packing.max_seqlen,
                max_seqlen_k=packing.max_seqlen,
                causal=True,
                window_size=sides,
                deterministic=self.deterministic,
                backend=self.backend,
            )[None]
        self.ran.note("forward", q.shape[-1])
        if q.requires_grad:
            # The hook runs when q has its gradient, in the thread of the backward pass, whose last call that was.
            q.register_hook(lambda grad: self.ran.note("backward", grad.shape[-1]))
        return out


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, packing: Packing | None) -> Tensor:
    """The same attention by torch's scaled_dot_product_attention, with a mask where it has no other way."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    mask = None
    if window is not None or packing is not None:
        place = torch.arange(q.shape[1], device=q.device)
        distance = place[:, None] - place
        mask = distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        if packing is not None:
            sequence = torch.bucketize(place, packing.cu_seqlens[1:].long(), right=True)
            mask = mask & (sequence[:, None] == sequence)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of x (batch, tokens, heads, head_dim), computed in fp32; positions (tokens,)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(half, device=x.device) / half)
    angles = (positions[:, None] * frequencies)[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class Attention(nn.Module):
    def __init__(self, size: Size, is_local: bool, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.window = size.window if is_local else None
        self.head_dim = LOCAL_HEAD_DIM if is_local else GLOBAL_HEAD_DIM
        kv_heads = size.local_kv_heads if is_local else size.global_kv_heads
        self.q = nn.Linear(size.hidden, size.heads * self.head_dim, bias=False)
        self.k = nn.Linear(size.hidden, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(size.hidden, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(size.heads * self.head_dim, size.hidden, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def forward(self, x: Tensor, positions: Tensor, packing: Packing | None) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        # Norm and rotation are fp32. Attention goes by the dtype of its inputs, whatever autocast says: v's, here.
        q = rotate(self.q_norm(q.float()), positions).to(v.dtype)
        k = rotate(self.k_norm(k.float()), positions).to(v.dtype)
        return self.out(self.attend(q, k, v, self.window, packing).flatten(2))


class Layer(nn.Module):
    def __init__(self, size: Size, is_local: bool, attend: Attend) -> None:
        super().__init__()
        self.attention = Attention(size, is_local, attend)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.hidden), nn.RMSNorm(size.hidden)
        self.gate = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.up = nn.Linear(size.hidden, size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor, positions: Tensor, packing: Packing | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, packing)
        y = self.mlp_norm(x)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


class TinyGpt(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, size: Size, attend: Attend, checkpoints: bool = False) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.embedding = nn.Embedding(VOCABULARY, size.hidden)
        self.layers = nn.ModuleList(Layer(size, (i + 1) % (LOCAL_LAYERS + 1) != 0, attend) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden)
        self.head = nn.Linear(size.hidden, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, packing: Packing | None = None) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device) if packing is None else packing.positions
        x = self.embedding(tokens)
        for layer in self.layers:
            if self.checkpoints:
                x = checkpoint(layer, x, positions, packing, use_reentrant=False)
            else:
                x = layer(x, positions, packing)
        return self.head(self.norm(x)).float()
