"""diffusers' own tests, run on our classes. They are not copied here: they are imported from a checkout of diffusers.

    git clone https://github.com/huggingface/diffusers CHECKOUT
    git -C CHECKOUT checkout 58eb52c0803ea9af3abec60841c2a093bdf1f951
    pip install parameterized requests-mock torchsde
    DIFFUSERS_CHECKOUT=CHECKOUT python -m pytest tests/test_diffusers_suite.py

Only its folder `tests` is used: the diffusers under test is the installed one. The tables below are made for that commit, the first
after v0.40.0 with these testers, on a machine without an accelerator: there, what needs one is skipped.

Each class is one of ours under the testers that diffusers puts its own classes under. Every test of these must pass and must
have built what it is about, except those that the table above the class names with the reason why they do not apply: these
must fail, skip themselves, or look at nothing of ours. So a test that begins to fail, to pass, to skip or that vanishes shows.
"""

import functools
import importlib
import inspect
import os
import sys
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.utils.torch_utils import disable_full_determinism, enable_full_determinism

from diffusers_edu import (
    EduDDPMScheduler,
    LatentDiffusionPipeline,
    StackedDAEPipeline,
    StackedDenoisingAutoencoder,
    VAEPipeline,
    VariationalAutoencoder,
)

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("diffusers' own tests: set DIFFUSERS_CHECKOUT to a checkout of it (see the file)", allow_module_level=True)
if not (Path(CHECKOUT) / "tests" / "pipelines").is_dir():
    pytest.fail(f"DIFFUSERS_CHECKOUT is {CHECKOUT}, where there is no tests/pipelines of diffusers", pytrace=False)
for requirement in ("parameterized", "requests_mock", "torchsde"):
    pytest.importorskip(requirement, reason="diffusers' own tests: pip install parameterized requests-mock torchsde")

# Their markers are registered in their conftest, which would also put the checkout's diffusers before the installed one.
with mock.patch.object(sys, "path", [CHECKOUT, *sys.path]), mock.patch.object(pytest.mark, "_config", None):
    older, newer, stock_ddpm, models, autoencoders, ddpm_scheduler, testing = (
        importlib.import_module(f"tests.{name}")
        for name in (
            "pipelines.test_pipelines_common",
            "pipelines.testing_utils",
            "pipelines.ddpm.test_ddpm",
            "models.testing_utils",
            "models.autoencoders.testing_utils",
            "schedulers.test_scheduler_ddpm",
            "testing_utils",
        )
    )
disable_full_determinism()  # importing them has turned it on for every test after these


@pytest.fixture(scope="module", autouse=True)
def as_determined_as_diffusers_tests_are():
    enable_full_determinism()
    yield
    disable_full_determinism()


# Training needs no accelerator; diffusers gates it to save time.
models.TrainingTesterMixin.pytestmark = []

# ---------------------------------------------------------------------------------------------- the tables, and how they hold

# Where diffusers does not skip it for the want of what it needs, a test must pass.
NEEDS_ACCELERATOR = "needs an accelerator"
# Tests about the signature of a class, which build nothing.
OF_THE_CLASS_ITSELF = {"test_pipeline_call_signature", "test_deprecated_kwargs"}
SUITES = []


def names_in(suite):
    return {name for name in dir(suite) if name.startswith("test_") and callable(getattr(suite, name))}


def all_pass_but(table):
    """A class decorator: hold every test of the class to the table of those that do not apply, name -> reason."""

    def hold(suite):
        suite.table = table
        SUITES.append(suite)
        for name in names_in(suite):
            setattr(suite, name, held(name, getattr(suite, name), table.get(name)))
        return suite

    return hold


def held(name, test, reason):
    applies = reason is None or reason.startswith("needs")
    looks = name in OF_THE_CLASS_ITSELF or any(given.startswith("base_") for given in inspect.signature(test).parameters)

    @functools.wraps(test)
    def run(self, *args, **kwargs):
        try:
            test(self, *args, **kwargs)
            verdict = None if looks or self.built else "it looked at nothing of ours"
        except (pytest.skip.Exception, unittest.SkipTest) as skip:
            verdict = f"it skipped itself: {skip}"
        except (Exception, pytest.fail.Exception) as error:
            if applies:
                raise
            verdict = repr(error)
        if applies and verdict:
            pytest.fail(f"this test does not apply and no table names it; {verdict}")
        if not applies:
            assert verdict, f"this test passes now; take it out of the table, where it says: {reason}"
            pytest.xfail(reason)

    return run


def is_gated(suite, test):
    """Whether diffusers skips the test for what the machine lacks."""
    marks = [mark for cls in suite.__mro__ for mark in vars(cls).get("pytestmark", [])] + getattr(test, "pytestmark", [])
    by_mark = any(mark.name == "skip" or (mark.name == "skipif" and mark.args[0]) for mark in marks)
    return by_mark or getattr(test, "__unittest_skip__", False)


def because(reason, names):
    """The tests, or testers, of these names, each with the reason."""
    return dict.fromkeys((name if name.endswith("Mixin") else f"test_{name}" for name in names.split()), reason)


# ---------------------------------------------------------------------------------------------- pipelines


class Pipeline:
    """What both generations of diffusers' pipeline testers ask of the class under test."""

    built = False
    steps = {"num_inference_steps": 2}
    optional = {"generator", "num_inference_steps", "output_type", "return_dict"}
    output_shape = (3, 8, 8)
    params = required_input_params_in_call_signature = frozenset({"batch_size"})
    batch_params = batch_input_params = image_params = image_latents_params = frozenset()
    test_layerwise_casting = test_group_offloading = True

    @property
    def required_optional_params(self):
        return frozenset(self.optional)

    optional_input_params = required_optional_params

    def get_dummy_components(self):
        self.built = True
        torch.manual_seed(0)
        return self.components()

    def get_dummy_inputs(self, device="cpu", seed=0):
        output_type = "np" if isinstance(self, unittest.TestCase) else "pt"
        generator = torch.Generator("cpu").manual_seed(seed)
        return {"batch_size": 1, "generator": generator, "output_type": output_type, **self.steps}


def tiny_vae(latent_channels=4, **kwargs):
    return VariationalAutoencoder(3, 3, 8, latent_channels, block_out_channels=(8, 8), norm_num_groups=4, **kwargs)


def tiny_unet(channels, size, **kwargs):
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (8, 8), "layers_per_block": 1}
    return UNet2DModel(size, channels, channels, norm_num_groups=4, **blocks, **kwargs)


class StackedDAE(Pipeline):
    pipeline_class = StackedDAEPipeline

    def components(self):
        return {"model": StackedDenoisingAutoencoder(3, 8, num_stages=4, block_out_channels=(8,), latent_dim=4)}


class VAE(Pipeline):
    pipeline_class = VAEPipeline
    steps = {}
    optional = Pipeline.optional - {"num_inference_steps"} | {"latents"}
    test_layerwise_casting = False

    def components(self):
        return {"vae": tiny_vae()}


class DDPM(Pipeline):
    pipeline_class = DDPMPipeline

    def components(self):
        return {"unet": tiny_unet(3, 8), "scheduler": EduDDPMScheduler()}


class LatentDiffusion(Pipeline):
    pipeline_class = LatentDiffusionPipeline
    optional = Pipeline.optional | {"class_labels", "guidance_scale", "latents"}
    callback_cfg_params = frozenset()

    def components(self):
        unet = tiny_unet(4, 4, num_class_embeds=3)
        return {"vae": tiny_vae(scaling_factor=0.7), "unet": unet, "scheduler": EduDDPMScheduler(clip_sample=False)}

    def get_dummy_inputs(self, device="cpu", seed=0):
        return {**super().get_dummy_inputs(device, seed), "class_labels": 1, "guidance_scale": 2.0}


OF_TEXT = {
    **because("no text prompts", "encode_prompt_works_in_isolation num_images_per_prompt"),
    **because("no optional components", "save_load_optional_components"),
}
OF_LATER_RUNGS = {**OF_TEXT, **because("no guidance", "cfg callback_cfg")}
WITHOUT_CALLBACKS = {**OF_LATER_RUNGS, **because("its images take one step: no callbacks", "callback_inputs")}
OF_STOCK_DDPM = {**OF_LATER_RUNGS, **because("diffusers' DDPMPipeline takes no callbacks", "callback_inputs")}
WITHOUT_UNET = because("no unet", "layerwise_casting_inference")
WITHOUT_IMAGES_IN = because("no images go in", "latents_input pt_np_pil_inputs_equivalent")

ACCELERATED = because(
    NEEDS_ACCELERATOR,
    """cpu_offload_forward_pass_twice group_offloading_inference model_cpu_offload_forward_pass
    pipeline_level_group_offloading_inference pipeline_level_group_offloading_sanity_checks save_load_float16
    sequential_cpu_offload_forward_pass sequential_offload_forward_pass_twice to_device""",
)
OLDER = {
    **ACCELERATED,
    **because(NEEDS_ACCELERATOR, "float16_inference"),
    **because("needs xformers and CUDA", "xformers_attention_forwardGenerator_pass"),
    **because("not built of Stable Diffusion's parts", "StableDiffusionMixin_component"),
}
NEWER = {**ACCELERATED, **because(NEEDS_ACCELERATOR, "half_precision_inference_no_nan")}


class NewerTester(
    newer.BasePipelineTesterConfig,
    newer.PipelineTesterMixin,
    newer.PipelineOffloadTesterMixin,
    newer.GroupOffloadTesterMixin,
    newer.LayerwiseCastingTesterMixin,
):
    pass


@all_pass_but({**OLDER, **OF_LATER_RUNGS, **WITHOUT_UNET})
class TestStackedDAEPipeline(StackedDAE, older.PipelineTesterMixin, unittest.TestCase):
    pass


@all_pass_but({**NEWER, **OF_LATER_RUNGS, **WITHOUT_UNET})
class TestStackedDAEPipelineByTheNewerTester(StackedDAE, NewerTester):
    pass


VAES_WITHOUT_A_SIZE = because("two of the VAEs that it tries do not say for what image size they are", "multi_vae")


@all_pass_but({**OLDER, **WITHOUT_CALLBACKS, **WITHOUT_UNET, **WITHOUT_IMAGES_IN, **VAES_WITHOUT_A_SIZE})
class TestVAEPipeline(VAE, older.PipelineLatentTesterMixin, older.PipelineTesterMixin, unittest.TestCase):
    def test_inference_batch_single_identical(self):
        self._test_inference_batch_single_identical(additional_params_copy_to_batched_inputs=[])


@all_pass_but({**NEWER, **WITHOUT_CALLBACKS, **WITHOUT_UNET})
class TestVAEPipelineByTheNewerTester(VAE, NewerTester):
    def test_inference_batch_single_identical(self):
        super().test_inference_batch_single_identical(additional_params_copy_to_batched_inputs=[])


NO_ARRAYS_OF_BFLOAT16 = because("diffusers' DDPMPipeline makes no numpy arrays of bfloat16", "layerwise_casting_inference")


@all_pass_but({**OLDER, **OF_STOCK_DDPM, **NO_ARRAYS_OF_BFLOAT16})
class TestDDPMPipeline(DDPM, older.PipelineTesterMixin, unittest.TestCase):
    pass


@all_pass_but({**NEWER, **OF_STOCK_DDPM})
class TestDDPMPipelineByTheNewerTester(DDPM, NewerTester):
    pass


@all_pass_but({})
class TestDDPMPipelineByItsOwnTests(stock_ddpm.DDPMPipelineFastTests):
    """With the images that diffusers expects of its own scheduler."""

    built = False

    def scheduler(self, **config):
        self.built = True
        return EduDDPMScheduler(**config)

    def setUp(self):
        replaced = mock.patch.object(stock_ddpm, "DDPMScheduler", self.scheduler)
        replaced.start()
        self.addCleanup(replaced.stop)


@all_pass_but({**OLDER, **OF_TEXT, **WITHOUT_IMAGES_IN})
class TestLatentDiffusionPipeline(
    LatentDiffusion,
    older.PipelineLatentTesterMixin,
    older.PipelineKarrasSchedulerTesterMixin,
    older.PipelineTesterMixin,
    unittest.TestCase,
):
    pass


@all_pass_but({**NEWER, **OF_TEXT})
class TestLatentDiffusionPipelineByTheNewerTester(LatentDiffusion, NewerTester):
    pass


# ---------------------------------------------------------------------------------------------- models


class Model(models.BaseModelTesterConfig):
    built = False
    main_input_name = "sample"
    output_shape = (3, 8, 8)
    model_split_percents = [0.5, 0.7]

    def get_init_dict(self):
        self.built = True
        return dict(self.sizes)

    def get_dummy_inputs(self):
        noise = torch.randn(2, 3, 8, 8, generator=torch.Generator("cpu").manual_seed(0))
        return {"sample": noise.to(testing.torch_device)}


class Stack(Model):
    model_class = StackedDenoisingAutoencoder
    sizes = {"in_channels": 3, "num_stages": 4, "block_out_channels": (8,), "latent_dim": 4}

    def get_dummy_inputs(self):
        return {**super().get_dummy_inputs(), "level": 2}


class Diagonal(Model):
    model_class = VariationalAutoencoder
    sizes = {"in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "latent_channels": 2, "norm_num_groups": 4}


class Full(Diagonal):
    sizes = {**Diagonal.sizes, "posterior": "full"}


COMMON = {
    **because(NEEDS_ACCELERATOR, "from_save_pretrained_dtype_inference sharded_checkpoints sharded_checkpoints_with_variant"),
    **because(
        "no module is kept in float32",
        """keep_in_fp32_modules keep_in_fp32_modules_as_str keep_in_fp32_modules_layerwise_casting
        to_keep_in_fp32_modules_warns""",
    ),
}
OF_THE_STACK = {
    **because("needs two accelerators", "model_parallelism"),
    **because(
        "a pass runs one small stage: there is nothing to save",
        "gradient_checkpointing gradient_checkpointing_equivalence gradient_checkpointing_is_applied",
    ),
}
OF_VAES = {
    **because("apply_forward_hook loses the device of the input, as in AutoencoderKL", "model_parallelism"),
    **because("images are small enough to be encoded whole", "enable_disable_slicing enable_disable_tiling"),
}
MEMORY = {
    **because(
        NEEDS_ACCELERATOR,
        """compile_with_group_offloading cpu_offload disk_offload_with_safetensors disk_offload_without_safetensors
        group_offloading group_offloading_with_disk group_offloading_with_layerwise_casting layerwise_casting_training
        torch_compile_recompilation_and_graph_break""",
    ),
    **because("no blocks are declared as worth compiling one by one", "torch_compile_repeated_blocks"),
    **because("trained for one size of image", "compile_on_different_shapes"),
}
MEMORY_OF_THE_STACK = {
    **because(NEEDS_ACCELERATOR, "compile_works_with_aot"),
    **because("no layer stays in the dtype of computation", "layerwise_casting_memory"),
}
MEMORY_OF_VAES = {
    **because(NEEDS_ACCELERATOR, "layerwise_casting_memory"),
    **because("the posterior in its output is no tensor, as an exported program asks for", "compile_works_with_aot"),
}


@all_pass_but({**COMMON, **OF_THE_STACK})
class TestStackedDenoisingAutoencoder(Stack, models.ModelTesterMixin, models.TrainingTesterMixin):
    pass


@all_pass_but({**MEMORY, **MEMORY_OF_THE_STACK})
class TestStackedDenoisingAutoencoderMemory(Stack, models.MemoryTesterMixin, models.TorchCompileTesterMixin):
    pass


class VAETester(models.ModelTesterMixin, models.TrainingTesterMixin, autoencoders.AutoencoderTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"ResidualBlock"})


@all_pass_but({**COMMON, **OF_VAES})
class TestVariationalAutoencoder(Diagonal, VAETester):
    pass


@all_pass_but({**COMMON, **OF_VAES})
class TestVariationalAutoencoderOfFullCovariance(Full, VAETester):
    pass


@all_pass_but({**MEMORY, **MEMORY_OF_VAES})
class TestVariationalAutoencoderMemory(Diagonal, models.MemoryTesterMixin, models.TorchCompileTesterMixin):
    pass


# ---------------------------------------------------------------------------------------------- scheduler


@all_pass_but(because("expects the float32 rounding of 1 - alpha_bar near the data; ours is exact", "full_loop_with_noise"))
class TestEduDDPMScheduler(ddpm_scheduler.DDPMSchedulerTest):
    built = False
    scheduler_classes = (EduDDPMScheduler,)

    def get_scheduler_config(self, **kwargs):
        self.built = True
        return super().get_scheduler_config(**kwargs)


# ---------------------------------------------------------------------------------------------- the tables themselves

BLOCKS = "no blocks of transformers, whose outputs could be kept from step to step"
CACHING = because(
    BLOCKS,
    """FasterCacheTesterMixin FirstBlockCacheTesterMixin MagCacheTesterMixin PyramidAttentionBroadcastTesterMixin
    TaylorSeerCacheTesterMixin""",
)
PEFT, IMAGE_PROMPTS, SHARDING = "no adapters of peft", "no image prompts", "no plan for sharding a model over several devices"
QUANTISED = ["Quantization", "AutoRound", "BitsAndBytes", "GGUF", "ModelOpt", "NunchakuLite", "Quanto", "SDNQ", "TorchAo"]
TESTERS_THAT_DO_NOT_APPLY = {
    models: {
        **CACHING,
        **because(BLOCKS, "CacheTesterMixin"),
        **because("no attention", "AttentionTesterMixin AttentionBackendTesterMixin"),
        **because(PEFT, "LoraTesterMixin LoraHotSwappingForModelTesterMixin"),
        **because(IMAGE_PROMPTS, "IPAdapterTesterMixin"),
        **because(SHARDING, "ContextParallelTesterMixin ContextParallelAttentionBackendsTesterMixin TensorParallelTesterMixin"),
        **because("no original checkpoints on the Hub", "SingleFileTesterMixin"),
        **{f"{x}TesterMixin": "needs a quantisation library and an accelerator" for x in QUANTISED},
        **{f"{x}CompileTesterMixin": "needs a quantisation library and an accelerator" for x in QUANTISED},
    },
    older: {
        **CACHING,
        **because("not built of Stable Diffusion's parts", "SDFunctionTesterMixin PipelineFromPipeTesterMixin"),
        **because(IMAGE_PROMPTS, "IPAdapterTesterMixin FluxIPAdapterTesterMixin"),
    },
    newer: {
        **CACHING,
        **because(BLOCKS, "CacheTesterMixin"),
        **because(PEFT, "LoraTesterMixin LoraMemoryTesterMixin UNetLoraTesterMixin"),
        **because("the sum of three that are run, which skips them whole without an accelerator", "MemoryTesterMixin"),
    },
}


@pytest.mark.parametrize("module", TESTERS_THAT_DO_NOT_APPLY, ids=lambda module: module.__name__)
def test_every_tester_of_diffusers_is_run_or_named(module):
    testers = {name for name in dir(module) if name.endswith("TesterMixin")}
    run = {name for name in testers if any(issubclass(suite, getattr(module, name)) for suite in SUITES)}
    assert set(TESTERS_THAT_DO_NOT_APPLY[module]) == testers - run


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_every_name_in_a_table_is_a_test(suite):
    assert set(suite.table) - names_in(suite) == set()


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_what_diffusers_skips_for_want_of_hardware_is_named(suite):
    gated = {name for name in names_in(suite) if is_gated(suite, getattr(suite, name))}
    assert gated - set(suite.table) == set()
    if testing.torch_device == "cpu":
        needing = {name for name, reason in suite.table.items() if reason.startswith("needs")}
        assert needing - gated == set(), "these run without an accelerator"
