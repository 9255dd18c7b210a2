"""Newton-Schulz iterations, by which Muon orthogonalises a matrix."""

from __future__ import annotations

from torch import Tensor

__all__ = ["newton_schulz", "newton_schulz_cost"]


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns: the singular vectors of ``matrix``, with singular
    values around 1.

    With a, b, c for the coefficients, X is divided by its Frobenius norm and ``steps`` times replaced by
    ``aX + (bA + cA²)X``, where A is ``XXᵀ``; of a matrix with more rows than columns X is the transpose.

    Operation by operation it is what ``torch.optim.Muon`` computes, and has its bits, but never writes to ``matrix``.

    Args:
        matrix: 2-D, of any floating-point dtype.
        eps: The least number to divide by.

    Returns:
        bf16, of the shape of ``matrix``, not always contiguous.

    Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024,
    kellerjordan.github.io/posts/muon.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = x.addmm(gram.addmm(gram, gram, beta=b, alpha=c), x, beta=a)
    orthogonal: Tensor = x.T if is_tall else x
    return orthogonal


def newton_schulz_cost(rows: int, cols: int) -> int:
    """What a step of it takes, up to a factor that is about the same for all shapes: its products are of the longer
    side by the shorter one squared."""
    return rows * cols * min(rows, cols)
