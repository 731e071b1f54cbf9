"""What kernels cost, in microseconds of an H200, for ``plan/cost.py``; written by ``benchmarks/fit_costs.py``."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """The four numbers of a kernel."""

    launch: float  # of a call
    tile: float  # of a tile, besides its n_blocks, for each wave of tiles
    block: float  # of an n_block
    gigabyte: float  # of q, k, v and out


#: The compute capability of the device that was measured. Elsewhere nobody knows them.
MEASURED = (9, 0)
#: Fitted to h200-seeds401-403.json.
COSTS: dict[str, Cost] = {
    "sm80_fwd_d128": Cost(3.13, 5.279, 3.455, 115.788),
    "sm80_fwd_d128_m32": Cost(2.938, 3.351, 1.767, 71.968),
    "sm80_fwd_d128_m64": Cost(3.372, 3.249, 1.426, 55.377),
    "sm80_fwd_d128_n32": Cost(3.405, 4.983, 1.999, 116.549),
    "sm80_fwd_d128_n48": Cost(3.184, 5.145, 2.639, 129.004),
    "sm80_fwd_d192": Cost(3.552, 5.564, 5.584, 61.75),
    "sm80_fwd_d192_smem163": Cost(3.606, 5.296, 3.436, 27.955),
    "sm80_fwd_d192_smem99": Cost(7.012, 2.22, 1.866, 32.608),
    "sm80_fwd_d256": Cost(4.052, 5.705, 5.339, 70.572),
    "sm80_fwd_d256_m32": Cost(2.882, 4.284, 2.275, 75.523),
    "sm80_fwd_d256_m64": Cost(2.832, 4.493, 2.18, 30.598),
    "sm80_fwd_d256_smem163": Cost(4.167, 5.744, 4.091, 49.424),
    "sm80_fwd_d256_smem99": Cost(8.018, 2.229, 2.52, 37.24),
    "sm80_fwd_d512": Cost(5.271, 5.675, 6.53, 89.22),
    "sm80_fwd_d512_smem163": Cost(5.333, 5.585, 4.771, 85.202),
    "sm80_fwd_d512_smem99": Cost(4.964, 5.503, 3.932, 70.736),
    "sm80_fwd_d64": Cost(3.643, 4.981, 2.862, 78.068),
    "sm80_fwd_d64_m32": Cost(2.976, 3.255, 1.236, 37.968),
    "sm80_fwd_d64_m64": Cost(3.053, 3.399, 1.667, 43.184),
    "sm80_fwd_d96": Cost(3.131, 5.365, 2.814, 107.054),
    "sm80_fwd_decode_d128": Cost(11.37, 5.839, 0.143, 25.574),
    "sm80_fwd_decode_d128_kve4m3": Cost(11.604, 8.01, 0.242, 0),
    "sm80_fwd_decode_d128_m32": Cost(13.87, 8.275, 0.188, 0),
    "sm80_fwd_decode_d128_m32_kve4m3": Cost(16.632, 10.79, 0.304, 0),
    "sm80_fwd_decode_d128_m32_smem99": Cost(16.718, 8.845, 0.395, 0),
    "sm80_fwd_decode_d128_smem99": Cost(13.279, 5.903, 0.302, 22.869),
    "sm80_fwd_decode_d128_smem99_kve4m3": Cost(13.121, 8.045, 0.435, 33.795),
    "sm80_fwd_decode_d256": Cost(11.492, 6.344, 0.268, 5.453),
    "sm80_fwd_decode_d256_kve4m3": Cost(13.558, 8.464, 0.436, 18.014),
    "sm80_fwd_decode_d256_m32": Cost(14.203, 9.633, 0.316, 1.088),
    "sm80_fwd_decode_d256_m32_kve4m3": Cost(19.458, 9.136, 0.681, 0),
    "sm80_fwd_decode_d256_m32_smem99": Cost(16.28, 11.459, 0.635, 0),
    "sm80_fwd_decode_d256_smem99": Cost(13.961, 6.902, 0.55, 5.769),
    "sm80_fwd_decode_d256_smem99_kve4m3": Cost(17.3, 5.715, 0.499, 10.561),
    "sm80_fwd_decode_d512": Cost(12.454, 7.857, 0.93, 0),
    "sm80_fwd_decode_d512_kve4m3": Cost(15.628, 9.463, 0.924, 0),
    "sm80_fwd_decode_d512_m32": Cost(11.945, 12.151, 0.685, 0),
    "sm80_fwd_decode_d512_m32_kve4m3": Cost(20.635, 11.446, 1.295, 0),
    "sm80_fwd_decode_d512_m32_smem99": Cost(9.948, 18.436, 1.397, 0),
    "sm80_fwd_decode_d512_smem99": Cost(10.792, 10.768, 1.096, 0),
    "sm80_fwd_decode_d512_smem99_kve4m3": Cost(21.929, 2.501, 0.946, 0),
    "sm80_fwd_decode_d64": Cost(10.875, 6.057, 0.163, 16.07),
    "sm80_fwd_decode_d64_m32": Cost(13.761, 7.57, 0.22, 0),
    "sm80_fwd_decode_d64_m32_smem99": Cost(16.376, 7.471, 0.451, 0),
    "sm80_fwd_decode_d64_smem99": Cost(12.697, 5.552, 0.322, 8.057),
    "sm90_fwd_d128": Cost(8.322, 4.29, 1.52, 96.947),
    "sm90_fwd_d128_e4m3": Cost(8.614, 4.367, 1.868, 62.709),
    "sm90_fwd_d128_m64": Cost(6.85, 3.204, 0.92, 93.303),
    "sm90_fwd_d192": Cost(8.043, 4.822, 1.821, 42.857),
    "sm90_fwd_d192_e4m3": Cost(9.551, 4.439, 1.485, 166.766),
    "sm90_fwd_d192_m64": Cost(6.666, 3.773, 1.109, 72.672),
    "sm90_fwd_d192_v128": Cost(8.614, 4.778, 1.812, 38.072),
    "sm90_fwd_d192_v128_e4m3": Cost(9.76, 4.845, 1.939, 77.188),
    "sm90_fwd_d256": Cost(8.576, 4.515, 1.705, 45.683),
    "sm90_fwd_d256_e4m3": Cost(8.158, 5.577, 2.057, 0),
    "sm90_fwd_d256_m64": Cost(6.803, 4.414, 0.962, 63.443),
    "sm90_fwd_d256_window": Cost(12.4, 5.053, 1.465, 0),
    "sm90_fwd_d384": Cost(5.822, 13.504, 1.712, 153.778),
    "sm90_fwd_d512": Cost(5.601, 11.845, 2.699, 62.638),
    "sm90_fwd_d64": Cost(7.686, 4.081, 1.12, 60.232),
    "sm90_fwd_d64_m64": Cost(6.314, 3.765, 0.958, 65.732),
    "sm90_fwd_d96": Cost(8.693, 3.926, 1.311, 148.681),
}
