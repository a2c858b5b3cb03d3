"""Traces a function, finds its products, and evaluates it with any of them replaced.

Knows nothing of quantization.
"""

from quantjax.interpreter.evaluate import Handler, evaluate
from quantjax.interpreter.product import Op, Product
from quantjax.interpreter.provenance import Origin, OriginKind, evaluate_origin
from quantjax.interpreter.sites import Operand, Role, Site, SiteStatus, discover
from quantjax.interpreter.trace import Program, ProgramCache, leaves_by_path, trace

__all__ = [
    "Handler",
    "Op",
    "Operand",
    "Origin",
    "OriginKind",
    "Product",
    "Program",
    "ProgramCache",
    "Role",
    "Site",
    "SiteStatus",
    "discover",
    "evaluate",
    "evaluate_origin",
    "leaves_by_path",
    "trace",
]
