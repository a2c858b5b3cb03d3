"""What calibration finds: every rule's range, site by site, what it clips and what that costs.

``collect`` observes a model on batches, ``calibration_report`` makes a table of what was observed,
``write_ranges`` and ``write_pictures`` put it into files. ``quantjax calibrate`` is these four.
"""

from quantjax.calibration.collect import Collected, Model, batched, collect
from quantjax.calibration.files import RangeRow, rows, write_pictures, write_ranges
from quantjax.calibration.plot import plot_ranges
from quantjax.calibration.report import calibration_report
from quantjax.calibration.results import Bars, CalibrationReport, OperandRanges, RuleRange
from quantjax.calibration.rules import FITS, RULES, FitName, RuleName

__all__ = [
    "FITS",
    "RULES",
    "Bars",
    "CalibrationReport",
    "Collected",
    "FitName",
    "Model",
    "OperandRanges",
    "RangeRow",
    "RuleName",
    "RuleRange",
    "batched",
    "calibration_report",
    "collect",
    "plot_ranges",
    "rows",
    "write_pictures",
    "write_ranges",
]
