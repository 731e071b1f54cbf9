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
    "sm80_fwd_d128": Cost(8.72, 12.021, 0.346, 5.37, 3.063, 1.695),
    "sm80_fwd_d128_m32": Cost(6.407, 10.697, 0.325, 3.22, 1.749, 1.026),
    "sm80_fwd_d128_m64": Cost(6.398, 9.02, 0.311, 3.059, 1.308, 0.764),
    "sm80_fwd_d128_n32": Cost(8.317, 12.847, 0.351, 5.118, 1.79, 1.003),
    "sm80_fwd_d128_n48": Cost(8.42, 13.751, 0.346, 5.184, 2.399, 1.376),
    "sm80_fwd_d192": Cost(8.095, 9.543, 0.348, 5.7, 4.467, 4.008),
    "sm80_fwd_d192_smem163": Cost(7.845, 10.287, 0.337, 5.003, 2.77, 2.361),
    "sm80_fwd_d192_smem99": Cost(7.592, 9.772, 0.236, 2.616, 1.367, 1.989),
    "sm80_fwd_d256": Cost(8.965, 13.161, 0.343, 6.045, 4.368, 3.59),
    "sm80_fwd_d256_m32": Cost(6.761, 9.94, 0.359, 4.343, 2.21, 1.463),
    "sm80_fwd_d256_m64": Cost(6.755, 9.152, 0.35, 4.259, 1.92, 1.281),
    "sm80_fwd_d256_smem163": Cost(8.664, 10.045, 0.328, 5.94, 3.216, 2.842),
    "sm80_fwd_d256_smem99": Cost(8.173, 12.659, 0.225, 2.996, 1.79, 2.722),
    "sm80_fwd_d512": Cost(8.855, 9.187, 0.35, 6.926, 5.06, 5.543),
    "sm80_fwd_d512_smem163": Cost(8.248, 9.325, 0.324, 6.525, 3.613, 4.268),
    "sm80_fwd_d512_smem99": Cost(8.486, 11.894, 0.329, 6.172, 3.131, 3.075),
    "sm80_fwd_d64": Cost(8.505, 12.273, 0.356, 5.966, 2.112, 1.368),
    "sm80_fwd_d64_m32": Cost(6.237, 14.788, 0.337, 3.889, 0.909, 0.684),
    "sm80_fwd_d64_m64": Cost(6.267, 10.333, 0.364, 4.089, 1.219, 0.871),
    "sm80_fwd_d96": Cost(8.601, 10.75, 0.361, 5.303, 2.573, 1.357),
    "sm80_fwd_decode_d128": Cost(13.967, 0, 0.375, 5.318, 0.155, 1.112),
    "sm80_fwd_decode_d128_kve4m3": Cost(10.085, 0, 1.412, 6.849, 0.273, 6.345),
    "sm80_fwd_decode_d128_m32": Cost(18.181, 0, 0, 7.35, 0.193, 1.14),
    "sm80_fwd_decode_d128_m32_kve4m3": Cost(19.281, 0, 1.554, 9.311, 0.293, 4.005),
    "sm80_fwd_decode_d128_m32_smem99": Cost(22.097, 0, 0, 7.78, 0.397, 1.167),
    "sm80_fwd_decode_d128_smem99": Cost(16.386, 0, 0, 5.266, 0.326, 1.128),
    "sm80_fwd_decode_d128_smem99_kve4m3": Cost(11.464, 0, 1.411, 6.698, 0.49, 6.958),
    "sm80_fwd_decode_d256": Cost(13.279, 0, 0, 5.901, 0.28, 2.211),
    "sm80_fwd_decode_d256_kve4m3": Cost(8.359, 0, 1.575, 6.577, 0.489, 11.136),
    "sm80_fwd_decode_d256_m32": Cost(18.232, 0, 0.575, 8.635, 0.325, 2.344),
    "sm80_fwd_decode_d256_m32_kve4m3": Cost(16.246, 0, 1.571, 7.306, 0.692, 9.083),
    "sm80_fwd_decode_d256_m32_smem99": Cost(22.525, 0, 0, 10.056, 0.642, 2.459),
    "sm80_fwd_decode_d256_smem99": Cost(16.598, 0, 0, 6.18, 0.578, 2.3),
    "sm80_fwd_decode_d256_smem99_kve4m3": Cost(13.116, 0, 1.501, 4.82, 0.53, 7.692),
    "sm80_fwd_decode_d512": Cost(10.302, 0, 1.049, 6.974, 0.967, 7.48),
    "sm80_fwd_decode_d512_kve4m3": Cost(7.367, 0, 1.407, 6.471, 0.991, 15.137),
    "sm80_fwd_decode_d512_m32": Cost(16.467, 0, 0, 10.326, 0.726, 4.749),
    "sm80_fwd_decode_d512_m32_kve4m3": Cost(11.859, 0, 1.506, 6.405, 1.282, 17.358),
    "sm80_fwd_decode_d512_m32_smem99": Cost(20.248, 0, 4.103, 13.471, 1.444, 5.154),
    "sm80_fwd_decode_d512_smem99": Cost(14.946, 0, 0.004, 9.067, 1.133, 4.586),
    "sm80_fwd_decode_d512_smem99_kve4m3": Cost(9.218, 0, 1.465, 5.611, 0.944, 12.663),
    "sm80_fwd_decode_d64": Cost(13.465, 0, 0.646, 5.539, 0.172, 1.109),
    "sm80_fwd_decode_d64_kve4m3": Cost(10.532, 0, 1.364, 6.268, 0.262, 3.033),
    "sm80_fwd_decode_d64_m32": Cost(17.271, 0, 0, 7.057, 0.228, 1.134),
    "sm80_fwd_decode_d64_m32_kve4m3": Cost(15.365, 0, 1.535, 8.838, 0.274, 3.57),
    "sm80_fwd_decode_d64_m32_smem99": Cost(19.977, 0, 0, 7.121, 0.435, 1.152),
    "sm80_fwd_decode_d64_smem99": Cost(15.011, 0, 0, 5.381, 0.326, 1.119),
    "sm80_fwd_decode_d64_smem99_kve4m3": Cost(12.223, 0, 1.516, 6.707, 0.272, 3.221),
    "sm90_fwd_d128": Cost(10.796, 19.316, 3.827, 4.304, 1.307, 1.059),
    "sm90_fwd_d128_e4m3": Cost(9.694, 9.815, 3.311, 4.313, 1.395, 1.885),
    "sm90_fwd_d128_m64": Cost(9.263, 12.194, 1.883, 3.469, 0.835, 0.519),
    "sm90_fwd_d192": Cost(11.25, 16.956, 3.923, 4.511, 1.591, 1.225),
    "sm90_fwd_d192_e4m3": Cost(10.608, 10.191, 4.393, 4.735, 1.045, 1.49),
    "sm90_fwd_d192_m64": Cost(9.559, 12.133, 3.77, 3.572, 1.117, 0.647),
    "sm90_fwd_d192_v128": Cost(11.673, 20.148, 4.734, 4.355, 1.621, 1.077),
    "sm90_fwd_d192_v128_e4m3": Cost(10.704, 8.795, 4.62, 4.909, 1.451, 1.979),
    "sm90_fwd_d256": Cost(11.344, 14.353, 5.198, 4.433, 1.426, 1.16),
    "sm90_fwd_d256_e4m3": Cost(11.059, 7.837, 3.697, 5.147, 1.226, 1.739),
    "sm90_fwd_d256_m64": Cost(9.601, 12.203, 4.819, 4.576, 0.849, 0.614),
    "sm90_fwd_d256_window": Cost(13.165, 11.478, 4.344, 3.94, 1.348, 0.919),
    "sm90_fwd_d384": Cost(15.685, 14.185, 5.051, 11.16, 2.734, 1.058),
    "sm90_fwd_d512": Cost(15.297, 18.703, 2.768, 9.705, 3.149, 1.228),
    "sm90_fwd_d64": Cost(10.319, 19.179, 2.464, 4.284, 0.822, 0.597),
    "sm90_fwd_d64_e4m3": Cost(9.256, 9.235, 3.419, 3.812, 0.408, 0.697),
    "sm90_fwd_d64_m64": Cost(9.292, 16.037, 4.152, 4.232, 0.721, 0.45),
    "sm90_fwd_d96": Cost(10.691, 19.681, 4.37, 4.125, 1.186, 1.046),
}
