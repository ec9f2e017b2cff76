"""The ladder as a table: what each rung builds, what it learns, and its defaults."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import set_seed
from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline, UNet2DModel

from .checkup import after_training, before_training, tell
from .errors import UsageError
from .models.modeling_stacked_dae import StackedDenoisingAutoencoder
from .models.modeling_vae import VariationalAutoencoder
from .pipelines.pipeline_latent_diffusion import LatentDiffusionPipeline
from .pipelines.pipeline_stacked_dae import StackedDAEPipeline
from .pipelines.pipeline_vae import VAEPipeline
from .schedulers.scheduling_edu_ddpm import EduDDPMScheduler
from .training.configuration import TrainingConfig
from .training.data import ImageData, load_data
from .training.dry_run import describe
from .training.launch import make_accelerator, on_main, one_first
from .training.objectives import DenoisingObjective, DiffusionObjective, Objective, VariationalObjective
from .training.trainer import train


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder.

    Args:
        title: its plain name.
        change: what is new against the rung before, a sentence.
        build: makes the untrained pipeline.
        objective: makes the objective that trains it.
        limit: what it is not good for, a sentence.
        defaults: of the configuration, where they differ from `TrainingConfig`'s.
        num_inference_steps: for sampling; None where it has no meaning.
    """

    title: str
    change: str
    build: Callable[[TrainingConfig, ImageData], DiffusionPipeline]
    objective: Callable[[Any, TrainingConfig, ImageData], Objective]
    limit: str
    defaults: dict[str, Any] = field(default_factory=dict)
    num_inference_steps: int | None = None


def build_stack(config: TrainingConfig, data: ImageData, **kwargs: Any) -> DiffusionPipeline:
    model = StackedDenoisingAutoencoder(in_channels=data.channels, sample_size=data.resolution, **kwargs)
    return StackedDAEPipeline(model)


def build_vae(config: TrainingConfig, data: ImageData) -> DiffusionPipeline:
    vae = VariationalAutoencoder(
        in_channels=data.channels, out_channels=data.channels, sample_size=data.resolution, posterior=config.posterior
    )
    return VAEPipeline(vae)


def build_unet(
    config: TrainingConfig, channels: int, size: int, widths: tuple[int, ...], num_class_embeds: int | None = None
) -> UNet2DModel:
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=2 * channels if config.learns_variance else channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=8,
        add_attention=False,
        dropout=config.dropout,
        num_class_embeds=num_class_embeds,
    )


def build_scheduler(config: TrainingConfig, clip_sample: bool) -> EduDDPMScheduler:
    return EduDDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        clip_sample=clip_sample,
    )


def build_ddpm(config: TrainingConfig, data: ImageData) -> DiffusionPipeline:
    # Halve while the size is even and more than 4; the widths double once, then stay.
    widths, size = [32], data.resolution
    while size % 2 == 0 and size > 4:
        widths, size = [*widths, 64], size // 2
    return DDPMPipeline(
        build_unet(config, data.channels, data.resolution, tuple(widths)), build_scheduler(config, clip_sample=True)
    )


def build_latent_diffusion(config: TrainingConfig, data: ImageData) -> DiffusionPipeline:
    vae = load_vae(config.vae_path)
    if vae.config.in_channels != data.channels:
        raise UsageError(
            f"the vae of {config.vae_path} takes {vae.config.in_channels} channels, the images have {data.channels}"
        )
    downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
    if data.resolution % downsampling:
        raise UsageError(f"--resolution {data.resolution}: the vae of {config.vae_path} takes multiples of {downsampling}")
    num_classes = None
    if config.class_conditional:
        if not data.class_names:
            raise UsageError("--class_conditional: the data has no class labels")
        num_classes = len(data.class_names) + 1
    size = data.resolution // downsampling
    # The second width works at half the size, which must be whole, and more than one place: a convolution there would see padding.
    widths = (64, 64) if size % 2 == 0 and size > 2 else (64,)
    unet = build_unet(config, vae.config.latent_channels, size, widths, num_classes)
    return LatentDiffusionPipeline(vae, unet, build_scheduler(config, clip_sample=False))


def load_vae(path: str | None) -> Any:
    """The VAE of a saved pipeline, or one saved alone.

    Raises:
        UsageError: there is none.
    """
    try:
        in_pipeline = (Path(str(path)) / "model_index.json").exists()
        vae = AutoModel.from_pretrained(path, **({"subfolder": "vae"} if in_pipeline else {}))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--vae_path {path}: there is no VAE that can be loaded") from error
    if not (hasattr(vae, "encode") and hasattr(vae, "decode") and {"latent_channels", "scaling_factor"} <= set(vae.config)):
        raise UsageError(f"--vae_path {path}: {type(vae).__name__} has not the interface of AutoencoderKL")
    return vae


RUNGS: dict[str, Rung] = {
    "dae": Rung(
        title="Denoising autoencoder",
        change="One encoder-decoder is asked to remove all the noise at once.",
        build=lambda config, data: build_stack(config, data, num_stages=1, fresh_noise=False),
        objective=lambda pipeline, config, data: DenoisingObjective(pipeline.model),
        limit="It makes one image, the mean of its data, whatever the noise: a step of a lesson, no generator.",
        defaults=dict(max_train_steps=250, train_batch_size=64, learning_rate=2e-3),
        num_inference_steps=1,
    ),
    "stacked_dae": Rung(
        title="Stacked denoising autoencoders",
        change="The work is split over ten encoder-decoders, one for each level of noise; each is trained on what the one before it "
        "returned, and an image is handed down from stage to stage.",
        build=lambda config, data: build_stack(config, data, num_stages=config.num_stages, fresh_noise=False),
        objective=lambda pipeline, config, data: DenoisingObjective(pipeline.model),
        limit="Its samples are all alike, as the first stage takes all the randomness away: a step of a lesson, no generator.",
        defaults=dict(max_train_steps=150, train_batch_size=64, learning_rate=2e-3),
        num_inference_steps=10,
    ),
    "noisy_stacked_dae": Rung(
        title="Stacked denoising autoencoders with fresh noise",
        change="Fresh noise enters before every stage, in training and in sampling.",
        build=lambda config, data: build_stack(config, data, num_stages=config.num_stages, fresh_noise=True),
        objective=lambda pipeline, config, data: DenoisingObjective(pipeline.model),
        limit="Its samples are blurred: each stage returns an average over the images that its input allows.",
        defaults=dict(max_train_steps=650, train_batch_size=64, learning_rate=4e-3),
        num_inference_steps=10,
    ),
    "vae": Rung(
        title="Variational autoencoder",
        change="The code itself is random, and known: a KL term pulls it to N(0, I), so that codes can be drawn without an image. (Its "
        "weight here is a fifth of the evidence lower bound's: sharper images, more holes in the prior.)",
        build=build_vae,
        objective=lambda pipeline, config, data: VariationalObjective(pipeline.vae, config.kl_weight),
        limit="Its samples are blurred, and codes from N(0, I) that fall into holes of the prior decode to no image of the data.",
        # Less than the bound's weight of 1: sharper images, more holes; the latent rung fills the holes.
        defaults=dict(max_train_steps=700, train_batch_size=64, learning_rate=2e-3, ema_max_decay=0.99, kl_weight=0.2),
    ),
    "ddpm": Rung(
        title="Denoising diffusion",
        change="One network, told the timestep, serves all noise levels; mean and variance are scaled until x_T is isotropic "
        "Gaussian, and every reverse step is a term of the evidence lower bound.",
        build=build_ddpm,
        objective=lambda pipeline, config, data: DiffusionObjective(
            pipeline.unet, pipeline.scheduler, snr_gamma=config.snr_gamma, bin_width=2 / data.max_value
        ),
        limit="It takes no labels and no prompts, and one call of its network for every step: slow, next to a model of one step.",
        defaults=dict(max_train_steps=1400, train_batch_size=64, learning_rate=4e-3, adam_beta2=0.95),
        num_inference_steps=50,
    ),
    "latent_diffusion": Rung(
        title="Latent diffusion",
        change="The same diffusion, of the codes of the variational autoencoder: it replaces the prior, and keeps the decoder.",
        build=build_latent_diffusion,
        objective=lambda pipeline, config, data: DiffusionObjective(
            pipeline.unet,
            pipeline.scheduler,
            pipeline.vae,
            dropout=config.conditioning_dropout_prob,
            snr_gamma=config.snr_gamma,
        ),
        limit="Its decoder sets the limit: detail that the autoencoder loses, no sampling brings back.",
        defaults=dict(max_train_steps=900, train_batch_size=128, learning_rate=4e-3, kl_weight=0.2),
        num_inference_steps=50,
    ),
}


def configuration(rung: str, **changes: Any) -> TrainingConfig:
    """The configuration of a rung: its defaults, and the changes to them.

    Raises:
        UsageError: an unknown rung, or a value out of its range.
    """
    if rung not in RUNGS:
        raise UsageError(f"--rung {rung}: choose from {', '.join(RUNGS)}")
    config = TrainingConfig(rung=rung, **{**RUNGS[rung].defaults, **changes})
    for name in ("vae_path", "train_data_dir"):
        path = getattr(config, name)
        if path is not None and Path(path).exists():
            setattr(config, name, str(Path(path).resolve()))  # the same folder, wherever the command is given
    config.validate()
    return config


def train_rung(config: TrainingConfig) -> Any:
    """Train a rung and save its pipeline in `config.output_dir`; return the pipeline. With `dry_run`, print what that would need.

    `latent_diffusion` without a `vae_path` trains its VAE first, for as many steps, in the folder `vae_rung` of its own; one that
    is there already is used.
    """
    config.check_folder()
    build_config = config
    own_vae = config.rung == "latent_diffusion" and config.vae_path is None
    if own_vae and not config.dry_run:
        build_config = replace(config, vae_path=train_own_vae(config))

    rung = RUNGS[config.rung]
    accelerator = make_accelerator(config)
    # One process of a machine decodes and fills the caches, the others read them.
    data, held_out = one_first(accelerator, lambda: load_data(config))
    set_seed(config.seed)
    try:
        with TemporaryDirectory() as folder:
            if own_vae and config.dry_run:  # an untrained one is as large
                RUNGS["vae"].build(config, data).save_pretrained(folder)
                build_config = replace(config, vae_path=folder)
            pipeline = rung.build(build_config, data)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--resolution {data.resolution}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    objective = rung.objective(pipeline, config, data)
    if config.dry_run:
        accelerator.print(describe(objective, data, config, accelerator))
        return pipeline
    steps = None if rung.num_inference_steps is None else min(rung.num_inference_steps, config.num_train_timesteps)
    objective.to(accelerator.device)
    known = on_main(accelerator, lambda: before_training(pipeline, config, data))
    if accelerator.is_main_process:
        tell(known)
    train(pipeline, objective, data, held_out, config, accelerator, {} if steps is None else {"num_inference_steps": steps})
    found = on_main(accelerator, lambda: after_training(pipeline, held_out, num_inference_steps=steps))
    names = {diagnosis.name for diagnosis in known}
    if accelerator.is_main_process:
        tell(diagnosis for diagnosis in found if diagnosis.name not in names)
    return pipeline


def train_own_vae(config: TrainingConfig) -> str:
    """Train the VAE of a latent rung, unless that has been done; return its folder."""
    shared = (
        *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "resolution", "posterior", "kl_weight"),
        *("center_crop", "random_flip", "on_bad_image", "streaming", "shuffle_buffer"),
        *("seed", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "mixed_precision"),
        *("dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit", "logging_steps"),
        *("validation_steps", "validation_samples"),
    )
    chosen = {name: getattr(config, name) for name in shared}
    resume = "latest" if config.resume_from_checkpoint else None
    folder = str(Path(config.output_dir) / "vae_rung")
    vae_config = configuration("vae", output_dir=folder, resume_from_checkpoint=resume, **chosen)
    vae_config.check_folder()
    if os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE")):
        raise UsageError("--vae_path is missing: on several machines, train --rung vae first, and give each machine its folder")
    if not (Path(folder) / "model_index.json").exists():
        train_rung(vae_config)
    return folder
