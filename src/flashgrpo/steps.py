"""Names that others import; they live in `processes/flow/steps.py`."""

from flashgrpo.processes.flow.steps import AllSteps, OneStep, Window

__all__ = ["AllSteps", "OneStep", "Window"]
