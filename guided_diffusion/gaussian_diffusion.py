"""The diffusion process: how images are noised, and how a network learns and samples the reverse.

Notation and order follow DDPM (Ho et al. 2020): q(x_t | x_0), the posterior q(x_{t-1} | x_t, x_0),
the network's p(x_{t-1} | x_t), samplers, objective, variational bound. Learned variances and the
hybrid objective are improved DDPM's (Nichol and Dhariwal 2021), guidance is ADM's (Dhariwal and
Nichol 2021), DDIM that of Song et al. (2021). Timesteps count from 0: t stands for the papers' t+1.

The network is any function `model(x_t, t, **model_kwargs)`.
"""

import enum
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .sampling import (
    Cond,
    CondFn,
    Denoiser,
    NoiseFn,
    SamplingMethods,
    Step,
    XStartFn,
    noise_like,
)
from .schedules import (  # noqa: F401 - the published home of these names
    SCHEDULES,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from .tables import DiffusionTables
from .tables import extract_into_tensor as _extract_into_tensor  # noqa: F401


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t


class ModelVarType(enum.Enum):
    """Where the variance of p(x_{t-1} | x_t) comes from.

    The learned kinds double the channels of the network's output. LEARNED_RANGE interpolates
    between the logarithms of FIXED_SMALL and FIXED_LARGE (improved DDPM, eq. 15).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()

    def is_learned(self) -> bool:
        """Tell whether the network's output has channels for the variance."""
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


# The tables of variance and log variance.
FIXED_VARIANCES = {
    ModelVarType.FIXED_SMALL: ("posterior_variance", "posterior_log_variance_clipped"),
    ModelVarType.FIXED_LARGE: ("_large_variance", "_large_log_variance"),
}


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # mean squared error, plus the bound for a learned variance
    RESCALED_MSE = enum.auto()  # the same with the bound scaled by T / 1000
    KL = enum.auto()  # one term of the variational bound
    RESCALED_KL = enum.auto()  # T times that: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Tell whether the objective is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(DiffusionTables, SamplingMethods):
    """A diffusion process of T steps: its distributions, samplers and objectives.

    The samplers are inherited from `SamplingMethods`, the tables from `DiffusionTables`.
    A subclass that sees the timesteps otherwise overrides `_wrap_model` and `_scale_timesteps`.

    Args:
        betas: the variances of the T noising steps, in (0, 1].
        model_mean_type: what the network predicts.
        model_var_type: where the variance comes from.
        loss_type: what training minimises.
        rescale_timesteps: hand the network timesteps in 0..1000 whatever T is.

    Raises:
        ValueError: if `betas` is empty or leaves (0, 1].
    """

    def __init__(
        self,
        *,
        betas: np.ndarray | Sequence[float],
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        super().__init__(betas)

    # -- q: noising --------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0), each [N, C, ...] (DDPM, eq. 4).

        Args:
            x_start: x_0, [N, C, ...].
            t: integer timesteps [N]; 0 means one step of noise.
        """
        mean = self.lookup("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self.lookup("_one_minus_alphas_cumprod", t, x_start)
        return mean, variance, self.lookup("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t [N, C, ...] given x_0 at integer timesteps [N]; `noise` is drawn if None."""
        noise = torch.randn_like(x_start) if noise is None else noise
        assert noise.shape == x_start.shape, (noise.shape, x_start.shape)
        signal = self.lookup("sqrt_alphas_cumprod", t, x_start) * x_start
        return signal + self.lookup("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0).

        DDPM, eqs. 6 and 7; all [N, C, ...]. The logarithm at t = 0 is that of t = 1.
        """
        assert x_start.shape == x_t.shape, (x_start.shape, x_t.shape)
        mean = (
            self.lookup("posterior_mean_coef1", t, x_t) * x_start
            + self.lookup("posterior_mean_coef2", t, x_t) * x_t
        )
        variance = self.lookup("posterior_variance", t, x_t)
        return mean, variance, self.lookup("posterior_log_variance_clipped", t, x_t)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        assert x_t.shape == eps.shape, (x_t.shape, eps.shape)
        scaled = self.lookup("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self.lookup("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        assert x_t.shape == xprev.shape, (x_t.shape, xprev.shape)
        scaled = self.lookup("_recip_posterior_mean_coef1", t, x_t) * xprev
        return scaled - self.lookup("_ratio_posterior_mean_coefs", t, x_t) * x_t

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        difference = self.lookup("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart
        return difference / self.lookup("sqrt_recipm1_alphas_cumprod", t, x_t)

    # -- p: the network's reverse step ---------------------------------------------------------

    def _wrap_model(self, model: Denoiser) -> Denoiser:
        """Hook: adapt the network or guidance function to this process; here, not at all."""
        return model

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """Hook: turn the timesteps [N] of this process into those that a function is handed."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _call(self, function, x, t, model_kwargs):
        """Evaluate the network or a guidance gradient: both see x_t and t the same way."""
        return self._wrap_model(function)(x, self._scale_timesteps(t), **(model_kwargs or {}))

    def p_mean_variance(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        model_kwargs: Cond | None = None,
    ) -> Step:
        """Describe p(x_{t-1} | x_t) and the prediction of x_0.

        Args:
            model: the network.
            x: x_t, [N, C, ...].
            t: integer timesteps [N].
            clip_denoised: limit the predicted x_0 to [-1, 1].
            denoised_fn: edits the predicted x_0, before it is clipped.
            model_kwargs: further arguments of the network, such as labels.

        Returns:
            `mean`, `variance`, `log_variance`, `pred_xstart`, each [N, C, ...].
        """
        assert t.shape == x.shape[:1], (t.shape, x.shape)
        output = self._split(self._call(model, x, t, model_kwargs), x)
        return self._p_from_output(*output, x, t, clip_denoised, denoised_fn)

    def _split(self, output, x):
        """Separate the network's output into mean and variance channels (None if fixed)."""
        if not self.model_var_type.is_learned():
            assert output.shape == x.shape, (output.shape, x.shape)
            return output, None
        channels = x.shape[1]
        expected = (len(x), 2 * channels, *x.shape[2:])
        assert output.shape == expected, (output.shape, expected)
        return torch.split(output, channels, dim=1)

    def _p_from_output(self, mean_out, var_out, x, t, clip_denoised, denoised_fn=None):
        """Build the result of `p_mean_variance` from the two parts of the network's output."""
        variance, log_variance = self._p_variance(var_out, x, t)
        x_start = self._p_xstart(mean_out, x, t)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = mean_out
        else:
            mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        assert mean.shape == log_variance.shape == x_start.shape == x.shape
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": x_start,
        }

    def _p_variance(self, var_out, x, t):
        """Return variance and log variance of p (improved DDPM, eq. 15, for LEARNED_RANGE)."""
        if var_out is None:
            variance, log_variance = FIXED_VARIANCES[self.model_var_type]
            return self.lookup(variance, t, x), self.lookup(log_variance, t, x)
        log_variance = var_out
        if self.model_var_type == ModelVarType.LEARNED_RANGE:
            fraction = (var_out + 1) / 2  # the output is meant to be in [-1, 1]; nothing clips it
            largest = self.lookup("_log_betas", t, x)
            smallest = self.lookup("posterior_log_variance_clipped", t, x)
            log_variance = fraction * largest + (1 - fraction) * smallest
        return torch.exp(log_variance), log_variance

    def _p_xstart(self, mean_out, x, t):
        """Translate the network's prediction into one of x_0."""
        match self.model_mean_type:
            case ModelMeanType.START_X:
                return mean_out
            case ModelMeanType.EPSILON:
                return self._predict_xstart_from_eps(x, t, eps=mean_out)
            case ModelMeanType.PREVIOUS_X:
                return self._predict_xstart_from_xprev(x, t, xprev=mean_out)

    # -- guidance ----------------------------------------------------------------------------

    def condition_mean(
        self,
        cond_fn: CondFn,
        p_mean_var: Step,
        x: Tensor,
        t: Tensor,
        model_kwargs: Cond | None = None,
    ) -> Tensor:
        """Return the mean of p, shifted by variance * gradient (ADM, algorithm 1).

        Args:
            cond_fn: `cond_fn(x, t, **model_kwargs)`, the gradient of log p(y | x_t); its
                timesteps are the network's.
            p_mean_var: the result of `p_mean_variance`.
            x: x_t, [N, C, ...].
            t: integer timesteps [N].
            model_kwargs: further arguments of `cond_fn`.
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self,
        cond_fn: CondFn,
        p_mean_var: Step,
        x: Tensor,
        t: Tensor,
        model_kwargs: Cond | None = None,
    ) -> Step:
        """Return `p_mean_var` with the gradient in the noise prediction (ADM, algorithm 2).

        The noise is derived from `pred_xstart`, clipped or not; the new `pred_xstart` and `mean`
        are not clipped again. Arguments are those of `condition_mean`.
        """
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = self._call(cond_fn, x, t, model_kwargs)
        eps = eps - self.lookup("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        x_start = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        return {**p_mean_var, "mean": mean, "pred_xstart": x_start}

    # -- objective ---------------------------------------------------------------------------

    def training_losses(
        self,
        model: Denoiser,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Cond | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of each image, and the terms it is made of.

        Args:
            model: the network.
            x_start: images [N, C, ...] in [-1, 1].
            t: integer timesteps [N].
            model_kwargs: further arguments of the network, such as labels.
            noise: the noise in x_t, shaped like x_start; drawn if None.

        Returns:
            `loss` [N]; for the squared errors also `mse` [N] and, if the variance is learned,
            `vb` [N], the share of the bound in the loss.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, False, model_kwargs)["output"]
            scale = self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1
            return {"loss": bound * scale}
        mean_out, var_out = self._split(self._call(model, x_t, t, model_kwargs), x_t)
        target = self._target(x_start, x_t, t, noise)
        mse = mean_flat((target - mean_out) ** 2)
        if var_out is None:
            return {"mse": mse, "loss": mse}
        # The bound trains the variance alone (improved DDPM, section 3.1, eq. 16).
        p = self._p_from_output(mean_out.detach(), var_out, x_t, t, clip_denoised=False)
        vb = self._bound_term(p, x_start, x_t, t)
        if self.loss_type == LossType.RESCALED_MSE:
            vb = vb * (self.num_timesteps / 1000.0)
        return {"vb": vb, "mse": mse, "loss": mse + vb}

    def _target(self, x_start, x_t, t, noise):
        """Return what the network's mean channels should be."""
        match self.model_mean_type:
            case ModelMeanType.EPSILON:
                return noise
            case ModelMeanType.START_X:
                return x_start
            case ModelMeanType.PREVIOUS_X:
                return self.q_posterior_mean_variance(x_start, x_t, t)[0]

    # -- variational bound ---------------------------------------------------------------------

    def _bound_term(self, p, x_start, x_t, t):
        """Return L_t of the bound (DDPM, eq. 5), [N], in bits per dimension.

        That is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 -log p(x_0 | x_1).
        """
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = normal_kl(mean, log_variance, p["mean"], p["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=p["mean"], log_scales=0.5 * p["log_variance"]
        )
        return torch.where(t == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2.0)

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """Return the bound's term [N] at t as `output`, and `pred_xstart`."""
        p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        return {"output": self._bound_term(p, x_start, x_t, t), "pred_xstart": p["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """Return KL(q(x_T | x_0) || N(0, 1)), [N], in bits per dimension: L_T of the bound."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Denoiser,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Cond | None = None,
        noise_fn: NoiseFn | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate the whole bound on -log p(x_0), in bits per dimension, with one draw per step.

        Args:
            model: the network.
            x_start: images [N, C, ...] in [-1, 1].
            clip_denoised: limit the predicted x_0 to [-1, 1].
            model_kwargs: further arguments of the network, such as labels.
            noise_fn: draws the noise of each step, `noise_fn(x_start)`; None for the global
                generator.

        Returns:
            `total_bpd` [N] and its parts `prior_bpd` [N] and `vb` [N, T]; the squared errors of
            the predicted x_0 and noise, `xstart_mse` and `mse`, [N, T]. Columns go from t = T - 1
            down to 0.
        """
        columns = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((len(x_start),), i, device=x_start.device)
            noise = noise_like(x_start, noise_fn)
            x_t = self.q_sample(x_start, t, noise=noise)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}
