"""Train a classifier of noised images, which can guide sampling."""

from functools import partial

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, build the classifier and the data, and run the loop."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.DataConfig,
        config.AugmentConfig,
        config.BatchConfig,
        config.OptimConfig,
        config.ClassifierTrainConfig,
        *config.CLASSIFIER_GROUPS,
        argv=argv,
        overrides={"lr": 3e-4, "batch_size": 4, "random_crop": True},
    )
    args = trained_flags.resume(args, "classifier")

    from guided_diffusion import dist_util, logger
    from guided_diffusion.image_datasets import load_data
    from guided_diffusion.losses import classifier_losses
    from guided_diffusion.script_util import (
        args_to_dict,
        classifier_and_diffusion_defaults,
        create_classifier_and_diffusion,
    )
    from guided_diffusion.train_util import seed_ranks, train

    with dist_util.process_group(args.device), logger.session(args.log_dir):
        seed_ranks(args.seed)
        flags = args_to_dict(args, classifier_and_diffusion_defaults())
        classifier, diffusion = create_classifier_and_diffusion(**flags)
        load = partial(
            load_data,
            batch_size=args.batch_size,
            image_size=args.image_size,
            class_cond=True,
            in_channels=args.in_channels,
            num_classes=args.num_classes,
            random_flip=args.random_flip,
            random_crop=args.random_crop,
            report=logger.log,
        )
        data = load(data_dir=args.data_dir)
        val_data = None
        if args.val_data_dir:
            val = {"data_dir": args.val_data_dir, "classes_from": args.data_dir}
            val_data = load(**val, flag="--val_data_dir", random_crop=False)
        losses = partial(classifier_losses, diffusion, args.noised)
        train(args, classifier, diffusion, data, flags, loss_fn=losses, val_data=val_data)


if __name__ == "__main__":
    config.run(main)
