"""Upsample the images of an npz file into a larger npz file and a PNG grid."""

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
        *config.SUPER_RES_GROUPS,
        argv=argv,
        overrides={"batch_size": 16},
    )
    args = trained_flags.complete(args, "upsampler")

    from guided_diffusion import dist_util, logger
    from guided_diffusion import sample_util as su
    from guided_diffusion.script_util import choose_seed

    with dist_util.process_group(args.device, args.dist_timeout), logger.session(args.log_dir):
        base = su.BaseSamples(args)
        model, diffusion = su.load_model_and_diffusion(args, "upsampler")
        seed = choose_seed(args.seed)
        images = su.draw_samples(
            args,
            model,
            diffusion,
            size=args.large_size,
            seed=seed,
            labels=base.labels,
            cond_of=base.low_res,
        )
        su.write_samples(images, base.labels, su.class_names(args.model_path))


if __name__ == "__main__":
    config.run(main)
