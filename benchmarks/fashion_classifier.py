"""The judge of Fashion-MNIST samples: a small CNN trained on the real images.

    python datasets/fashion_mnist.py data/fashion_mnist
    python benchmarks/fashion_classifier.py --out runs/judge.pt
    python benchmarks/fashion_classifier.py --judge runs/judge.pt --score samples_1000x28x28x1.npz

The second command trains a judge, writes it to --out and prints its
accuracy on the real test images; it is deterministic under a seed. The third loads the judge in
--judge and prints, for samples with their requested labels, two numbers: how often the judge sees
the requested label, and how diverse the samples of one label are, where real test images are 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from guided_diffusion.image_datasets import class_numbers, find_images, read_image

NUM_CLASSES = 10
JUDGE = Path("runs/judge.pt")  # where a judge is written and looked for unless told otherwise
PIXEL_MEAN, PIXEL_STD = 0.286, 0.353  # of the training images in [0, 1]


class Judge(nn.Module):
    """A convolutional classifier of grey 28 x 28 images, 290,000 parameters."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            conv(1, 32),
            conv(32, 32),
            nn.MaxPool2d(2),
            conv(32, 64),
            conv(64, 64),
            nn.MaxPool2d(2),
            conv(64, 128),
            nn.MaxPool2d(2),
            nn.Flatten(),  # [N, 128 * 3 * 3]
            nn.Dropout(0.3),
            nn.Linear(128 * 3 * 3, 128),
            nn.ReLU(),
        )
        self.out = nn.Linear(128, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, 28, 28] in [0, 1] to logits [N, 10]."""
        return self.out(self.features((x - PIXEL_MEAN) / PIXEL_STD))


def conv(channels_in: int, channels_out: int) -> nn.Module:
    """Return a 3 x 3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def load_judge(path: str | os.PathLike) -> Judge:
    """Load a trained judge, in evaluation mode.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"no judge in {str(path)!r}: train it by fashion_classifier.py --out {path}"
        )
    judge = Judge()
    try:
        judge.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged files fail in pickle, zipfile or torch
        reason = str(error).splitlines()[0]
        raise ValueError(f"{str(path)!r} holds no judge ({reason}): train it anew") from error
    return judge.eval()


def to_batches(images: np.ndarray, batch_size: int = 500) -> Iterator[Tensor]:
    """Yield uint8 images [N, 28, 28, 1] as float batches [n, 1, 28, 28] in [0, 1]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (28, 28, 1):
        raise ValueError(
            f"the judge reads uint8 images [N, 28, 28, 1], got {images.dtype} {images.shape}"
        )
    for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size):
        yield batch.float() / 255


@torch.no_grad()
def predict(judge: Judge, images: np.ndarray) -> np.ndarray:
    """Return the most likely label, int64 [N], of each uint8 image [N, 28, 28, 1]."""
    labels = [judge(batch).argmax(dim=1).numpy() for batch in to_batches(images)]
    return np.concatenate([np.zeros(0, np.int64), *labels])


@torch.no_grad()
def features(judge: Judge, images: np.ndarray) -> np.ndarray:
    """Return what the last layer sees, float64 [N, 128], of uint8 images [N, 28, 28, 1]."""
    x = [(batch - PIXEL_MEAN) / PIXEL_STD for batch in to_batches(images)]
    return torch.cat([judge.features(batch) for batch in x]).double().numpy()


def accuracy(judge: Judge, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images [N, 28, 28, 1] that the judge gives their label [N]."""
    return float((predict(judge, images) == labels).mean())


def mean_distance(points: np.ndarray) -> float:
    """Return the mean Euclidean distance over all pairs of different rows of [N, D], N > 1."""
    return torch.pdist(torch.from_numpy(points)).mean().item()


def diversity(
    judge: Judge,
    images: np.ndarray,
    labels: np.ndarray,
    real_images: np.ndarray,
    real_labels: np.ndarray,
) -> float:
    """Measure how different samples of the same label are; real images score 1.

    It is the mean over labels of the mean feature distance between two samples, divided by the
    same number for as many real images. A label with fewer than two samples does not count.

    Raises:
        ValueError: No label has two samples and two real images.
    """
    found, real = features(judge, images), features(judge, real_images)
    ours, theirs = [], []
    for label in range(NUM_CLASSES):
        points, real_points = found[labels == label], real[real_labels == label]
        if min(len(points), len(real_points)) > 1:
            ours.append(mean_distance(points))
            theirs.append(mean_distance(real_points[: len(points)]))
    if not ours:
        raise ValueError("diversity needs two samples of some label")
    return float(np.mean(ours) / np.mean(theirs))


def read_folder(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Read grey images uint8 [N, 28, 28, 1] and their labels int64 [N] from a folder of PNGs."""
    paths = find_images(folder)
    labels = np.array(class_numbers(paths, NUM_CLASSES))
    bar = tqdm(paths, desc=f"reading {folder}", unit="img", unit_scale=True)
    images = np.stack([np.array(read_image(path, "L")) for path in bar])
    return images[..., None], labels


def read_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read arr_0 [N, 28, 28, 1] and the labels arr_1 [N] of a file of samples.

    Raises:
        ValueError: The file is missing, broken or lacks one of the two.
    """
    try:
        with np.load(path, allow_pickle=False) as npz:
            return npz["arr_0"], npz["arr_1"]
    except Exception as error:  # OSError, KeyError, zipfile's and zlib's
        raise ValueError(
            f"--score {path!r} is no npz file with arr_0 (images) and arr_1 (labels): {error}"
        ) from error


def epochs(
    images: np.ndarray, labels: np.ndarray, batch_size: int, num_epochs: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled, randomly mirrored batches [n, 1, 28, 28] and labels [n]."""
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    for _ in range(num_epochs):
        for index in torch.randperm(len(x)).split(batch_size):
            batch = x[index].float() / 255
            mirror = torch.rand(len(index), 1, 1, 1) < 0.5
            yield torch.where(mirror, batch.flip(3), batch), y[index]


def train(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
    num_epochs: int = 8,
    batch_size: int = 256,
    lr: float = 4e-3,
) -> Judge:
    """Train a judge on images [N, 28, 28, 1] with labels [N], on the CPU; return it for use."""
    torch.manual_seed(seed)
    judge = Judge().train().to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    num_steps = num_epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=num_steps)
    bar = tqdm(total=num_epochs * len(images), desc="training", unit="img", unit_scale=True)
    for x, y in epochs(images, labels, batch_size, num_epochs):
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), y)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        schedule.step()
        bar.update(len(x))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    return judge.eval()


def save(judge: Judge, path: Path) -> None:
    """Write the weights; an interrupted write leaves no file under that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(path.name + ".tmp")
    torch.save(judge.state_dict(), temp)
    os.replace(temp, path)


def train_command(args: argparse.Namespace) -> None:
    """Train a judge, save it and print its accuracy on the real test images."""
    path = args.out or JUDGE
    test = read_folder(os.path.join(args.data_dir, "test"))
    judge = train(
        *read_folder(os.path.join(args.data_dir, "train")), seed=args.seed, num_epochs=args.epochs
    )
    save(judge, path)
    print(f"accuracy on {len(test[0]):,} real test images: {accuracy(judge, *test):.2%}")
    print(f"judge: {path.resolve()}")


def score_command(args: argparse.Namespace) -> None:
    """Print the agreement and the diversity of a file of labelled samples."""
    if args.out:
        raise ValueError(f"--out {args.out} is for training: --score loads the file --judge")
    judge = load_judge(args.judge)
    images, labels = read_samples(args.score)
    print(f"requested label seen in {accuracy(judge, images, labels):.1%} of {len(images)} samples")
    test = read_folder(os.path.join(args.data_dir, "test"))
    print(f"diversity {diversity(judge, images, labels, *test):.3f} (real test images: 1)")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help=f"file for the judge to train [{JUDGE}]")
    parser.add_argument("--judge", type=Path, default=JUDGE, help="file of the judge that scores")
    parser.add_argument(
        "--data_dir", default="data/fashion_mnist", help="folder that holds train/ and test/"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training run")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images")
    parser.add_argument("--score", metavar="NPZ", help="score these samples instead of training")
    args = parser.parse_args(argv)
    try:
        (score_command if args.score else train_command)(args)
    except (ValueError, OSError) as error:
        print(f"fashion_classifier.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
