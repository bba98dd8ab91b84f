import copy

import pytest
import torch
from torch import nn

from guided_diffusion import fp16_util
from guided_diffusion.fp16_util import MixedPrecisionTrainer


class Net(nn.Module):
    """A convolution, a norm and a linear layer: one float16 weight among float32 ones."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 1)

    def convert_to_fp16(self):
        self.apply(fp16_util.convert_module_to_f16)

    def forward(self, x):
        h = self.conv(x.to(self.conv.weight.dtype)).float()
        return self.head(self.norm(h).square().mean(dim=(2, 3)))


def make_trainer(use_fp16, **options):
    torch.manual_seed(0)
    return MixedPrecisionTrainer(model=Net(), use_fp16=use_fp16, **options)


def run_step(trainer, opt):
    trainer.zero_grad()
    torch.manual_seed(1)
    trainer.backward(trainer.model(torch.randn(3, 2, 6, 6)).square().mean())
    return trainer.optimize(opt)


def snapshot(params):
    return [param.detach().clone() for param in params]


def test_only_convolutions_change_precision():
    """Norms and linear layers stay float32, and the way back restores float32."""
    net = Net()
    net.apply(fp16_util.convert_module_to_f16)
    assert net.conv.weight.dtype == net.conv.bias.dtype == torch.float16
    assert net.norm.weight.dtype == net.head.weight.dtype == torch.float32
    net.apply(fp16_util.convert_module_to_f32)
    assert {param.dtype for param in net.parameters()} == {torch.float32}


def test_a_convolution_without_bias_is_converted_too():
    """There is no bias to convert, and none is made."""
    conv = nn.Conv1d(2, 2, 1, bias=False)
    fp16_util.convert_module_to_f16(conv)
    assert conv.weight.dtype == torch.float16 and conv.bias is None


def test_masters_are_one_flat_vector_and_one_flat_matrix():
    """Optimizer files index the two groups: vectors [n], then matrices [1, m], by creation."""
    trainer = make_trainer(use_fp16=True)
    names = [[name for name, _ in group] for group, _ in trainer.param_groups_and_shapes]
    assert names[0] == ["conv.bias", "norm.weight", "norm.bias", "head.bias"]
    assert names[1] == ["conv.weight", "head.weight"]
    assert [tuple(p.shape) for p in trainer.master_params] == [(13,), (1, 76)]
    assert all(p.dtype == torch.float32 and p.is_leaf for p in trainer.master_params)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flattening_and_back_is_exact(layout):
    """No element may move or change, whatever the memory layout of the weights."""
    net = Net().to(memory_format=layout)
    groups = fp16_util.get_param_groups_and_shapes(net.named_parameters())
    masters = fp16_util.make_master_params(groups)
    for (group, _), master in zip(groups, masters, strict=True):
        for (name, param), value in zip(
            group, fp16_util.unflatten_master_params(group, master), strict=True
        ):
            assert torch.equal(param, value), name
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    fp16_util.master_params_to_model_params(groups, masters)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_missing_gradients_count_as_zeros():
    """A parameter without a gradient holds its place in the flat master gradient."""
    net = Net()
    net.head.bias.grad = torch.ones(1)
    groups = fp16_util.get_param_groups_and_shapes(net.named_parameters())
    masters = fp16_util.make_master_params(groups)
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert masters[0].grad.tolist() == [0.0] * 12 + [1.0]
    assert masters[1].grad.shape == (1, 76) and not masters[1].grad.any()


@pytest.mark.parametrize("use_fp16", [False, True])
def test_state_dict_there_and_back(use_fp16):
    """Masters -> state_dict -> masters is exact, in the names, shapes and order of the model."""
    trainer = make_trainer(use_fp16)
    masters = [p.detach() + 1e-4 for p in trainer.master_params]
    state = trainer.master_params_to_state_dict(masters)
    assert list(state) == list(trainer.model.state_dict())
    assert all(state[k].shape == v.shape for k, v in trainer.model.state_dict().items())
    back = trainer.state_dict_to_master_params(state)
    assert all(torch.equal(a, b) for a, b in zip(masters, back, strict=True))


def test_fp32_masters_are_the_parameters_themselves():
    """Without fp16 nothing is copied, and every step is taken."""
    trainer = make_trainer(use_fp16=False)
    assert all(a is b for a, b in zip(trainer.master_params, trainer.model_params, strict=True))
    before = snapshot(trainer.model_params)
    assert run_step(trainer, torch.optim.SGD(trainer.master_params, lr=0.1)) is True
    assert not all(map(torch.equal, before, trainer.model_params))
    assert set(trainer.metrics) == {"grad_norm", "param_norm"}


def test_fp16_takes_nearly_the_step_of_fp32():
    """Scaling the loss and unscaling the gradients must cancel, in steps and reported norms."""
    trainers = [make_trainer(use_fp16=flag, initial_lg_loss_scale=10) for flag in (False, True)]
    for trainer in trainers:
        assert run_step(trainer, torch.optim.SGD(trainer.master_params, lr=0.1))
    plain, scaled = trainers
    assert scaled.metrics["grad_norm"] == pytest.approx(plain.metrics["grad_norm"], rel=1e-2)
    assert scaled.metrics["param_norm"] == pytest.approx(plain.metrics["param_norm"], rel=1e-2)
    assert scaled.metrics["lg_loss_scale"] == 10
    for a, b in zip(plain.model_params, scaled.model_params, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=2e-3)


def test_the_loss_scale_grows_with_each_step_taken():
    """By fp16_scale_growth, from its start; master gradients are forgotten."""
    trainer = make_trainer(True, fp16_scale_growth=0.25, initial_lg_loss_scale=8)
    opt = torch.optim.SGD(trainer.master_params, lr=0.1)
    assert run_step(trainer, opt) and run_step(trainer, opt)
    assert trainer.lg_loss_scale == 8.5
    assert all(param.grad is None for param in trainer.master_params)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_skips_the_step_and_halves_the_scale(value):
    """Weights, masters and the optimizer stay as they were, and the next step may be taken."""
    trainer = make_trainer(use_fp16=True)
    assert trainer.lg_loss_scale == fp16_util.INITIAL_LOG_LOSS_SCALE == 20
    opt = torch.optim.AdamW(trainer.master_params, lr=0.1)
    before = snapshot([*trainer.model_params, *trainer.master_params])
    trainer.model.conv.weight.grad = torch.full_like(trainer.model.conv.weight, value)
    assert trainer.optimize(opt) is False
    after = snapshot([*trainer.model_params, *trainer.master_params])
    assert all(map(torch.equal, before, after))
    assert trainer.lg_loss_scale == 19 and trainer.metrics == {"lg_loss_scale": 20}
    assert not opt.state and all(param.grad is None for param in trainer.master_params)
    trainer.lg_loss_scale = 8
    assert run_step(trainer, opt) is True
    assert {"grad_norm", "param_norm", "lg_loss_scale"} == set(trainer.metrics)


def test_a_scale_that_is_too_large_comes_down_by_itself():
    """Real float16 gradients overflow at 2 ** 60, and training finds a scale that works."""
    trainer = make_trainer(use_fp16=True, initial_lg_loss_scale=60)
    opt = torch.optim.SGD(trainer.master_params, lr=0.0)
    taken = [run_step(trainer, opt) for _ in range(60)]
    assert not taken[0] and taken[-1]
    assert trainer.lg_loss_scale < 40


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 0.0, 1e300])
def test_check_overflow(value):
    """Infinite values and NaN are overflows, large ones are not."""
    assert fp16_util.check_overflow(value) is (value not in (0.0, 1e300))
