"""The main job on a few steps: what it writes, and that the page stands alone."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline
from markupsafe import escape
from PIL import Image

import diffusers_edu  # noqa: F401  (registers)
from diffusers_edu.cli import main
from diffusers_edu.evaluation.estimates import Estimate
from diffusers_edu.evaluation.pictures import decimal, slerp
from diffusers_edu.evaluation.report import number
from diffusers_edu.evaluation.sampling import initial_noise, sample, trace
from diffusers_edu.rungs import RUNGS

ESTIMATES = (
    "frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "diversity", "two_sample_accuracy",
    "train_on_synthetic", "parzen_bits_per_dim",
)  # fmt: skip


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    output = tmp_path_factory.mktemp("ladder")
    main(["ladder", str(output), "--max_train_steps", "3", "--num_samples", "32", "--seeds", "2"])
    return output


@pytest.fixture(scope="module")
def results(ladder):
    return json.loads((ladder / "results.json").read_text())


def test_the_results_hold_every_figure_of_every_rung_and_the_floor(results):
    assert results["dataset"] == "digits"
    assert list(results["rungs"]) == list(RUNGS)
    for name, rung in results["rungs"].items():
        assert rung["num_samples"] == 32
        assert rung["num_inference_steps"] == RUNGS[name].num_inference_steps
        assert rung["train_seconds"] > 0
        assert (rung["bits_per_dim"] is None) == name.endswith("dae")  # those have no likelihood
        if rung["bits_per_dim"] is not None:
            low, high = rung["bits_per_dim"]["interval"]
            assert low < rung["bits_per_dim"]["value"] < high
            assert rung["bits_per_dim"]["value"] > 0
            assert rung["bits_per_dim"]["n"] == 540
    for holder in (*results["rungs"].values(), results["floor"]):
        for name in ESTIMATES:
            low, high = holder[name]["interval"]
            assert low <= holder[name]["value"] <= high
            assert holder[name]["n"] > 0
    # Samples are compared with as many real digits, never with more.
    assert results["floor"]["frechet_distance"]["n"] == 32 == results["rungs"]["dae"]["frechet_distance"]["n"]


def test_figures_are_means_over_the_seeds_and_the_first_seeds_pipelines_lie_in_front(ladder, results):
    assert results["seeds"] == [0, 1]
    both = [results["by_seed"][seed]["vae"]["frechet_distance"]["value"] for seed in ("0", "1")]
    assert both[0] != both[1]
    assert results["rungs"]["vae"]["frechet_distance"]["value"] == pytest.approx(sum(both) / 2)
    for folder in (ladder, ladder / "seed-1"):
        assert all((folder / name / "model_index.json").exists() for name in RUNGS)


def test_every_claim_has_a_verdict_that_follows_from_its_figures(ladder, results):
    assert list(results["claims"]) == list(RUNGS)
    words = {"supported", "not supported", "undecided"}
    text = (ladder / "report.html").read_text()
    for claims in results["claims"].values():
        for claim in claims:
            verdicts = {finding["verdict"] for finding in claim["findings"]}
            assert claim["verdict"] in words and verdicts <= words
            assert (claim["verdict"] == "supported") == (verdicts == {"supported"})
            assert (claim["verdict"] == "not supported") == ("not supported" in verdicts)
            assert str(escape(claim["claim"])) in text
    # After three steps nothing is sharp; but a sample's cost does not depend on what was learned.
    assert results["claims"]["latent_diffusion"][3]["verdict"] == "supported"
    assert results["claims"]["ddpm"][0]["verdict"] != "supported"


def test_the_results_are_those_of_the_saved_pipelines(ladder, results):
    from diffusers_edu.evaluation.metrics import measure
    from diffusers_edu.training.data import load_digits

    samples = sample(DiffusionPipeline.from_pretrained(ladder / "vae"), 32)
    again = measure(samples.flatten(1), load_digits()[1].images.flatten(1))
    assert again["frechet_distance"].value == pytest.approx(
        results["by_seed"]["0"]["vae"]["frechet_distance"]["value"], rel=1e-5
    )


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
  const move = (input, value) => { input.value = value; input.dispatchEvent(new Event("input")); };
  const seen = sliders.map(slider => {
    const input = slider.querySelector("input");
    return [0, Number(input.max), 1].map(value => {
      move(input, value);
      const figures = shown(slider);
      return [figures.length, figures[0].querySelector("img").src, input.getAttribute("aria-valuetext")];
    });
  });
  const charts = [...document.querySelectorAll(".readout")].map(chart => {
    const input = chart.querySelector("input"), output = chart.querySelector("output"), states = [];
    const note = () => states.push([chart.querySelectorAll(".read").length, output.textContent, Number(input.value)]);
    for (const value of [0, Number(input.max)]) { move(input, value); note(); }
    chart.scrollIntoView();
    const box = chart.querySelector('[data-bar="1"]').getBoundingClientRect();
    const at = { clientX: box.left + box.width / 2, clientY: box.top, bubbles: true };
    chart.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", at));
    note();
    return states;
  });
  const width = [document.documentElement.scrollWidth, window.innerWidth];
  document.body.textContent = JSON.stringify({ seen, charts, width });
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_in_a_browser_the_sliders_move_the_charts_are_read_and_the_page_fits_a_phone(ladder, tmp_path):
    page = tmp_path / "page.html"
    page.write_text((ladder / "report.html").read_text().replace("</body>", MOVE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path}/profile", "--window-size=500,900", "--dump-dom", page.as_uri()]
    run = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr
    found = json.loads(html.unescape(re.search(r'\{"seen.*\}', run.stdout).group()))
    assert len(found["seen"]) == 5  # the forward process, the two stacks, diffusion and latent diffusion
    for states in found["seen"]:
        assert [count for count, _, _ in states] == [1, 1, 1]
        pictures, labels = {picture for _, picture, _ in states}, {label for _, _, label in states}
        assert len(pictures) >= 2  # the last frames of a collapsed stack may be alike
        assert len(labels) == 3
    assert len(found["charts"]) == 4  # the stages of two stacks, what those of one are fed, and the bound
    for states in found["charts"]:
        assert [count for count, _, _ in states] == [1, 1, 1]
        assert len({text for _, text, _ in states}) == 3
        assert [value for _, _, value in states][::2] == [0, 1]  # the last by the pointer
    width, window = found["width"]
    assert width <= window


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
    about, *found = printed
    assert (about["num_samples"], about["num_inference_steps"], about["held_out"], about["features"]) == (20, 2, 540, "pixels")
    assert [list(line) for line in found] == [["samples"], ["floor"], ["diagnoses"]]
    assert found[0]["samples"]["frechet_distance"]["n"] == found[1]["floor"]["frechet_distance"]["n"] == 20


@pytest.mark.slow
def test_evaluate_prints_the_bounds_and_by_how_much_runs_differ(ladder, capsys, monkeypatch):
    monkeypatch.setattr("diffusers_edu.bounds.CODES", (1, 5, 25))  # 1,000 take their time
    main(["evaluate", *(str(ladder / name) for name in ("vae", "noisy_stacked_dae")), "--num_samples", "20", "--likelihood"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    *bounds, of_the_stack = (line["likelihood"] for line in printed if "likelihood" in line)
    assert of_the_stack == {"none": "denoising autoencoders give images no probability"}
    assert [bound["codes"] for bound in bounds] == [1, 5, 25]
    values = [bound["bits_per_dim"]["value"] for bound in bounds]
    assert values == sorted(values, reverse=True)  # more codes, a tighter bound
    assert bounds[0]["nats"]["value"] == pytest.approx(values[0] * 64 * math.log(2))
    assert bounds[0]["parts"].keys() == {"reconstruction", "kl"}
    parzen = [line["parzen_bits_per_dim"] for line in printed if "parzen_bits_per_dim" in line]
    assert len(parzen) == 2 and all("training_images" in line and "no likelihood" in line["note"] for line in parzen)
    first, second = (line["samples"] for line in printed if "samples" in line)
    (compared,) = (line for line in printed if "difference" in line)
    difference = compared["difference"]
    assert compared["of"] == f"{ladder / 'noisy_stacked_dae'} minus {ladder / 'vae'}"
    name = "frechet_distance"
    assert difference[name]["value"] == pytest.approx(second[name]["value"] - first[name]["value"])


@pytest.mark.slow
def test_evaluate_tells_where_in_time_a_diffusions_bound_comes_from(ladder, capsys):
    main(["evaluate", str(ladder / "latent_diffusion"), "--num_samples", "10", "--num_inference_steps", "1", "--likelihood"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    bounds = [line["likelihood"] for line in printed if "likelihood" in line]
    assert {(bound["variance"], bound["steps"]) for bound in bounds} == {
        (variance, steps) for variance in ("fixed_small", "fixed_large", "analytic") for steps in (10, 50)
    }
    for bound in bounds:
        assert len(bound["timesteps"]) == len(bound["denoising_loss_by_timestep"]) == bound["steps"]
        assert sum(part["value"] for part in bound["parts"].values()) == pytest.approx(bound["nats"]["value"])


def test_evaluate_says_why_there_is_no_likelihood(ladder, capsys):
    main(["evaluate", str(ladder / "dae"), "--num_samples", "12", "--likelihood"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["likelihood"] for line in printed if "likelihood" in line] == [
        {"none": "denoising autoencoders give images no probability"}
    ]


def test_evaluate_refuses_data_too_small_to_measure_on(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.effect_noise((8, 8), 50 + i).save(tmp_path / "images" / f"{i}.png")
    run = str(tmp_path / "run")
    main(
        ["train", "--rung", "dae", "--train_data_dir", str(tmp_path / "images"), "--max_train_steps", "1", "--output_dir", run]
    )
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", run, "--num_samples", "16"])
    assert stop.value.code == 2
    assert "figures take 6 of each" in capsys.readouterr().err


def test_evaluate_refuses_to_compare_runs_on_different_data(ladder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.effect_noise((8, 8), 50 + i).save(tmp_path / "images" / f"{i}.png")
    flags = ["--train_data_dir", str(tmp_path / "images"), "--max_train_steps", "1", "--output_dir", str(tmp_path / "other")]
    main(["train", "--rung", "dae", *flags])
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(ladder / "dae"), str(tmp_path / "other"), "--num_samples", "16"])
    assert stop.value.code == 2
    assert "figures of different data cannot be compared" in capsys.readouterr().err


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


def test_spherical_interpolation_keeps_the_ends_and_the_norm():
    a, b = torch.randn(2, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    a, b = (x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b))
    assert (slerp(a, b, 0.0) - a).abs().max() < 1e-5
    assert (slerp(a, b, 1.0) - b).abs().max() < 1e-5
    assert (slerp(a, b, 0.3).flatten(1).norm(dim=1) - 1).abs().max() < 1e-5


def test_numbers_are_written_as_people_read_them():
    assert [number(x) for x in (1502.9, 4.6312, 0.1174, 0.00123, -0.00001)] == ["1,503", "4.63", "0.117", "0.0012", "0"]
    assert [decimal(x) for x in (24123.0, 0.487, 2.4e-9)] == ["24,000", "0.49", "2.4e-09"]
    assert Estimate(1.0, (0.5, 1.5), 10).as_json() == {"value": 1.0, "interval": [0.5, 1.5], "n": 10}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seeds", "0"], "--seeds 0: at least 1"),
        (["--num_samples", "31"], "--num_samples 31: at least 32"),
        (["--num_samples", "2000"], "the floor is of as many training images, of which there are 1257"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(flags, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ladder", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_ladder_that_is_stopped_takes_its_workers_with_it_and_they_save_a_checkpoint(tmp_path):
    command = [sys.executable, "-m", "diffusers_edu.cli", "ladder", str(tmp_path), "--num_samples", "32"]
    ladder = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, stderr=subprocess.DEVNULL)
    try:
        log, deadline = tmp_path / "ddpm" / "log.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = psutil.Process(ladder.pid).children(recursive=True)
        ladder.terminate()
        assert ladder.wait(timeout=60) == 143
    finally:
        ladder.kill()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert list((tmp_path / "ddpm").glob("checkpoint-*"))
    assert not (tmp_path / "results.json").exists()
