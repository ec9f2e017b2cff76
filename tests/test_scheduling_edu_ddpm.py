"""EduDDPMScheduler against independent truth: the stock class, the formulas in float64, and data whose answer is known."""

import logging
import warnings
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_edu import EduDDPMScheduler

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
SPACINGS = ("leading", "trailing", "linspace")
BETA_NAMES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
BETAS = [{"beta_schedule": name} for name in BETA_NAMES]
OTHER_BETAS = [{"trained_betas": np.linspace(1e-3, 0.03, 1000)}, {"rescale_betas_zero_snr": True}]
BOUNDS = [{"clip_sample_range": 1.2}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}]
GRIDS = [({"timestep_spacing": name}, {"num_inference_steps": 10}) for name in SPACINGS]
GRIDS += [({}, {"timesteps": [990, 700, 350, 120, 3]})]
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), dim=0)  # the default schedule, in float64
by_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
by_variance = pytest.mark.parametrize("variance", VARIANCES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def gap(a, b):
    """The largest |a - b|, relative to the largest |b|, of the worst row."""
    return ((a - b).abs().flatten(1).amax(1) / b.abs().flatten(1).amax(1)).max().item()


def model(x, t, variance=None):
    """A deterministic nonlinear function of (x, t), with a second half of channels where the variance is learned."""
    output = torch.tanh(0.7 * x.flip(-1) + torch.cos(torch.as_tensor(t / 200.0)))
    second_half = {"learned": 0.1 * torch.sin(x).square(), "learned_range": torch.sin(3 * x)}
    return torch.cat([output, second_half[variance]], dim=1) if variance in second_half else output


def trajectory(scheduler):
    """The predicted x_0 and the x_s of every step, stacked; the last row is the image."""
    generator = seeded()
    x, states = torch.randn((2, 3, 4, 4), generator=generator), []
    for t in scheduler.timesteps:
        out = scheduler.step(model(x, t, scheduler.config.variance_type), t, x, generator=generator)
        x = out.prev_sample
        states += [out.pred_original_sample, x]
    return torch.stack(states)


@by_prediction
def test_trajectories_are_those_of_the_stock_class(prediction):
    for betas, variance, (spacing, grid), bound in product(BETAS + OTHER_BETAS, VARIANCES, GRIDS, BOUNDS):
        if variance == "fixed_large_log" or (prediction == "epsilon" and "rescale_betas_zero_snr" in betas):
            continue  # stock gives NaN: it takes the root of a logarithm, or divides by alpha_bar = 0
        config = {"prediction_type": prediction, "variance_type": variance, **betas, **spacing, **bound}
        ours, stock = EduDDPMScheduler(**config), DDPMScheduler(**config)
        for scheduler in (ours, stock):
            scheduler.set_timesteps(**grid)
        assert torch.equal(ours.timesteps, stock.timesteps)
        a, b = trajectory(ours), trajectory(stock)
        if stock.timesteps[-1] > 0 and variance in ("fixed_large", "learned", "learned_range"):
            a, b = a[:-1], b[:-1]  # stock leaves noise in the image where the grid ends above 0
        assert gap(a, b) <= 1e-4, (config, grid)


@by_prediction
def test_a_single_step_is_that_of_the_stock_class(prediction):
    config = {"prediction_type": prediction, "clip_sample": False}
    ours, stock = EduDDPMScheduler(**config), DDPMScheduler(**config)
    # With its float32 table, stock's beta between neighbouring timesteps, a difference from 1, is off by up to 1e-3.
    stock.alphas_cumprod, stock.one = ALPHA_BAR, stock.one.double()
    x = randn(2, 3, 4, 4)
    for t in [0, 1, 2, 3, *range(10, 1000, 90), 999]:
        steps = [torch.stack(s.step(model(x, t), t, x, generator=seeded(1), return_dict=False)) for s in (ours, stock)]
        assert gap(*steps) <= 1e-5, t


def test_without_set_timesteps_the_grid_is_every_timestep():
    ours, stock = EduDDPMScheduler(num_train_timesteps=20), DDPMScheduler(num_train_timesteps=20)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert gap(trajectory(ours), trajectory(stock)) <= 1e-4


def test_ddpm_pipeline_draws_the_same_images_as_with_the_stock_scheduler():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (8, 8)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks).eval()
    images = []
    for scheduler in (EduDDPMScheduler(), DDPMScheduler()):
        pipe = DDPMPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(batch_size=2, num_inference_steps=10, generator=seeded(), output_type="np").images)
    assert abs(images[0] - images[1]).max() <= 1e-4
    assert images[1].std() > 0.1  # or the comparison says nothing


def test_add_noise_and_get_velocity_are_the_stock_ones_and_the_float64_formulas():
    ours, stock, t = EduDDPMScheduler(), DDPMScheduler(), torch.arange(1000)
    x_0, epsilon = randn(1000, 3), randn(1000, 3, seed=1)
    signal, sigma = ALPHA_BAR.sqrt()[:, None], (1 - ALPHA_BAR).sqrt()[:, None]
    expected = {"add_noise": signal * x_0 + sigma * epsilon, "get_velocity": signal * epsilon - sigma * x_0}
    for name in expected:
        result = getattr(ours, name)(x_0, epsilon, t)
        assert gap(result, getattr(stock, name)(x_0, epsilon, t)) <= 1e-3  # 1 - alpha_bar cancels in stock's float32
        assert gap(result[100:], getattr(stock, name)(x_0, epsilon, t)[100:]) <= 1e-5
        assert gap(result.double(), expected[name]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_only_the_result_is_rounded(dtype):
    scheduler, t = EduDDPMScheduler(), torch.arange(1000)
    x_0, epsilon = randn(1000, 3).to(dtype), randn(1000, 3, seed=1).to(dtype)
    for method in (scheduler.add_noise, scheduler.get_velocity):
        assert torch.equal(method(x_0, epsilon, t), method(x_0.float(), epsilon.float(), t).to(dtype))
    # The level of the noise itself, at the least t above all, is right to half a unit in the last place.
    noise = scheduler.add_noise(torch.zeros_like(x_0), torch.ones_like(x_0), t)[:, :1]
    assert gap(noise.double(), (1 - ALPHA_BAR).sqrt()[:, None]) <= torch.finfo(dtype).eps / 2 * 1.001


@by_prediction
def test_ancestral_sampling_with_the_ideal_denoiser_returns_gaussian_data(prediction):
    """E[x_0 | x_t] of x_0 ~ N(m, C) is linear in x_t; T steps of it from N(0, I) must end in N(m, C)."""
    n, d = 40_000, 3
    m = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    C = torch.tensor([[1.0, 0.6, -0.2], [0.6, 0.8, 0.1], [-0.2, 0.1, 0.3]], dtype=torch.float64)
    # fixed_small is right for data at one point: in theory it loses 1 % of the variance here, and fixed_large 0.1 %.
    scheduler = EduDDPMScheduler(prediction_type=prediction, variance_type="fixed_large", clip_sample=False)
    generator = seeded()
    x = torch.randn((n, d, 1, 1), generator=generator)
    for t in range(999, -1, -1):
        a = ALPHA_BAR[t]
        gain = a.sqrt() * C @ torch.linalg.inv(a * C + (1 - a) * torch.eye(d))
        x_t = x[..., 0, 0]
        x_0 = m + (x_t - a.sqrt() * m) @ gain.T
        epsilon = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        output = {"sample": x_0, "epsilon": epsilon, "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * x_0}[prediction]
        x = scheduler.step(output[..., None, None].float(), t, x, generator=generator).prev_sample
    x, variances = x[..., 0, 0].double(), C.diagonal()
    # In standard errors of estimates from n draws.
    assert ((x.mean(0) - m).abs() / (variances / n).sqrt()).max() <= 4.5
    assert ((x.T.cov() - C).abs() / ((variances[:, None] * variances + C.square()) / n).sqrt()).max() <= 4.5


@by_variance
def test_one_timestep_for_each_sample_equals_one_call_for_each(variance):
    for prediction, bound in product(PREDICTIONS, BOUNDS):
        scheduler = EduDDPMScheduler(prediction_type=prediction, variance_type=variance, **bound)
        scheduler.set_timesteps(10)
        x, t = randn(4, 3, 4, 4), torch.tensor([900, 300, 100, 0])
        output = model(x, t.reshape(-1, 1, 1, 1), variance)
        together = scheduler.step(output, t, x, generator=[seeded(i) for i in range(4)])
        alone = [scheduler.step(output[i : i + 1], int(t[i]), x[i : i + 1], generator=seeded(i)) for i in range(4)]
        for key in ("prev_sample", "pred_original_sample"):
            assert gap(together[key], torch.cat([one[key] for one in alone])) <= 1e-5


def test_int_and_tensor_timesteps_agree():
    scheduler, x, output = EduDDPMScheduler(), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    scheduler.set_timesteps(10)
    for t, s in ((900, 800), (100, 0), (0, -1)):
        a, b, c = (scheduler.step(output, kind(t), x, generator=seeded()).prev_sample for kind in (int, torch.tensor, np.int64))
        assert gap(a, b) == gap(a, c) == 0
        assert scheduler.previous_timestep(t) == scheduler.previous_timestep(torch.tensor(t)).item() == s
    assert scheduler.previous_timestep(torch.tensor([900, 0])).tolist() == [800, -1]


@by_variance
def test_the_finished_image_carries_no_noise(variance):
    one_step = ({"timestep_spacing": "trailing"}, {"num_inference_steps": 1})
    for spacing, grid in [*GRIDS, one_step, ({"steps_offset": 1}, {"num_inference_steps": 10})]:
        scheduler, x = EduDDPMScheduler(variance_type=variance, **spacing), randn(2, 3, 4, 4)
        scheduler.set_timesteps(**grid)
        last = scheduler.timesteps[-1]
        for t in (last, last.expand(2)):
            a, b = (scheduler.step(model(x, last, variance), t, x, generator=seeded(i)) for i in range(2))
            assert gap(a.prev_sample, b.prev_sample) == 0, (spacing, grid)
            assert gap(a.prev_sample, a.pred_original_sample) <= 1e-6


@pytest.mark.parametrize("spacing", SPACINGS)
def test_fixed_large_log_is_fixed_large(spacing):
    schedulers = [EduDDPMScheduler(variance_type=name, timestep_spacing=spacing) for name in ("fixed_large_log", "fixed_large")]
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    assert gap(*map(trajectory, schedulers)) == 0


def test_every_evenly_spaced_grid_decreases_within_the_training_timesteps_and_has_the_steps_asked_for():
    wrong = []
    for spacing, (T, counts) in product(SPACINGS, {50: range(1, 51), 128: range(1, 129), 1000: (1, 61, 999, 1000)}.items()):
        scheduler = EduDDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
        for count in counts:
            scheduler.set_timesteps(count)
            grid = scheduler.timesteps
            if len(grid) != count or grid[0] >= T or grid[-1] < 0 or not (grid[1:] < grid[:-1]).all():
                wrong.append((spacing, T, count, grid[-1].item()))
    assert not wrong


def test_an_offset_that_leads_out_of_the_training_timesteps_is_refused():
    with pytest.raises(ValueError, match="steps_offset"):
        EduDDPMScheduler(steps_offset=1).set_timesteps(1000)


@pytest.mark.parametrize("betas", BETAS, ids=BETA_NAMES)
def test_rescaled_betas_end_in_pure_noise_and_sampling_from_it_works(betas):
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler, epsilon = EduDDPMScheduler(prediction_type="v_prediction", **zero_snr, **betas), randn(2, 3, 4, 4)
    assert scheduler.alphas_cumprod[-1] == 0
    assert gap(scheduler.add_noise(torch.ones_like(epsilon), epsilon, torch.tensor([999])), epsilon) == 0
    scheduler.set_timesteps(5)
    assert trajectory(scheduler).isfinite().all()


@pytest.mark.parametrize("t", [999, torch.tensor(999), torch.tensor([5, 999])], ids=str)
def test_epsilon_at_zero_terminal_snr_is_refused(t):
    scheduler, x = EduDDPMScheduler(rescale_betas_zero_snr=True), randn(2, 3, 4, 4)
    assert scheduler.step(x, 998, x).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="v_prediction"):
        scheduler.step(x, t, x)


@pytest.fixture
def warned(caplog):
    """What diffusers has warned of so far; Python's own warnings are errors."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def test_an_unknown_key_is_warned_of(warned):
    EduDDPMScheduler.from_config({"no_such_key": 1})
    assert "no_such_key" in warned()[0]


def test_save_and_load_keeps_the_configuration(tmp_path, warned):
    betas = np.linspace(0.01, 0.9, 7)
    scheduler = EduDDPMScheduler(7, trained_betas=betas, variance_type="learned_range", timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path)
    loaded = EduDDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    for key in {key for key in scheduler.config if not key.startswith("_")} - {"trained_betas"}:
        assert loaded.config[key] == scheduler.config[key]
    assert not warned()


@pytest.mark.parametrize("saved", [False, True], ids=["in_memory", "saved"])
@pytest.mark.parametrize("stock", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_configurations_go_to_and_from_stock_schedulers_in_silence(stock, saved, tmp_path, warned):
    def handed_on(scheduler):
        if saved:  # a loaded configuration also holds the keys that were left at their defaults
            scheduler.save_pretrained(tmp_path)
            scheduler = type(scheduler).from_pretrained(tmp_path)
        return scheduler.config

    for config in ({}, {"beta_schedule": "scaled_linear", "beta_end": 0.012, "prediction_type": "v_prediction"}):
        theirs = getattr(diffusers, stock)(**config)
        ours = EduDDPMScheduler.from_config(handed_on(theirs))
        back = type(theirs).from_config(handed_on(ours))
        for other in (ours, back):
            assert other.config.prediction_type == theirs.config.prediction_type
            assert (other.alphas_cumprod - theirs.alphas_cumprod).abs().max() <= 1e-7
    assert not warned()


@pytest.mark.parametrize("distilled", ["LCMScheduler", "TCDScheduler"])
def test_configurations_that_come_from_distilled_samplers_are_saved_and_loaded_in_silence(distilled, tmp_path, warned):
    theirs = getattr(diffusers, distilled)
    theirs(prediction_type="v_prediction").save_pretrained(tmp_path)
    EduDDPMScheduler.from_config(theirs.load_config(tmp_path)).save_pretrained(tmp_path)
    assert EduDDPMScheduler.from_pretrained(tmp_path).config.prediction_type == "v_prediction"
    assert not warned()


@pytest.mark.parametrize("key, allowed", [
    ("beta_schedule", BETA_NAMES), ("prediction_type", PREDICTIONS), ("timestep_spacing", SPACINGS),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_the_list_of_known_ones(key, allowed):
    with pytest.raises(ValueError) as error:
        EduDDPMScheduler(**{key: "cubist"})
    assert all(name in str(error.value) for name in (key, "cubist", *allowed))


@pytest.mark.parametrize("arguments, message", [
    ({}, "either"), ({"num_inference_steps": 5, "timesteps": [3]}, "either"),
    ({"num_inference_steps": 0}, "1 to 1000"), ({"num_inference_steps": 1001}, "1 to 1000"),
    ({"timesteps": []}, "at least one"), ({"timesteps": [3, 3]}, "strictly decreasing"),
    ({"timesteps": [1000, 3]}, "1000"), ({"timesteps": [3, -1]}, "0 or later"),
])  # fmt: skip
def test_set_timesteps_refuses_what_is_no_grid_and_keeps_the_one_it_has(arguments, message):
    scheduler = EduDDPMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == [750, 500, 250, 0]


@pytest.mark.parametrize("config, channels, message", [
    ({"num_train_timesteps": 0}, 3, "at least 1"), ({}, 1, r"\(2, 1, 4, 4\).*\(2, 3, 4, 4\)"),
    ({"variance_type": "learned"}, 3, "second half"), ({"variance_type": "learned_range"}, 3, "second half"),
])  # fmt: skip
def test_no_timesteps_and_outputs_of_the_wrong_shape_are_refused(config, channels, message):
    with pytest.raises(ValueError, match=message):
        EduDDPMScheduler(**config).step(randn(2, channels, 4, 4), 5, randn(2, 3, 4, 4))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clip_sample", [False, True])
def test_without_fresh_noise_it_is_stock_ddim_on_the_same_grid(prediction_type, clip_sample):
    shared = {"prediction_type": prediction_type, "clip_sample": clip_sample, "timestep_spacing": "trailing"}
    ours = EduDDPMScheduler(eta=0.0, **shared)
    stock = DDIMScheduler(set_alpha_to_one=True, **shared)
    x = y = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    ours.set_timesteps(20)
    stock.set_timesteps(20)
    assert torch.equal(ours.timesteps, stock.timesteps)
    for t in ours.timesteps:
        x = ours.step(torch.tanh(x), t, x).prev_sample
        # The noise that the stock class keeps is by default that of the image before clipping.
        y = stock.step(torch.tanh(y), t, y, use_clipped_model_output=True).prev_sample
    assert (x - y).abs().max() < 1e-4 * y.abs().max()


def test_between_ddim_and_ddpm_the_marginals_of_gaussian_data_stay_right():
    """Any eta leaves q(x_s | x_0) what it is, so with the ideal denoiser the data's variance comes back."""
    scheduler = EduDDPMScheduler(eta=0.5, clip_sample=False, prediction_type="sample", beta_schedule="squaredcos_cap_v2")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 1, 1, generator=generator)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t]
        ideal = x * 0.09 * alpha_bar.sqrt() / (0.09 * alpha_bar + 1 - alpha_bar)  # E[x_0 | x_t] for x_0 ~ N(0, 0.3^2)
        x = scheduler.step(ideal, t, x, generator=generator).prev_sample
    assert abs(x.std().item() / 0.3 - 1) < 4 / (2 * 20000) ** 0.5 + 0.005


def test_the_posterior_is_that_of_bayes_rule():
    scheduler = EduDDPMScheduler()
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[4])
    s = int(scheduler.timesteps[5])
    x_0, x_t = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)
    alpha = alpha_bar[t] / alpha_bar[s]
    # q(x_s | x_0) q(x_t | x_s) as a Gaussian in x_s: precisions add, and means weigh by them.
    precision = 1 / (1 - alpha_bar[s]) + alpha / (1 - alpha)
    mean = (alpha_bar[s].sqrt() * x_0 / (1 - alpha_bar[s]) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    got = scheduler.posterior(x_0, t, x_t)
    assert (got.mean - mean).abs().max() < 1e-10
    assert abs(got.variance - 1 / precision) < 1e-10
    assert abs(got.log_variance + precision.log()) < 1e-10
    last = scheduler.posterior(x_0, scheduler.timesteps[-1], x_t)
    assert (last.mean - x_0).abs().max() < 1e-10
    assert last.variance == 0
    assert last.log_variance == scheduler.posterior(x_0, scheduler.timesteps[-2], x_t).log_variance


def test_the_posterior_takes_a_timestep_for_each_sample():
    scheduler = EduDDPMScheduler()
    x_0, x_t = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    together = scheduler.posterior(x_0, torch.tensor([3, 500, 999]), x_t)
    for i, t in enumerate((3, 500, 999)):
        one = scheduler.posterior(x_0[i : i + 1], t, x_t[i : i + 1])
        assert (together.mean[i] - one.mean).abs().max() < 1e-6
        assert abs(together.variance[i].squeeze() - one.variance) < 1e-7
        assert abs(together.log_variance[i].squeeze() - one.log_variance) < 1e-5


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_predictions_convert_into_each_other(prediction_type):
    scheduler = EduDDPMScheduler(prediction_type=prediction_type)
    x_0, epsilon = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 300, 900])
    x_t, v = scheduler.add_noise(x_0, epsilon, t), scheduler.get_velocity(x_0, epsilon, t)
    said = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}
    for to, expected in said.items():
        assert (scheduler.convert_model_output(said[prediction_type], t, x_t, to) - expected).abs().max() < 1e-9
    with pytest.raises(ValueError, match="epsilon, sample, v_prediction"):
        scheduler.convert_model_output(epsilon, t, x_t, "score")


def test_the_signal_to_noise_ratio_is_its_definition_for_any_shape_of_t():
    scheduler = EduDDPMScheduler()
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)
    assert scheduler.snr(7) == alpha_bar[7] / (1 - alpha_bar[7])
    assert torch.equal(scheduler.snr(torch.tensor([0, 999])), (alpha_bar / (1 - alpha_bar))[[0, 999]])


def test_eta_out_of_range_is_refused_and_an_unknown_variance_is_named(caplog):
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        EduDDPMScheduler(eta=1.5)
    diffusers.utils.logging.enable_propagation()
    EduDDPMScheduler(variance_type="other")
    assert "fixed_small" in caplog.text


# ------------------------------------------------------------------ betas and T


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2", "laplace"])
def test_betas_rescaled_to_t_run_along_the_schedule_of_a_thousand(name):
    thousand = EduDDPMScheduler(beta_schedule=name)._alpha_bar
    for count in (50, 100, 250, 4000):
        rescaled = EduDDPMScheduler(count, beta_schedule=name, rescale_betas_to_timesteps=True)._alpha_bar
        if name in ("linear", "scaled_linear", "sigmoid"):
            assert abs(rescaled[-1].log() / thousand[-1].log() - 1) < 1e-3
            if count < 1000:
                assert (rescaled - thousand[1000 // count - 1 :: 1000 // count]).abs().max() < 1e-5
        else:
            assert torch.equal(rescaled, EduDDPMScheduler(count, beta_schedule=name)._alpha_bar)


def test_rescaled_betas_go_with_the_configuration_to_every_scheduler(tmp_path, warned):
    ours = EduDDPMScheduler(50, rescale_betas_to_timesteps=True)
    ours.save_pretrained(tmp_path)
    for made in (
        DDPMScheduler.from_config(ours.config),
        DDIMScheduler.from_pretrained(tmp_path),
        EduDDPMScheduler.from_pretrained(tmp_path),
    ):
        assert torch.equal(made.alphas_cumprod, ours.alphas_cumprod)
    assert not warned()


def test_a_prior_far_from_noise_is_warned_of_by_its_alpha_bar(warned):
    EduDDPMScheduler(100)
    assert "alpha_bar_T is 0.36" in warned()[0]
    EduDDPMScheduler(100, rescale_betas_to_timesteps=True)
    EduDDPMScheduler(1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)  # Stable Diffusion's
    assert len(warned()) == 1


# ------------------------------------------------------------------ the variational bound and the variance

STD = 0.5  # of data x_0 ~ N(0, STD^2 I), whose best denoiser, variance and entropy are known


def ideal(scheduler, t, x_t):
    """E[x_0 | x_t] for that data: a regression, whose slope is cov(x_0, x_t) / var(x_t)."""
    alpha_bar = scheduler._alpha_bar[t].to(x_t).reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar) * x_t


def ideal_errors(scheduler):
    alpha_bar = scheduler._alpha_bar
    return (STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)).tolist()


def bound(scheduler, steps, count=4000):
    """The bound of `count` images over a grid, and its standard error, in nats per dimension."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x_0 = STD * torch.randn((count, 1, 2, 2), generator=generator, dtype=torch.float64)
    total = scheduler.prior_term(x_0)
    for t in scheduler.timesteps:
        x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=generator, dtype=torch.float64), t)
        total = total + scheduler.bound_term(ideal(scheduler, t, x_t), t, x_t, x_0, bin_width=None)
    return total.mean().item() / 4, total.std().item() / count**0.5 / 4


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_with_the_exact_denoiser_and_the_analytic_variance_the_bound_of_gaussian_data_is_its_entropy(steps):
    entropy = 0.5 * np.log(2 * np.pi * np.e * STD**2)
    config = {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"}
    errors = ideal_errors(EduDDPMScheduler())
    value, error = bound(EduDDPMScheduler(variance_type="analytic", prediction_errors=errors, **config), steps)
    assert abs(value - entropy) < 4 * error
    for kind in ("fixed_small", "fixed_large"):
        if steps > 1:
            assert bound(EduDDPMScheduler(variance_type=kind, **config), steps)[0] > value + 4 * error


def test_with_the_analytic_variance_a_few_steps_give_gaussian_data_its_spread():
    scheduler = EduDDPMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    stds = {}
    for kind in ("fixed_small", "analytic"):
        errors = ideal_errors(scheduler) if kind == "analytic" else None
        scheduler = EduDDPMScheduler.from_config(scheduler.config, variance_type=kind, prediction_errors=errors)
        scheduler.set_timesteps(timesteps=[999, 500, 250, 2])
        generator, x = (
            torch.Generator().manual_seed(1),
            torch.randn((20000, 1, 1, 1), generator=torch.Generator().manual_seed(0)),
        )
        for t in scheduler.timesteps:
            x = scheduler.step(ideal(scheduler, t, x), t, x, generator=generator).prev_sample
        stds[kind] = x.std().item()
    assert abs(stds["analytic"] / STD - 1) < 4 / (2 * 20000) ** 0.5 + 0.002
    assert stds["fixed_small"] < 0.9 * STD


def test_the_probabilities_of_all_grey_levels_sum_to_one():
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for mean, t in ((-0.99, 0), (0.3, 5), (0.7, 400), (-0.4, 999)):
        scheduler = EduDDPMScheduler(prediction_type="sample", variance_type="fixed_large")
        scheduler.set_timesteps(timesteps=[t])
        x = torch.full_like(levels, mean)
        nats = scheduler.bound_term(x, t, x, levels, bin_width=2 / 16)
        assert abs(nats.neg().exp().sum() - 1) < 1e-9, (mean, t)


def test_a_bound_term_is_the_divergence_of_torch_distributions_for_every_sample_and_variance():
    x_0, x_t, output = torch.randn(3, 3, 1, 2, 2, dtype=torch.float64, generator=seeded()).clamp(-1, 1)
    t = torch.tensor([30, 400, 999])
    for kind in ("fixed_small", "fixed_large", "learned_range", "analytic"):
        scheduler = EduDDPMScheduler(variance_type=kind, prediction_errors=[0.1] * 1000 if kind == "analytic" else None)
        full = torch.cat([output, torch.tanh(output)], 1) if kind == "learned_range" else output
        q, p = scheduler.posterior(x_0, t, x_t), scheduler.reverse(full, t, x_t)
        q, p = (torch.distributions.Normal(g.mean, g.variance.sqrt().expand_as(x_0)) for g in (q, p))
        expected = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
        assert (scheduler.bound_term(full, t, x_t, x_0) / expected - 1).abs().max() < 1e-6, kind


def test_step_draws_from_the_reverse_distribution():
    scheduler = EduDDPMScheduler(variance_type="learned_range")
    x_t = randn(1, 1, 2, 2).expand(20000, 1, 2, 2)
    output = torch.cat([torch.sin(x_t), torch.cos(x_t)], 1)
    p = scheduler.reverse(output[:1], 300, x_t[:1])
    drawn = scheduler.step(output, 300, x_t, generator=seeded()).prev_sample
    assert ((drawn.mean(0) - p.mean[0]) / p.variance[0].sqrt()).abs().max() < 4 / 20000**0.5
    assert (drawn.var(0) / p.variance[0] - 1).abs().max() < 4 * (2 / 20000) ** 0.5


def test_what_the_variance_or_the_bound_lacks_is_said():
    x = randn(2, 1, 2, 2)
    with pytest.raises(ValueError, match="fit_variance"):
        EduDDPMScheduler(variance_type="analytic").step(x, 5, x)
    with pytest.raises(ValueError, match="there must be 1000"):
        EduDDPMScheduler(variance_type="analytic", prediction_errors=[0.1])
    with pytest.raises(ValueError, match="eta > 0"):
        EduDDPMScheduler(eta=0.0).bound_term(x, 5, x, x)
    with pytest.raises(ValueError, match=r"within 0 \.\. 999"):
        EduDDPMScheduler().step(x, 1000, x)
    with pytest.raises(ValueError, match="one for each"):
        EduDDPMScheduler().add_noise(x, x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="must be the same"):
        EduDDPMScheduler().add_noise(x, x[:1], torch.tensor([1, 2]))


def test_an_inverted_step_is_undone_by_the_step():
    scheduler = EduDDPMScheduler(eta=0.0, clip_sample=False)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x_s, epsilon = randn(2, 1, 2, 2).double(), randn(2, 1, 2, 2, seed=1).double()
        x_t = scheduler.invert_step(epsilon, t, x_s)
        assert gap(scheduler.step(epsilon, t, x_t).prev_sample, x_s) < 1e-9


# ------------------------------------------------------------------ what compilers and accelerators ask for


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_a_model_and_a_step_compile_to_one_graph_for_every_timestep(variance):
    scheduler, eager = (EduDDPMScheduler(variance_type=variance) for _ in range(2))

    def denoise(x, t):
        return scheduler.step(model(x, t, variance), t, x, return_dict=False)

    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(denoise, fullgraph=True, backend=graphs)
    x = randn(2, 1, 4, 4)
    for t in (999, 500, 3, 0):
        torch.manual_seed(0)
        got = compiled(x, torch.tensor(t))
        torch.manual_seed(0)
        expected = eager.step(model(x, torch.tensor(t), variance), torch.tensor(t), x, return_dict=False)
        assert max(gap(*pair) for pair in zip(got, expected, strict=True)) < 1e-5
    assert graphs.frame_count == 1
    assert all(type(copy) is torch.Tensor for copy in scheduler._copies.values())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_asks_for_no_value_of_a_tensor(prediction):
    scheduler = EduDDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for device in ("cpu", "cuda"):
            x = torch.empty(3, 1, 4, 4, device=device)
            for t in (torch.tensor(5, device=device), torch.tensor([0, 5, 999], device=device)):
                assert scheduler.step(x, t, x).prev_sample.device.type == device
                assert scheduler.add_noise(x, x, t).shape == x.shape
    x = randn(2, 1, 4, 4)  # and the scheduler has kept nothing of it
    assert scheduler.step(x, torch.tensor([5, 7]), x).prev_sample.isfinite().all()


def test_a_model_with_a_learned_variance_can_be_sampled_with_another():
    x = randn(2, 1, 4, 4)
    output = torch.cat([torch.sin(x), torch.cos(x)], 1)
    scheduler = EduDDPMScheduler()
    a, b = (scheduler.step(out, 500, x, generator=seeded()).prev_sample for out in (output, output[:, :1]))
    assert torch.equal(a, b)


def test_a_learned_variance_below_zero_leaves_no_hole_in_the_image():
    scheduler = EduDDPMScheduler(variance_type="learned")
    x = randn(2, 1, 4, 4)
    output = torch.cat([x, torch.full_like(x, -0.1)], 1)
    for t in (500, 1, 0, torch.tensor([500, 0])):
        assert scheduler.step(output, t, x).prev_sample.isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients_pass_and_callers_tensors_stay_as_they_are(prediction):
    scheduler = EduDDPMScheduler(prediction_type=prediction)
    x, output = randn(2, 1, 4, 4).requires_grad_(), randn(2, 1, 4, 4, seed=1).requires_grad_()
    before = x.detach().clone(), output.detach().clone()
    for t in (500, torch.tensor([500, 3])):
        scheduler.step(output, t, x).prev_sample.sum().backward()
    assert torch.equal(x.detach(), before[0]) and torch.equal(output.detach(), before[1])
    assert x.grad.abs().sum() > 0 and output.grad.abs().sum() > 0


def test_float64_samples_keep_their_precision_beside_a_float32_model():
    scheduler, x = EduDDPMScheduler(eta=0.5), randn(1, 1, 2, 2).double() + 1e-10
    result = scheduler.step(x.float(), 500, x, generator=seeded()).prev_sample
    assert result.dtype == torch.float64 and not torch.equal(result, result.float().double())


def test_custom_timesteps_come_as_any_sequence_and_belong_to_the_scheduler():
    grid = np.arange(0, 1000, 100)
    scheduler = EduDDPMScheduler()
    scheduler.set_timesteps(timesteps=grid[::-1])
    given = torch.tensor([900, 500, 100])
    scheduler.set_timesteps(timesteps=given)
    given[0] = 7
    assert scheduler.timesteps.tolist() == [900, 500, 100]
    with pytest.raises(ValueError, match="integers"):
        scheduler.set_timesteps(timesteps=[500.7, 3.2])
    with pytest.raises(ValueError, match="timesteps must lie within"):
        scheduler.step(randn(2, 1, 2, 2), torch.tensor([1000, 1]), randn(2, 1, 2, 2))
