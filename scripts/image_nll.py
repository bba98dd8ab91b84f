"""Score images by the variational bound on their bits per dimension."""

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, load the model, score the images and write the terms."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.DataConfig,
        config.LoadConfig,
        config.BatchConfig,
        *config.DIFFUSION_GROUPS,
        argv=argv,
        overrides={"num_samples": 1000},
    )
    args = trained_flags.complete(args)

    if args.dry_run:
        from guided_diffusion.estimates import dry_run

        return dry_run(args)

    from guided_diffusion import dist_util, given_images, logger
    from guided_diffusion import sample_util as su

    with dist_util.process_group(args.device, args.dist_timeout), logger.session(args.log_dir):
        model, diffusion = su.load_model_and_diffusion(args)
        data = given_images.load_images(args)
        seed = su.choose_seed(args.seed)
        scores = given_images.score_images(args, model, diffusion, data, seed)
        given_images.write_scores(scores)


if __name__ == "__main__":
    config.run(main)
