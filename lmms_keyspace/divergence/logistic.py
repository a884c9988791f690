"""Balanced logistic regression with an L2 penalty, for all heads together, and how tokens move its fit.

Shapes: B heads, n tokens, width d. "Balanced": each side has half of the mass, whatever its number of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogisticFit(NamedTuple):
    """A classifier on features standardized by the tokens of its fit; `weight` and `bias` take raw features.

    Attributes:
        weight, bias: `[B, d]` and `[B, 1]`.
        mean, scale: `[B, d]` of the fitted tokens.
        hessian: `[B, d + 1, d + 1]` of the objective in standardized features and intercept, at the last Newton step.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    hessian: Tensor

    def logit(self, features: Tensor) -> Tensor:
        """`[B, n]` log-odds of the first side."""
        return _affine(features, self.weight, self.bias)

    def influence(self, features: Tensor, is_x: Tensor, judged: Tensor, slope: Tensor) -> Tensor:
        """What a loss on other tokens would rise by, to first order, were a token of the fit not there.

        The influence function of an M-estimator (Hampel, J. Am. Stat. Assoc. 69, 1974; of each token of a fit: Cook and
        Weisberg 1982; for classifiers Koh and Liang, arXiv 1703.04730). The features' standardization is held fixed.

        Args:
            features, is_x: `[B, n, d]` and `[n]` the tokens of the fit.
            judged: `[B, m, d]` the other tokens.
            slope: `[B, m]` derivative of the loss by their logits.

        Returns:
            `[B, n]`; for a group of tokens, the sum.
        """
        raw = (slope.unsqueeze(1) @ judged).squeeze(1)
        mass = slope.sum(dim=-1, keepdim=True)
        gradient = torch.cat([(raw - mass * self.mean) / self.scale, mass], dim=-1)
        step = torch.linalg.solve(self.hessian, gradient.unsqueeze(-1)).squeeze(-1)
        pulled = _affine(features, *_raw(step, self.mean, self.scale))
        residual = torch.sigmoid(self.logit(features)) - is_x.to(features.dtype)
        rise = balance(is_x, features.dtype) * residual * pulled
        # What is left of a side keeps half of the mass.
        for side in (is_x, ~is_x):
            rise[:, side] -= rise[:, side].mean(dim=-1, keepdim=True)
        return rise


def fit(
    features: Tensor,
    is_x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    l2: float,
    tolerance: float,
    max_iterations: int,
) -> LogisticFit:
    """Newton's method with step halving.

    Args:
        features: `[B, n, d]`.
        is_x: `[n]` the first side.
        weight, bias: `[B, d]` and `[B, 1]`, where to start, for raw features.
        l2: weight of |w|^2 / 2 beside the mean balanced log-loss, on standardized features; the intercept is free.
        tolerance: largest gradient entry at which the iteration stops.
        max_iterations: Newton steps. Single precision that needs more is repeated in double.

    Raises:
        RuntimeError: double precision needs more steps.
    """
    mass = balance(is_x, features.dtype)
    mean = features.mean(dim=1)
    deviation = features.std(dim=1, correction=0)
    # A feature that is constant but for rounding must not have its rounding blown up.
    scale = torch.where(deviation > 1e-9 * deviation.amax(dim=-1, keepdim=True), deviation, 1.0)
    z = torch.cat([(features - mean.unsqueeze(1)) / scale.unsqueeze(1), torch.ones_like(features[..., :1])], dim=-1)
    penalty = torch.full_like(z[0, 0], l2)
    penalty[-1] = 0
    target = is_x.to(z.dtype)
    w = torch.cat([weight * scale, bias + (weight * mean).sum(dim=-1, keepdim=True)], dim=-1)

    def objective(w: Tensor) -> Tensor:
        logit = (z @ w.unsqueeze(-1)).squeeze(-1)
        loss = torch.nn.functional.softplus(torch.where(is_x, -logit, logit))
        return loss @ mass + (penalty * w * w).sum(dim=-1) / 2

    def curvature(p: Tensor) -> Tensor:
        # The ridge on the intercept's row keeps the system solvable when every p is at 0 or 1.
        return z.mT @ ((mass * p * (1 - p)).unsqueeze(-1) * z) + torch.diag(penalty + 1e-7)

    current, hessian = objective(w), None
    for _ in range(max_iterations):
        p = torch.sigmoid((z @ w.unsqueeze(-1)).squeeze(-1))
        gradient = ((mass * (p - target)).unsqueeze(1) @ z).squeeze(1) + penalty * w
        if float(gradient.abs().max()) <= tolerance:
            return LogisticFit(*_raw(w, mean, scale), mean, scale, curvature(p) if hessian is None else hessian)
        hessian = curvature(p)
        step = torch.linalg.solve(hessian, gradient.unsqueeze(-1)).squeeze(-1)
        length = torch.ones_like(current)
        for _ in range(20):
            trial = objective(w - length.unsqueeze(-1) * step)
            worse = trial > current + 1e-6
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        w, current = w - length.unsqueeze(-1) * step, trial
    if features.dtype == torch.float32:  # rounding can stall it on extreme outliers
        double = fit(
            features.double(),
            is_x,
            weight.double(),
            bias.double(),
            l2=l2,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        return LogisticFit(*(part.to(features.dtype) for part in double))
    raise RuntimeError(f"logistic regression did not converge in {max_iterations} Newton steps")


def balance(is_x: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights `[n]` that give each side half of the mass."""
    return torch.where(is_x, 0.5 / is_x.sum(), 0.5 / (~is_x).sum()).to(dtype)


def _affine(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (features @ weight.unsqueeze(-1)).squeeze(-1) + bias


def _raw(w: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias on raw features of weights `[B, d + 1]` on standardized ones."""
    weight = w[:, :-1] / scale
    return weight, w[:, -1:] - (weight * mean).sum(dim=-1, keepdim=True)
