"""The bound of the relative entropy that trains a generator.

A decoder's draw x, its latents z_0 and their diffusion z_t to t = 1 have a joint density; so have x ~ pi = exp(-U)/Z
and the encoder's path, which starts at z_1 ~ N(0, I) and comes back with the drift f - g^2 s. The relative entropy of
the two bounds that of x alone:

    KL(p_D(x) || pi) <= E[ln p_D(x)/pi(x)] + I(x; z_1) + int g^2/2 E|grad ln p_D(z_t|x) - s|^2 dt            (1)

since z_1 | x differs from N(0, I), the marginal of z_1, by the mutual information I(x; z_1). The unknown densities go
out by the entropy balances of z_t given x and of z_t, both under the same noise,

    I(x; z_0) - I(x; z_1) = int g^2/2 (E|grad ln p_D(z_t|x)|^2 - E|grad ln p_D(z_t)|^2) dt,

by E[ln p_D(x)] = E[ln p_D(x|z_0)] - I(x; z_0), and by parts: E[s . grad ln p_D(z_t|x)] = -E[div s]. What is left is

    bound = E[ln p_D(x|z_0) + U(x)] + int g^2/2 E[|s|^2 + 2 div s] dt + int g^2/2 E|grad ln p_D(z_t)|^2 dt + ln Z.

I(x; z_1) has cancelled: that z_1 still knows a little of x costs exactly what (1) says, no more. Nor is E[ln p_D(z_0)]
missing: z_t is N(0, I) at all times, since this is what the diffusion keeps, so E[ln p_D(z_0)] and E[ln p_D(z_1)],
which the encoder's start has with the opposite sign, cancel, and the last integral is d_z Lambda/2 for a Lambda up to
t = 1. The bound is tight where x and z_1 are independent and s is the score of z_t given x.

Estimator. The base of the score, see `scores`, is that of a Gaussian p_t(z|x) which the diffusion carries along. Ito's
formula for ln p_t(z_t) along the diffusion of one z_0 makes its share of the integrals a closed form,

    int g^2/2 E[|base|^2 + 2 div base] dt + d_z Lambda/2 = E[ln p_1(z_1)|z_0] - ln p_0(z_0),

to which ln N(z_0; 0, I) - E[ln N(z_1; 0, I)|z_0] is added, of mean zero: for s = -z, where x knows nothing of z, every
row is zero. What is left to sample is the correction c. With antithetic noise +-eps,

    h = |c|^2 + 2 base . c + 2 (c . eps)/sigma,

averaged over both signs, has the mean |c|^2 + 2 base . c + 2 div c, since E[c . eps] = sigma E[div c] for Gaussian
noise. The difference of c between both signs makes up for 1/sigma. The integral is E[weight h] over the clock of
`diffusion`, in strata over the batch. In hundreds of dimensions most of the scatter would be the base's.

Decoders of pairs, see `pairs`, are taken for the maps x = f(z) that they are but for their narrow width. What an
encoder that is right for them leaves of the bound is E[U(x) + ln N(z_0; 0, I) - ln|det df/dz|] + ln Z: a closed form.
It is a bound where f is one to one, that is, where no determinant is negative: folds are counted, and trained away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.checks import whole
from openmm_tsf.edg.generator import EDG
from openmm_tsf.edg.networks import Latents, Target, at_temperatures, check_dim, log_normal
from openmm_tsf.edg.pairs import PairDecoder
from openmm_tsf.edg.scores import Given
from openmm_tsf.typing import Mask, Scalars, Vectors

MOST_LOST = 0.01
"""Share of draws that may have no finite energy without a warning."""


@dataclass(frozen=True)
class BoundSample:
    """An estimate of the bound less ln Z, with temperatures averaged over where there are several.

    Attributes:
        loss: scalar, differentiable; its gradient trains decoder and score.
        value: the bound less ln Z [nat]: on average at least -ln Z.
        error: standard error of the value [nat].
        energy: mean U/tau.
        entropy: mean of -ln p_D(x|z_0) over the draws, of a map -ln p_D(x) [nat].
        encoder: the integrals over time [nat].
        n_nonfinite: draws left out because their energy, its gradient or x itself was not finite.
        n_folded: draws where a map folds space: with any, the value may be below -ln Z.
        n_energy_evaluations: of the target; a gradient counts one, and so does a product with its Hessian. What the
            score "energy" asks of a Hamiltonian decoder is not counted.
        x: (B, d) the draws that are not left out.
        log_weights: (B,) of these with their latents, the encoder's base being the encoder [nat]; see `walkers`.
    """

    loss: Float[Tensor, ""]
    value: float
    error: float
    energy: float
    entropy: float
    encoder: float
    n_nonfinite: int
    n_folded: int
    n_energy_evaluations: int
    x: Vectors
    log_weights: Scalars


def kl_bound(
    edg: EDG, target: Target, n: int, *, tau: float | Scalars = 1.0, times: int = 1, soften_above: float = torch.inf,
    generator: torch.Generator,
) -> BoundSample:  # fmt: skip
    """Estimate the bound less ln Z from n draws of the decoder.

    A draw whose x, energy or gradient is not finite is left out of everything, and counted: the estimate is then of the
    draws that the target knows, and says nothing about the others.

    Args:
        edg: the generator.
        target: U at temperature 1.
        n: draws, each costing one energy and its gradient, and twice the slopes that the decoder takes.
        tau: temperature, or temperatures (n,).
        times: of the diffusion for each draw, each with two evaluations of the score.
        soften_above: reduced energies above this pull like their logarithm; the value does not know of it.
        generator: of everything.

    Raises:
        ValueError: fewer than two draws, a temperature that is not above 0, a target of another dimension, or an energy
            not of shape (B,).
        RuntimeError: no draw is finite.
    """
    whole("the number of draws", n, 2)
    whole("the number of times", times)
    check_target(edg, target)
    options = {"generator": generator, "dtype": edg.dtype, "device": generator.device}
    taus = torch.as_tensor(tau, dtype=edg.dtype, device=edg.device).expand(n)
    if not bool((torch.isfinite(taus) & (taus > 0.0)).all()):
        raise ValueError("temperatures must be finite and above 0")
    z = torch.randn(n, edg.latent_dim, **options).to(edg.device)
    xi = torch.randn(n, edg.dim, **options).to(edg.device)
    eps = torch.randn(times * n, edg.latent_dim, **options).to(edg.device)
    u = _strata(n, times, **options).to(edg.device)
    evaluations = n * (1 + 2 * edg.decoder.n_slopes)
    drawn = _decode(edg, target, z, xi, taus, soften_above)
    good = drawn.finite
    n_bad = int((~good).sum())
    if n_bad == n:
        raise RuntimeError(f"none of {n} draws has a finite energy and gradient; is the target finite where draws are?")
    if n_bad:  # once more, since a bad row of the graph would make every gradient NaN
        rows = good.nonzero()[:, 0]
        z, xi, taus = z[rows], xi[rows], taus[rows]
        eps, u = (y.view(times, n, *y.shape[1:])[:, rows].flatten(0, 1) for y in (eps, u))
        evaluations += len(rows) * (1 + edg.decoder.n_slopes)
        drawn = _decode(edg, target, z, xi, taus, soften_above)
    if isinstance(edg.decoder, PairDecoder):
        inner = log_encoder = torch.zeros_like(drawn.energy)
    else:
        given = edg.score.given(drawn.x, taus)
        inner, log_encoder = base_integral(edg, z, given), given.log_prob(z) - log_normal(z)
        if edg.score.corrected:
            more = integrand(edg, z.repeat(times, 1), given.repeated(times) if times > 1 else given, u, eps)
            inner = inner + more.view(times, -1).mean(0)
    rows = drawn.energy - drawn.entropy.detach() + inner.detach()
    surrogate = ((drawn.slope * drawn.x).sum(1) - drawn.entropy + inner).mean()
    value = rows.mean()
    return BoundSample(
        loss=surrogate - surrogate.detach() + value,
        value=float(value),
        error=float(rows.std() / len(rows) ** 0.5),
        energy=float(drawn.energy.mean()),
        entropy=float(drawn.entropy.detach().mean()),
        encoder=float(inner.detach().mean()),
        n_nonfinite=n_bad,
        n_folded=int(drawn.folded.sum()),
        n_energy_evaluations=evaluations,
        x=drawn.x.detach(),
        log_weights=(log_encoder + drawn.entropy - drawn.energy).detach(),
    )


def integrand(edg: EDG, z0: Latents, given: Given, u: Scalars, eps: Latents) -> Scalars:
    """What the correction adds to the integrals over time, at one clock reading for each row: (B,); their mean is it.

    Args:
        z0: (B, d_z) latents.
        given: of the x that they gave.
        u: (B,) clock readings in (0, 1).
        eps: (B, d_z) noise, taken with both signs.
    """
    t, weight = edg.diffusion.times(u)
    width = edg.diffusion.width(t)
    centre, noise = edg.diffusion.perturbed(z0, t, torch.zeros_like(eps)), width[:, None] * eps
    parts = edg.score.parts(torch.cat((centre + noise, centre - noise)), given.repeated(2), t.repeat(2))
    plain = (parts.correction * (parts.correction + 2.0 * parts.base)).sum(1)
    there, back = parts.correction.chunk(2)
    divergence = ((there - back) * eps).sum(1) / (2.0 * width)
    return weight * (0.5 * (plain[: len(u)] + plain[len(u) :]) + 2.0 * divergence)


def base_integral(edg: EDG, z0: Latents, given: Given) -> Scalars:
    """What the base adds to the integrals over time (B,), for latents (B, d_z) and what is given of their x: exact."""
    end = torch.ones_like(z0[:, 0])
    a, sigma = edg.diffusion.scale(end)[:, None], edg.diffusion.width(end)[:, None]
    off, wide = given.along_axes(z0 - given.mean), given.frame(edg.diffusion, end)[1]
    at_end = -0.5 * ((a * off).square() + sigma.square()) / wide.square() - wide.log()
    at_start = -0.5 * (off * torch.exp(-given.log_width)).square() - given.log_width
    return (at_end - at_start - 0.5 * sigma.square() * (z0.square() - 1.0)).sum(1)


def check_target(edg: EDG, target: Target) -> None:
    """Refuse a target that the generator was not built for.

    Raises:
        ValueError: another dimension, or none.
    """
    check_dim(target)
    if target.dim != edg.dim:
        raise ValueError(f"the target has {target.dim} dimensions, the generator {edg.dim}")


@dataclass(frozen=True)
class _Drawn:
    """x with its graph, and of each row: raw U/tau, gradient of the softened U/tau, whether all is finite, whether a
    map folds there; and entropy, which is -ln p_D(x|z_0), or -ln p_D(x) of a map, with the gradient of its mean."""

    x: Vectors
    energy: Scalars
    slope: Vectors
    entropy: Scalars
    finite: Mask
    folded: Mask


def _decode(edg: EDG, target: Target, z: Latents, xi: Vectors, tau: Scalars, soften_above: float) -> _Drawn:
    if isinstance(edg.decoder, PairDecoder):
        x, log_det, folded = edg.decoder.centre_and_log_det(z)
        entropy = log_det - log_normal(z)
    else:
        conditional = edg.decoder.conditional(z, tau)
        x, entropy = conditional.sample(xi), conditional.entropy + 0.5 * (xi.square() - 1.0).sum(1)
        folded = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    with torch.enable_grad():
        here = x.detach().requires_grad_()
        energy = reduced(target, here, tau)
        (slope,) = torch.autograd.grad(energy.sum(), here)
    energy = energy.detach()
    excess = (energy - soften_above).clamp_min(0.0)
    finite = torch.isfinite(energy) & torch.isfinite(slope).all(1) & torch.isfinite(here).all(1)
    return _Drawn(x, energy, slope / (1.0 + excess)[:, None], entropy, finite, folded)


def reduced(target: Target, x: Vectors, tau: Scalars) -> Scalars:
    """The reduced energy (B,) of vectors (B, d) at temperatures (B,), in their dtype; see `Target`.

    Raises:
        ValueError: the target gives something else than one number for each row, takes another dtype only, or has no
            gradient.
    """
    try:
        energy = at_temperatures(target, x, tau)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise ValueError(
            f"the target fails for vectors of {x.dtype}: {error}. Training has single precision and draws double, so "
            "let its constants follow x, as constant.to(x) does"
        ) from error
    if x.requires_grad and not energy.requires_grad:
        raise ValueError(
            "the target's energies have no gradient: compute them from x in torch, without numpy, detach or no_grad; "
            "energies with forces of their own go into a torch.autograd.Function"
        )
    return energy.to(x.dtype)


def _strata(n: int, times: int, **options: object) -> Scalars:
    """Clock readings (times n,): each draw has one in each of `times` parts of (0, 1), and all together are even."""
    order = torch.rand(times, n, **options).argsort(1)  # so that strata do not go with anything else of the rows
    within = (order + torch.rand(times, n, **options)) / n
    u = ((torch.arange(times, device=within.device)[:, None] + within) / times).flatten()
    return u.clamp_min(1e-6)  # at 0 there is no noise to divide by
