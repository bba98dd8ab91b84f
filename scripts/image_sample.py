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
        config.StepsConfig,
        config.SteeringConfig,
        config.LabelConfig,
        *config.DIFFUSION_GROUPS,
        argv=argv,
        overrides={"batch_size": 16},
    )
    args = trained_flags.complete(args)

    from guided_diffusion import estimates
    from guided_diffusion import sample_util as su

    if args.dry_run:
        su.choose_classes(args)  # tells what is wrong with them
        return estimates.dry_run(args)

    with su.sampling(args, args.image_size) as (files, labels):
        model, diffusion = su.load_model_and_diffusion(args)
        su.draw_samples(args, su.choose_sampler(args, model, diffusion), files, labels)


if __name__ == "__main__":
    config.run(main)
