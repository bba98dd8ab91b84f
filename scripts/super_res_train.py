"""Train an upsampler on a folder of images, which it sees shrunk by area."""

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, build the model and the data, and run the loop."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.DataConfig,
        config.AugmentConfig,
        config.BatchConfig,
        config.OptimConfig,
        config.TrainConfig,
        *config.SUPER_RES_GROUPS,
        argv=argv,
    )
    args = trained_flags.resume(args, "upsampler")

    from guided_diffusion import dist_util, logger
    from guided_diffusion.image_datasets import add_low_res, drop_labels, load_data
    from guided_diffusion.script_util import (
        args_to_dict,
        sr_create_model_and_diffusion,
        sr_model_and_diffusion_defaults,
    )
    from guided_diffusion.train_util import seed_ranks, train

    with dist_util.process_group(args.device), logger.session(args.log_dir):
        seed_ranks(args.seed)
        flags = args_to_dict(args, sr_model_and_diffusion_defaults())
        model, diffusion = sr_create_model_and_diffusion(**flags)
        data = load_data(
            data_dir=args.data_dir,
            batch_size=args.batch_size,
            image_size=args.large_size,
            class_cond=args.class_cond,
            in_channels=args.in_channels,
            num_classes=args.num_classes,
            random_flip=args.random_flip,
            random_crop=args.random_crop,
            report=logger.log,
        )
        data = drop_labels(data, args.label_dropout, args.num_classes)
        train(args, model, diffusion, add_low_res(data, args.small_size), flags)


if __name__ == "__main__":
    config.run(main)
