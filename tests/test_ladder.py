"""The main job on a few steps: what it writes, and that the page stands alone."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_edu  # noqa: F401  (registers)
from diffusers_edu.cli import main
from diffusers_edu.evaluation.metrics import Estimate
from diffusers_edu.evaluation.pictures import decimal, slerp, stage_shares
from diffusers_edu.evaluation.report import number
from diffusers_edu.evaluation.sampling import Step, initial_noise, sample, trace
from diffusers_edu.rungs import RUNGS

ESTIMATES = (
    "frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "diversity", "two_sample_accuracy",
)  # fmt: skip


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    output = tmp_path_factory.mktemp("ladder")
    main(["ladder", str(output), "--max_train_steps", "3", "--num_samples", "32"])
    return output


def test_the_results_hold_every_figure_of_every_rung_and_the_floor(ladder):
    results = json.loads((ladder / "results.json").read_text())
    assert results["dataset"] == "digits"
    assert list(results["rungs"]) == list(RUNGS)
    for name, rung in results["rungs"].items():
        assert rung["num_samples"] == 32
        assert rung["num_inference_steps"] == RUNGS[name].num_inference_steps
        assert rung["train_seconds"] > 0
        assert (rung["bits_per_dim"] is None) == name.endswith("dae")  # those have no likelihood
        if rung["bits_per_dim"] is not None:
            low, high = rung["bits_per_dim"]["interval"]
            assert 0 < low < rung["bits_per_dim"]["value"] < high
            assert rung["bits_per_dim"]["n"] == 540
    for holder in (*results["rungs"].values(), results["floor"]):
        for name in ESTIMATES:
            low, high = holder[name]["interval"]
            assert low <= holder[name]["value"] <= high
            assert holder[name]["n"] > 0
    assert results["floor"]["frechet_distance"]["value"] == pytest.approx(0.073, abs=0.001)


def test_the_results_are_those_of_the_saved_pipelines(ladder):
    from diffusers_edu.evaluation.metrics import measure
    from diffusers_edu.training.data import load_digits

    results = json.loads((ladder / "results.json").read_text())
    samples = sample(DiffusionPipeline.from_pretrained(ladder / "vae"), 32)
    again = measure(samples.flatten(1), load_digits()[1].images.flatten(1))
    assert again["frechet_distance"].value == pytest.approx(results["rungs"]["vae"]["frechet_distance"]["value"], rel=1e-5)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.sources, self.unnamed = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        self.links += [found["href"]] if tag == "a" else []
        self.sources += [found["src"]] if "src" in found else []
        self.unnamed += [tag] if tag == "img" and not found.get("alt") else []


def test_the_page_stands_alone_and_names_every_rung(ladder):
    text = (ladder / "report.html").read_text()
    page = Page(text)
    assert set(RUNGS) <= page.ids
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not page.unnamed
    assert not re.search(r"<(script .*src|link|iframe)", text)
    assert text.count("<svg") >= len(RUNGS) + 4


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
MOVE = """<script>
window.addEventListener("load", () => {
  const sliders = [...document.querySelectorAll(".slider")];
  const shown = slider => [...slider.querySelectorAll("figure")].filter(figure => figure.offsetParent !== null);
  const seen = sliders.map(slider => {
    const input = slider.querySelector("input"), states = [];
    for (const value of [0, Number(input.max), 1]) {
      input.value = value;
      input.dispatchEvent(new Event("input"));
      const figures = shown(slider);
      states.push([figures.length, figures[0].querySelector("img").src, input.getAttribute("aria-valuetext")]);
    }
    return states;
  });
  const width = [document.documentElement.scrollWidth, window.innerWidth];
  document.body.textContent = JSON.stringify({ seen, width });
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_in_a_browser_the_sliders_move_and_the_page_fits_a_phone(ladder, tmp_path):
    page = tmp_path / "page.html"
    page.write_text((ladder / "report.html").read_text().replace("</body>", MOVE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path}/profile", "--window-size=500,900", "--dump-dom", page.as_uri()]
    run = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr
    found = json.loads(re.search(r'\{"seen.*\}', run.stdout).group())
    assert len(found["seen"]) == 5  # the forward process, the two stacks, diffusion and latent diffusion
    for states in found["seen"]:
        assert [count for count, _, _ in states] == [1, 1, 1]
        pictures, labels = {picture for _, picture, _ in states}, {label for _, _, label in states}
        assert len(pictures) >= 2  # the last frames of a collapsed stack may be alike
        assert len(labels) == 3
    width, window = found["width"]
    assert width <= window


def test_the_verdicts_follow_the_measurements(ladder):
    text = (ladder / "report.html").read_text()
    assert "Not supported in this run." in text  # after three steps the noisy stack cannot have regained its diversity
    assert "Supported." in text  # a one-shot denoiser has none however little it is trained


def test_a_second_ladder_with_other_settings_is_refused_and_changes_nothing(ladder, capsys):
    before = {path: path.read_bytes() for path in ladder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(["ladder", str(ladder), "--seed", "1", "--num_samples", "32"])
    assert stop.value.code == 2
    assert "holds another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in ladder.rglob("*") if path.is_file()} == before


def test_evaluate_prints_the_figures_of_a_run_and_its_floor(ladder, capsys):
    main(["evaluate", str(ladder / "latent_diffusion"), "--num_samples", "20", "--num_inference_steps", "2"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [list(line) for line in printed] == [["samples"], ["floor"]]
    assert printed[0]["samples"]["frechet_distance"]["n"] == 20


@pytest.mark.parametrize("command", ["ladder", "evaluate"])
@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_out_of_range_is_refused(ladder, command, seed, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, str(ladder / ("vae" if command == "evaluate" else "")), "--seed", seed])
    assert stop.value.code == 2
    assert f"--seed {seed}" in capsys.readouterr().err


@pytest.mark.parametrize("rung", ["noisy_stacked_dae", "ddpm", "latent_diffusion"])
def test_a_trace_starts_at_the_noise_and_ends_in_the_samples(ladder, rung):
    pipeline = DiffusionPipeline.from_pretrained(ladder / rung)
    steps = trace(pipeline, 3, seed=5, num_inference_steps=4)
    assert len(steps) == 4
    last = steps[-1].sample
    if rung == "latent_diffusion":
        last = pipeline.vae.decode(last / pipeline.vae.config.scaling_factor).sample.detach()
    drawn = sample(pipeline, 3, seed=5, num_inference_steps=4)
    assert ((last / 2 + 0.5).clamp(0, 1) - drawn).abs().max() < 1e-6
    if rung == "noisy_stacked_dae":
        start = pipeline.model.config.sigma_max * initial_noise(5, 3, (1, 8, 8))
        first = pipeline.model(start, steps[0].timestep).sample.detach()
        assert abs((steps[0].sample - first).std().item() / pipeline.model.sigmas[8] - 1) < 0.2


def test_samples_do_not_depend_on_the_batch_they_are_drawn_in(ladder):
    pipeline = DiffusionPipeline.from_pretrained(ladder / "ddpm")
    at_once, apart = (sample(pipeline, 6, seed=1, batch_size=size, num_inference_steps=3) for size in (6, 2))
    assert (at_once - apart).abs().max() < 1e-5


def test_shares_of_the_change_add_up_and_diversity_is_relative_to_the_data():
    start = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 10
    steps = [Step(2, start / 10), Step(1, start / 20)]
    shares = stage_shares(steps, start, data_std=0.5)
    assert shares.change == pytest.approx([0.9 / 0.95, 0.05 / 0.95], rel=1e-5)
    assert shares.diversity == pytest.approx([2.0, 1.0], rel=0.02)
    assert shares.levels == [2, 1]


def test_spherical_interpolation_keeps_the_ends_and_the_norm():
    a, b = torch.randn(2, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    a, b = (x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b))
    assert (slerp(a, b, 0.0) - a).abs().max() < 1e-5
    assert (slerp(a, b, 1.0) - b).abs().max() < 1e-5
    assert (slerp(a, b, 0.3).flatten(1).norm(dim=1) - 1).abs().max() < 1e-5


def test_numbers_are_written_as_people_read_them():
    assert [number(x) for x in (4.6312, 0.1174, 0.00123, -0.00001)] == ["4.63", "0.117", "0.0012", "0.0000"]
    assert [decimal(x) for x in (24123.0, 0.487, 2.4e-9)] == ["24,000", "0.49", "2.4e-09"]
    assert Estimate(1.0, (0.5, 1.5), 10).as_json() == {"value": 1.0, "interval": [0.5, 1.5], "n": 10}
