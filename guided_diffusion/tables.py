"""The tables of a diffusion process: what the betas imply, in float64, and their device copies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def extract_into_tensor(
    arr: np.ndarray | Tensor, timesteps: Tensor, broadcast_shape: Sequence[int]
) -> Tensor:
    """Pick the entry of a 1-D table for each image of a batch.

    Args:
        arr: the table [T].
        timesteps: integer indices [N]; the result is on their device.
        broadcast_shape: a shape (N, ...); the entries vary along its first dimension only.

    Returns:
        A float32 tensor of that shape, a view that must not be written to.
    """
    # Cast before moving: not every device knows float64.
    table = torch.from_numpy(arr) if isinstance(arr, np.ndarray) else arr
    entries = (
        table.float().to(timesteps.device)[timesteps].view(-1, *[1] * (len(broadcast_shape) - 1))
    )
    return entries.expand(tuple(broadcast_shape))


class DeviceTables:
    """Float or integer tables on the devices that ask for them.

    A table crosses to each device once, and again only if its content has changed. Copies and
    pickles of this cache start empty.
    """

    def __init__(self):
        self._sent = {}

    def get(
        self, name: str, table: Any, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the 1-D `table` on `device`; `name` tells it from other tables."""
        sent = self._sent.get((name, device, dtype))
        if sent is None or not np.array_equal(sent[0], table):
            sent = np.array(table), torch.from_numpy(np.array(table)).to(dtype).to(device)
            self._sent[name, device, dtype] = sent
        return sent[1]

    def __reduce__(self):
        return DeviceTables, ()


class DiffusionTables:
    """The float64 arrays [T] of a process with T noising steps, as attributes.

    They may be replaced or edited; `lookup` reads them through a cache that notices.

    Args:
        betas: the variances of the noising steps, in (0, 1].

    Raises:
        ValueError: if `betas` is empty or leaves (0, 1].
    """

    def __init__(self, betas: np.ndarray | Sequence[float]):
        self.betas = betas = np.array(betas, dtype=np.float64)
        assert betas.ndim == 1, f"betas must be 1-D, got the shape {betas.shape}"
        if not (len(betas) and (betas > 0).all() and (betas <= 1).all()):
            extent = f"reach from {betas.min():g} to {betas.max():g}" if len(betas) else "are none"
            raise ValueError(
                f"the {len(betas)} betas must lie in (0, 1] but {extent}; "
                "the linear --noise_schedule needs --diffusion_steps of at least 20"
            )
        self.num_timesteps = len(betas)
        self._tables = DeviceTables()

        # a_t, a_{t-1}, a_{t+1}: the share of the signal's variance that is left in x_t.
        self.alphas_cumprod = a_t = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = a_prev = np.append(1.0, a_t[:-1])
        self.alphas_cumprod_next = np.append(a_t[1:], 0.0)
        # q(x_t | x_0), and x_0 from x_t and the noise.
        self.sqrt_alphas_cumprod = np.sqrt(a_t)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - a_t)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - a_t)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / a_t)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / a_t - 1)
        # q(x_{t-1} | x_t, x_0). Its variance is 0 at t = 0, where log takes the next entry.
        self.posterior_variance = betas * (1.0 - a_prev) / (1.0 - a_t)
        self.posterior_log_variance_clipped = np.log(self._first_replaced(self.posterior_variance))
        self.posterior_mean_coef1 = betas * np.sqrt(a_prev) / (1.0 - a_t)
        self.posterior_mean_coef2 = (1.0 - a_prev) * np.sqrt(1.0 - betas) / (1.0 - a_t)

    def lookup(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return the entries at the timesteps `t` [N] of a table, broadcast to `like`'s shape.

        Args:
            name: the attribute that holds the table, such as "alphas_cumprod".
            t: integer timesteps [N]; the result is on their device, in float32.
            like: a tensor [N, ...].
        """
        table = self._tables.get(name, getattr(self, name), t.device)
        return extract_into_tensor(table, t, like.shape)

    def _first_replaced(self, variances: np.ndarray) -> np.ndarray:
        """Put the posterior variance of t = 1 (beta, if T = 1) in the place of entry 0."""
        first = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        return np.append(first, variances[1:])

    # Tables that follow from others are computed when asked for, so that they follow edits too.

    @property
    def _one_minus_alphas_cumprod(self):
        return 1.0 - self.alphas_cumprod

    @property
    def _one_minus_alphas_cumprod_prev(self):
        return 1.0 - self.alphas_cumprod_prev

    @property
    def _large_variance(self):
        return self._first_replaced(self.betas)

    @property
    def _large_log_variance(self):
        return np.log(self._large_variance)

    @property
    def _log_betas(self):
        return np.log(self.betas)

    @property
    def _recip_posterior_mean_coef1(self):
        return 1.0 / self.posterior_mean_coef1

    @property
    def _ratio_posterior_mean_coefs(self):
        return self.posterior_mean_coef2 / self.posterior_mean_coef1
