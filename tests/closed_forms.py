"""Data whose best denoiser is known, and what it cannot know: E[x_0 | x_t] in closed form, its error by numerical integration.

Images are of independent pixels. Each kind of data has `draw(count)`, `mean(x_t, alpha_bar)`, `unknown(alpha_bar)`, which is
E Var(x_0 | x_t) of a pixel, and `power`, E x_0^2.
"""

from dataclasses import dataclass

import torch

SIZE = 4
GRID = torch.linspace(-9, 9, 20_001, dtype=torch.float64)  # of x_t, whose variance is at most about 1


@dataclass(frozen=True)
class Mixture:
    """Every pixel is drawn from N(means[i], spread^2) with the weight of i; a spread of 0 makes it a finite set."""

    means: tuple[float, ...]
    weights: tuple[float, ...]
    spread: float

    def parts(self):
        return torch.tensor(self.means, dtype=torch.float64), torch.tensor(self.weights, dtype=torch.float64)

    @property
    def power(self):
        means, weights = self.parts()
        return (weights * (means.square() + self.spread**2)).sum()

    def draw(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        means, weights = self.parts()
        shape = (count, 1, SIZE, SIZE)
        chosen = torch.multinomial(weights, count * SIZE**2, replacement=True, generator=generator).reshape(shape)
        return means[chosen] + self.spread * torch.randn(shape, generator=generator, dtype=torch.float64)

    def logits(self, x_t, alpha_bar):
        """Of each part, log of weight times density at x_t, in a last dimension."""
        means, weights = self.parts()
        variance = alpha_bar * self.spread**2 + 1 - alpha_bar
        away = (x_t[..., None] - (alpha_bar.sqrt() * means)).square()
        return weights.log() - away / (2 * variance) - 0.5 * torch.log(2 * torch.pi * variance)

    def mean(self, x_t, alpha_bar):
        """E[x_0 | x_t]; alpha_bar broadcasts over x_t."""
        a = torch.as_tensor(alpha_bar, dtype=torch.float64)[..., None]
        means, _ = self.parts()
        variance = a * self.spread**2 + 1 - a
        shrunk = means + a.sqrt() * self.spread**2 / variance * (x_t[..., None] - a.sqrt() * means)
        return (self.logits(x_t, a).softmax(-1) * shrunk).sum(-1)

    def unknown(self, alpha_bar):
        """E Var(x_0 | x_t) = E x_0^2 - E E[x_0 | x_t]^2, for each alpha_bar of (T,)."""
        found = []
        for a in torch.as_tensor(alpha_bar, dtype=torch.float64).reshape(-1):
            density = self.logits(GRID, a).logsumexp(-1).exp()
            found.append(self.power - torch.trapezoid(density * self.mean(GRID, a).square(), GRID))
        return torch.stack(found).clamp(min=0)


GAUSSIAN = Mixture((0.0,), (1.0,), 0.4)
MIXTURE = Mixture((-0.8, 0.1, 0.7), (0.5, 0.3, 0.2), 0.15)
FINITE = Mixture((-1.0, -0.25, 0.5), (0.25, 0.25, 0.5), 0.0)
KINDS = {"gaussian": GAUSSIAN, "mixture": MIXTURE, "finite": FINITE}
