"""Draw images from a diffusion model, guided by a classifier, into an npz file and a PNG grid."""

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, load model and classifier, draw the images and write them."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.LoadConfig,
        config.BatchConfig,
        config.SampleConfig,
        config.LabelConfig,
        config.GuidanceConfig,
        *config.DIFFUSION_GROUPS,
        config.ClassifierConfig,
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
        cond_fn = su.load_guidance(args)
        su.draw_samples(args, model, diffusion, files, labels, cond_fn=cond_fn)


if __name__ == "__main__":
    config.run(main)
