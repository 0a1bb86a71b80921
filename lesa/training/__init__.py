"""Training: prompts -> statistics -> fit -> LesaForecaster."""

from lesa.training.collect import collect
from lesa.training.statistics import Statistics
from lesa.training.train import calibrate, train

__all__ = ["Statistics", "calibrate", "collect", "train"]
