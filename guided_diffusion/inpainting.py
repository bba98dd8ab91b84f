"""Drawing parts of given images anew (RePaint, Lugmayr et al. 2022).

At each step the known part is noised afresh from the image, and the rest is what the network makes
of both. One pass alone lets the network only react to the known part, never correct it; so the
chain is cut into stretches, and each is walked several times: up again by noising all that is
there, and down again by the network, until the parts agree.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .base_samples import ImageSet, to_tensor
from .flag_checks import MASKS
from .gaussian_diffusion import GaussianDiffusion
from .image_decoding import read_image
from .npz_rows import open_rows
from .pictures import save_film
from .sample_files import SampleFiles
from .sample_labels import choose_classes
from .samplers import Sampler, make_sampler, shortened
from .sampling import Cond, Denoiser, Device, NoiseFn, Step, model_device, noise_like, run_chain
from .streams import INPAINT_CHAIN, INPAINT_NOISE

IMAGES, MASK = "--images", "--mask"
IN_PICTURE = 10  # images that are shown with their hole and what fills it
GREY = 127  # of the hole
# Half a grey level: bytes are cut off, not rounded (pictures.to_uint8), and shall come back equal.
HALF_LEVEL = 1 / 255

# --------------------------------------------------------------------------------------------
# The chain


def repaint_timesteps(num_steps: int, jump_length: int = 10, resamplings: int = 10) -> list[int]:
    """Return the timesteps at which the network is called, in order.

    The chain is cut into stretches of `jump_length` steps, from the clean end; the last one to be
    cut, the noisiest, may be shorter. Each is walked `resamplings` times, so there are
    num_steps * resamplings calls. Where a timestep is not below the one before it, the sample is
    noised up in between.

    Args:
        num_steps: of the process.
        jump_length: steps of a stretch.
        resamplings: how often each is walked; 1 for the plain chain.
    """
    assert min(num_steps, jump_length, resamplings) > 0, (num_steps, jump_length, resamplings)
    starts = range(0, num_steps, jump_length)  # of the stretches: their cleanest timesteps
    stretches = [range(start, min(start + jump_length, num_steps)) for start in starts]
    return [
        t for stretch in reversed(stretches) for _ in range(resamplings) for t in reversed(stretch)
    ]


def inpaint_step(
    process: GaussianDiffusion,
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    image: Tensor,
    mask: Tensor,
    following: int = -1,
    *,
    noise_fn: NoiseFn | None = None,
    **options: Any,
) -> Step:
    """Draw x_{t-1}: of the known part from q(x_{t-1} | x_0), of the rest by the network.

    If another timestep is to follow than t - 1, the sample is noised up to that.

    Args:
        process: the process; `p_sample` is its step.
        model: the network.
        x: x_t, [N, C, ...].
        t: integer timesteps [N], all the same.
        image: x_0 where it is known, [N, C, ...] in [-1, 1].
        mask: where to draw anew: bool, [N, C, ...] or broadcastable to it.
        following: the next timestep, -1 after the last.
        noise_fn: draws the noise; None for the global generator.
        options: those of `p_sample`.
    """
    noise = noise_like(x, noise_fn)
    # Both parts have their share of one draw, so a mask of all pixels changes nothing.
    out = process.p_sample(model, x, t, noise_fn=lambda _: noise, **options)
    known = process.lookup("alphas_cumprod_prev", t, x).sqrt() * image
    known = known + process.lookup("_one_minus_alphas_cumprod_prev", t, x).sqrt() * noise
    sample = torch.where(mask, out["sample"], known)
    if following >= 0 and following >= int(t[0]):
        sample = noise_up(process, sample, int(t[0]), following, noise_fn)
    return {"sample": sample, "pred_xstart": out["pred_xstart"]}


def noise_up(
    process: GaussianDiffusion,
    sample: Tensor,
    t: int,
    following: int,
    noise_fn: NoiseFn | None = None,
) -> Tensor:
    """Draw x_following from q(x_following | x_{t-1}) at once, however many steps lie between.

    Args:
        process: the process.
        sample: what the step at timestep t returned, x_{t-1}, [N, C, ...].
        t: that timestep; at 0 the sample is a clean image.
        following: the timestep to reach, at least t.
        noise_fn: draws the noise; None for the global generator.
    """
    kept = float(process.alphas_cumprod[following] / process.alphas_cumprod_prev[t])
    return math.sqrt(kept) * sample + math.sqrt(1.0 - kept) * noise_like(sample, noise_fn)


def inpaint_loop_progressive(
    process: GaussianDiffusion,
    model: Denoiser,
    image: Tensor,
    mask: Tensor,
    *,
    jump_length: int = 10,
    resamplings: int = 10,
    noise: Tensor | None = None,
    device: Device = None,
    progress: bool = False,
    noise_fn: NoiseFn | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Yield every step of drawing parts of images anew, as the loops of the process do.

    A sample is what the next step starts from: after a stretch that is walked again, the noised-up
    one. Of the last, the known part is that of `image`.

    Args:
        process: the diffusion process; of a respaced one `jump_length` counts the steps kept.
        model: the network.
        image: the known images, [N, C, ...] in [-1, 1].
        mask: where to draw anew: bool, [N, C, ...] or broadcastable to it.
        jump_length: steps of a stretch; see `repaint_timesteps`.
        resamplings: how often each is walked.
        noise: where the chain starts; drawn if None.
        device: where to sample; None for where the network's parameters are.
        progress: show a tqdm bar.
        noise_fn: draws all noise, one block a step and one more where it is noised up; None for
            the global generator.
        options: clip_denoised, denoised_fn, cond_fn and model_kwargs of `p_sample`.
    """
    device = model_device(model, noise) if device is None else device
    image, mask = image.to(device), mask.to(device)
    timesteps = repaint_timesteps(process.num_timesteps, jump_length, resamplings)
    followings = iter([*timesteps[1:], -1])

    def step(x: Tensor, t: Tensor) -> Step:
        """Take a step, and go up again if a higher timestep follows."""
        given = (image, mask, next(followings))
        return inpaint_step(process, model, x, t, *given, noise_fn=noise_fn, **options)

    shape = tuple(image.shape)
    return run_chain(step, model, shape, timesteps, noise, device, progress, noise_fn)


def make_inpainter(
    args: argparse.Namespace, model: Denoiser, diffusion: GaussianDiffusion, **steering: Any
) -> Sampler:
    """Make the sampler that inpaints; to be told "image" and "mask" among what is given.

    Args:
        args: as for `samplers.make_sampler`, with jump_length and resamplings.
        model: the network.
        diffusion: the process, respaced by --timestep_respacing.
        steering: cond_fn, guide and device, as for `samplers.make_sampler`.

    Raises:
        ValueError: if the process has not as many steps as are wanted.
    """
    process = shortened(args, diffusion)
    walk = {"jump_length": args.jump_length, "resamplings": args.resamplings}
    num_calls = len(repaint_timesteps(process.num_timesteps, **walk))

    def loop(
        network: Denoiser, _shape: Sequence[int], *, model_kwargs: Cond, **options: Any
    ) -> Iterator[Step]:
        """Yield the steps of a batch; the last one gives back what was known, bit by bit."""
        cond = dict(model_kwargs)
        image, mask = cond.pop("image"), cond.pop("mask")
        chain = inpaint_loop_progressive(
            process, network, image, mask, model_kwargs=cond, **walk, **options
        )
        for number, out in enumerate(chain, 1):
            if number == num_calls:
                known = (image + HALF_LEVEL).to(out["sample"])
                out["sample"] = torch.where(mask, out["sample"], known)
            yield out

    return make_sampler(args, model, diffusion, loop=(loop, num_calls), **steering)


# --------------------------------------------------------------------------------------------
# What is given


class Inpainted:
    """The images of --images and what --mask covers; sample i is of image i mod their number.

    Args:
        args: gives images, mask, image_size, in_channels, class_cond, num_classes, model_path,
            classes, class_balanced, labels_file, classifier_path and classifier_scale.

    Attributes:
        mask: what is drawn anew, bool [H, W].
        labels: the classes that the flags ask for, or else those of the images, int64 [M]; None
            if there are none.

    Raises:
        ValueError: if the images or the mask do not fit, or labels are needed and there are none.
    """

    purposes = INPAINT_NOISE, INPAINT_CHAIN

    def __init__(self, args: argparse.Namespace):
        shape = (args.image_size, args.image_size, args.in_channels)
        self.images = ImageSet(
            args.images, shape, args, flag=IMAGES, taker="the model",
            remedy="use a model of their size", keep_colour=True,
        )  # fmt: skip
        self.mask = read_mask(args.mask, shape[:2])
        chosen = choose_classes(args)
        if chosen is None and (args.class_cond or args.classifier_scale):
            wanted_by = "--class_cond" if args.class_cond else "--classifier_scale"
            self.images.require_labels(wanted_by, "; or give --classes")
        self.labels = self.images.labels if chosen is None else chosen

    def cond(self, indices: range, seed: int) -> dict[str, Tensor]:
        """Return "image" [N, C, H, W] in [-1, 1] and "mask", bool [1, 1, H, W]."""
        image = to_tensor(self.images.take(indices))
        return {"image": image, "mask": torch.from_numpy(self.mask)[None, None]}

    def digests(self) -> dict[str, str]:
        """Return hashes of the images and of the pixels that the mask covers."""
        mask = hashlib.sha256(self.mask.tobytes()).hexdigest()
        return {"images": self.images.digest(), "mask": mask}


def read_mask(name: str, size: tuple[int, int]) -> np.ndarray:
    """Return what a mask covers, bool [H, W].

    Args:
        name: a key of MASKS, or the path of a picture that is white (above 127) there.
        size: (height, width) of the images.

    Raises:
        ValueError: if it covers nothing, is of another size or cannot be read.
    """
    if name in MASKS:
        top, bottom, left, right = MASKS[name]
        y, x = (np.arange(count) / count for count in size)
        mask = np.outer((y >= top) & (y < bottom), (x >= left) & (x < right))
    else:
        picture = read_image(name, "L", MASK)
        if picture.size[::-1] != size:
            raise ValueError(
                f"{MASK} {name} is {picture.height} x {picture.width}, the images are {size[0]} x "
                f"{size[1]}: give a mask of their size, or one of {', '.join(MASKS)}"
            )
        mask = np.array(picture) > 127
    if not mask.any():
        raise ValueError(f"{MASK} {name} covers nothing: make white what is to be drawn anew")
    return mask


def show_inpainted(files: SampleFiles, given: Inpainted) -> None:
    """Save a PNG of three rows: the first images, their holes in grey, what was made of them.

    Args:
        files: of the samples, which are all there. Only rank 0 writes.
        given: what they were made from.
    """
    if dist_util.is_main():
        samples = np.asarray(open_rows(files.npz)[:IN_PICTURE])
        images = given.images.take(range(len(samples)))
        holes = np.where(given.mask[None, :, :, None], np.uint8(GREY), images)
        rows = np.stack([images, holes, samples])[None]  # [1, 3, N, H, W, C]
        save_film(rows, None, f"{files.stem}_inpainted.png")
