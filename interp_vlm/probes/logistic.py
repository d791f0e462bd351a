"""L2 logistic regression, many problems on one matrix at once, in the coordinates of its row space.

The L2 problem sees its features only through their inner products, so any orthonormal basis of the training rows' span
gives the solution of the raw problem exactly. One decomposition of a layer and training fold therefore serves every C,
every inner fold and every permutation of the labels. In the singular basis the Hessian is close to diagonal, which
makes conjugate gradients short; all problems step together, so that the cost is a few matrix products.

The objective is scikit-learn's: C * sum of losses + |w|**2 / 2, the intercept free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["C_PATH", "Reduced", "reduce", "solve"]

C_PATH = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
NEWTON_STEPS = 60
CG_STEPS = 400
GAP = 1e-9  # stop when the loss, summed over examples, is this close to its minimum
SMALLEST = 1e-13  # directions with less of the largest direction's variance are rounding


@dataclass(frozen=True, eq=False)
class Reduced:
    """Training rows in an orthonormal basis of their span, with what is needed to bring other rows there.

    Attributes:
        rows: training rows.
        spectrum: squared singular values, one a direction.
        mean: feature means of the training rows, taken off first.
        scale: feature standard deviations of the training rows (1 where constant, or when they are left alone).
        basis: factors whose product, (feature, direction), holds the orthonormal basis; multiplying them out would cost
            more than the decomposition.
    """

    rows: Float[Tensor, "example direction"]
    spectrum: Float[Tensor, " direction"]
    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]
    basis: tuple[Tensor, ...]

    def project(self, features: Float[Tensor, "other feature"]) -> Float[Tensor, "other direction"]:
        """Other rows in the same coordinates."""
        rows = (features.to(self.mean) - self.mean) / self.scale
        for factor in self.basis:
            rows = rows @ factor
        return rows

    def raw(
        self, weights: Float[Tensor, "direction problem"], intercepts: Float[Tensor, " problem"]
    ) -> tuple[Float[Tensor, "feature problem"], Float[Tensor, " problem"]]:
        """Coefficients and intercepts for the features as they came."""
        full = weights
        for factor in reversed(self.basis):
            full = factor @ full
        full = full / self.scale[:, None]
        return full, intercepts - self.mean @ full


def reduce(features: Float[Tensor, "example feature"], *, standardise: bool = True) -> Reduced:
    """Thin singular decomposition of the training rows, through the smaller of their two Gram matrices.

    Args:
        features: training rows.
        standardise: divide each feature by its standard deviation over these rows; means are always taken off.
    """
    values = features.to(torch.float64)
    mean = values.mean(0)
    train = values - mean
    scale = torch.ones_like(mean)
    if standardise:
        spread = train.square().mean(0).sqrt()
        # a constant feature keeps rounding noise around its mean; dividing by it would make that noise a feature
        scale = torch.where(spread > 1e-12 * (mean.abs() + 1e-300), spread, 1.0)
        train = train / scale
    n, d = train.shape
    gram = train @ train.T if n <= d else train.T @ train
    spectrum, vectors = torch.linalg.eigh(gram)
    kept = spectrum > SMALLEST * spectrum[-1].clamp_min(1e-300)
    spectrum, vectors = spectrum[kept], vectors[:, kept]
    if n <= d:
        root = spectrum.sqrt()
        return Reduced(vectors * root, spectrum, mean, scale, (train.T, vectors / root))
    return Reduced(train @ vectors, spectrum, mean, scale, (vectors,))


def solve(
    reduced: Reduced,
    labels: Float[Tensor, "example problem"],
    weights: Float[Tensor, "example problem"],
    C: Float[Tensor, " problem"],
) -> tuple[Float[Tensor, "direction problem"], Float[Tensor, " problem"]]:
    """Coefficients and intercepts of many problems that share their rows.

    Newton's method with the step found by preconditioned conjugate gradients and halved until the loss falls; problems
    leave the batch when they have converged.

    Args:
        reduced: the rows, in `reduce`'s coordinates.
        labels: 0 and 1.
        weights: how much each row counts in each problem: 0 leaves it out (the inner fold's validation rows).
        C: inverse strength of the penalty.
    """
    rows = reduced.rows
    total = weights.sum(0)
    share = ((weights * labels).sum(0) / total).clamp(1e-6, 1 - 1e-6)
    a = rows.new_zeros(rows.shape[1], labels.shape[1])
    b = torch.logit(share)
    active = torch.arange(labels.shape[1], device=rows.device)
    for _ in range(NEWTON_STEPS):
        y, w, ridge = 2.0 * labels[:, active] - 1.0, weights[:, active], 1.0 / C[active]
        a_now, b_now = a[:, active], b[active]
        f = rows @ a_now + b_now
        step_a, step_b, step_f, gap = _newton(rows, reduced.spectrum, f, y, w, ridge, a_now)
        t = _halve(f, step_f, y, w, ridge, a_now, step_a)
        a[:, active], b[active] = a_now + t * step_a, b_now + t * step_b
        active = active[gap > GAP]
        if not len(active):
            break
    return a, b


def _newton(
    rows: Tensor, spectrum: Tensor, f: Tensor, y: Tensor, w: Tensor, ridge: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton's step for each problem, its effect on the scores, and how far each loss is from its minimum."""
    p = torch.sigmoid(-y * f)
    pull = w * y * p
    curvature = w * p * (1.0 - p)
    r_a, r_b = rows.T @ pull - ridge * a, pull.sum(0)
    mass = curvature.sum(0).clamp_min(1e-12)
    shape = spectrum[:, None] * (mass / len(rows)) + ridge

    x_a, x_b, x_f = torch.zeros_like(r_a), torch.zeros_like(r_b), torch.zeros_like(f)
    z_a, z_b = r_a / shape, r_b / mass
    d_a, d_b = z_a.clone(), z_b.clone()
    rz = (r_a * z_a).sum(0) + r_b * z_b
    start, pull_a, pull_b = rz.clone(), r_a, r_b
    # far from the minimum a rough step will do; near it the step is solved as far as the gap asks for
    wanted = start * start.sqrt().clamp(1e-5, 0.1)
    for _ in range(CG_STEPS):
        d_f = rows @ d_a + d_b
        bent = curvature * d_f
        h_a, h_b = rows.T @ bent + ridge * d_a, bent.sum(0)
        size = rz / ((d_a * h_a).sum(0) + d_b * h_b).clamp_min(1e-300)
        size = torch.where(rz > wanted, size, 0.0)
        x_a, x_b, x_f = x_a + size * d_a, x_b + size * d_b, x_f + size * d_f
        r_a, r_b = r_a - size * h_a, r_b - size * h_b
        z_a, z_b = r_a / shape, r_b / mass
        new = (r_a * z_a).sum(0) + r_b * z_b
        if bool((new <= wanted).all()):
            break
        turn = new / rz.clamp_min(1e-300)
        d_a, d_b, rz = z_a + turn * d_a, z_b + turn * d_b, new
    gap = ((x_a * pull_a).sum(0) + x_b * pull_b) / 2.0
    return x_a, x_b, x_f, gap


def _loss(f: Tensor, y: Tensor, w: Tensor, ridge: Tensor, a: Tensor) -> Tensor:
    return (w * torch.nn.functional.softplus(-y * f)).sum(0) + ridge * a.square().sum(0) / 2.0


def _halve(f: Tensor, step_f: Tensor, y: Tensor, w: Tensor, ridge: Tensor, a: Tensor, step_a: Tensor) -> Tensor:
    """The longest of 1, 1/2, 1/4 ... of each step that does not raise its loss."""
    before = _loss(f, y, w, ridge, a)
    t = torch.ones_like(before)
    for _ in range(30):
        worse = _loss(f + t * step_f, y, w, ridge, a + t * step_a) > before + 1e-12 * before.abs()
        if not bool(worse.any()):
            break
        t = torch.where(worse, t / 2.0, t)
    return t
