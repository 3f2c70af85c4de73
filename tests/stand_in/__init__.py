"""A GPU that is not there, and what runs on it; see `device.py` and `runs.py`."""

import shutil


def lacking() -> str | None:
    """Name what this machine lacks for a stand-in, or None."""
    import torch  # here, because the stand-in comes before it
    from torch.utils import _python_dispatch

    if torch.version.cuda:
        return "a build of torch without CUDA"
    if not shutil.which("g++"):
        return "g++"
    private = {"_make_wrapper_subclass": torch.Tensor, "_set_only_lift_cpu_tensors": torch._C}
    private |= {"DisableTorchFunctionSubclass": torch._C, "return_and_correct_aliasing": _python_dispatch}
    return next((f"torch's {name}" for name, owner in private.items() if not hasattr(owner, name)), None)
