"""Diffusion in the latent space of an autoencoder, with or without class labels.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (https://arxiv.org/abs/2112.10752).
"""

import inspect
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


class LatentDiffusionPipeline(DiffusionPipeline):
    """Denoise latents from N(0, I) with a UNet, then decode them once.

    Args:
        vae: a `VariationalAutoencoder` or any autoencoder of that interface; `config.scaling_factor` maps its codes to unit
            variance.
        unet: a `UNet2DModel` over the latents. With class labels, its last class (`num_class_embeds - 1`) stands for
            "no class".
        scheduler: any scheduler of diffusers that steps from noise to data.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, vae: ModelMixin, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Draw `batch_size` images.

        Args:
            batch_size: how many.
            class_labels: the class of all, or of each, image; None draws from the unconditional model.
            guidance_scale: w of classifier-free guidance, eps = eps_uncond + w (eps_class - eps_uncond); 1.0 is none
                (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598).
            num_inference_steps: denoising steps.
            generator: the source of randomness; a list has one for each image.
            latents: the noise to start from, shape (batch_size, C, h, w).
            output_type: `pil`; `np`, floats (B, H, W, C) in [0, 1]; `pt`, a tensor (B, C, H, W) in [0, 1]; `latent`, the
                latents as denoised, undecoded.
            return_dict: whether to return an `ImagePipelineOutput` or the tuple (images,).
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})` after each step; a
                dictionary it returns replaces the latents.
            callback_on_step_end_tensor_inputs: the tensors that the callback sees; only `latents` there is.
        """
        self.check_inputs(callback_on_step_end_tensor_inputs)
        self._guidance_scale = guidance_scale
        device, dtype = self._execution_device, self.unet.dtype
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *([size, size] if isinstance(size, int) else size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this model takes {shape}")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma  # which may depend on the timesteps
        labels = self.prepare_labels(class_labels, batch_size, device)
        if class_labels is not None:
            none = torch.full_like(labels, self.unet.config.num_class_embeds - 1)

        extra = self.prepare_extra_step_kwargs(generator)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = self.scheduler.scale_model_input(latents, t)
            guided = class_labels is not None and self.guidance_scale != 1.0  # which a callback may have changed
            if guided:
                both = torch.cat([model_input] * 2)
                unconditional, conditional = self.unet(both, t, class_labels=torch.cat([none, labels])).sample.chunk(2)
                output = unconditional + self.guidance_scale * (conditional - unconditional)
                # A learned variance, in further channels, is no direction to go further in.
                output[:, latents.shape[1] :] = conditional[:, latents.shape[1] :]
            else:
                output = self.unet(model_input, t, class_labels=labels).sample
            latents = self.scheduler.step(output, t, latents, **extra).prev_sample
            if callback_on_step_end is not None:
                seen = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = (callback_on_step_end(self, i, t, seen) or {}).get("latents", latents)

        if output_type == "latent":
            images = latents
        else:
            codes = latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
            image = self.vae.decode(codes.to(self.vae.dtype)).sample
            images = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def guidance_scale(self) -> float:
        """w of the call in progress, or of the last one; a callback changes it by `pipeline._guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The steps of the call in progress, or of the last one."""
        return self._num_timesteps

    def check_inputs(self, callback_tensor_inputs: list[str]) -> None:
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can see {self._callback_tensor_inputs}, not {sorted(unknown)}")

    def prepare_labels(self, class_labels, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """Labels as int64 of shape (batch_size,); None where the unet takes none."""
        num_classes = self.unet.config.num_class_embeds
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but this unet was trained without them")
            return None
        null = num_classes - 1
        labels = torch.as_tensor(null if class_labels is None else class_labels, device=device).reshape(-1)
        if len(labels) not in (1, batch_size):
            raise ValueError(f"{len(labels)} class_labels for a batch of {batch_size}: give one, or one for each image")
        if bool(((labels < 0) | (labels > null)).any()):
            raise ValueError(f"class_labels must lie in 0 .. {null - 1} ({null} is the class that stands for none)")
        return labels.to(torch.int64).expand(batch_size)

    def prepare_extra_step_kwargs(self, generator) -> dict:
        """`generator` for the schedulers whose `step` draws noise; the others take none."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}
