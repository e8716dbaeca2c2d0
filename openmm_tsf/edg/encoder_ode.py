"""The encoder's density of latents, from the probability-flow equation.

The reverse diffusion with drift f - g^2 s has the same densities at all times as dz = (f - g^2 s/2) dt, if s is the
gradient of their logarithm. The encoder's density is defined by that equation, which holds for any s:

    ln p_E(z_0|x) = ln N(z_1; 0, I) + int div(f - g^2 s/2) dt,      from z_0 at t = 0 to z_1 at t = 1.

It is integrated over the clock of `diffusion`, since in t it is stiff at the start, and in units of the Gaussian that
is the base of the score, n = (z - a m)/w_t with w_t^2 = a^2 w^2 + sigma^2. The base alone would leave n where it is, so

    dn/du = -k c/w_t,    d ln|dn/dn_0|/du = -k div_z c,    k = (g^2/2) dt/du,    c the correction of the score,

and ln p_E(z_0|x) = ln N(z_1; 0, I) + ln|dn_1/dn_0| + sum ln(w_1/w_0). However narrow the posterior, what the solver
sees is smooth; where there is no correction there is nothing to solve.

The divergence takes a derivative for each latent at each step: in hundreds of dimensions see `encoder_chain` instead.
Derivatives of many latents in one batch are no faster than one by one, since it is arithmetic that takes the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_tsf.edg.generator import EDG
from openmm_tsf.edg.networks import Latents, log_normal
from openmm_tsf.edg.scores import Given, Score
from openmm_tsf.typing import Scalars, Vectors

MOST_EVALUATIONS = 5000
"""Evaluations of the score after which the solver gives up."""


@dataclass(frozen=True, eq=False)
class EncoderPaths:
    """Where the equation leads.

    Attributes:
        log_prob: (B,) ln p_E(z_0|x) [nat].
        start, end: (B, d_z) z_0 and z_1.
        n_function_evaluations: of the score and its divergence, each of the whole batch.
    """

    log_prob: Scalars
    start: Latents
    end: Latents
    n_function_evaluations: int


def encoder_log_prob(
    edg: EDG, z0: Latents, x: Vectors, rtol: float = 1e-4, atol: float = 1e-4, *, tau: Scalars | None = None
) -> Scalars:
    """ln p_E(z_0|x) (B,) [nat]; see `encoder_paths`."""
    return encoder_paths(edg, z0, x, rtol, atol, tau=tau).log_prob


@torch.no_grad()
def encoder_paths(
    edg: EDG, z0: Latents, x: Vectors, rtol: float = 1e-4, atol: float = 1e-4, *, tau: Scalars | None = None,
    most_evaluations: int = MOST_EVALUATIONS,
) -> EncoderPaths:  # fmt: skip
    """Follow latents to t = 1 by an adaptive solver (Dormand, Prince, order 5); needs the extra "edg".

    One step size serves the batch: tolerances hold for the root mean square over its latents and logarithms.

    Args:
        edg: the generator.
        z0, x: (B, d_z) and (B, d).
        rtol, atol: tolerances, relative and absolute, of latents in units of their width, and of the logarithm [nat].
        tau: (B,) temperatures, of generators that are conditioned on them.
        most_evaluations: of the score.

    Raises:
        ValueError: latents and x of different numbers or dtypes, or of another size than the generator's.
        ModuleNotFoundError: torchdiffeq is not installed.
        RuntimeError: the solver does not converge.
    """
    check_pairs(edg, z0, x)
    flow = _Flow(edg, edg.score.given(x, tau), most_evaluations)
    given = flow.given
    n, change = flow.follow(given.along_axes(z0 - given.mean) * torch.exp(-given.log_width), (0.0, 1.0), rtol, atol)
    return flow.paths(z0, n, change)


@torch.no_grad()
def encoder_sample(
    edg: EDG, x: Vectors, rtol: float = 1e-4, atol: float = 1e-4, *, tau: Scalars | None = None,
    generator: torch.Generator, most_evaluations: int = MOST_EVALUATIONS,
) -> EncoderPaths:  # fmt: skip
    """Latents z_0 ~ p_E(z_0|x), one for each x, and their density; arguments and errors as in `encoder_paths`."""
    flow = _Flow(edg, edg.score.given(x, tau), most_evaluations)
    given = flow.given
    z1 = torch.randn(given.mean.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    centre, width = flow.frame_at_end()
    n1 = given.along_axes(z1 - centre) / width
    n, change = flow.follow(n1, (1.0, 0.0), rtol, atol)
    return flow.paths(given.mean + given.from_axes(given.log_width.exp() * n), n1, -change)


class _Flow:
    """Velocity of (n, ln|dn/dn_0|) in the clock's time, and what is made of its solutions."""

    def __init__(self, edg: EDG, given: Given, most_evaluations: int) -> None:
        self.edg, self.given, self.most, self.n_evaluations = edg, given, most_evaluations, 0

    def __call__(self, u: Tensor, state: Tensor) -> Tensor:
        self.n_evaluations += 1
        t, weight = self.edg.diffusion.times(u.expand(len(state)))
        centre, width = self.given.frame(self.edg.diffusion, t)
        z = centre + self.given.from_axes(width * state[:, :-1])
        c, divergence = correction_and_divergence(self.edg.score, z, self.given, t)
        return -weight[:, None] * torch.cat((self.given.along_axes(c) / width, divergence[:, None]), 1)

    def follow(self, n: Latents, clock: tuple[float, float], rtol: float, atol: float) -> tuple[Latents, Scalars]:
        """n at the second time, and ln|det| of how it depends on n at the first."""
        if not self.edg.score.corrected:
            return n, torch.zeros_like(n[:, 0])
        state, problem = torch.cat((n, torch.zeros_like(n[:, :1])), 1), ""
        times = torch.tensor(clock, dtype=n.dtype, device=n.device)
        options = {"max_num_steps": max(1, self.most // 6)}
        try:
            state = solver()(self, state, times, rtol=rtol, atol=atol, method="dopri5", options=options)[1]
        except AssertionError as error:  # how torchdiffeq says that steps became too small or too many
            problem = str(error)
        if not problem and not torch.isfinite(state).all():
            problem = "the result is not finite"
        if problem:
            raise RuntimeError(
                f"the encoder's equation did not converge at rtol = {rtol:g}, atol = {atol:g} after "
                f"{self.n_evaluations} evaluations of the score for {len(n)} draws ({problem}); loosen the tolerances "
                "or train the score longer"
            )
        return state[:, :-1], state[:, -1]

    def frame_at_end(self) -> tuple[Latents, Latents]:
        """a m and w_t at t = 1."""
        return self.given.frame(self.edg.diffusion, torch.ones_like(self.given.mean[:, 0]))

    def paths(self, z0: Latents, n: Latents, change: Scalars) -> EncoderPaths:
        """The result, from z_0, n at t = 1 and ln|dn_1/dn_0|."""
        centre, width = self.frame_at_end()
        end = centre + self.given.from_axes(width * n)
        log_prob = log_normal(end) + change + (width.log() - self.given.log_width).sum(1)
        return EncoderPaths(log_prob, z0, end, self.n_evaluations)


def check_pairs(edg: EDG, z0: Tensor, x: Tensor) -> None:
    """Refuse latents and x that do not go together, or not with the generator.

    Raises:
        ValueError: not (B, d_z) and (B, d) in the generator's dtype.
    """
    rows = z0.shape[0] if z0.ndim else 0
    if (tuple(z0.shape), tuple(x.shape)) != ((rows, edg.latent_dim), (rows, edg.dim)):
        raise ValueError(
            f"need as many latents of size {edg.latent_dim} as x of size {edg.dim}, not arrays of shape "
            f"{tuple(z0.shape)} and {tuple(x.shape)}"
        )
    if {z0.dtype, x.dtype} != {edg.dtype}:
        raise ValueError(f"the generator computes in {edg.dtype}; latents are in {z0.dtype} and x in {x.dtype}")


def solver() -> Callable[..., Tensor]:
    """The solver of torchdiffeq, whose import complains of its own use of torch.jit.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torchdiffeq import odeint
    except ModuleNotFoundError as error:
        hint = "weights of a diffusion generator need torchdiffeq: pip install torchdiffeq"
        raise ModuleNotFoundError(hint) from error
    return odeint


def correction_and_divergence(score: Score, z: Latents, given: Given, t: Scalars) -> tuple[Latents, Scalars]:
    """The correction of the score (B, d_z) and its divergence (B,), exact: every latent costs a derivative."""
    with torch.enable_grad():
        here = z.detach().requires_grad_()
        correction = score.parts(here, given, t).correction
        divergence = torch.zeros_like(t)
        if correction.requires_grad:
            for i, column in enumerate(correction.unbind(1)):
                (row,) = torch.autograd.grad(column.sum(), here, retain_graph=True)
                divergence = divergence + row[:, i]
    return correction.detach(), divergence
