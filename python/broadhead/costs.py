"""What kernels cost, in microseconds of an H200, for ``plan/cost.py``; written by ``benchmarks/fit_costs.py``."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """The six numbers of a kernel."""

    launch: float  # of a call
    merge: float = 0.0  # of a call whose keys are divided
    again: float = 0.0  # of a call of more tiles than run at a time
    tile: float = 0.0  # of a tile of each place, besides its n_blocks
    block: float = 0.0  # of an n_block of each place
    chain: float = 0.0  # of an n_block of the longest tile


#: The compute capability of the device that was measured. Elsewhere nobody knows them.
MEASURED = (9, 0)
#: What the memory of that device takes for a gigabyte at least: it gives 4.8 TB/s.
MICROSECONDS_PER_GIGABYTE = 208.0
#: Fitted to h200-seeds401-403.json.
COSTS: dict[str, Cost] = {
    "sm80_fwd_d128": Cost(8.77, 12.36, 0.327, 5.389, 3.081, 1.723),
    "sm80_fwd_d128_m32": Cost(6.401, 10.607, 0.303, 3.208, 1.762, 1.045),
    "sm80_fwd_d128_m64": Cost(6.393, 9.272, 0.293, 3.064, 1.318, 0.778),
    "sm80_fwd_d128_n32": Cost(8.405, 12.523, 0.335, 5.145, 1.805, 1.008),
    "sm80_fwd_d128_n48": Cost(8.511, 14.091, 0.33, 5.196, 2.419, 1.377),
    "sm80_fwd_d192": Cost(8.079, 9.2, 0.326, 5.698, 4.508, 4.034),
    "sm80_fwd_d192_smem163": Cost(7.818, 10.355, 0.319, 5.034, 2.783, 2.398),
    "sm80_fwd_d192_smem99": Cost(7.621, 9.574, 0.23, 2.628, 1.375, 2.026),
    "sm80_fwd_d256": Cost(8.982, 13.278, 0.327, 6.092, 4.4, 3.626),
    "sm80_fwd_d256_m32": Cost(6.731, 10.31, 0.341, 4.38, 2.22, 1.467),
    "sm80_fwd_d256_m64": Cost(6.849, 9.499, 0.327, 4.257, 1.934, 1.284),
    "sm80_fwd_d256_smem163": Cost(8.701, 9.663, 0.312, 5.949, 3.236, 2.896),
    "sm80_fwd_d256_smem99": Cost(8.186, 12.744, 0.22, 3.011, 1.803, 2.746),
    "sm80_fwd_d512": Cost(8.76, 9.094, 0.332, 6.965, 5.103, 5.616),
    "sm80_fwd_d512_smem163": Cost(8.102, 9.24, 0.309, 6.574, 3.636, 4.322),
    "sm80_fwd_d512_smem99": Cost(8.419, 11.628, 0.314, 6.211, 3.142, 3.088),
    "sm80_fwd_d64": Cost(8.485, 12.073, 0.337, 5.998, 2.126, 1.383),
    "sm80_fwd_d64_m32": Cost(6.271, 14.581, 0.321, 3.876, 0.916, 0.693),
    "sm80_fwd_d64_m64": Cost(6.185, 10.179, 0.342, 4.116, 1.223, 0.884),
    "sm80_fwd_d96": Cost(8.566, 10.351, 0.337, 5.282, 2.595, 1.382),
    "sm80_fwd_decode_d128": Cost(15.032, 0, 0.376, 5.337, 0.157, 0),
    "sm80_fwd_decode_d128_kve4m3": Cost(16.61, 0, 1.23, 6.926, 0.279, 0),
    "sm80_fwd_decode_d128_m32": Cost(16.362, 0, 0, 7.446, 0.197, 2.644),
    "sm80_fwd_decode_d128_m32_kve4m3": Cost(18.933, 0, 1.299, 9.165, 0.284, 5.102),
    "sm80_fwd_decode_d128_m32_smem99": Cost(16.362, 0, 0, 7.833, 0.402, 6.812),
    "sm80_fwd_decode_d128_smem99": Cost(16.362, 0, 0, 5.297, 0.329, 0.926),
    "sm80_fwd_decode_d128_smem99_kve4m3": Cost(18.581, 0, 1.223, 6.768, 0.511, 0),
    "sm80_fwd_decode_d256": Cost(15.398, 0, 0, 5.962, 0.284, 0),
    "sm80_fwd_decode_d256_kve4m3": Cost(18.933, 0, 1.347, 6.665, 0.495, 0.122),
    "sm80_fwd_decode_d256_m32": Cost(16.362, 0, 0.963, 8.662, 0.332, 3.866),
    "sm80_fwd_decode_d256_m32_kve4m3": Cost(18.933, 0, 1.328, 6.519, 0.687, 7.974),
    "sm80_fwd_decode_d256_m32_smem99": Cost(16.362, 0, 0, 10.087, 0.649, 8.533),
    "sm80_fwd_decode_d256_smem99": Cost(16.362, 0, 0, 6.213, 0.579, 2.193),
    "sm80_fwd_decode_d256_smem99_kve4m3": Cost(18.933, 0, 1.285, 4.792, 0.533, 2.28),
    "sm80_fwd_decode_d512": Cost(16.362, 0, 1.644, 6.993, 0.986, 0.957),
    "sm80_fwd_decode_d512_kve4m3": Cost(18.933, 0, 1.263, 7.362, 0.991, 0.891),
    "sm80_fwd_decode_d512_m32": Cost(16.362, 0, 0, 10.388, 0.733, 4.619),
    "sm80_fwd_decode_d512_m32_kve4m3": Cost(18.933, 0, 1.288, 5.875, 1.293, 10.925),
    "sm80_fwd_decode_d512_m32_smem99": Cost(16.362, 0, 3.914, 13.357, 1.457, 9.286),
    "sm80_fwd_decode_d512_smem99": Cost(16.362, 0, 0, 9.073, 1.146, 3.28),
    "sm80_fwd_decode_d512_smem99_kve4m3": Cost(18.933, 0, 1.258, 5.736, 0.953, 2.935),
    "sm80_fwd_decode_d64": Cost(14.508, 0, 0.375, 5.543, 0.174, 0),
    "sm80_fwd_decode_d64_kve4m3": Cost(14.299, 0, 1.165, 6.232, 0.276, 0),
    "sm80_fwd_decode_d64_m32": Cost(16.362, 0, 0, 7.022, 0.23, 2.409),
    "sm80_fwd_decode_d64_m32_kve4m3": Cost(18.933, 0, 1.303, 8.702, 0.284, 1.484),
    "sm80_fwd_decode_d64_m32_smem99": Cost(16.362, 0, 0, 6.914, 0.437, 5.415),
    "sm80_fwd_decode_d64_smem99": Cost(16.074, 0, 0, 5.449, 0.329, 0),
    "sm80_fwd_decode_d64_smem99_kve4m3": Cost(16.091, 0, 1.289, 6.657, 0.284, 0),
    "sm90_fwd_d128": Cost(10.585, 13.131, 4.483, 3.078, 1.371, 1.005),
    "sm90_fwd_d128_e4m3": Cost(9.488, 6.795, 3.854, 3.054, 1.406, 1.808),
    "sm90_fwd_d128_m64": Cost(9.076, 8.191, 1.599, 2.862, 0.837, 0.518),
    "sm90_fwd_d128_m64_e4m3": Cost(8.852, 7.805, 4.049, 2.829, 1.106, 1.161),
    "sm90_fwd_d192": Cost(10.962, 9.85, 4.716, 3.147, 1.669, 1.186),
    "sm90_fwd_d192_e4m3": Cost(10.264, 9.515, 5.106, 3.908, 1.078, 1.495),
    "sm90_fwd_d192_m64": Cost(9.076, 8.623, 3.451, 3.129, 1.131, 0.653),
    "sm90_fwd_d192_m64_e4m3": Cost(9.435, 10.735, 3.431, 3.656, 0.904, 0.868),
    "sm90_fwd_d192_v128": Cost(11.346, 17.503, 5.323, 2.919, 1.697, 1.052),
    "sm90_fwd_d192_v128_e4m3": Cost(10.386, 8.467, 5.174, 3.965, 1.425, 1.996),
    "sm90_fwd_d256": Cost(11.082, 10.592, 5.321, 4.231, 1.333, 1.19),
    "sm90_fwd_d256_e4m3": Cost(10.352, 7.002, 4.184, 4.277, 1.225, 1.71),
    "sm90_fwd_d256_m64": Cost(9.473, 8.35, 4.454, 4.548, 0.839, 0.617),
    "sm90_fwd_d256_m64_e4m3": Cost(9.266, 9.007, 3.197, 3.689, 1.053, 1.004),
    "sm90_fwd_d256_window": Cost(12.839, 9.381, 4.996, 3.967, 1.185, 0.905),
    "sm90_fwd_d384": Cost(15.662, 14.265, 5.384, 10.222, 2.823, 1.045),
    "sm90_fwd_d512": Cost(14.936, 16.849, 2.907, 9.024, 3.232, 1.24),
    "sm90_fwd_d64": Cost(9.757, 16.279, 2.617, 3.73, 0.861, 0.601),
    "sm90_fwd_d64_e4m3": Cost(9.554, 8.56, 3.234, 3.149, 0.545, 0.722),
    "sm90_fwd_d64_m64": Cost(8.902, 13.796, 5.506, 3.231, 0.764, 0.457),
    "sm90_fwd_d64_m64_e4m3": Cost(8.804, 8.56, 4.814, 2.832, 0.271, 0.376),
    "sm90_fwd_d96": Cost(10.165, 13.622, 4.561, 3.426, 1.183, 1.035),
    "sm90_fwd_d96_m64": Cost(9.032, 15.559, 3.56, 4.317, 0.937, 0.476),
}
