"""Grids of quantized evaluations: one compiled program for all cells, resumable results."""

from quantjax.sweep.grid import FLOAT_CELL, Cell, Grid
from quantjax.sweep.progress import Progress, Silent
from quantjax.sweep.run import SweepResult, run_sweep
from quantjax.sweep.runner import CellProgram, Execution, Trial, compile_cells
from quantjax.sweep.store import ResultStore, Row
from quantjax.sweep.study import Study
from quantjax.sweep.summary import Summary, summarize, table

__all__ = [
    "FLOAT_CELL",
    "Cell",
    "CellProgram",
    "Execution",
    "Grid",
    "Progress",
    "ResultStore",
    "Row",
    "Silent",
    "Study",
    "Summary",
    "SweepResult",
    "Trial",
    "compile_cells",
    "run_sweep",
    "summarize",
    "table",
]
