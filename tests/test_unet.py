import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.fill import draw, fill_, thin
from torch import nn

from guided_diffusion import unet
from guided_diffusion.fp16_util import MixedPrecisionTrainer

REFERENCE = Path(__file__).parent / "reference"
CASES = {case["name"]: case for case in json.loads((REFERENCE / "unet.json").read_text())}
CHECKPOINTS = json.loads((REFERENCE / "checkpoints.json").read_text())
SCRIPT_KINDS = {
    "image_sample.py": "unet",
    "super_res_sample.py": "sr",
    "classifier_sample.py": "unet",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The numbers of the reference were made on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def reference_arrays():
    with np.load(REFERENCE / "unet.npz") as arrays:
        return dict(arrays)


def build(kind, kwargs):
    """Build a network from the flags of a script, or by its class."""
    from guided_diffusion import script_util

    if kind == "unet":
        flags = script_util.model_and_diffusion_defaults() | kwargs
        return script_util.create_model_and_diffusion(**flags)[0]
    if kind == "sr":
        flags = script_util.sr_model_and_diffusion_defaults() | kwargs
        return script_util.sr_create_model_and_diffusion(**flags)[0]
    if kind == "classifier":
        return script_util.create_classifier(**script_util.classifier_defaults() | kwargs)
    return getattr(unet, kind)(**kwargs)


def layout(model):
    return [(name, list(entry.shape)) for name, entry in model.state_dict().items()]


def assert_agrees(actual, expected, name):
    """Within 1e-5 of the largest absolute value, as the reference asks."""
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name
    )


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_published_networks(name):
    """Layout, output and all gradients must be those of the published code (unet.npz)."""
    case, arrays = CASES[name], reference_arrays()
    seed = case["seed"]
    model = build(case["kind"], case["kwargs"])
    assert layout(model) == list(case["state_dict"].items())
    fill_(model.eval(), seed)
    x = draw("x", case["x_shape"], seed).requires_grad_()
    cond = {} if case["y"] is None else {"y": torch.tensor(case["y"])}
    if case["low_res_shape"]:
        cond["low_res"] = draw("low_res", case["low_res_shape"], seed)
    out = model(x, torch.tensor(case["t"]), **cond)
    assert list(out.shape) == case["out_shape"]
    (out * draw("probe", out.shape, seed)).sum().backward()
    # The reference took the norms in float32, which loses digits for the largest tensors.
    norms = [param.grad.norm().item() for _, param in sorted(model.named_parameters())]
    assert_agrees(thin(out), arrays[f"{name}/out"], "out")
    assert_agrees(thin(x.grad), arrays[f"{name}/x_grad"], "x_grad")
    assert_agrees(np.array(norms), arrays[f"{name}/param_grad_norms"], "param_grad_norms")


def parse(value):
    """Turn a flag on a command line into the value it stands for."""
    if value in ("True", "False"):
        return value == "True"
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        return value


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_released_checkpoints_fit(name):
    """Names, shapes, order and number of parameters must be those of the released file."""
    entry = CHECKPOINTS[name]
    kind = "classifier" if "classifier" in name else SCRIPT_KINDS[entry["script"]]
    with torch.device("meta"):
        model = build(kind, {flag: parse(value) for flag, value in entry["flags"].items()})
    assert layout(model) == list(entry["state_dict"].items())
    assert [n for n, _ in model.named_parameters()] == list(entry["state_dict"])
    assert sum(param.numel() for param in model.parameters()) == entry["parameters"]


SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "channel_mult": (1, 2),
    "num_heads": 2,
}


def small(cls=unet.UNetModel, seed=7, **options):
    return fill_(cls(**SMALL | options), seed)


def inputs(n=2, channels=3):
    return draw("x", (n, channels, 8, 8), 0), torch.tensor([3.5, 900.0])[:n]


@pytest.mark.parametrize("cls", [unet.UNetModel, unet.EncoderUNetModel])
@pytest.mark.parametrize("updown", [False, True])
def test_random_numbers_are_drawn_in_the_order_of_the_state_dict(cls, updown):
    """A seed must give the same fresh weights as in the published code."""
    classes = {"num_classes": 5} if cls is unet.UNetModel else {}
    torch.manual_seed(0)
    model = cls(**SMALL, resblock_updown=updown, **classes)
    replay = copy.deepcopy(model)
    torch.manual_seed(0)
    for module in replay.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd):
            module.reset_parameters()
    for (name, param), again in zip(model.named_parameters(), replay.parameters(), strict=True):
        assert torch.equal(param, again) or not param.any(), name


def test_a_fresh_network_predicts_zero():
    """The last convolution of the network and of every residual branch starts at zero."""
    model = unet.UNetModel(**SMALL)
    x, t = inputs()
    assert not model(x, t).any()
    emb = torch.randn(2, 128)
    for block in model.modules():
        if isinstance(block, unet.ResBlock) and block.channels == block.out_channels:
            h = torch.randn(2, block.channels, 4, 4)
            assert torch.equal(block(h, emb), h)
        if isinstance(block, unet.AttentionBlock):
            h = torch.randn(2, block.channels, 4, 4)
            assert torch.equal(block(h), h)


def test_labels_are_given_if_and_only_if_the_network_takes_them():
    """Forgetting y, or passing it in vain, would go unnoticed otherwise."""
    x, t = inputs()
    y = torch.tensor([0, 2])
    with pytest.raises(AssertionError, match="class-conditional"):
        small()(x, t, y)
    with pytest.raises(AssertionError, match="class-conditional"):
        small(num_classes=3)(x, t)
    model = small(num_classes=3)
    assert not torch.allclose(model(x, t, y), model(x, t, y=y.flip(0)))


def test_fractional_timesteps_lie_between_whole_ones():
    """Respacing with rescaled timesteps hands the network fractions: they must not be rounded."""
    model = small()
    x, _ = inputs(1)
    outs = [model(x, torch.tensor([t])) for t in (10.0, 10.5, 11.0)]
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])
    torch.testing.assert_close(model(x, torch.tensor([10])), outs[0])


# ------------------------------------------------------------------ attention


def naive_attention(q, k, v):
    """Attend from the definition, position by position; all [T, C]."""
    weights = torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=-1)
    return weights @ v


@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("cls", [unet.QKVAttention, unet.QKVAttentionLegacy])
def test_attention_follows_the_definition(cls, backend):
    """Each head attends alone; the two classes differ in where its q, k and v lie."""
    heads, channels, length = 3, 4, 5
    attention = cls(heads)
    attention.set_attention_backend(backend)
    qkv = draw("qkv", (2, 3 * heads * channels, length), 0)
    order = (3, heads) if cls is unet.QKVAttention else (heads, 3)
    split = qkv.reshape(2, *order, channels, length)
    split = split if cls is unet.QKVAttention else split.transpose(1, 2)  # [N, 3, H, C, T]
    for n in range(2):
        expected = [naive_attention(*split[n, :, h].transpose(-1, -2)).T for h in range(heads)]
        torch.testing.assert_close(attention(qkv)[n], torch.cat(expected))


def test_attention_ignores_the_order_of_positions():
    """Without positions in its input, attention commutes with a permutation of them."""
    attention = unet.QKVAttention(2)
    qkv, order = draw("qkv", (1, 24, 9), 0), torch.randperm(9)
    torch.testing.assert_close(attention(qkv[..., order]), attention(qkv)[..., order])


def test_unknown_attention_backends_are_refused():
    """The error lists the names."""
    with pytest.raises(ValueError, match=r"\['auto', 'math'\], got 'flash'"):
        small().set_attention_backend("flash")


@pytest.mark.parametrize("build_model", [small, functools.partial(small, unet.EncoderUNetModel)])
def test_the_backend_reaches_every_attention_module(build_model):
    """One call on the network must leave no layer behind."""
    model = build_model()
    model.set_attention_backend("math")
    backends = [m.backend for m in model.modules() if isinstance(m, unet.QKVAttention)]
    assert backends and set(backends) == {"math"}
    x, t = inputs()
    expected = model(x, t)
    model.set_attention_backend("auto")
    torch.testing.assert_close(model(x, t), expected)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("new_order", [False, True])
def test_attention_can_be_differentiated_twice(use_checkpoint, new_order):
    """Second derivatives of a block must be those of finite differences in double precision."""
    block = unet.AttentionBlock(
        32, 4, use_checkpoint=use_checkpoint, use_new_attention_order=new_order
    )
    fill_(block.double(), 3)
    block.set_attention_backend("math")
    x = draw("x", (1, 32, 3), 0).double().requires_grad_()
    assert torch.autograd.gradgradcheck(block, (x,))


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_whole_network_can_be_differentiated_twice(use_checkpoint):
    """The Hessian along a direction v is how the gradient changes along v."""
    model = small(use_checkpoint=use_checkpoint, use_scale_shift_norm=True).double()
    model.dtype = torch.float64
    model.set_attention_backend("math")
    x, t = inputs()
    x, probe, v = (draw(name, x.shape, 1).double() for name in ("x", "probe", "v"))

    def gradient(at, create_graph=False):
        at = at.detach().requires_grad_()
        out = (model(at, t) * probe).sum()
        return at, torch.autograd.grad(out, at, create_graph=create_graph)[0]

    at, grad = gradient(x, create_graph=True)
    hessian_v = torch.autograd.grad((grad * v).sum(), at)[0]
    step = 1e-5
    difference = (gradient(x + step * v)[1] - gradient(x - step * v)[1]) / (2 * step)
    torch.testing.assert_close(hessian_v, difference, rtol=1e-6, atol=1e-6 * difference.abs().max())


# ------------------------------------------------------------------ memory and precision


def gradients(model, x, t, seed=5):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = model(x, t)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(param.grad for param in model.parameters())]


@pytest.mark.parametrize("cls", [unet.UNetModel, unet.EncoderUNetModel])
def test_checkpointing_changes_nothing(cls):
    """Output and gradients must be bit for bit the same, dropout included."""
    plain, saving = (small(cls, dropout=0.3, use_checkpoint=flag) for flag in (False, True))
    for a, b in zip(gradients(plain, *inputs()), gradients(saving, *inputs()), strict=True):
        assert torch.equal(a, b)


def test_checkpointing_keeps_no_activations_inside_blocks():
    """`use_checkpoint` must hold for every block, those of attention included."""
    calls = {False: 0, True: 0}
    for flag in calls:
        model = small(use_checkpoint=flag)
        for block in model.modules():
            if isinstance(block, unet.AttentionBlock | unet.ResBlock):
                layer = block.norm if isinstance(block, unet.AttentionBlock) else block.in_layers[0]
                layer.register_forward_hook(
                    lambda *_, flag=flag: calls.__setitem__(flag, calls[flag] + 1)
                )
        x, t = inputs()
        model(x, t).sum().backward()
    assert calls[True] == 2 * calls[False] > 0


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_checkpointing_keeps_no_joint_tensor(use_checkpoint):
    """Of a decoder block's two inputs, which are kept anyway, no concatenated copy is kept."""
    model = small(use_checkpoint=use_checkpoint)
    joint = {block[0].channels for block in model.output_blocks}
    kept, own = set(), {param.data_ptr() for param in model.parameters()}

    def keep(tensor):
        if tensor.dim() == 4 and tensor.data_ptr() not in own:
            kept.add(tensor.shape[1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs())
    wider = {width for width in joint if width > max(model._widths)}
    assert wider and bool(wider & kept) != use_checkpoint


def test_a_block_joins_what_it_is_given_beside_the_skip_connection():
    """Also a first layer that is no residual block gets both, and no layer gets them twice."""
    x, skip, emb = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4), torch.randn(2, 8)
    layers = [nn.Conv2d(8, 32, 1), unet.ResBlock(32, 8, 0.0)]
    block = unet.TimestepEmbedSequential(*layers)
    whole = torch.cat([x, skip], dim=1)
    assert torch.equal(block(x, emb, skip), layers[1](layers[0](whole), emb))
    assert torch.equal(block(whole, emb), block(x, emb, skip))
    res = unet.ResBlock(64, 8, 0.0, out_channels=32)
    x, skip = torch.randn(2, 2, 32, 4, 4)
    block = unet.TimestepEmbedSequential(res, nn.Identity())
    assert torch.equal(block(x, emb, skip), res(torch.cat([x, skip], dim=1), emb))


def test_fp16_converts_the_torso_alone():
    """Norms, embeddings and the output stay float32; 32 -> 16 -> 32 restores the layout."""
    model = small(num_classes=3, use_fp16=True)
    assert model.dtype == torch.float16
    model.convert_to_fp16()
    for name, param in model.named_parameters():
        torso = name.startswith(("input_blocks", "middle_block", "output_blocks"))
        convolution = not any(part in name for part in ("norm", "emb_layers", "_layers.0"))
        assert (param.dtype == torch.float16) == (torso and convolution), name
    model.convert_to_fp32()
    assert {param.dtype for param in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("cls", [unet.UNetModel, unet.EncoderUNetModel])
def test_fp16_and_autocast_stay_close_to_float32(cls):
    """Narrow arithmetic costs digits, no more; the result has the dtype of the input."""
    model = small(cls).eval()
    x, t = inputs()
    with torch.no_grad():
        exact = model(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close_to(model(x, t), exact, 0.05)
        assert model(x.double(), t).dtype == torch.float64
        model.convert_to_fp16()
        assert_close_to(model(x, t), exact, 0.01)


def assert_close_to(actual, expected, share):
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() < share * expected.abs().max()


def test_training_under_autocast_gives_float32_gradients():
    """bfloat16 inside, float32 outside: gradients must be close to the exact ones."""
    x, t = inputs()
    exact = gradients(small(), x, t)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gradients(small(), x, t)
    assert {grad.dtype for grad in narrow} == {torch.float32}
    error = [(a - b).norm() for a, b in zip(narrow, exact, strict=True)]
    # Together: some gradients, such as those of the keys' biases, are zero but for rounding.
    assert torch.stack(error).norm() <= 0.05 * torch.stack([b.norm() for b in exact]).norm()


def test_the_trainer_takes_the_networks_groups():
    """The mixed-precision trainer must find every parameter in one of its two flat groups."""
    model = small(num_classes=3, use_fp16=True)
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=8)
    sizes = sum(param.numel() for param in trainer.master_params)
    assert sizes == sum(param.numel() for param in model.parameters())
    x, t = inputs()
    trainer.backward(model(x, t, torch.tensor([0, 1])).square().mean())
    assert trainer.optimize(torch.optim.SGD(trainer.master_params, lr=1e-3))


@pytest.mark.parametrize("options", [{}, {"resblock_updown": True, "use_scale_shift_norm": True}])
def test_channels_last_is_only_a_layout(options):
    """Weights and images in channels_last must give the same output and gradients."""
    x, t = inputs()
    expected = gradients(small(**options), x, t)
    model = small(**options).to(memory_format=torch.channels_last)
    actual = gradients(model, x.to(memory_format=torch.channels_last), t)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


# ------------------------------------------------------------------ the other networks


def test_the_upsampler_sees_the_enlarged_image():
    """It is a `UNetModel` on the image next to the bilinear enlargement of the small one."""
    model = small(unet.SuperResModel)
    x, t = inputs()
    low_res = draw("low_res", (2, 3, 4, 4), 0)
    enlarged = nn.Upsample((8, 8), mode="bilinear", align_corners=False)(low_res)
    plain = small(in_channels=6)
    torch.testing.assert_close(model(x, t, low_res=low_res), plain(torch.cat([x, enlarged], 1), t))
    assert model.in_channels == 6


@pytest.mark.parametrize("pool", sorted(unet.POOLS))
@pytest.mark.parametrize("head_channels", [-1, 16, 64])
def test_every_pool_classifies(pool, head_channels):
    """One row of logits per image, for any width of head that divides the channels."""
    model = small(
        unet.EncoderUNetModel,
        pool=pool,
        num_head_channels=head_channels,
        out_channels=11,
        attention_resolutions=(2,),
    )
    x, t = inputs()
    logits = model(x, t)
    assert logits.shape == (2, 11)
    assert logits.std(dim=0).min() > 0


def test_unknown_pools_are_refused():
    """The error lists the names."""
    with pytest.raises(ValueError, match="'adaptive', 'attention', 'spatial', 'spatial_v2'"):
        small(unet.EncoderUNetModel, pool="max")


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"num_head_channels": 24}])
def test_heads_must_divide_the_channels(options):
    """The error names the option and the channels."""
    with pytest.raises(ValueError, match=rf"{next(iter(options))} .* 32 channels"):
        unet.AttentionBlock(32, **options)


@pytest.mark.parametrize("dims, factors", [(1, (2,)), (2, (2, 2)), (3, (1, 2, 2))])
@pytest.mark.parametrize("use_conv", [False, True])
def test_resampling_halves_and_doubles(dims, factors, use_conv):
    """Down undoes up where nothing is learned; of three dimensions the first stays."""
    x = torch.randn(2, 4, *[4] * dims)
    up = unet.Upsample(4, use_conv, dims=dims)
    down = unet.Downsample(4, use_conv, dims=dims)
    assert up(x).shape == (2, 4, *[4 * f for f in factors])
    assert down(x).shape == (2, 4, *[4 // f for f in factors])
    if not use_conv:
        torch.testing.assert_close(down(up(x)), x)


def test_a_block_takes_another_norm_as_its_own():
    """Whoever puts a plain norm into a block gets the same function by the plain formula."""
    torch.manual_seed(0)
    block = unet.ResBlock(32, 16, 0.0, use_scale_shift_norm=True)
    nn.init.normal_(block.out_layers[-1].weight, std=0.1)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    expected = block(x, emb)
    block.out_layers[0] = nn.GroupNorm(32, 32)
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-5)


def test_sequential_hands_the_embedding_to_those_that_take_it():
    """Plain layers get one argument, timestep blocks two."""

    class Add(unet.TimestepBlock):
        def forward(self, x, emb):
            return x + emb

    layers = unet.TimestepEmbedSequential(nn.ReLU(), Add(), nn.Identity())
    out = layers(-torch.ones(1, 2), torch.full((1, 2), 3.0))
    assert out.tolist() == [[3.0, 3.0]]


def test_networks_survive_copying_and_saving(tmp_path):
    """EMA copies networks, and some programs pickle them whole."""
    model = small()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x, t = inputs()
    torch.testing.assert_close(loaded(x, t), model(x, t), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x, t), model(x, t), rtol=0, atol=0)
