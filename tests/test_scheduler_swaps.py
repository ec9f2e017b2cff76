"""EduDDPMScheduler in the place of diffusers' own schedulers: configurations go from class to class, pipelines draw as before."""

import inspect
import json
import logging
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, LDMPipeline, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_edu import EduDDPMScheduler

# Classes disagree on the defaults of the betas, which in memory are not handed on: every configuration names its own.
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STABLE_DIFFUSION = {**SCALED_LINEAR, "clip_sample": False, "steps_offset": 1}
CONFIGS = {
    "ho_et_al": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "stable_diffusion": STABLE_DIFFUSION,
    "v_prediction": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "trained_betas": {"num_train_timesteps": 50, "trained_betas": np.linspace(0.001, 0.2, 50)},
    "own_keys": {**STABLE_DIFFUSION, "variance_type": "learned_range", "eta": 0.5},
}
STOCK = {  # each with one key away from its default, and where it has such, one that we lack
    "DDPMScheduler": {"variance_type": "fixed_large"},
    "DDIMScheduler": {"set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {"solver_order": 3},
    "UniPCMultistepScheduler": {"solver_type": "bh1"},
    "EulerDiscreteScheduler": {"final_sigmas_type": "sigma_min"},
    "EulerAncestralDiscreteScheduler": {"steps_offset": 2},
    "HeunDiscreteScheduler": {"use_karras_sigmas": True},
    "LCMScheduler": {"original_inference_steps": 25},
    "PNDMScheduler": {"skip_prk_steps": True},
}
ZERO_SNR = {**STABLE_DIFFUSION, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
every_class = pytest.mark.parametrize("name", STOCK)
every_config = pytest.mark.parametrize("config", CONFIGS)


@pytest.fixture
def warned(caplog):
    """What diffusers has warned of so far; Python's own warnings are errors."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, of how Heun and Euler ancestral use it
        yield lambda: [
            r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("diffusers")
        ]
    logger.removeHandler(caplog.handler)


@pytest.fixture(params=["in_memory", "saved"])
def folder(request, tmp_path):
    """Where schedulers are saved and loaded before they are handed on, if they are."""
    return tmp_path if request.param == "saved" else None


def keys(cls):
    return set(inspect.signature(cls).parameters)


def own_config(scheduler):
    """What its own constructor takes, arrays as lists."""
    return {key: np.asarray(scheduler.config[key]).tolist() for key in keys(type(scheduler))}


def settled(scheduler, folder):
    """As it is, or as it comes back from a folder, whose file also holds what was left at defaults."""
    if folder:
        scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder) if folder else scheduler


def walk(scheduler, *classes, folder):
    """The scheduler, and one of each class, made from the configuration of the one before."""
    path = [scheduler]
    for cls in classes:
        path.append(settled(cls.from_config(settled(path[-1], folder).config), folder))
    return path


@every_config
@every_class
def test_our_configuration_goes_to_a_stock_class_and_back(name, config, folder, warned):
    classes = getattr(diffusers, name), EduDDPMScheduler
    ours, theirs, back = walk(EduDDPMScheduler(**CONFIGS[config]), *classes, folder=folder)
    assert torch.equal(theirs.alphas_cumprod, ours.alphas_cumprod)
    for key in keys(type(theirs)) & (keys(EduDDPMScheduler) if folder else CONFIGS[config].keys()):
        assert own_config(theirs)[key] == own_config(ours)[key]
    assert own_config(back) == own_config(ours)
    assert torch.equal(back.alphas_cumprod, ours.alphas_cumprod)
    assert not warned()


@every_config
@every_class
def test_a_stock_configuration_comes_to_us_and_goes_back(name, config, folder, warned):
    cls = getattr(diffusers, name)
    arguments = {key: value for key, value in {**CONFIGS[config], **STOCK[name]}.items() if key in keys(cls)}
    theirs, ours, back = walk(cls(**arguments), EduDDPMScheduler, cls, folder=folder)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    for key in keys(EduDDPMScheduler) & (keys(cls) if folder else arguments.keys()):
        assert own_config(ours)[key] == own_config(theirs)[key]
    assert own_config(back) == own_config(theirs)
    assert torch.equal(back.alphas_cumprod, theirs.alphas_cumprod)
    assert not warned()


@every_config
@pytest.mark.parametrize("chain", ["DDIM EulerDiscrete", "DPMSolverMultistep UniPCMultistep", "PNDM HeunDiscrete DDPM"])
def test_through_several_stock_classes_nothing_is_lost(chain, config, tmp_path, warned):
    classes = [getattr(diffusers, f"{name}Scheduler") for name in chain.split()]
    ours, *others = walk(EduDDPMScheduler(**CONFIGS[config]), *classes, EduDDPMScheduler, folder=tmp_path)
    assert all(torch.equal(other.alphas_cumprod, ours.alphas_cumprod) for other in others)
    assert own_config(others[-1]) == own_config(ours)
    assert not warned()


@every_class
def test_zero_terminal_snr_survives_even_where_a_class_does_not_know_it(name, folder, warned):
    cls = getattr(diffusers, name)
    ours, theirs, back = walk(EduDDPMScheduler(**ZERO_SNR), cls, EduDDPMScheduler, folder=folder)
    assert own_config(back) == own_config(ours)
    if "rescale_betas_zero_snr" in keys(cls):  # the classes with sigmas put 2^-24 in the place of the last alpha_bar, 0
        assert torch.equal(theirs.alphas_cumprod[:-1], ours.alphas_cumprod[:-1])
        assert ours.alphas_cumprod[-1] == 0
    assert not warned()


# ---------------------------------------------------------------------------------------------- pipelines

BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, **BLOCKS}
CROSS = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2, **BLOCKS}
CODER = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, **BLOCKS}


def make_ddpm(variance_type="fixed_small"):
    unet = UNet2DModel(8, 3, 6 if variance_type == "learned_range" else 3, add_attention=False, **PLAIN)
    return DDPMPipeline(unet, DDPMScheduler(variance_type=variance_type))


def make_dit(factor=1):
    """With the factor 2 the model predicts the variance too, of which the pipeline hands nothing to the scheduler."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4, "patch_size": 2}
    transformer = diffusers.DiTTransformer2DModel(in_channels=2, out_channels=2 * factor, **sizes)
    return DiTPipeline(transformer, AutoencoderKL(latent_channels=2, sample_size=8, **CODER), DDIMScheduler(clip_sample=False))


def make_ldm():
    vqvae = diffusers.VQModel(latent_channels=3, num_vq_embeddings=16, **CODER)
    return LDMPipeline(vqvae, UNet2DModel(4, 3, 3, add_attention=False, **PLAIN), DDIMScheduler(clip_sample=False))


BUILDERS = {"ddpm": make_ddpm, "dit": make_dit, "ldm": make_ldm}
BUILDERS |= {"ddpm_learned_range": lambda: make_ddpm("learned_range"), "dit_learned_range": lambda: make_dit(factor=2)}


def assert_draws_as_with_the_stock_scheduler(pipe, **inputs):
    config = pipe.scheduler.config
    pipe.set_progress_bar_config(disable=True)

    def draw(scheduler):
        pipe.scheduler = scheduler.from_config(config)
        torch.manual_seed(0)  # LDMPipeline hands its generator to no scheduler
        generator = torch.Generator().manual_seed(0)
        return pipe(generator=generator, num_inference_steps=4, output_type="np", **inputs).images

    ours, stock = draw(EduDDPMScheduler), draw(DDPMScheduler)
    assert abs(ours - stock).max() <= 1e-4
    assert stock.std() > 0.01
    if config.get("variance_type") != "learned_range":  # with which DDIM cannot sample
        # Without the fresh noise, as if the eta = 0 that some of the pipelines pass had arrived, the image is another.
        assert abs(ours - draw(DDIMScheduler)).max() > 0.01


@pytest.mark.parametrize("name", BUILDERS)
def test_pipelines_without_text_draw_as_with_the_stock_scheduler(name, warned):
    torch.manual_seed(0)
    inputs = {"class_labels": [1, 207]} if "dit" in name else {"batch_size": 2}
    assert_draws_as_with_the_stock_scheduler(BUILDERS[name](), **inputs)
    assert not warned()


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """The components of a tiny random Stable Diffusion that reads single letters; its VAE halves the size."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = ["<|startoftext|>", "<|endoftext|>", *"abc", "a</w>", "b</w>", "c</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=8)
    widths = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    on_the_hub = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **STABLE_DIFFUSION}
    torch.manual_seed(0)
    return {
        "vae": AutoencoderKL(latent_channels=4, sample_size=16, **CODER),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=8, **widths, **ends)),
        "tokenizer": tokenizer,
        "unet": diffusers.UNet2DConditionModel(8, 4, 4, cross_attention_dim=8, attention_head_dim=4, **CROSS),
        "scheduler": diffusers.PNDMScheduler.from_config(on_the_hub),
        **{"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    }


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
def test_stable_diffusion_draws_as_with_the_stock_scheduler(task, stable_diffusion, warned):
    image = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    inputs = {"": {}, "Img2Img": {"image": image}, "Inpaint": {"image": image, "mask_image": (image[:, :1] > 0.5).float()}}
    pipe = getattr(diffusers, f"StableDiffusion{task}Pipeline")(**stable_diffusion)
    assert_draws_as_with_the_stock_scheduler(pipe, prompt="a b c", **inputs[task])
    assert not warned()
