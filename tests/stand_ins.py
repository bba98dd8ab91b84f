"""What the diffusion tests share: the reference numbers, and the functions they were made with."""

from pathlib import Path

import numpy as np
import torch

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion

REFERENCE = np.load(Path(__file__).parent / "reference" / "diffusion.npz")
MEANS = [kind.name for kind in ModelMeanType]
VARS = [kind.name for kind in ModelVarType]
LOSSES = [kind.name for kind in LossType]


def tensor(key):
    return torch.from_numpy(REFERENCE[key])


def assert_close(actual, key, tolerance=1e-5):
    """Compare relative to the largest absolute value, as reference/README.md of the data says."""
    expected = REFERENCE[key]
    assert actual.shape == expected.shape, key
    error = np.abs(actual.detach().numpy() - expected).max() / np.abs(expected).max()
    assert error <= tolerance, (key, error)


def make(mean="EPSILON", var="FIXED_SMALL", loss="MSE", rescale=False, cls=GaussianDiffusion, **kw):
    kw.setdefault("betas", get_named_beta_schedule("cosine", 20))
    if cls is SpacedDiffusion:
        kw.setdefault("use_timesteps", range(len(kw["betas"])))
    return cls(
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        loss_type=LossType[loss],
        rescale_timesteps=rescale,
        **kw,
    )


def network(var="FIXED_SMALL", weight=None):
    """Return the stand-in network of the reference data."""
    channels = 6 if var.startswith("LEARNED") else 3
    weight = (tensor("in/W") if weight is None else weight)[:channels]
    bias = tensor("in/b")[:channels, None, None]

    def model(x, t):
        mixed = torch.einsum("oc,nchw->nohw", weight, x) + bias
        return torch.tanh(mixed) + 1e-4 * t.float()[:, None, None, None]

    return model


def gradient(x, t):
    """Return the stand-in guidance gradient of the reference data."""
    mixed = torch.einsum("oc,nchw->nohw", tensor("in/V"), x)
    return 0.5 * mixed - 1e-4 * t.float()[:, None, None, None]


def inputs():
    return tensor("in/x_start"), tensor("in/t"), tensor("in/noise")
