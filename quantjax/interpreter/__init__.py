"""Traces a function, finds its products, and evaluates it with any of them replaced.

Knows nothing of quantization.
"""

from quantjax.interpreter.containers import Carried
from quantjax.interpreter.describe import unbroadcast
from quantjax.interpreter.discover import discover
from quantjax.interpreter.evaluate import (
    NOTHING,
    Addition,
    Additions,
    Evaluated,
    Handler,
    Outcome,
    Settle,
    Visit,
    evaluate,
)
from quantjax.interpreter.product import Op, Product
from quantjax.interpreter.provenance import (
    NEUTRAL_MOVES,
    Origin,
    OriginKind,
    eqn_shapes,
    evaluate_origin,
)
from quantjax.interpreter.sites import Operand, Role, Site, SiteStatus
from quantjax.interpreter.trace import Program, ProgramCache, leaves_by_path, trace

__all__ = [
    "NEUTRAL_MOVES",
    "NOTHING",
    "Addition",
    "Additions",
    "Carried",
    "Evaluated",
    "Handler",
    "Op",
    "Operand",
    "Origin",
    "Outcome",
    "OriginKind",
    "Product",
    "Program",
    "ProgramCache",
    "Role",
    "Settle",
    "Site",
    "SiteStatus",
    "Visit",
    "discover",
    "eqn_shapes",
    "evaluate",
    "evaluate_origin",
    "leaves_by_path",
    "trace",
    "unbroadcast",
]
