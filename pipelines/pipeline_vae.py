"""Images from the prior of a variational autoencoder: z ~ N(0, I), x = decode(z)."""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


class VAEPipeline(DiffusionPipeline):
    """Draw codes from N(0, I) and decode them, all in one step.

    Args:
        vae: a `VariationalAutoencoder`, or any autoencoder of that interface whose `config` has `latent_channels`,
            `sample_size` and `block_out_channels`, such as `AutoencoderKL`.
    """

    model_cpu_offload_seq = "vae"

    def __init__(self, vae: ModelMixin):
        super().__init__()
        self.register_modules(vae=vae)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw `batch_size` images.

        Args:
            batch_size: how many.
            generator: the source of randomness; a list has one for each image.
            latents: the codes z themselves, shape (batch_size, latent_channels, h, w), in place of draws from N(0, I).
            output_type: `pil`; `np`, floats (B, H, W, C) in [0, 1]; `pt`, a tensor (B, C, H, W) in [0, 1].
            return_dict: whether to return an `ImagePipelineOutput` or the tuple (images,).
        """
        config = self.vae.config
        size = config.sample_size // 2 ** (len(config.block_out_channels) - 1)
        shape = (batch_size, config.latent_channels, size, size)
        device, dtype = self._execution_device, self.vae.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {batch_size} codes of this vae have {shape}")

        image = self.vae.decode(latents.to(device, dtype)).sample
        images = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
