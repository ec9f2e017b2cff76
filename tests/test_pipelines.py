"""Every rung's pipeline is called in the same way, and comes back from its folder with the same pixels."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, EulerDiscreteScheduler, UNet2DModel

from diffusers_edu import (
    EduDDPMScheduler,
    LatentDiffusionPipeline,
    StackedDAEPipeline,
    StackedDenoisingAutoencoder,
    VAEPipeline,
    VariationalAutoencoder,
)

WIDTHS = {"block_out_channels": (8, 8), "norm_num_groups": 4}
SCALES = {"scaling_factor": 0.7}


def make_stack(channels=1, fresh_noise=True, num_stages=4):
    sizes = {"num_stages": num_stages, "block_out_channels": (8,), "latent_dim": 4}
    model = StackedDenoisingAutoencoder(channels, 8, fresh_noise=fresh_noise, **sizes)
    with torch.no_grad():  # fresh weights contract: without a gain, four stages in a row forget what they began with
        for weight in model.parameters():
            weight.mul_(3)
    return StackedDAEPipeline(model)


def make_vae(channels=1):
    return VariationalAutoencoder(channels, channels, 8, latent_channels=2, **WIDTHS, **SCALES)


def make_stock_vae(channels=1, shift_factor=0.2):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"in_channels": channels, "out_channels": channels, "sample_size": 8, "latent_channels": 2}
    return AutoencoderKL(shift_factor=shift_factor, **SCALES, **sizes, **blocks, **WIDTHS)


def make_unet(channels, size, num_class_embeds=None, out_channels=None):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1, **WIDTHS}
    return UNet2DModel(
        size, channels, out_channels or channels, num_class_embeds=num_class_embeds, add_attention=False, **blocks
    )


def make_latent(channels=1, vae=make_vae, num_class_embeds=None):
    return LatentDiffusionPipeline(vae(channels), make_unet(2, 4, num_class_embeds), EduDDPMScheduler(clip_sample=False))


BUILDERS = {
    "noisy_stacked_dae": make_stack,
    "stacked_dae": lambda channels=1: make_stack(channels, fresh_noise=False),
    "vae": lambda channels=1: VAEPipeline(make_vae(channels)),
    "stock_vae": lambda channels=1: VAEPipeline(make_stock_vae(channels)),
    "ddpm": lambda channels=1: DDPMPipeline(make_unet(channels, 8), EduDDPMScheduler()),
    "latent": make_latent,
    "latent_stock_vae": lambda channels=1: make_latent(channels, make_stock_vae),
    "latent_classes": lambda channels=1: make_latent(channels, num_class_embeds=4),
}
every_pipeline = pytest.mark.parametrize("name", BUILDERS)
latent_pipelines = pytest.mark.parametrize("name", [name for name in BUILDERS if name.startswith("latent")])
with_callbacks = pytest.mark.parametrize("name", [name for name in BUILDERS if "stacked" in name or name.startswith("latent")])


def build(name, channels=1):
    torch.manual_seed(0)
    pipe = BUILDERS[name](channels)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipe, **kwargs):
    steps = {"num_inference_steps": 3} if "num_inference_steps" in inspect.signature(pipe.__call__).parameters else {}
    return pipe(**{"generator": seeded(), "output_type": "np", **steps, **kwargs})


def pixels(pipe, **kwargs):
    return sample(pipe, **kwargs).images


@every_pipeline
@pytest.mark.parametrize("channels", [1, 3])
def test_output_types_shapes_and_ranges(name, channels):
    pipe = build(name, channels)
    array = pixels(pipe, batch_size=2)
    assert (array.shape, array.dtype) == ((2, 8, 8, channels), np.float32)
    assert 0 <= array.min() < array.max() <= 1
    images = pixels(pipe, batch_size=2, output_type="pil")
    assert [(image.size, image.mode) for image in images] == [((8, 8), "L" if channels == 1 else "RGB")] * 2
    for image, row in zip(images, array, strict=True):
        assert abs(np.asarray(image).reshape(8, 8, channels) / 255 - row).max() <= 0.5 / 255 + 1e-6
    tensor = pixels(pipe, batch_size=2, output_type="pt")
    assert tensor.shape == (2, channels, 8, 8)
    assert abs(tensor.permute(0, 2, 3, 1).numpy() - array).max() <= 1e-6


@every_pipeline
def test_without_return_dict_the_images_come_in_a_tuple(name):
    pipe = build(name)
    (images,) = sample(pipe, return_dict=False)
    assert abs(images - pixels(pipe)).max() == 0


@every_pipeline
def test_a_generator_gives_the_same_images_again_and_another_seed_gives_others(name):
    pipe = build(name)
    assert abs(pixels(pipe, batch_size=2) - pixels(pipe, batch_size=2)).max() == 0
    assert abs(pixels(pipe, batch_size=2) - pixels(pipe, batch_size=2, generator=seeded(1))).max() > 1e-5


@every_pipeline
def test_with_a_list_of_generators_an_image_does_not_depend_on_the_batch(name):
    pipe = build(name)
    together = pixels(pipe, batch_size=3, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        assert abs(together[i : i + 1] - pixels(pipe, generator=seeded(i))).max() <= 1e-5
    assert abs(together[0] - together[1]).max() > 1e-5


@every_pipeline
def test_save_and_load_gives_the_same_pixels(name, tmp_path):
    pipe = build(name)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert abs(pixels(loaded, batch_size=2) - pixels(pipe, batch_size=2)).max() == 0

    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    for key, component in pipe.components.items():
        library = "diffusers_edu" if type(component).__module__.startswith("diffusers_edu.") else "diffusers"
        assert index[key] == [library, type(component).__name__]


@with_callbacks
def test_callbacks_see_the_latents_of_every_step(name):
    pipe, seen = build(name), []

    def look(pipeline, step, timestep, tensors):
        seen.append((pipeline is pipe, step, int(timestep), list(tensors), tensors["latents"].shape[0]))

    silent = pixels(pipe, batch_size=2)
    assert abs(pixels(pipe, batch_size=2, callback_on_step_end=look) - silent).max() == 0
    assert [one[:2] for one in seen] == [(True, step) for step in range(3)]
    assert [one[2] for one in seen] == (pipe.levels(3) if "stacked" in name else [666, 333, 0])
    assert all(one[3:] == (["latents"], 2) for one in seen)


@with_callbacks
def test_callbacks_may_replace_the_latents(name):
    pipe = build(name)
    for last_step_replaced in (0, 2):

        def replace(pipeline, step, timestep, tensors, last=last_step_replaced):
            return {"latents": torch.zeros_like(tensors["latents"])} if step == last else {}

        replaced = pixels(pipe, batch_size=2, callback_on_step_end=replace)
        assert abs(replaced - pixels(pipe, batch_size=2)).max() > 1e-5
    # After the last step nothing is left of either image.
    assert abs(replaced[0] - replaced[1]).max() <= 1e-6


@with_callbacks
def test_callbacks_cannot_ask_for_other_tensors(name):
    with pytest.raises(ValueError, match=r"latents.*prompt_embeds"):
        sample(build(name), callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_the_stages_are_visited_from_the_noisiest_down():
    pipe = make_stack()
    for count, levels in ((None, [4, 3, 2, 1]), (1, [4]), (2, [4, 2]), (3, [4, 3, 2]), (4, [4, 3, 2, 1]), (9, [4, 3, 2, 1])):
        assert pipe.levels(count) == levels
    with pytest.raises(ValueError, match="at least 1"):
        pipe(num_inference_steps=0)


@pytest.mark.parametrize("name", ["noisy_stacked_dae", "stacked_dae"])
def test_an_image_is_handed_from_stage_to_stage_as_the_definition_says(name):
    pipe, generator = build(name), seeded()
    sigmas, draw = pipe.model.sigmas, lambda: torch.randn((2, 1, 8, 8), generator=generator)
    x = sigmas[4] * draw()
    for level in (4, 3, 2, 1):
        x = pipe.model(x, level).sample
        if level > 1 and name == "noisy_stacked_dae":
            x = x + sigmas[level - 1] * draw()
    expected = (x / 2 + 0.5).clamp(0, 1)
    assert (pixels(pipe, batch_size=2, num_inference_steps=None, output_type="pt") - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["vae", "stock_vae"])
def test_the_vae_pipeline_decodes_the_codes_it_is_given(name):
    pipe, z = build(name), torch.randn(2, 2, 4, 4, generator=seeded())
    assert abs(pixels(pipe, batch_size=2, latents=z) - pixels(pipe, batch_size=2)).max() == 0
    expected = (pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    assert (pixels(pipe, batch_size=2, output_type="pt") - expected).abs().max() <= 1e-6


@latent_pipelines
def test_latents_go_in_and_come_out(name):
    pipe, generator = build(name), seeded()
    noise = torch.randn((2, 2, 4, 4), generator=generator)
    given = pixels(pipe, batch_size=2, latents=noise, generator=generator)
    assert abs(given - pixels(pipe, batch_size=2)).max() == 0
    latents = pixels(pipe, batch_size=2, output_type="latent")
    assert latents.shape == (2, 2, 4, 4)
    shift = 0.2 if name == "latent_stock_vae" else 0.0
    decoded = (pipe.vae.decode(latents / 0.7 + shift).sample / 2 + 0.5).clamp(0, 1)
    assert abs(decoded.detach().permute(0, 2, 3, 1).numpy() - given).max() <= 1e-6


@pytest.mark.parametrize("name", ["vae", "stock_vae", "latent", "latent_classes"])
@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (2, 3, 4, 4), (2, 2, 8, 8)])
def test_latents_of_another_shape_are_refused_with_the_right_one(name, shape):
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\)"):
        sample(build(name), batch_size=2, latents=torch.zeros(shape))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_latent_diffusion_steps_with_any_scheduler(scheduler):
    pipe = build("latent")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    latents = pixels(pipe, batch_size=2, output_type="latent")
    pipe.scheduler.set_timesteps(3)
    x = torch.randn((2, 2, 4, 4), generator=seeded()) * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        output = pipe.unet(pipe.scheduler.scale_model_input(x, t), t).sample
        x = pipe.scheduler.step(output, t, x).prev_sample
    assert (latents - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("labels", [1, [0, 2], torch.tensor([2, 1])], ids=str)
def test_guidance_is_the_formula(labels, w):
    pipe, noise = build("latent_classes"), torch.randn((2, 2, 4, 4), generator=seeded())
    # With one step, to the image that the network predicts, what comes out is the guided prediction itself.
    pipe.scheduler = EduDDPMScheduler(prediction_type="sample", timestep_spacing="trailing", clip_sample=False)
    one_step = {"batch_size": 2, "latents": noise, "num_inference_steps": 1, "output_type": "latent"}

    def network(labels):
        with torch.no_grad():
            return pipe.unet(noise, 999, class_labels=torch.as_tensor(labels).expand(2)).sample

    unconditional, conditional = network(3), network(labels)
    expected = unconditional + w * (conditional - unconditional)
    assert (pixels(pipe, class_labels=labels, guidance_scale=w, **one_step) - expected).abs().max() <= 1e-5
    assert (pixels(pipe, **one_step) - unconditional).abs().max() <= 1e-5
    assert (conditional - unconditional).abs().max() > 1e-2


@pytest.mark.parametrize("labels, message", [
    (4, "0 .. 2"), (-1, "0 .. 2"), ([0, 1, 9], "0 .. 2"), ([0, 1], "2 class_labels for a batch of 3"), ([], "0 class_labels"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        sample(build("latent_classes"), batch_size=3, class_labels=labels)


def test_labels_for_a_model_without_classes_are_refused():
    with pytest.raises(ValueError, match="trained without"):
        sample(build("latent"), class_labels=0)


def test_a_call_does_not_depend_on_the_call_before_whatever_the_scheduler(tmp_path):
    """Euler's initial sigma depends on its timesteps; a saved configuration brings the spacing with it."""
    EduDDPMScheduler().save_pretrained(tmp_path)
    saved = EduDDPMScheduler.from_pretrained(tmp_path)
    pipeline = make_latent()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(saved.config)
    first, second = (
        pipeline(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for _ in range(2)
    )
    assert (first - second).abs().max() == 0


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_offloading_hooks_fire_on_the_vae(method):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Hook(ModelHook):
        fired = False

        def pre_forward(self, module, *args, **kwargs):
            self.fired = True
            return args, kwargs

    vae, hook = VariationalAutoencoder(), Hook()
    add_hook_to_module(vae, hook)
    getattr(vae, method)(torch.zeros(1, *((1, 8, 8) if method == "encode" else vae.latent_shape)))
    assert hook.fired


@with_callbacks
def test_callbacks_may_ask_for_the_number_of_steps(name):
    seen = []
    sample(build(name), callback_on_step_end=lambda pipe, step, t, tensors: seen.append(pipe.num_timesteps) or {})
    assert seen == [3, 3, 3]


def test_a_callback_may_end_the_guidance():
    """As elsewhere in diffusers, by `_guidance_scale`: from then on only the labelled half is computed."""
    pipe, sizes = build("latent_classes"), []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, *args, **kwargs: sizes.append(len(x)) or forward(x, *args, **kwargs)

    def end(pipe, step, t, tensors):
        pipe._guidance_scale = 1.0
        return {}

    sample(pipe, batch_size=2, class_labels=[0, 1], guidance_scale=3.0, callback_on_step_end=end)
    assert sizes == [4, 2, 2]
