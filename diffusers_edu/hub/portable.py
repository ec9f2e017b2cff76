"""Rewrite a pipeline to classes of diffusers, where its configuration allows that, and show that the images are the same."""

import inspect
from typing import Any

import diffusers
import torch

from ..errors import UsageError

TOLERANCE = 1e-3  # of pixels in [0, 1], a quarter of a grey level: float32 rounding, no more
STOCK = {
    "diffusers",
    "transformers",
    "tokenizers",
    "onnxruntime",
    "optimum",
}  # what diffusers, as it comes, loads components from


def to_stock(pipeline: Any) -> Any:
    """The same pipeline of stock classes alone: `DDPMPipeline`, or `LDMPipeline` for latents.

    Raises:
        UsageError: it has no such form; the message names every reason.
    """
    reasons: list[str] = []
    components = dict(pipeline.components)
    for name, component in components.items():
        kind = type(component)
        if component is not None and name != "scheduler" and not is_stock(kind):
            reasons.append(f"diffusers has no class with the architecture of {kind.__name__} ({name})")
    latent = {"vae", "unet", "scheduler"} == components.keys()
    if not is_stock(type(pipeline)) and not latent:
        reasons.append(f"diffusers has no pipeline that samples as {type(pipeline).__name__} does")
    if latent and not is_stock(type(pipeline)):
        reasons += latent_reasons(components["vae"], components["unet"])
    if "scheduler" in components:
        reasons += scheduler_reasons(components["scheduler"])
    if reasons:
        raise UsageError(f"--form portable: {'; '.join(reasons)}. Give --form plugin or self-contained")

    components["scheduler"] = stock_scheduler(components["scheduler"])
    if latent and not is_stock(type(pipeline)):
        stock = diffusers.LDMPipeline(components["vae"], components["unet"], components["scheduler"])
    else:
        stock = type(pipeline)(**components)
    stock.set_progress_bar_config(disable=True)
    if "batch_size" in inspect.signature(stock.__call__).parameters:  # the others want prompts
        check_same_images(pipeline, stock)
    return stock


def is_stock(kind: type) -> bool:
    """Whether whoever has diffusers has the class."""
    return kind.__module__.split(".")[0] in STOCK


def latent_reasons(vae: Any, unet: Any) -> list[str]:
    """Why `LDMPipeline` could not take these models."""
    reasons = []
    if getattr(vae.config, "shift_factor", None):
        reasons.append(f"LDMPipeline does not add the vae's shift_factor, {vae.config.shift_factor}")
    if getattr(unet.config, "num_class_embeds", None) is not None:
        reasons.append("LDMPipeline gives its unet no class labels")
    return reasons


def scheduler_reasons(scheduler: Any) -> list[str]:
    """Why no stock scheduler would take the same steps."""
    if is_stock(type(scheduler)):
        return []
    config = scheduler.config
    if not {"variance_type", "eta"} <= set(config):
        return [f"diffusers has no scheduler for {type(scheduler).__name__}"]
    reasons = []
    # Stock DDIM takes its noise from the clipped x_0 only where step is told to, and pipelines do not tell it.
    if not (config.eta == 1 or (config.eta == 0 and not config.clip_sample and not config.thresholding)):
        reasons.append(f"no stock scheduler has eta {config.eta} with this clipping")
    if config.eta == 1 and config.variance_type == "analytic":
        reasons.append("no stock scheduler has the variance 'analytic'")
    ends_at_0 = config.timestep_spacing == "linspace" or (config.timestep_spacing == "leading" and config.steps_offset == 0)
    if config.eta == 1 and not ends_at_0 and not config.variance_type.startswith("fixed_small"):
        reasons.append(
            f"DDPMScheduler leaves noise in the finished image with the variance '{config.variance_type}' on this grid, which does not "
            f"end at 0 ({config.timestep_spacing}, steps_offset {config.steps_offset})"
        )
    return reasons


def stock_scheduler(scheduler: Any) -> Any:
    """`DDPMScheduler`, or `DDIMScheduler` where there is no fresh noise, of the same configuration."""
    if is_stock(type(scheduler)):
        return scheduler
    kind = diffusers.DDPMScheduler if scheduler.config.eta == 1 else diffusers.DDIMScheduler
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    config = {name: value for name, value in scheduler.config.items() if name in known}
    # The stock fixed_large_log takes a logarithm for a standard deviation (NaN); the variance is that of fixed_large.
    if config.get("variance_type") == "fixed_large_log":
        config["variance_type"] = "fixed_large"
    return kind(**config)


def check_same_images(pipeline: Any, stock: Any, num_images: int = 2, num_inference_steps: int = 10) -> None:
    """Raise a `UsageError` unless both make the same images from the same global seed.

    The global one, because `LDMPipeline` hands no generator on to its scheduler.
    """
    steps = min(num_inference_steps, len(pipeline.scheduler))
    images = []
    for candidate in (pipeline, stock):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            images.append(candidate(batch_size=num_images, num_inference_steps=steps, output_type="np").images)
    difference = float(abs(images[0] - images[1]).max())
    if not difference <= TOLERANCE:
        raise UsageError(f"--form portable: the stock classes make other images (they differ by {difference:.2g})")
