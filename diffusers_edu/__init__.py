"""diffusers_edu: the road from a denoising autoencoder to latent diffusion, every rung a diffusers pipeline.

The names, in the ladder's order. Importing this package registers them with diffusers, so that
`DiffusionPipeline.from_pretrained` loads what the project saves, with no `trust_remote_code`.
"""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils

from .models.modeling_stacked_dae import StackedDenoisingAutoencoder
from .models.modeling_vae import VariationalAutoencoder
from .pipelines.pipeline_latent_diffusion import LatentDiffusionPipeline
from .pipelines.pipeline_stacked_dae import StackedDAEPipeline
from .pipelines.pipeline_vae import VAEPipeline
from .schedulers.scheduling_edu_ddpm import EduDDPMScheduler

__version__ = "0.1.0"
__all__ = [
    "StackedDenoisingAutoencoder",
    "StackedDAEPipeline",
    "VariationalAutoencoder",
    "VAEPipeline",
    "EduDDPMScheduler",
    "LatentDiffusionPipeline",
]

# The loader looks for these base classes in the module that a component names (`["diffusers_edu", "VariationalAutoencoder"]`),
# and takes from them the names of the methods that save and load.
_LOADABLE = {base.__name__: ["save_pretrained", "from_pretrained"] for base in (ModelMixin, SchedulerMixin, DiffusionPipeline)}


def _register() -> None:
    """Make our classes known to diffusers' loader. Private API: `tests/test_registration.py` holds it.

    Raises:
        ImportError: diffusers has another class of one of our names.
    """
    pipeline_loading_utils.LOADABLE_CLASSES[__name__] = _LOADABLE
    for name in __all__:
        mine, theirs = globals()[name], getattr(diffusers, name, None)
        if theirs is not None and theirs is not mine:
            raise ImportError(f"this version of diffusers has a class {name} of its own, with which ours would be confused")
        setattr(diffusers, name, mine)
    # A configuration of ours that another scheduler has saved keeps our keys; these classes then know whose they are.
    ours = EduDDPMScheduler
    for name in ours._compatibles:
        stock: Any = getattr(diffusers, name, None)
        if ours.__name__ not in getattr(stock, "_compatibles", [ours.__name__]):
            stock._compatibles = [*stock._compatibles, ours.__name__]


_register()
