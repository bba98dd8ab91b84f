"""Laws of guided_diffusion/estimates.py and of --dry_run: what a run needs, without running it."""

import json
import re
from argparse import Namespace

import pytest
import torch
from scripting import (
    CLASSIFIER,
    ROOT,
    SMALL,
    SUPER_RES,
    files_below,
    flags_of,
    make_images,
    run_script,
    succeed,
)
from torch import nn

from guided_diffusion import config, trained_flags
from guided_diffusion.blocks import AttentionBlock, QKVAttention
from guided_diffusion.estimates import WORK, dry_run, estimate
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.losses import classifier_losses
from guided_diffusion.metering import Meter, count_flops, peak_memory
from guided_diffusion.script_util import CREATE
from guided_diffusion.sharding import make_optimizer

FASHION = ROOT / "models" / "fashion"
TRAINED = {
    "diffusion model": FASHION / "diffusion.pt",
    "upsampler": FASHION / "upsampler.pt",
    "classifier": FASHION / "classifier.pt",
}
TRAINERS = {
    "image_train": ("diffusion model", SMALL),
    "super_res_train": ("upsampler", SUPER_RES),
    "classifier_train": ("classifier", CLASSIFIER),
}
DIFFUSION = config.DIFFUSION_GROUPS
TRAINING = [config.BatchConfig, config.OptimConfig, config.RunConfig]
SAMPLING = [config.RunConfig, config.LoadConfig, config.BatchConfig, config.SampleConfig]


def training(values=SMALL, kind="diffusion model", **more):
    """Estimate the training of a network; flags of a kind that has none of them are left out."""
    groups = [*TRAINING, *trained_flags.KINDS[kind]]
    flags = flags_of({"batch_size": 4} | values | more)
    args = config.parse_flags("", *groups, argv=flags)
    return estimate(Namespace(**vars(args), noised=True), kind)


def sampling_args(kind="diffusion model", guided=False, **values):
    """Return the flags of a script that samples from a bundled model."""
    groups = [*SAMPLING, *trained_flags.KINDS[kind]]
    values = {"model_path": TRAINED[kind], "batch_size": 4} | values
    if guided:
        groups += [config.GuidanceConfig, config.ClassifierConfig]
        values |= {"classifier_path": TRAINED["classifier"]}
    args = config.parse_flags("", *groups, argv=flags_of(values))
    return trained_flags.complete(args, kind)


def sampling(*args, chains=1, **values):
    """Estimate sampling from a bundled model."""
    flags = sampling_args(*args, **values)
    return estimate(flags, args[0] if args else "diffusion model", chains)


def total(needs):
    return sum(needs.memory.values())


def activations(needs):
    return needs.memory[WORK]


# --------------------------------------------------------------------------------------------
# Counting


def test_the_operations_of_attention_are_those_of_a_hand_computation():
    """Each entry of q k^T and of its product with v is a sum of products, two FLOPs per term."""
    batch, heads, channels, length = 2, 3, 5, 7
    qkv = torch.empty(batch, 3 * heads * channels, length, device="meta")
    attention = QKVAttention(heads)
    by_hand = batch * heads * 2 * (2 * length * length * channels)
    assert count_flops(lambda: attention(qkv), attention) == by_hand


def test_the_operations_of_a_block_are_those_of_a_hand_computation():
    """A block of attention: a convolution to q, k and v, the attention, and one back."""
    width, pixels = 32, 6 * 6
    block = AttentionBlock(width, num_heads=2).to("meta")
    x = torch.empty(1, width, 6, 6, device="meta", requires_grad=True)
    forward = 2 * pixels * width * (3 * width) + 4 * pixels**2 * width + 2 * pixels * width * width
    assert count_flops(lambda: block(x), block) == forward
    # Backward, each product has two: one for either factor's gradient.
    assert count_flops(lambda: block(x).sum().backward(), block) == 3 * forward


def test_the_operations_of_convolutions_are_those_of_a_hand_computation():
    """Stride and kernel count: 2 * kernel area * channels in * values out."""
    layer = nn.Conv2d(3, 8, 3, stride=2, padding=1, device="meta")
    x = torch.empty(2, 3, 16, 16, device="meta")
    assert count_flops(lambda: layer(x)) == 2 * 9 * 3 * (2 * 8 * 8 * 8)


def test_memory_that_is_shared_counts_once_and_what_is_freed_no_more():
    """Views, and changes in place, need nothing; the peak remembers what is gone."""
    before = torch.zeros(1000)
    with Meter() as meter:
        before.view(10, 100).t().add_(1)
        assert (meter.live, meter.peak) == (0, 0)
        kept = torch.zeros(100)
        view = kept[:50].view(5, 10)
        assert meter.live == 400
        del kept
        assert meter.live == 400  # the view needs all of it
        passing = view.clone()
        del passing, view
    assert (meter.live, meter.peak) == (0, 600)


# --------------------------------------------------------------------------------------------
# Against real networks


def real_network(kind, **more):
    """Return a network like a bundled one, on the CPU, its process and its flags."""
    flags = json.loads(TRAINED[kind].with_suffix(".json").read_text())
    known = config.defaults(*trained_flags.KINDS[kind])
    flags = {name: flags.get(name, default) for name, default in known.items()} | more
    model, process = CREATE[kind](**flags)
    return model, process, Namespace(**flags)


def real_inputs(kind, args, num, device):
    """Return x, t and the further inputs of a network, on a device."""
    size = args.large_size if kind == "upsampler" else args.image_size
    x = torch.zeros(num, args.in_channels, size, size, device=device)
    t = torch.zeros(num, dtype=torch.int64, device=device)
    cond = {"y": t} if kind == "classifier" or args.class_cond else {}
    if kind == "upsampler":
        cond["low_res"] = x[:, :, : args.small_size, : args.small_size]
    return x, t, cond


@pytest.mark.parametrize("kind", CREATE)
def test_a_network_without_content_needs_what_a_real_one_does(kind):
    """A call on the meta device allocates and computes, to the byte, what one on the CPU does."""
    model, _, args = real_network(kind)

    def needs(device):
        model.to(device)
        x, t, cond = real_inputs(kind, args, 3, device)
        cond = {} if kind == "classifier" else cond
        with torch.no_grad():
            call = lambda: model(x, t, **cond)  # noqa: E731
            if device == "meta":
                return peak_memory(call, model), count_flops(call, model)
            model.set_attention_backend("auto")
            with Meter() as memory:
                call()
            return memory.peak, count_flops(call, model)

    real = needs("cpu")
    assert real[0] > 0
    assert needs("meta") == real


@pytest.mark.parametrize(
    ("kind", "more"), [*[(kind, {}) for kind in CREATE], ("upsampler", {"use_checkpoint": True})]
)
def test_a_training_step_without_content_needs_what_a_real_one_does(kind, more):
    """So it is with loss and gradient, whose memory is what the pass keeps for its way back."""
    model, process, args = real_network(kind, **more)

    def peak(device):
        model.to(device)
        x, t, cond = real_inputs(kind, args, 3, device)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)

        def step():
            if kind == "classifier":
                return classifier_losses(process, True, model, x, t, cond)["loss"].mean().backward()
            return process.training_losses(model, x, t, cond)["loss"].mean().backward()

        step()  # which copies the tables to the device
        if device == "meta":
            return peak_memory(step, model)
        with Meter() as memory:
            step()
        return memory.peak

    assert peak("cpu") == peak("meta")


@pytest.mark.parametrize("use_fp16", [False, True])
def test_the_optimizer_needs_what_a_real_one_does(use_fp16):
    """With few activations it decides how much a step needs, most of all under float16."""
    needs = training(batch_size=1, use_fp16=use_fp16, device="cpu")
    flags = config.defaults(*DIFFUSION) | SMALL | {"use_fp16": use_fp16}
    model, process = CREATE["diffusion model"](**flags)
    trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, initial_lg_loss_scale=0.0)
    opt = make_optimizer(trainer.master_params, lr=1e-4, weight_decay=0.0)
    x, t, cond = real_inputs("diffusion model", Namespace(**flags), 1, "cpu")
    for _ in range(2):
        trainer.zero_grad()
        with Meter() as memory:
            trainer.backward(process.training_losses(model, x, t, cond)["loss"].mean())
            assert trainer.optimize(opt)
    assert memory.peak == pytest.approx(needs.memory[WORK] + needs.memory["gradients"], rel=0.02)
    moments = sum(value.nbytes for state in opt.state.values() for value in state.values())
    assert needs.memory["moments of AdamW"] == moments
    assert needs.memory["gradients"] == sum(param.grad.nbytes for param in model.parameters())


@pytest.mark.parametrize("kind", CREATE)
def test_parameters_are_those_of_the_real_network(kind):
    """And weights in float32 take four bytes each."""
    count = sum(param.numel() for param in real_network(kind)[0].parameters())
    values = json.loads(TRAINED[kind].with_suffix(".json").read_text())
    known = config.defaults(*trained_flags.KINDS[kind])
    needs = training({name: v for name, v in values.items() if name in known}, kind)
    assert needs.parameters == {kind: count}
    assert needs.memory["weights"] == needs.memory["gradients"] == 4 * count
    if kind != "classifier":
        needs = sampling(kind)
        assert needs.parameters == {kind: count}
        assert needs.memory[f"weights, {kind}"] == 4 * count


# --------------------------------------------------------------------------------------------
# Laws of sampling


def test_operations_do_not_depend_on_the_batch_but_memory_does():
    """Operations are told for one image; activations grow with the images, weights do not."""
    one, four = sampling(batch_size=1), sampling(batch_size=4)
    assert one.flops == four.flops
    assert activations(four) == pytest.approx(4 * activations(one), rel=0.01)
    assert one.memory["weights, diffusion model"] == four.memory["weights, diffusion model"]


def test_operations_of_an_image_grow_with_the_steps_and_chains():
    """An image is as many calls as there are steps after respacing, and chains."""
    one_call = sum(sampling().flops.values())
    assert sampling().image_flops == 1000 * one_call
    assert sampling(timestep_respacing="50").image_flops == 50 * one_call
    assert sampling(timestep_respacing="ddim25", use_ddim=True).image_flops == 25 * one_call
    assert sampling(timestep_respacing="50", chains=2).image_flops == 100 * one_call


def test_guidance_adds_the_classifier():
    """Its weights, its way there and back in each step, and the peak of the larger network."""
    alone, guided = sampling(), sampling(guided=True)
    (call,) = alone.flops
    (way,) = guided.flops.keys() - alone.flops.keys()
    assert guided.flops[call] == alone.flops[call]
    assert guided.image_flops == 1000 * (alone.flops[call] + guided.flops[way])
    assert guided.parameters.keys() == {"diffusion model", "classifier"}
    assert activations(guided) > activations(alone)
    weights = 4 * guided.parameters["classifier"]
    assert total(guided) - total(alone) == weights + activations(guided) - activations(alone)


def test_without_a_scale_there_is_no_classifier():
    """--classifier_scale 0 samples without it, and so needs nothing of it."""
    args = sampling_args(guided=True, classifier_scale=0)
    assert estimate(args) == sampling()


@pytest.mark.parametrize("flag", ["use_fp16", "use_bf16"])
def test_half_precision_saves_memory_of_sampling(flag):
    """The activations shrink; weights do in float16 only, autocast keeps both."""
    full, half = sampling(batch_size=16), sampling(batch_size=16, **{flag: True})
    assert activations(half) < 0.85 * activations(full)
    assert half.flops == full.flops
    weights = "weights, diffusion model"
    assert (half.memory[weights] < full.memory[weights]) == (flag == "use_fp16")
    assert ("weights in bfloat16" in half.memory) == (flag == "use_bf16")


# --------------------------------------------------------------------------------------------
# Laws of training


@pytest.mark.parametrize("name", TRAINERS)
def test_training_needs_more_than_sampling(name):
    """Gradients, moments and averages: four times the weights, and one more for each average."""
    kind, values = TRAINERS[name]
    needs = training(values, kind, ema_rate="0.9,0.99")
    weights = needs.memory["weights"]
    assert weights == 4 * needs.parameters[kind]
    assert needs.memory["gradients"] == weights
    assert needs.memory["averages of weights"] == 2 * weights
    steps = total(needs) - activations(needs) - 6 * weights  # the optimizer's counts of steps
    assert 0 < steps < 0.01 * weights
    assert "averages of weights" not in training(values, kind, ema_rate="").memory


def test_a_training_image_is_a_way_there_and_back():
    """Backward costs twice the forward pass, but for the first layer, which has no gradient."""
    needs = training()
    assert 1.9 < needs.flops["backward"] / needs.flops["forward"] <= 2
    assert needs.image_flops == sum(needs.flops.values())


def test_checkpointing_saves_memory_and_costs_operations():
    """What is recomputed need not be kept; that is most of a forward pass."""
    plain, recomputed = training(batch_size=16), training(batch_size=16, use_checkpoint=True)
    assert activations(recomputed) < 0.6 * activations(plain)
    again = recomputed.flops["backward"] - plain.flops["backward"]
    assert 0.5 * plain.flops["forward"] < again < plain.flops["forward"]


def test_micro_batches_save_memory():
    """Activations are those of a micro-batch, though of all but the first while gradients wait."""
    whole, part = training(batch_size=256), training(batch_size=256, microbatch=4)
    assert part.flops == whole.flops
    assert activations(part) < 0.2 * activations(whole)
    small = training(batch_size=4)
    most = activations(small) + small.memory["gradients"]
    images = 3 * 8 * 256 * (1 + SMALL["image_size"] ** 2 * 3)  # with their noise, and timesteps
    assert activations(small) < activations(part) < most + images
    assert training(batch_size=4, microbatch=16) == small


def test_float16_training_keeps_float32_weights():
    """The network shrinks, and masters of all weights come, with moments and averages of them."""
    full, half = training(batch_size=64), training(batch_size=64, use_fp16=True)
    masters = 4 * half.parameters["diffusion model"]
    assert half.memory["float32 weights"] == half.memory["averages of weights"] == masters
    assert masters / 2 < half.memory["weights"] == half.memory["gradients"] < masters
    assert activations(half) < activations(full)


def test_bfloat16_training_keeps_its_weights():
    """Autocast narrows activations only."""
    full, half = training(batch_size=64), training(batch_size=64, use_bf16=True)
    assert activations(half) < 0.9 * activations(full)
    assert half.flops == full.flops
    assert {n: m for n, m in half.memory.items() if n != WORK} == {
        n: m for n, m in full.memory.items() if n != WORK
    }


def test_ranks_exchange_or_share(monkeypatch):
    """Replicas hold the gradients once more on their way; shards hold a part of everything."""
    alone = training()
    set_rank(monkeypatch, 0, 4)
    replica, shard = training(), training(shard_params=True)
    assert total(replica) - total(alone) == alone.memory["gradients"]
    assert activations(replica) == activations(alone)
    # At most the gradients do not wait for activations to go, which is not known of parts of them.
    more = activations(shard) - activations(alone)
    assert 0 < more <= alone.memory["gradients"]
    kept = total(alone) - activations(alone)
    assert total(shard) - activations(shard) == pytest.approx(kept / 4, abs=8)


def set_rank(monkeypatch, rank, size):
    """Set the environment that torchrun gives a rank."""
    variables = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


# --------------------------------------------------------------------------------------------
# What is printed


@pytest.mark.parametrize("name", TRAINERS)
def test_a_dry_run_of_training_tells_and_writes_nothing(name, tmp_path, monkeypatch):
    """No log folder, neither a given one nor that of the default; exit code 0."""
    kind, values = TRAINERS[name]
    data = make_images(tmp_path / "data", count=2)
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)
    values = values | {"data_dir": data, "batch_size": 4, "dry_run": True}
    done = succeed(name, values)
    logged = succeed(name, values, log_dir=tmp_path / "new")
    assert files_below(tmp_path) == before
    needs = training({n: v for n, v in values.items() if n not in ("data_dir", "dry_run")}, kind)
    assert f"{needs.parameters[kind]:,}" in done.out
    step = f"{4 * needs.image_flops / 1e9:,.3f} GFLOPs"
    assert re.search(rf"a step of --batch_size 4 +{step}", done.out)
    assert re.search(r"Expected memory at --batch_size 4 on (cpu|cuda|mps)\n", done.out)
    assert re.search(r"--batch_size 4 +# given\n", done.out)
    assert f"--log_dir {tmp_path}/new" in logged.out


def test_the_sum_is_told_as_it_was_made(capsys):
    """The line of an image names steps and calls, and every flag of the script has its line."""
    args = sampling_args(guided=True, timestep_respacing="50", batch_size=4)
    dry_run(args)
    out = capsys.readouterr().out
    first, second, image = (
        float(n)
        for n in re.search(r"an image, 50 x \((\S+) \+ (\S+)\) +(\S+) GFLOPs", out).groups()
    )
    assert image == pytest.approx(50 * (first + second), abs=0.06)
    assert re.search(r"--image_size 28 +# by --model_path\n", out)
    assert re.search(r"--classifier_depth 1 +# by --classifier_path\n", out)
    assert re.search(r"--timestep_respacing 50 +# given\n", out)
    shown = set(re.findall(r"^  --(\w+) ", out, re.MULTILINE))
    assert shown == vars(args).keys() - {"given", "notes"}


def test_notes_and_the_device_are_told_as_they_are(capsys):
    """The device need not be there: a laptop may tell what a GPU will need."""
    args = sampling_args(device="cuda:7")
    args.notes = ["model.pt has no flags file", "so they were guessed"]
    dry_run(args)
    out = capsys.readouterr().out
    assert "model.pt has no flags file\nso they were guessed\n" in out
    assert "Expected memory at --batch_size 4 on cuda:7\n" in out


def test_only_the_first_rank_prints(monkeypatch, capsys):
    """The launcher's environment tells the ranks apart: no process group is made."""
    set_rank(monkeypatch, 1, 2)
    dry_run(sampling_args())
    assert capsys.readouterr().out == ""
    set_rank(monkeypatch, 0, 2)
    dry_run(sampling_args())
    assert "in each of 2 processes" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


def test_what_cannot_run_is_told_by_a_dry_run(tmp_path):
    """An impossible respacing, or network, is a mistake before anything is printed."""
    data = make_images(tmp_path / "data", count=1)
    values = SMALL | {"data_dir": data, "dry_run": True}
    for wrong in ({"timestep_respacing": "50"}, {"num_channels": 48}):
        done = run_script("image_train", values | wrong)
        assert done.code == 1
        assert done.out == ""
        assert f"--{next(iter(wrong))} " in done.err


def test_the_largest_released_network_is_counted_without_its_memory():
    """Half a billion parameters, which nowhere exist; as many as the published file has."""
    released = json.loads((ROOT / "tests" / "reference" / "checkpoints.json").read_text())
    released = released["512x512_diffusion.pt"]
    flags = {n: v for n, v in released["flags"].items() if n in config.defaults(*DIFFUSION)}
    assert training(flags, batch_size=1).parameters == {"diffusion model": released["parameters"]}
