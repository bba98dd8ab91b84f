"""Draw anew what a mask covers of given images, into an npz file and PNG grids."""

from guided_diffusion import config, trained_flags


def main(argv=None):
    """Read the flags, load the model and the images, draw what is covered and write all."""
    args = config.parse_flags(
        __doc__,
        config.RunConfig,
        config.LoadConfig,
        config.InpaintConfig,
        config.BatchConfig,
        config.SampleConfig,
        config.StepsConfig,
        config.SteeringConfig,
        config.LabelConfig,
        config.GuidanceConfig,
        *config.DIFFUSION_GROUPS,
        config.ClassifierConfig,
        argv=argv,
        overrides={"batch_size": 16, "num_samples": 16, "classifier_scale": 0.0},
    )
    args = trained_flags.complete(args)

    from guided_diffusion import estimates, inpainting
    from guided_diffusion import sample_util as su

    given = inpainting.Inpainted(args)
    if args.dry_run:
        return estimates.dry_run(args, chains=args.resamplings)

    with su.sampling(args, args.image_size, given) as (files, labels):
        model, diffusion = su.load_model_and_diffusion(args)
        sampler = su.choose_sampler(
            args, model, diffusion, su.load_guidance(args), inpainting.make_inpainter
        )
        su.draw_samples(args, sampler, files, labels, base=given)
        inpainting.show_inpainted(files, given)


if __name__ == "__main__":
    config.run(main)
