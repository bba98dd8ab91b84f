"""Guidance: functions that steer sampling towards a label."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sampling import CondFn


def classifier_guidance(classifier: nn.Module, scale: float) -> CondFn:
    """Return the gradient of scale * log p(y | x_t) as a function of x_t, t and y (ADM, alg. 1).

    The gradient flows to x_t alone: the classifier is frozen and put in eval mode.

    Args:
        classifier: (x_t [N, C, H, W], t [N]) -> logits [N, classes].
        scale: the guidance scale s.

    Returns:
        a function (x_t, t, y [N], **ignored) -> [N, C, H, W], to be given as `cond_fn`.
    """
    classifier.requires_grad_(False).eval()

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None, **_) -> Tensor:
        if y is None:
            raise ValueError("classifier guidance needs the labels y in model_kwargs")
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t).float(), dim=-1)  # [N, classes]
            chosen = log_probs.gather(1, y[:, None])  # [N, 1]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * scale

    return cond_fn
