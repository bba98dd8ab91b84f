"""Upsample small images, of an npz, a folder or a zip, into an npz file and a PNG grid."""

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, load the upsampler and its inputs, draw the images and write them."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.LoadConfig,
        config.BaseSamplesConfig,
        config.BatchConfig,
        config.SampleConfig,
        config.StepsConfig,
        config.SteeringConfig,
        *config.SUPER_RES_GROUPS,
        argv=argv,
        overrides={"batch_size": 16},
    )
    args = trained_flags.complete(args, "upsampler")

    from guided_diffusion import estimates
    from guided_diffusion import sample_util as su
    from guided_diffusion.base_samples import BaseSamples

    base = BaseSamples(args)
    if args.dry_run:
        return estimates.dry_run(args, "upsampler")

    with su.sampling(args, args.large_size, base) as (files, labels):
        model, diffusion = su.load_model_and_diffusion(args, "upsampler")
        sampler = su.choose_sampler(args, model, diffusion)
        su.draw_samples(args, sampler, files, labels, base=base)


if __name__ == "__main__":
    config.run(main)
