"""What kernels cost, in microseconds of an H200, for ``plan/cost.py``; written by ``benchmarks/fit_costs.py``."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """The four numbers of a kernel."""

    launch: float  # of a call
    tile: float  # of a tile, besides its n_blocks, for each wave of tiles
    block: float  # of an n_block
    gigabyte: float  # of q, k, v and out


#: Fitted to rows1c.json.
COSTS: dict[str, Cost] = {
    "sm80_fwd_d128": Cost(4.763, 7.601, 0.747, 301.046),
    "sm80_fwd_d128_m32": Cost(3.117, 7.354, 0.266, 212.505),
    "sm80_fwd_d128_m64": Cost(5.133, 4.596, 0.506, 237.444),
    "sm80_fwd_d128_n32": Cost(5.811, 5.918, 0.394, 386.263),
    "sm80_fwd_d128_n48": Cost(4.96, 6.864, 0.575, 321.559),
    "sm80_fwd_d192": Cost(5.757, 8.867, 1.633, 332.437),
    "sm80_fwd_d192_smem163": Cost(5.301, 7.054, 1.423, 287.413),
    "sm80_fwd_d192_smem99": Cost(8.084, 3.317, 1.14, 62.393),
    "sm80_fwd_d256": Cost(3.38, 8.099, 4.363, 25.172),
    "sm80_fwd_d256_m32": Cost(0, 10.758, 0.979, 36.337),
    "sm80_fwd_d256_m64": Cost(2.347, 7.14, 1.485, 49.533),
    "sm80_fwd_d256_smem163": Cost(3.323, 7.759, 3.348, 24.855),
    "sm80_fwd_d256_smem99": Cost(7.801, 3.108, 2.166, 11.433),
    "sm80_fwd_d512": Cost(3.013, 6.032, 6.282, 9.835),
    "sm80_fwd_d512_smem163": Cost(3.506, 5.969, 4.945, 11.316),
    "sm80_fwd_d512_smem99": Cost(4.262, 5.481, 4.275, 22.256),
    "sm80_fwd_d64": Cost(5.574, 4.8, 1.873, 260.502),
    "sm80_fwd_d64_m32": Cost(5.504, 3.389, 0.694, 176.296),
    "sm80_fwd_d64_m64": Cost(5.509, 3.049, 1.086, 276.733),
    "sm80_fwd_d96": Cost(4.258, 7.304, 1.17, 183.928),
    "sm80_fwd_decode_d128": Cost(9.733, 6.042, 0.128, 0),
    "sm80_fwd_decode_d128_kve4m3": Cost(10.351, 7.577, 0.183, 0),
    "sm80_fwd_decode_d128_m32": Cost(9.684, 8.824, 0.141, 0),
    "sm80_fwd_decode_d128_m32_kve4m3": Cost(10.829, 10.487, 0.307, 0),
    "sm80_fwd_decode_d128_m32_smem99": Cost(8.471, 10.402, 0.302, 0),
    "sm80_fwd_decode_d128_smem99": Cost(9.453, 6.404, 0.261, 0),
    "sm80_fwd_decode_d128_smem99_kve4m3": Cost(10.712, 7.732, 0.375, 0),
    "sm80_fwd_decode_d256": Cost(8.867, 6.023, 0.444, 3.195),
    "sm80_fwd_decode_d256_kve4m3": Cost(11.764, 7.56, 0.473, 0),
    "sm80_fwd_decode_d256_m32": Cost(8.308, 9.121, 0.643, 1.88),
    "sm80_fwd_decode_d256_m32_kve4m3": Cost(16.058, 9.856, 0.797, 0),
    "sm80_fwd_decode_d256_m32_smem99": Cost(7.205, 10.733, 1.323, 1.555),
    "sm80_fwd_decode_d256_smem99": Cost(8.44, 6.326, 0.903, 8.355),
    "sm80_fwd_decode_d256_smem99_kve4m3": Cost(12.326, 7.598, 0.571, 0),
    "sm80_fwd_decode_d512": Cost(8.951, 5.906, 1.819, 0),
    "sm80_fwd_decode_d512_m32": Cost(9.603, 9.126, 1.606, 0),
    "sm80_fwd_decode_d512_m32_smem99": Cost(10.076, 10.798, 3.215, 0),
    "sm80_fwd_decode_d512_smem99": Cost(8.68, 6.921, 2.203, 0),
    "sm80_fwd_decode_d64": Cost(9.262, 5.782, 0.234, 0),
    "sm80_fwd_decode_d64_m32": Cost(10.538, 7.638, 0.255, 0),
    "sm80_fwd_decode_d64_m32_smem99": Cost(9.352, 8.368, 0.546, 0),
    "sm80_fwd_decode_d64_smem99": Cost(10.66, 5.376, 0.448, 0),
    "sm90_fwd_d128": Cost(9.616, 5.727, 1.2, 0),
    "sm90_fwd_d128_e4m3": Cost(8.173, 4.394, 1.933, 0),
    "sm90_fwd_d128_m64": Cost(8.014, 4.619, 0.544, 34.398),
    "sm90_fwd_d192": Cost(9.498, 6.246, 0.784, 140.004),
    "sm90_fwd_d192_e4m3": Cost(0, 13.898, 0.595, 19.632),
    "sm90_fwd_d192_m64": Cost(8.29, 5.219, 0.268, 181.555),
    "sm90_fwd_d192_v128": Cost(10.517, 6.047, 1.216, 0),
    "sm90_fwd_d256": Cost(8.723, 5.882, 1.567, 17.811),
    "sm90_fwd_d256_e4m3": Cost(8.826, 5.651, 1.12, 25.153),
    "sm90_fwd_d256_window": Cost(59.277, 10.183, 3.784, 0),
    "sm90_fwd_d384": Cost(4.002, 14.871, 3.382, 19.783),
    "sm90_fwd_d512": Cost(1.699, 15.779, 4.468, 0),
    "sm90_fwd_d64": Cost(9.232, 4.378, 0.853, 113.132),
    "sm90_fwd_d64_m64": Cost(8.195, 4.042, 0.744, 93.123),
    "sm90_fwd_d96": Cost(9.736, 5.584, 1.164, 0),
}
