"""The claims of the ladder's story, each a statement about figures that can turn out otherwise.

A claim rests on inequalities, each of one figure. It is `supported` where the whole interval of every figure lies on the side that it
says, `not supported` where that of one lies wholly on the other side, and else `undecided`: more samples, or more seeds, would tell.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .estimates import Estimate, over_seeds

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"

Run = Mapping[str, Mapping[str, Estimate]]  # of one seed: rung -> figure -> estimate


@dataclass(frozen=True)
class Check:
    """An inequality: the figure lies between `above` and `below`."""

    what: str
    figure: Callable[[Run], Estimate]
    above: float = -math.inf
    below: float = math.inf


@dataclass(frozen=True)
class Claim:
    """A statement, what it rests on, and why it should be so."""

    statement: str
    checks: Sequence[Check]
    why: str


@dataclass(frozen=True)
class Finding:
    """A check's figure over all runs, what was asked of it, and the verdict."""

    what: str
    estimate: Estimate
    asked: str
    verdict: str

    def as_json(self) -> dict:
        return {"what": self.what, **self.estimate.as_json(), "asked": self.asked, "verdict": self.verdict}


@dataclass(frozen=True)
class Verdict:
    """A claim held against the measurements of one or more runs."""

    statement: str
    why: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def word(self) -> str:
        words = [finding.verdict for finding in self.findings]
        return next((word for word in (NOT_SUPPORTED, UNDECIDED) if word in words), SUPPORTED)

    def as_json(self) -> dict:
        return {"claim": self.statement, "verdict": self.word, "findings": [finding.as_json() for finding in self.findings]}


def judge(claims: Sequence[Claim], runs: Sequence[Run]) -> list[Verdict]:
    """Hold claims against runs that differ in their seed alone. Figures are formed run by run, so that what runs share cancels."""
    return [
        Verdict(
            claim.statement, claim.why, [find(check, over_seeds([check.figure(run) for run in runs])) for check in claim.checks]
        )
        for claim in claims
    ]


def find(check: Check, estimate: Estimate) -> Finding:
    low, high = estimate.interval
    if check.above < low and high < check.below:
        verdict = SUPPORTED
    else:
        verdict = NOT_SUPPORTED if high <= check.above or low >= check.below else UNDECIDED
    bounds = [f"above {check.above:g}"] if check.above > -math.inf else []
    bounds += [f"below {check.below:g}"] if check.below < math.inf else []
    return Finding(check.what, estimate, " and ".join(bounds), verdict)


def figure(rung: str, name: str) -> Callable[[Run], Estimate]:
    return lambda run: run[rung][name]


def gain(rung: str, *before: str, name: str = "frechet_distance") -> Callable[[Run], Estimate]:
    """By how much a rung is lower than the best of others."""
    return lambda run: min((run[other][name] for other in before), key=lambda e: e.value) - run[rung][name]


BEFORE_DIFFUSION = ("dae", "stacked_dae", "noisy_stacked_dae", "vae")
BLURRED = 0.95  # of the sharpness of data
AS_GOOD = 0.02  # of Fréchet distance, a quarter of what real digits are apart

CLAIMS: dict[str, list[Claim]] = {
    "dae": [
        Claim(
            "From pure noise, removing all the noise at once returns the mean image: every sample is the same.",
            [
                Check("diversity of the samples (data: 1)", figure("dae", "diversity"), below=0.1),
                Check("distance of a sample to the mean training digit (grey range 1)", figure("dae", "from_mean"), below=0.05),
            ],
            "Squared error is least at the mean, and pure noise does not tell which digit it was.",
        )
    ],
    "stacked_dae": [
        Claim(
            "Without fresh noise, the first stage takes all the randomness away.",
            [
                Check("diversity after the first stage (data: 1)", figure("stacked_dae", "diversity_after_first"), below=0.1),
                Check("diversity of the samples (data: 1)", figure("stacked_dae", "diversity"), below=0.1),
            ],
            "What it returns from pure noise is the mean image.",
        ),
        Claim(
            "Then the later stages have nothing left to do.",
            [
                Check(
                    "distance from what the first stage returned to the sample (spread of the data: 1)",
                    figure("stacked_dae", "later_change"),
                    below=0.1,
                ),
                Check("the largest change by one of them", figure("stacked_dae", "largest_later_change"), below=0.1),
            ],
            "They were trained on what the first stage returns, and hand it on.",
        ),
    ],
    "noisy_stacked_dae": [
        Claim(
            "Fresh noise at every stage restores diversity.",
            [
                Check("diversity of the samples (data: 1)", figure("noisy_stacked_dae", "diversity"), above=0.5),
                Check("Fréchet distance gained on the rung before", gain("noisy_stacked_dae", "stacked_dae"), above=0),
            ],
            "With new noise, each stage chooses anew among the digits that its input allows.",
        ),
        Claim(
            "Its samples are blurred: each stage returns an average.",
            [
                Check("sharpness (data: 1)", figure("noisy_stacked_dae", "sharpness"), below=BLURRED),
                Check("diversity of the samples (data: 1)", figure("noisy_stacked_dae", "diversity"), above=0.5),
            ],
            "The average is over the digits that its input allows.",
        ),
        Claim(
            "Its stages do not fit together: each learned from noised digits and is fed noised guesses. On noised digits the last one "
            "would be rid of most of the distance.",
            [
                Check(
                    "variance of the guesses that the last stage is fed (data: 1)",
                    figure("noisy_stacked_dae", "variance_fed"),
                    below=1,
                ),
                Check(
                    "Fréchet distance that the last stage would gain on noised digits",
                    lambda run: run["noisy_stacked_dae"]["frechet_distance"] - run["noisy_stacked_dae"]["distance_on_digits"],
                    above=0,
                ),
                Check(
                    "that gain, less what would be left",
                    lambda run: (
                        run["noisy_stacked_dae"]["frechet_distance"] - run["noisy_stacked_dae"]["distance_on_digits"] * 2
                    ),
                    above=0,
                ),
            ],
            "A guess is a mean, which varies less than digits do; noised anew, it is no noised digit. Were it drawn from all the "
            "digits that it may stand for, the next stage could not tell the difference.",
        ),
    ],
    "vae": [
        Claim(
            "Codes drawn from N(0, I) decode to digits, in one step, better than the stack's in ten.",
            [Check("Fréchet distance gained on the rung before", gain("vae", "noisy_stacked_dae"), above=0)],
            "The code is what is random, and its distribution is known.",
        ),
        Claim(
            "Samples of the autoencoder are blurred.",
            [
                Check("sharpness (data: 1)", figure("vae", "sharpness"), below=BLURRED),
                Check("diversity of the samples (data: 1)", figure("vae", "diversity"), above=0.5),
            ],
            "The decoder returns the mean of all digits that a code may stand for.",
        ),
        Claim(
            "The prior has holes: digits' codes do not lie as N(0, I) does, and that costs distance.",
            [
                Check("how often a code and a draw of N(0, I) are told apart", figure("vae", "codes_told_apart"), above=0.5),
                Check(
                    "Fréchet distance that digits' own codes would gain",
                    lambda run: run["vae"]["frechet_distance"] - run["vae"]["distance_of_codes"],
                    above=0,
                ),
            ],
            "The decoder can do better than its prior lets it: where no digit's code lies, it has learned nothing.",
        ),
        Claim(
            "A heavier KL term draws the codes to N(0, I), and pays with the detail that they keep.",
            [
                Check(
                    "how much less often a code is told from N(0, I), from the lightest to the heaviest term",
                    gain("vae_heavy", "vae_light", name="codes_told_apart"),
                    above=0,
                ),
                Check(
                    "error of reconstructions that it costs (grey range 1)",
                    lambda run: run["vae_heavy"]["reconstruction_error"] - run["vae_light"]["reconstruction_error"],
                    above=0,
                ),
            ],
            "KL is the rate of the code: what it pulls towards N(0, I) can say less of the digit.",
        ),
        Claim(
            "A posterior of full covariance explains digits better than one of independent dimensions.",
            [Check("bits/dim gained", figure("vae_full", "bits_gained"), above=0)],
            "It holds the diagonal one, and can follow a code's dimensions where they depend on each other.",
        ),
    ],
    "ddpm": [
        Claim(
            "One network for all noise levels, and small Gaussian steps: better than every rung before.",
            [Check("Fréchet distance gained on the best of them", gain("ddpm", *BEFORE_DIFFUSION), above=0)],
            "A small step back is nearly Gaussian: its mean is all there is to learn, and its noise keeps the choice open.",
        ),
        Claim(
            "Its samples are as sharp and as diverse as the data.",
            [
                Check("sharpness (data: 1)", figure("ddpm", "sharpness"), above=BLURRED, below=1.1),
                Check("diversity (data: 1)", figure("ddpm", "diversity"), above=0.9, below=1.1),
            ],
            "No step has to average over different digits: what is left open is decided by the noise of the next one.",
        ),
        Claim(
            "It explains unseen digits better than the autoencoder does.",
            [Check("bits/dim gained on the autoencoder's bound of ten codes", figure("ddpm", "bits_gained"), above=0)],
            "Its bound adds up many small steps, each of which a Gaussian fits; and the autoencoder is trained for its samples, with "
            "less weight on its KL term than its bound has.",
        ),
    ],
    "latent_diffusion": [
        Claim(
            "Through the same decoder, learned codes are better than codes from N(0, I).",
            [Check("Fréchet distance gained on N(0, I)", gain("latent_diffusion", "vae"), above=0)],
            "The decoder is the same, so the difference is the prior's.",
        ),
        Claim(
            "They close most of the gap between N(0, I) and the digits' own codes.",
            [
                Check(
                    "Fréchet distance gained on N(0, I), less what is still missing to those codes",
                    lambda run: (
                        run["vae"]["frechet_distance"]
                        + run["vae"]["distance_of_codes"]
                        - run["latent_diffusion"]["frechet_distance"] * 2
                    ),
                    above=0,
                ),
            ],
            "The diffusion has learned where the codes of digits lie.",
        ),
        Claim(
            "As a prior, the diffusion explains unseen digits better than N(0, I) does.",
            [Check("bits/dim gained on the autoencoder's bound", figure("latent_diffusion", "bits_gained"), above=0)],
            "Where the digits' codes lie, it has more of its probability than N(0, I).",
        ),
        Claim(
            "A sample costs less than one of diffusion in pixels.",
            [
                Check(
                    "its arithmetic, over that of diffusion in pixels",
                    lambda run: run["latent_diffusion"]["operations"] * (1 / run["ddpm"]["operations"].value),
                    below=1,
                ),
            ],
            "A step works on the code, which has fewer places; the decoder runs once.",
        ),
        Claim(
            "A sample is as good as one of diffusion in pixels.",
            [
                Check(
                    f"Fréchet distance lost to diffusion in pixels (as good: less than {AS_GOOD:g})",
                    lambda run: run["latent_diffusion"]["frechet_distance"] - run["ddpm"]["frechet_distance"],
                    below=AS_GOOD,
                )
            ],
            "The decoder loses little that the distance sees.",
        ),
    ],
}
