"""L2 logistic regression, many problems that share their rows at once.

The L2 problem sees its features only through their inner products: any orthonormal basis of the rows' span, or the
Gram matrix of the rows, gives the solution of the raw problem exactly. Either is made once for a layer and a training
part and serves every C, every inner fold and every permutation of the labels; a step of all problems is one wide matrix
product. `Tall` (many examples of few features) works in the singular basis, `Wide` with the Gram matrix.

Newton's method models the loss around a margin m of every example, which is a weighted ridge regression, and solves it
by conjugate gradients. The next margin is not the score of that model but, where a score fell, the one that belongs to
the model's probability: far margins then need no damping, and classes that separate take ten steps, not forty.

The objective is scikit-learn's: C * sum of losses + |w|**2 / 2, the intercept free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["C_PATH", "Reduced", "Tall", "Wide", "reduce", "solve"]

C_PATH = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FEW = 512  # features up to which a full decomposition is cheap
DIRECTIONS = 64  # of the Gram matrix, inverted exactly
PROBLEMS = 96  # in one batch: wide enough for fast products, narrow enough for little memory
NEWTON_STEPS, CG_STEPS = 100, 400
STRIDE = 2.0  # margins grow by this much in a step at most
SMALLEST = 1e-13  # directions with less of the largest direction's variance are rounding


@dataclass(frozen=True)
class _Precision:
    """How far a number type can go.

    Attributes:
        gap: see `solve`.
        rough: factor by which a step's residual falls where the end is near.
        margin: beyond it an example's weight counts as that margin's.
    """

    gap: float
    rough: float
    margin: float


PRECISION = {torch.float32: _Precision(1e-4, 1e-2, 20.0), torch.float64: _Precision(1e-9, 1e-5, 40.0)}


@dataclass(frozen=True, eq=False)
class _Model:
    """The weighted ridge regressions of one step: each problem's loss around the margins m.

    Attributes:
        pull: minus the slope of each loss by the score, at the present scores.
        weight: curvature of each loss by the score.
        ridge: one a problem.
        precision: how exactly the step is wanted.
    """

    pull: Float[Tensor, "example problem"]
    weight: Float[Tensor, "example problem"]
    ridge: Float[Tensor, " problem"]
    precision: _Precision

    def wanted(self, start: Tensor) -> Tensor:
        """Where the squared residual, which began at `start`, is small enough."""
        # far from the minimum a rough step will do
        rough = start * start.clamp_min(0.0).sqrt().clamp(self.precision.rough, 0.1)
        return rough.clamp_min(1e-4 * self.precision.gap)


@dataclass(frozen=True, eq=False)
class Reduced(ABC):
    """Standardised training rows, ready for many problems. Coefficients `a` are in coordinates of its own.

    Attributes:
        rows: training rows in those coordinates (`Tall`) or as standardised features (`Wide`).
        mean: feature means of the training rows, taken off first.
        scale: feature standard deviations of the training rows (1 where constant, or when they are left alone).
        tail: mean size of the Gram matrix' directions beyond the largest ones.
    """

    rows: Tensor
    mean: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]
    tail: float

    @property
    @abstractmethod
    def count(self) -> int:
        """How many coefficients a problem has."""

    @abstractmethod
    def times(self, a: Tensor) -> Float[Tensor, "example problem"]:
        """Scores of the training rows, without the intercept."""

    @abstractmethod
    def standard(self, a: Tensor) -> Float[Tensor, "feature problem"]:
        """Coefficients for standardised features."""

    @abstractmethod
    def step(self, model: _Model, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Changes of coefficients, intercepts and scores that solve the model."""

    def scores(
        self, features: Float[Tensor, "other feature"], a: Tensor, b: Float[Tensor, " problem"]
    ) -> Float[Tensor, "other problem"]:
        """Scores of other rows."""
        return ((features.to(self.rows) - self.mean) / self.scale) @ self.standard(a) + b

    def raw(
        self, a: Tensor, b: Float[Tensor, " problem"]
    ) -> tuple[Float[Tensor, "feature problem"], Float[Tensor, " problem"]]:
        """Coefficients and intercepts for the features as they came, in float64."""
        full = self.standard(a).double() / self.scale.double()[:, None]
        return full, b.double() - self.mean.double() @ full


@dataclass(frozen=True, eq=False)
class Tall(Reduced):
    """Rows in their singular basis, where the Hessian is close to diagonal.

    Attributes:
        spectrum: squared singular values, one a direction.
        basis: (feature, direction), orthonormal.
    """

    spectrum: Float[Tensor, " direction"]
    basis: Float[Tensor, "feature direction"]

    @property
    def count(self) -> int:
        return self.rows.shape[1]

    def times(self, a: Tensor) -> Tensor:
        return self.rows @ a

    def standard(self, a: Tensor) -> Tensor:
        return self.basis @ a

    def step(self, model: _Model, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, ridge = self.rows, model.ridge
        r_a, r_b = rows.T @ model.pull - ridge * a, model.pull.sum(0)
        mass = model.weight.sum(0).clamp_min(1e-12)
        shape = self.spectrum[:, None] * (mass / len(rows)) + ridge
        x_a, x_b, x_f = torch.zeros_like(r_a), torch.zeros_like(r_b), torch.zeros_like(model.pull)
        z_a, z_b = r_a / shape, r_b / mass
        d_a, d_b = z_a, z_b
        rz = (r_a * z_a).sum(0) + r_b * z_b
        wanted = model.wanted(rz)
        for _ in range(CG_STEPS):
            d_f = rows @ d_a + d_b
            bent = model.weight * d_f
            h_a, h_b = rows.T @ bent + ridge * d_a, bent.sum(0)
            going = rz > wanted
            size = torch.where(going, rz / ((d_a * h_a).sum(0) + d_b * h_b).clamp_min(1e-300), 0.0)
            x_a, x_b, x_f = x_a + size * d_a, x_b + size * d_b, x_f + size * d_f
            r_a, r_b = r_a - size * h_a, r_b - size * h_b
            z_a, z_b = r_a / shape, r_b / mass
            new = (r_a * z_a).sum(0) + r_b * z_b
            if bool((new <= wanted).all()):
                break
            turn = torch.where(going, new / rz, 0.0)
            d_a, d_b, rz = z_a + turn * d_a, z_b + turn * d_b, new
        return x_a, x_b, x_f


@dataclass(frozen=True, eq=False)
class Wide(Reduced):
    """Coefficients are those of the rows, sum_i a_i x_i, and add up to 0, which the free intercept asks for.

    With H the root of the weights, a step is a = H u with (H K H + ridge) u = pull / H - ridge a / H.

    Attributes:
        gram: inner products K of the rows; None where the rows themselves are the shorter way to a product.
        top: the largest directions of K, each times the root of its size.
    """

    gram: Float[Tensor, "example example"] | None
    top: Float[Tensor, "example direction"]

    @property
    def count(self) -> int:
        return len(self.rows)

    def times(self, a: Tensor) -> Tensor:
        return self.gram @ a if self.gram is not None else self.rows @ (self.rows.T @ a)

    def standard(self, a: Tensor) -> Tensor:
        return self.rows.T @ a

    def step(self, model: _Model, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, ridge = model.weight.sqrt(), model.ridge
        residual = torch.where(h > 0.0, (model.pull - ridge * a) / h.clamp_min(1e-30), 0.0)
        invert = self._preconditioner(h, ridge)
        offset = invert(h)
        mass = (h * offset).sum(0)

        def balanced(v: Tensor) -> Tensor:
            z = invert(v)
            return z - offset * ((h * z).sum(0) / mass)

        x, x_f = torch.zeros_like(h), torch.zeros_like(h)
        z = d = balanced(residual)
        rz = (residual * z).sum(0)
        wanted = model.wanted(rz)
        for _ in range(CG_STEPS):
            d_f = self.times(h * d)
            bent = h * d_f + ridge * d
            going = rz > wanted
            size = torch.where(going, rz / (d * bent).sum(0).clamp_min(1e-30), 0.0)
            x, x_f, residual = x + size * d, x_f + size * d_f, residual - size * bent
            z = balanced(residual)
            new = (residual * z).sum(0)
            if bool((new <= wanted).all()):
                break
            # a problem that is done waits for the others; its rz is rounding, of either sign
            d, rz = z + torch.where(going, new / rz, 0.0) * d, new
        # what the residual has left along h is the intercept's
        x_b = (offset * residual).sum(0) / mass
        return h * x, x_b, x_f + x_b

    def _preconditioner(self, h: Tensor, ridge: Tensor) -> Callable[[Tensor], Tensor]:
        """The inverse of H (top top' + tail) H + ridge, problem by problem (Woodbury)."""
        top, diagonal = self.top, ridge + self.tail * h * h
        shape = torch.bmm((h * h / diagonal).T[:, None, :] * top.T, top.expand(h.shape[1], *top.shape))
        shape.diagonal(dim1=1, dim2=2).add_(1.0)
        factor = torch.linalg.cholesky(shape)

        def invert(v: Tensor) -> Tensor:
            z = v / diagonal
            inside = torch.cholesky_solve((top.T @ (h * z)).T[:, :, None], factor)[:, :, 0].T
            return z - h * (top @ inside) / diagonal

        return invert


def reduce(features: Float[Tensor, "example feature"], *, standardise: bool = True) -> Reduced:
    """Training rows, standardised and decomposed.

    Many examples of at most 512 features, and whatever is float64, are worked on in float64, the rest in float32.

    Args:
        features: training rows.
        standardise: divide each feature by its standard deviation over these rows; means are always taken off.
    """
    n, d = features.shape
    tall = d <= min(n, FEW)
    values = features.double() if tall or features.dtype == torch.float64 else features.float()
    mean = values.mean(0)
    rows = values - mean
    scale = torch.ones_like(mean)
    if standardise:
        # a few rows at a time: no second copy of the layer, sums in float64
        squares = sum((part.square().sum(0, dtype=torch.float64) for part in rows.split(64)), mean.new_zeros(()))
        spread = (squares / n).sqrt().to(rows)
        # a constant feature keeps rounding noise around its mean; dividing by it would make that noise a feature
        least = torch.finfo(rows.dtype).eps ** 0.75 * mean.abs()
        scale = torch.where(spread > least.clamp_min(1e-30), spread, 1.0)
        rows /= scale
    if tall:
        spectrum, basis = torch.linalg.eigh(rows.T @ rows)
        kept = spectrum > SMALLEST * spectrum[-1].clamp_min(1e-300)
        spectrum, basis = spectrum[kept], basis[:, kept]
        return Tall(rows @ basis, mean, scale, float(spectrum[:-DIRECTIONS].sum()) / n, spectrum, basis)
    gram = _gram(rows) if n <= 2 * d else None
    top, tail = _largest(Wide(rows, mean, scale, 0.0, gram, rows[:, :0]))
    return Wide(rows, mean, scale, tail, gram, top)


def _gram(rows: Tensor) -> Tensor:
    # NumPy sees that a @ a.T is symmetric and does half of the work
    return rows @ rows.T if rows.is_cuda else torch.from_numpy(rows.numpy() @ rows.numpy().T)


def _largest(wide: Wide) -> tuple[Tensor, float]:
    """The largest directions (Halko, Martinsson and Tropp 2011, algorithm 4.4) and the mean size of the others.

    They only speed the solver up: how well they are found has no say in its result.
    """
    n, wanted = len(wide.rows), min(DIRECTIONS, *wide.rows.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(n, min(wanted + 8, n), generator=generator, dtype=wide.rows.dtype).to(wide.rows)
    for _ in range(2):
        basis = torch.linalg.qr(wide.times(basis))[0]
    sizes, turn = torch.linalg.eigh(basis.T @ wide.times(basis))
    sizes, turn = sizes[-wanted:].clamp_min(0.0), turn[:, -wanted:]
    whole = wide.gram.trace() if wide.gram is not None else wide.rows.square().sum()
    rest = float(whole - sizes.sum())
    return (basis @ turn) * sizes.sqrt(), max(rest, 0.0) / max(n - wanted, 1)


def solve(
    reduced: Reduced,
    labels: Float[Tensor, "example problem"],
    weights: Float[Tensor, "example problem"],
    C: Float[Tensor, " problem"],
    start: tuple[Float[Tensor, "coefficient problem"], Float[Tensor, " problem"]] | None = None,
    gap: float | None = None,
) -> tuple[Float[Tensor, "coefficient problem"], Float[Tensor, " problem"]]:
    """Coefficients, in the coordinates of `reduced`, and intercepts of many problems that share their rows.

    Problems leave the batch when they have converged.

    Args:
        reduced: the rows.
        labels: 0 and 1.
        weights: how much each row counts in each problem: 0 leaves it out (the inner fold's validation rows).
        C: inverse strength of the penalty.
        start: coefficients and intercepts to start from.
        gap: stop when a step promises less than this, in losses summed over examples; by default where the number type
            ends. The step still taken squares it.
    """
    solved, gap = [], PRECISION[reduced.rows.dtype].gap if gap is None else gap
    for part in torch.arange(labels.shape[1], device=labels.device).split(PROBLEMS):
        own = None if start is None else (start[0][:, part].to(reduced.rows), start[1][part].to(reduced.rows))
        own_problems = (each[..., part].to(reduced.rows) for each in (labels, weights, C))
        solved.append(_solve(reduced, *own_problems, start=own, gap=gap))
    return torch.cat([a for a, _ in solved], dim=1), torch.cat([b for _, b in solved])


def _solve(
    reduced: Reduced, labels: Tensor, weights: Tensor, C: Tensor, start: tuple[Tensor, Tensor] | None, gap: float
) -> tuple[Tensor, Tensor]:
    precision, sign, ridge = PRECISION[reduced.rows.dtype], 2.0 * labels - 1.0, 1.0 / C
    if start is None:
        b = torch.logit(((weights * labels).sum(0) / weights.sum(0)).clamp(1e-6, 1 - 1e-6))
        a = labels.new_zeros(reduced.count, labels.shape[1])
        f = b.expand_as(labels).clone()
        # were all examples alike, their margin m would satisfy m = C tail p with p = 1 / (1 + exp(m))
        margin = sign * b + _common(C * reduced.tail)
    else:
        a, b = start[0].clone(), start[1].clone()
        f = reduced.times(a) + b
        margin = sign * f
    margin = margin.clamp(-precision.margin, precision.margin)
    active = torch.arange(labels.shape[1], device=labels.device)
    for _ in range(NEWTON_STEPS):
        y, w, m = sign[:, active], weights[:, active], margin[:, active]
        p, q = torch.sigmoid(-m), torch.sigmoid(m)
        curvature = w * p * q
        pull = w * y * p + curvature * (y * m - f[:, active])
        step_a, step_b, step_f = reduced.step(_Model(pull, curvature, ridge[active], precision), a[:, active])
        a[:, active] += step_a
        b[active] += step_b
        f[:, active] += step_f
        reached = (y * f[:, active]).clamp(-precision.margin, precision.margin)
        margin[:, active] = _next(m, reached, p, q).clamp(-precision.margin, precision.margin)
        active = active[(curvature * (reached - m).square()).sum(0) / 2.0 > gap]
        if not len(active):
            break
    return a, b


def _common(size: Tensor) -> Tensor:
    """The margin m = size / (1 + exp(m))."""
    m = torch.zeros_like(size)
    for _ in range(60):
        p = torch.sigmoid(-m)
        m = m - (m - size * p) / (1.0 + size * p * (1.0 - p))
    return m


def _next(m: Tensor, reached: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The margins around which the losses are modelled next.

    Where a margin fell, the model's score overshoots by far (it was made where the loss is flat), but its probability,
    p - p q (reached - m), is sound.
    """
    implied = torch.minimum(p - p * q * (reached - m), 1.0 - 0.3 * q).clamp_min(1e-30)
    fallen = torch.log1p(-implied) - torch.log(implied)
    far = torch.where(reached > m, torch.minimum(reached, m + STRIDE), fallen)
    return torch.where((reached - m).abs() < 0.1, reached, far)
