"""Train an upsampler on a folder of images, which it sees shrunk by area."""

from functools import partial

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
        *config.SUPER_RES_GROUPS,
        argv=argv,
    )
    args = trained_flags.resume(args, "upsampler")
    if args.dry_run:
        from guided_diffusion.estimates import dry_run

        return dry_run(args, "upsampler")

    from guided_diffusion.image_datasets import add_low_res
    from guided_diffusion.script_util import (
        args_to_dict,
        sr_create_model_and_diffusion,
        sr_model_and_diffusion_defaults,
    )
    from guided_diffusion.training import train_diffusion, training_session

    with training_session(args):
        flags = args_to_dict(args, sr_model_and_diffusion_defaults())
        model, diffusion = sr_create_model_and_diffusion(**flags)
        shrink = partial(add_low_res, small_size=args.small_size)
        train_diffusion(args, model, diffusion, flags, args.large_size, prepare=shrink)


if __name__ == "__main__":
    config.run(main)
