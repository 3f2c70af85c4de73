"""Names that others import; they live in `processes/flow/noise.py` and `processes/flow/table.py`."""

from flashgrpo.processes.flow.noise import ConstantSde, Cps, FlowSde, LinearSde, Ode
from flashgrpo.processes.flow.table import StepTable, checked_sigmas

__all__ = ["ConstantSde", "Cps", "FlowSde", "LinearSde", "Ode", "StepTable", "checked_sigmas"]
