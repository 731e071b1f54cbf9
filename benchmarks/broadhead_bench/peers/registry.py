"""Every implementation that the benchmarks know."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from broadhead_bench.peers.base import Peer
from broadhead_bench.peers.broadhead_api import Baseline, Broadhead
from broadhead_bench.peers.broadhead_rows import BestRow, PortableForward
from broadhead_bench.peers.broadhead_variants import Deterministic, Portable
from broadhead_bench.peers.flash_attention import Ffpa, FlashAttention3, FlashAttention4
from broadhead_bench.peers.flashinfer_wrappers import FlashInfer
from broadhead_bench.peers.torch_flex import Flex
from broadhead_bench.peers.torch_sdpa import TorchDefault, TorchFlash, TorchSdpa


def all_peers() -> list[Peer]:
    """Every implementation, in the order of the tables."""
    return [
        Broadhead(),
        Deterministic(),
        Portable(),
        PortableForward(),
        BestRow(),
        Baseline(),
        TorchFlash("fa2", SDPBackend.FLASH_ATTENTION),
        FlashAttention3(),
        FlashAttention4(),
        Ffpa(),
        TorchSdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
        TorchSdpa("memeff", SDPBackend.EFFICIENT_ATTENTION),
        TorchDefault(),
        Flex(),
        FlashInfer(),
    ]
