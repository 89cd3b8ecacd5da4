"""Pure functions on tensors, one folder per operation; knows nothing of modules, tasks or configs.

Every operation has up to three implementations with one public function in front:

- ``reference``: the definition as plainly as the paper has it, any dtype, twice differentiable, never fast.
- ``torch``: the fast path without Triton (CPU, MPS, double backward).
- ``triton``: forward and backward kernels for CUDA and ROCm; imported only when it runs.

Left alone, tensors on a CUDA or ROCm device go to ``triton`` and all others to ``torch``. An explicit choice never falls
back: ``impl="torch"`` in the call, ``with kernels.use("torch"):`` around it, or ``ZOO_KERNELS=torch`` in the environment,
in that order of precedence. What the explicit choice lacks raises NotImplementedError naming the alternative; which head sizes the Triton kernels take
says one table, ``_common/widths.py``. States by hand (``*_state``, ``*_read``, ``*_step``) are one product or one step, in plain torch on every device,
whatever is chosen.
"""

from kernels._common.choice import IMPLEMENTATIONS, choose, current, use

__all__ = ["IMPLEMENTATIONS", "choose", "current", "use"]
