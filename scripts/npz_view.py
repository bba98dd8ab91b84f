"""Show images of an npz file as a grid in a PNG: npz_view.py FILE.npz [--start N].

Shows arr_0, uint8 [N, H, W] or [N, H, W, 1 or 3], under the labels arr_1 by the names in a
classes.txt beside it. Of a large file only the rows that are shown are read. Numbers with a
fraction are images if they lie in [-1, 1]; others, such as latents, are scaled to that.
"""

import os

from guided_diffusion import config


def main(argv=None):
    """Read the flags and the rows, and write the picture."""
    args = config.parse_flags(__doc__, config.ViewConfig, argv=argv, positional=("npz",))
    end = args.start + args.num_images
    out = args.out or f"{os.path.splitext(args.npz)[0]}_from{args.start}.png"
    if args.dry_run:
        shown = [f"--{name} {value}" for name, value in vars(args).items() if name != "given"]
        print("\n".join([*shown, "would write:", os.path.abspath(out)]))
        return

    from guided_diffusion import pictures

    images, note = pictures.read_images(args.npz, args.start, end)
    labels = pictures.read_labels(args.npz, args.start, end)
    columns = args.columns or pictures.columns_of_square(len(images))
    pictures.save_grid(images, labels, out, pictures.class_names(args.npz), len(images), columns)
    print(note)


if __name__ == "__main__":
    config.run(main)
