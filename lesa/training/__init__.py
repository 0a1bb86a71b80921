"""Training: prompts -> statistics -> fit -> LesaForecaster."""

from lesa.training.collect import collect
from lesa.training.job import Job
from lesa.training.statistics import Statistics
from lesa.training.train import train

__all__ = ["Job", "Statistics", "collect", "train"]
