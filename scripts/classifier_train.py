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
        config.KeepConfig,
        config.ClassifierTrainConfig,
        *config.CLASSIFIER_GROUPS,
        argv=argv,
        overrides={"lr": 3e-4, "batch_size": 4, "random_crop": True, "ema_rate": ""},
    )
    args = trained_flags.resume(args, "classifier")
    if args.dry_run:
        from guided_diffusion.estimates import dry_run

        return dry_run(args, "classifier")

    from guided_diffusion.losses import classifier_losses
    from guided_diffusion.script_util import (
        args_to_dict,
        classifier_and_diffusion_defaults,
        create_classifier_and_diffusion,
    )
    from guided_diffusion.training import (
        classifier_options,
        train,
        training_data,
        training_session,
        validation_data,
    )

    with training_session(args):
        flags = args_to_dict(args, classifier_and_diffusion_defaults())
        classifier, diffusion = create_classifier_and_diffusion(**flags)
        data = training_data(args, args.image_size)
        options = classifier_options(args)
        if args.val_data_dir:
            options |= validation_data(args, data)
        losses = partial(classifier_losses, diffusion, args.noised)
        train(args, classifier, diffusion, data, flags, loss_fn=losses, **options)


if __name__ == "__main__":
    config.run(main)
