"""`optimize`: any network, faster, or as it was.

capture.py traces it, simplify.py does the algebra of its linear layers, statistics.py finds what is taken of whole
images, patterns.py the fused operators, lower.py gathers them into plans, model.py puts it together and compares.
"""

from .model import OptimizedModel, Program, optimize
from .report import Report

__all__ = ["OptimizedModel", "Program", "Report", "optimize"]
