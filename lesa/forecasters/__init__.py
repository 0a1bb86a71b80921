"""Forecasters: each makes a table of coefficients from a schedule and its noise levels."""

from lesa.core.forecaster import Forecaster
from lesa.forecasters.foca import FoCa
from lesa.forecasters.hicache import HiCache
from lesa.forecasters.lesa import LesaForecaster
from lesa.forecasters.prior import Prior
from lesa.forecasters.reuse import Reuse
from lesa.forecasters.spectrum import Spectrum
from lesa.forecasters.taylor import Taylor

__all__ = [
    "FoCa",
    "Forecaster",
    "HiCache",
    "LesaForecaster",
    "Prior",
    "Reuse",
    "Spectrum",
    "Taylor",
]
