"""Images from pure noise by a stack of denoising autoencoders, the noisiest level first."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


class StackedDAEPipeline(DiffusionPipeline):
    """Start from sigma_K epsilon and hand the image from stage to stage.

    Where the model has `fresh_noise`, the estimate of each stage is corrupted anew to the next stage's level; otherwise it is
    handed on as it is. The last stage's estimate is the image.

    Args:
        model: a `StackedDenoisingAutoencoder`.
    """

    model_cpu_offload_seq = "model"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, model: ModelMixin):
        super().__init__()
        self.register_modules(model=model)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Draw `batch_size` images.

        Args:
            batch_size: how many.
            generator: the source of randomness; a list has one for each image.
            num_inference_steps: use this many of the stages, spread evenly, the noisiest always among them; None, or
                more than there are, uses all.
            output_type: `pil`; `np`, floats (B, H, W, C) in [0, 1]; `pt`, a tensor (B, C, H, W) in [0, 1].
            return_dict: whether to return an `ImagePipelineOutput` or the tuple (images,).
            callback_on_step_end: called as `callback(pipeline, step, level, {"latents": ...})` after each stage with what
                goes on to the next; a dictionary it returns replaces it.
            callback_on_step_end_tensor_inputs: the tensors that the callback sees; only `latents` there is.
        """
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can see {self._callback_tensor_inputs}, not {sorted(unknown)}")
        config = self.model.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        levels = self.levels(num_inference_steps)
        self._num_timesteps = len(levels)

        def draw() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.model.dtype)

        noise = draw()
        image = self.model.corrupt(torch.zeros_like(noise), noise, levels[0])
        for i, (level, following) in enumerate(self.progress_bar(list(zip(levels, [*levels[1:], 0], strict=True)))):
            image = self.model(image, level).sample
            if following > 0 and config.fresh_noise:
                image = self.model.corrupt(image, draw(), following)
            if callback_on_step_end is not None:
                seen = dict.fromkeys(callback_on_step_end_tensor_inputs, image)
                image = (callback_on_step_end(self, i, level, seen) or {}).get("latents", image)

        images = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def num_timesteps(self) -> int:
        """The steps of the call in progress, or of the last one; callbacks ask for it."""
        return self._num_timesteps

    def levels(self, num_inference_steps: int | None) -> list[int]:
        """The levels K .. 1 to visit, from the noisiest down."""
        K = self.model.config.num_stages
        count = K if num_inference_steps is None else min(num_inference_steps, K)
        if count < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        return [K - (i * K) // count for i in range(count)]
