"""Classifier guidance: the gradient itself, and what it must leave alone."""

import pytest
import torch

from guided_diffusion.guidance import classifier_guidance
from guided_diffusion.script_util import create_classifier


class Linear(torch.nn.Module):
    """log p(y | x) whose gradient is known: logits = W x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=torch.manual_seed(0)))

    def forward(self, x, t):
        return x.flatten(1) @ self.weight.T


def test_the_gradient_is_that_of_the_log_probability_of_the_label():
    """For a linear classifier it is scale * (w_y - the mean of w under the prediction)."""
    classifier = Linear()
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    weight = classifier.weight.detach()
    gradient = classifier_guidance(classifier, 2.5)(x, torch.zeros(5), y=y)
    expected = 2.5 * (weight[y] - (x.flatten(1) @ weight.T).softmax(1) @ weight)
    torch.testing.assert_close(gradient.flatten(1), expected)


def test_guidance_never_computes_gradients_of_the_weights():
    """The classifier is frozen: no operation on its weights alone is recorded."""
    classifier = create_classifier(
        32, False, 32, 1, "16", True, True, "attention", 10, 1, "1,2", 32
    )
    cond_fn = classifier_guidance(classifier, 1.0)
    assert not any(p.requires_grad for p in classifier.parameters()) and not classifier.training
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():  # as in the sampling loops
        gradient = cond_fn(x, torch.tensor([3, 900]), y=torch.tensor([1, 7]))
    assert gradient.shape == x.shape and not gradient.requires_grad and gradient.abs().sum() > 0
    assert all(p.grad is None for p in classifier.parameters())


def test_guidance_without_labels_says_so():
    """There is no gradient towards nothing."""
    with pytest.raises(ValueError, match="labels y"):
        classifier_guidance(Linear(), 1.0)(torch.zeros(1, 1, 2, 2), torch.zeros(1))
