"""Encode images as latents by the DDIM ODE, decode them again, and report the error."""

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, load the model, send the images there and back, and write all."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.DataConfig,
        config.LoadConfig,
        config.BatchConfig,
        *config.DIFFUSION_GROUPS,
        argv=argv,
        overrides={"num_samples": 100, "batch_size": 16, "clip_denoised": False},
    )
    args = trained_flags.complete(args)
    if args.dry_run:
        from guided_diffusion.estimates import dry_run

        return dry_run(args, chains=2)

    from guided_diffusion import dist_util, given_images, logger
    from guided_diffusion import sample_util as su

    with dist_util.process_group(args.device, args.dist_timeout), logger.session(args.log_dir):
        model, diffusion = su.load_model_and_diffusion(args)
        data = given_images.load_images(args)
        found = given_images.invert_images(args, model, diffusion, data)
        given_images.write_inversions(found, diffusion.num_timesteps)


if __name__ == "__main__":
    config.run(main)
