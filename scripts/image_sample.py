"""Draw images from a diffusion model into an npz file and a PNG grid."""

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, load the model, draw the images and write them."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.LoadConfig,
        config.BatchConfig,
        config.SampleConfig,
        config.LabelConfig,
        *config.DIFFUSION_GROUPS,
        argv=argv,
        overrides={"batch_size": 16},
    )
    args = trained_flags.complete(args)
    if args.dry_run:
        from guided_diffusion.estimates import dry_run

        return dry_run(args)

    from guided_diffusion import sample_util as su

    with su.sampling(args, args.image_size) as (files, labels):
        model, diffusion = su.load_model_and_diffusion(args)
        su.draw_samples(args, model, diffusion, files, labels)


if __name__ == "__main__":
    config.run(main)
