"""Time and accuracy of the ways to decompose a wide second moment: eigh, eigenvalues alone, subspace iteration, and
eigh in float32 whose first directions are refined in float64.

    OMP_NUM_THREADS=1 python -m benchmarks.accuracy.decomposition --features 2048 4096

The moments have known spectra: variances that fall by a power of their index, three outliers among them, in random
directions. Times are processor time, which a machine shared with others disturbs least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ops.report import format_table
from lowrank_ops.subspaces.principal import Leading, subspace_iteration

HEADER = ("features", "method", "rank", "spectrum", "seconds", "of eigh", "excess", "bound", "lost of top half")
METHODS = ("eigh", "eigenvalues", "iteration", "float32")


class Row(NamedTuple):
    """One decomposition."""

    features: int
    method: str
    rank: int | None
    decay: float
    seconds: float
    of_eigh: float | None  # its time as a share of eigh's
    excess: float | None  # variance dropped beyond the least possible, as a share of the least
    bound: float | None  # what was stated of it beforehand
    lost: float | None  # share of the first rank / 2 directions outside the basis

    def cells(self) -> list[str]:
        """The row as text."""
        return [
            f"{self.features}",
            self.method,
            "-" if self.rank is None else f"{self.rank}",
            f"i^-{self.decay:g}",
            f"{self.seconds:.2f}",
            "not measured" if self.of_eigh is None else f"{self.of_eigh:.2f}",
            *("-" if share is None else f"{share:.2%}" for share in (self.excess, self.bound)),
            "-" if self.lost is None else f"{self.lost:.1e}",
        ]


def moment_of(spectrum: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix of this spectrum in random directions: (features, features), and its eigenvectors in columns."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.eye(len(spectrum), dtype=spectrum.dtype)
    for _ in range(4):  # block reflections mix every direction with every other one
        plane = torch.linalg.qr(torch.randn(len(spectrum), 64, dtype=spectrum.dtype, generator=generator)).Q
        basis -= 2 * plane @ (plane.T @ basis)
    moment = (basis * spectrum) @ basis.T
    return (moment + moment.T) / 2, basis


def falling(features: int, decay: float) -> Tensor:
    """Variances i^-decay, the first three 30 times as large."""
    spectrum = torch.arange(1, features + 1, dtype=torch.float64) ** -decay
    spectrum[:3] *= 30
    return spectrum


def judged(found: Leading, spectrum: Tensor, basis: Tensor) -> tuple[float, float, float]:
    """The excess and its bound as shares of the least variance dropped, and what is missing of the first directions."""
    rank = found.basis.shape[-1]
    least = float(spectrum[rank:].sum())
    top = basis[:, : rank // 2]
    lost = 1 - float((found.basis.T @ top).square().sum()) / (rank // 2)
    return float(found.dropped) / least - 1, float(found.excess) / least, lost


def refined(moment: Tensor, vectors: Tensor, rank: int, product: bool) -> Leading:
    """The first ``rank`` directions in float64, from ``vectors`` (features, features), float32, by rising variance.

    Without a product with the moment they are made orthonormal; with one, so is what it makes of a quarter more of
    them, and the best ``rank`` directions among these count.
    """
    width = min(len(moment), rank + rank // 4 if product else rank)
    sketch = vectors[:, -width:].flip(1).to(moment.dtype)
    sketch = torch.linalg.qr(moment @ sketch if product else sketch).Q
    if product:
        projected = sketch.T @ (moment @ sketch)
        sketch = sketch @ torch.linalg.eigh((projected + projected.T) / 2).eigenvectors.flip(1)[:, :rank]
    dropped = moment.trace() - (sketch * (moment @ sketch)).sum()
    return Leading(sketch, dropped, torch.tensor(float("nan")))


def measure(features: int, decay: float, shares: Sequence[int], methods: Sequence[str] = METHODS) -> Iterator[Row]:
    """All methods on one matrix; those that find the first directions only at ranks of features / share."""
    spectrum = falling(features, decay)
    moment, basis = moment_of(spectrum)
    whole = None
    if "eigh" in methods:
        _, whole = _timed(lambda: torch.linalg.eigh(moment))
        yield Row(features, "eigh", None, decay, whole, 1.0, None, None, None)

    def of_eigh(seconds: float) -> float | None:
        return None if whole is None else seconds / whole

    if "eigenvalues" in methods:
        _, seconds = _timed(lambda: torch.linalg.eigvalsh(moment))
        yield Row(features, "eigenvalues", None, decay, seconds, of_eigh(seconds), None, None, None)
    ranks = [features // share for share in shares]
    for rank in ranks if "iteration" in methods else []:
        found, seconds = _timed(partial(subspace_iteration, moment, rank))
        yield Row(features, "iteration", rank, decay, seconds, of_eigh(seconds), *judged(found, spectrum, basis))
    if "float32" in methods:
        (_, vectors), single = _timed(lambda: torch.linalg.eigh(moment.float()))
        for name, product in {"float32, orthonormal": False, "float32, one product": True}.items():
            for rank in ranks:
                found, more = _timed(partial(refined, moment, vectors, rank, product))
                excess, _, lost = judged(found, spectrum, basis)
                seconds = single + more
                yield Row(features, name, rank, decay, seconds, of_eigh(seconds), excess, None, lost)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    result = call()
    return result, time.process_time() - begin


def main(arguments: list[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--decays", nargs="+", type=float, default=[1.0, 1.5])
    parser.add_argument("--shares", nargs="+", type=int, default=[16, 8, 4], help="ranks, as features / share")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args(arguments)
    rows = []
    for features in options.features:
        for decay in options.decays:
            for row in measure(features, decay, options.shares, options.methods):
                rows.append(row)
                print("  ".join(row.cells()), flush=True)
    print(f"\ntorch {torch.__version__}, threads: {torch.get_num_threads()}")
    print(format_table(HEADER, [row.cells() for row in rows]))


if __name__ == "__main__":
    main()
