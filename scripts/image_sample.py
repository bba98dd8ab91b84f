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

    from guided_diffusion import dist_util, logger
    from guided_diffusion import sample_util as su
    from guided_diffusion.script_util import choose_seed

    with dist_util.process_group(args.device, args.dist_timeout), logger.session(args.log_dir):
        model, diffusion = su.load_model_and_diffusion(args)
        seed = choose_seed(args.seed)
        labels = su.choose_labels(args, seed) if args.class_cond else None
        images = su.draw_samples(
            args, model, diffusion, size=args.image_size, seed=seed, labels=labels
        )
        su.write_samples(images, labels, su.class_names(args.model_path))


if __name__ == "__main__":
    config.run(main)
