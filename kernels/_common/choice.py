"""Which implementation of an operation runs."""

import contextlib
import contextvars
import difflib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "torch", "triton")
_VARIABLE = "ZOO_KERNELS"
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("zoo_kernels", default=None)
_log = logging.getLogger("kernels")


def _check(name: str, origin: str) -> str:
    if name in IMPLEMENTATIONS:
        return name
    close = difflib.get_close_matches(str(name), IMPLEMENTATIONS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"unknown implementation {name!r} in {origin}{hint} choose from {', '.join(IMPLEMENTATIONS)} or auto"
    )


@contextlib.contextmanager
def use(impl: str | None) -> Iterator[None]:
    """Choose the implementation of every operation called inside the block; None or "auto" gives the choice back.

    Example:
        >>> with kernels.use("reference"):
        ...     out = model(x)
    """
    value = None if impl in (None, "auto") else _check(impl, "kernels.use(...)")
    token = _forced.set(value if value is not None else "auto")
    try:
        yield
    finally:
        _forced.reset(token)


def current() -> str | None:
    """The implementation that a context manager or the environment asks for, or None."""
    forced = _forced.get()
    if forced is not None:
        return None if forced == "auto" else forced
    name = os.environ.get(_VARIABLE, "auto") or "auto"
    return None if name == "auto" else _check(name, f"environment variable {_VARIABLE}")


def _constant(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which marks a function, without its import of the whole compiler (2 s)."""
    function._dynamo_marked_constant = True
    return function


@_constant
def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter (the variable must be set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")


@_constant
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def in_forward_mode() -> bool:
    """Inside `torch.func.jvp` and its kin, or among dual tensors: a registered operator drops tangents in silence there."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


@functools.lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    _log.info(message)


def choose(op: str, impl: str | None, *tensors: Tensor, triton_gap: str | None = None) -> str:
    """Settle on an implementation.

    Args:
        op: Name of the operation, for messages.
        impl: What the caller asked for; None or "auto" leaves it to the context, the environment and the device.
        tensors: The inputs; the first one's device decides.
        triton_gap: What the Triton kernels lack for this call (None: nothing). Asked for explicitly, that is an error.

    Returns:
        One of "reference", "torch", "triton".

    Raises:
        NotImplementedError: Triton was asked for explicitly and cannot do this.
        ValueError: Unknown name.
    """
    asked = None if impl in (None, "auto") else _check(impl, "impl=")
    if asked is None:
        # Reading context variables is outside what torch.compile traces; the choice is baked into the graph.
        asked = _current_traceable()
    device = tensors[0].device.type if tensors else "cpu"
    if asked is None and device != "cuda":
        return "torch"
    gap = triton_gap
    if gap is None and any(t.dtype == torch.float64 for t in tensors):
        gap = "float64 inputs"
    if gap is None and in_forward_mode():
        gap = "forward-mode derivatives and torch.func"
    if asked == "triton":
        if gap is not None:
            raise NotImplementedError(
                f"{op}: no Triton kernel for {gap}; use impl='torch' (or leave impl unset)"
            )
        if device != "cuda" and not interpreting():
            raise NotImplementedError(
                f"{op}: impl='triton' needs tensors on a GPU, got device {device!r}; use impl='torch', "
                "or set TRITON_INTERPRET=1 before Python starts to run the kernels in the interpreter"
            )
        if not has_triton():
            raise NotImplementedError(f"{op}: impl='triton' but triton is not installed; use impl='torch'")
        return "triton"
    if asked is not None:
        return asked
    if gap is not None or not has_triton():
        if not torch.compiler.is_compiling():
            _log_once(f"{op}: torch implementation on {device} ({gap or 'triton is not installed'})")
        return "torch"
    return "triton"


@_constant
def _current_traceable() -> str | None:
    return current()
