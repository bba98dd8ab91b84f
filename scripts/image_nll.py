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

    from guided_diffusion import dist_util, logger
    from guided_diffusion import sample_util as su
    from guided_diffusion.image_datasets import load_data
    from guided_diffusion.script_util import choose_seed

    with dist_util.process_group(args.device, args.dist_timeout), logger.session(args.log_dir):
        model, diffusion = su.load_model_and_diffusion(args)
        data = load_data(
            data_dir=args.data_dir,
            batch_size=args.batch_size,
            image_size=args.image_size,
            class_cond=args.class_cond,
            in_channels=args.in_channels,
            num_classes=args.num_classes,
            labels=args.labels,
            num_workers=None if args.num_workers == -1 else args.num_workers,
            skip_bad_images=args.skip_bad_images,
            once=True,
            report=logger.log,
        )
        seed = choose_seed(args.seed)
        su.write_scores(su.score_images(args, model, diffusion, data, seed))


if __name__ == "__main__":
    config.run(main)
