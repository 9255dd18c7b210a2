"""How far a decoded element may lie from the encoded one: derived from docs/wire-formats.md and the input alone."""

from __future__ import annotations

import torch
from torch import Tensor

import smallreduce as sr

BLOCK = 32


def half_ulp(dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """The most that rounding a number of at most ``magnitude`` (fp64) to ``dtype`` can change it, saturation apart."""
    significand_bits, smallest_exponent = {
        torch.float32: (24, -149),
        torch.bfloat16: (8, -133),
        torch.float16: (11, -24),
        torch.float8_e4m3fn: (4, -9),
        torch.float8_e5m2: (3, -16),
    }[dtype]
    return magnitude * 2.0**-significand_bits + 2.0 ** (smallest_exponent - 1)


def error_bound(codec: sr.PacketCodec, x: Tensor) -> Tensor:
    """The most that each element of ``x`` may change in a packet, in fp64, derived from docs/wire-formats.md."""
    values = x.double()
    if isinstance(codec, sr.Cast):
        lossy = half_ulp(codec.dtype, values.abs())
    else:
        group = codec.format.group
        groups = torch.nn.functional.pad(values, (0, -x.numel() % group)).view(-1, group)
        if isinstance(codec, sr.IntQuant):
            blocks, largest_code = groups.view(-1, group // BLOCK, BLOCK), 2 ** (codec.bits - 1) - 1
            if codec.hadamard:
                blocks = blocks @ hadamard_matrix(x.device) / BLOCK
            # Section 5: rounded up to the 8 significant bits of a bf16.
            scale = blocks.abs().amax(dim=(1, 2)) / largest_code * (1 + 2.0**-7)
            # Section 6: half a level to the nearest, one at random; rounding 1/s, y and t moves t by less than 2^-14.
            levels = (0.5 if codec.rounding == "nearest" else 1.0) + 2.0**-14
            if codec.hadamard:
                # Section 8: an element is the sum of 32 values, each as wrong as the above and, in each direction, by
                # five additions of terms that never sum to more than 32 times the largest value.
                levels = BLOCK * (levels + 2 * 5 * BLOCK * largest_code * 2.0**-24)
            bound = (scale * levels).unsqueeze(1).expand_as(groups)
        else:
            # Section 5: the sum of magnitudes is good to 2^-18, its bf16 to 2^-8; padding does not count in the mean.
            starts = torch.arange(0, x.numel(), group, device=x.device)
            mean = (groups.abs().sum(1) / (x.numel() - starts).clamp(max=group)).unsqueeze(1)
            bound = (groups.abs() - mean).abs() + mean * (2.0**-8 + 2.0**-18)
        lossy = bound.flatten()[: x.numel()]
    return lossy + half_ulp(x.dtype, values.abs() + lossy)


def hadamard_matrix(device: torch.device) -> Tensor:
    """Sylvester's 32 by 32 matrix of +1 and -1, fp64."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
