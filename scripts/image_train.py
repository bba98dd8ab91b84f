"""Train a diffusion model on a folder of images."""

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
        config.KeepConfig,
        config.TrainConfig,
        *config.DIFFUSION_GROUPS,
        argv=argv,
    )
    args = trained_flags.resume(args)
    if args.dry_run:
        from guided_diffusion.estimates import dry_run

        return dry_run(args)

    from guided_diffusion.script_util import (
        args_to_dict,
        create_model_and_diffusion,
        model_and_diffusion_defaults,
    )
    from guided_diffusion.training import train_diffusion, training_session

    with training_session(args):
        flags = args_to_dict(args, model_and_diffusion_defaults())
        model, diffusion = create_model_and_diffusion(**flags)
        train_diffusion(args, model, diffusion, flags, args.image_size)


if __name__ == "__main__":
    config.run(main)
