"""Accelerated runs as the statistics of plain runs predict them, without the model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lesa.training.objective import objective
from lesa.training.statistics import Statistics

__all__ = ["Simulation"]

Vector = npt.NDArray[np.float64]
Steps = tuple[int, ...]
STEERING = 0.5  # beta of the target, as in the runs that it stands for
KEPT = 20_000  # states that are remembered


class Simulation:
    """Predicted errors of step lists, forecasts fitted and steered as in the closed loop.

    The state is the latent's error e_s in the basis of the statistics. A skipped step is fitted by
    least squares on the mean Gram matrix, with the cached features and the latent x_s + e_s as
    regressors and v_s - beta pull e_s as target; its error d_s moves the state by
    e_{s+1} = keep e_s + rate d_s. What is left out is that the model answers to e_s at full steps:
    there the features are the plain run's. Lists with a common beginning share its states.

    Needs the sampler and the latents; `Simulation.possible` says whether they are known.
    """

    def __init__(self, statistics: Statistics, history: int, ridge: float = 1e-6) -> None:
        sampler = statistics.sampler
        assert sampler is not None
        self.statistics, self.history, self.ridge = statistics, history, ridge
        self.joint, self.scale = statistics.joint.numpy(), statistics.final_energy()
        self.gram = self.joint.mean(0)
        self.keep, rates = sampler.keep.numpy(), sampler.rates.numpy()
        self.pull = self.keep / rates.sum(1)
        self.latents = statistics.num_steps * sum(statistics.rows.values())
        self.features, self.rates = {}, {}
        for branch in statistics.branches:
            weights = statistics.weights(branch)
            assert weights is not None
            embedded = statistics.embed(branch, weights).numpy().T
            self.features[branch] = embedded[: statistics.num_steps]
            self.rates[branch] = rates[:, statistics.places(branch)].sum(1)
        self._products = {name: rows @ self.gram for name, rows in self.features.items()}
        self._states: dict[Steps, list[Vector]] = {}

    @staticmethod
    def possible(statistics: Statistics) -> bool:
        """Whether the statistics tell how outputs move the latent."""
        sampler = statistics.sampler
        return statistics.has_latent and sampler is not None and sampler.trusted

    def scores(self, full_steps: Steps) -> Vector:
        """The error of the final latent per picture, relative to its mean square, in dB; higher is
        better."""
        state = self._state(full_steps, self.statistics.num_steps)
        energy = (self.joint @ state) @ state / self.scale
        return -10 * np.log10(np.maximum(energy, 1e-12))

    def quality(self, full_steps: Steps) -> float:
        """The objective of the scores."""
        return objective(self.scores(full_steps))

    def _state(self, full_steps: Steps, step: int) -> Vector:
        """The error at a step after the last of these full steps."""
        if len(self._states) * self.statistics.num_steps > KEPT:
            self._states.clear()
        last = full_steps[-1]
        if full_steps not in self._states:
            before = full_steps[:-1]
            state = self._state(before, last) if before else np.zeros(len(self.gram))
            self._states[full_steps] = [self.keep[last] * state]
        states = self._states[full_steps]
        cached = full_steps[::-1][: self.history]
        while last + len(states) < step:
            states.append(self._skipped(states[-1], last + len(states), cached))
        return states[step - last - 1]

    def _skipped(self, error: Vector, step: int, cached: Steps) -> Vector:
        """The error after a skipped step."""
        found, carried = self.keep[step] * error, np.zeros(len(error))
        latent = error.copy()
        latent[self.latents + step] += 1
        seen = self.gram @ latent
        for branch, features in self.features.items():
            rate = self.rates[branch][step]
            target = features[step] - self.pull[step] * STEERING * error + carried / rate
            regressors = np.vstack([features[list(cached)], latent])
            products = np.vstack([self._products[branch][list(cached)], seen])
            moments, onto = products @ regressors.T, products @ target
            start = np.eye(len(regressors))[0]
            pull = self.ridge * np.trace(moments) / len(moments) * np.eye(len(moments))
            weights = start + np.linalg.solve(moments + pull, onto - moments @ start)
            forecast = weights @ regressors
            found = found + rate * (forecast - features[step])
            carried = rate * (target - forecast)
        return found
