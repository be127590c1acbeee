"""Pivot rows: rows of a matrix of which all others are combinations."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_COEFFICIENT = 1.05  # in magnitude; it scales a pivot row's rounding error in the other rows
EXCHANGES = 4  # at most, times the rank


def pivoted_rows(up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pivot rows of a matrix, the other rows, and the coefficients that express the others in the pivots.

    Rows of large volume: by LU decomposition with partial pivoting, then exchanging a pivot and another row while a
    coefficient exceeds ``MAX_COEFFICIENT`` (Goreinov et al. 2010, How to find a good submatrix).

    Args:
        up: (rows, rank), float64, of which every row of a product ``up @ down`` is a combination.

    Returns:
        pivots (rank,), others (rows - rank,), coefficients (rows - rank, rank): ``up[others] = coefficients @
        up[pivots]``.
    """
    rows, rank = up.shape
    basis = torch.linalg.qr(up).Q  # of full rank, also where up is not
    order = list(range(rows))
    if rank:
        for place, other in enumerate(torch.linalg.lu_factor(basis).pivots.tolist()):
            order[place], order[other - 1] = order[other - 1], order[place]
    pivots, others = torch.tensor(order, dtype=torch.int64, device=up.device).split([rank, rows - rank])
    if not rank or rank == rows:
        return pivots, others, basis[others]

    def solved() -> Tensor:
        return torch.linalg.solve(basis[pivots], basis[others], left=False)

    coefficients = solved()
    for _ in range(EXCHANGES * rank):
        i, j = divmod(int(coefficients.abs().argmax()), rank)  # the other row i becomes a pivot instead of pivot j
        largest = coefficients[i, j].clone()
        if largest.abs() <= MAX_COEFFICIENT:
            break
        row, column = -coefficients[i] / largest, coefficients[:, j].clone()
        row[j] = 1 / largest
        change = row.clone()
        change[j] -= 1
        coefficients.addr_(column, change)
        coefficients[i] = row
        pivots[j], others[i] = others[i].clone(), pivots[j].clone()
    return pivots, others, solved()
