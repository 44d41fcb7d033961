"""In a child that has no GPU: what PyTorch, Inductor and Triton ask CUDA is answered from a snapshot.

Nothing is initialised and nothing can be launched. A question that the snapshot does not answer ends the job and is
named, also where Inductor would catch the error and go on with a guess. The names that are replaced stand in
:mod:`sandbox.inductor.compat`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError
from sandbox.gpus import Gpu, Gpus
from sandbox.inductor import compat, devices, tensors

#: Modules that have taken `_lazy_init` from `torch.cuda` when they were imported.
_TOOK: Final = ("torch.cuda.memory", "torch.cuda.random")
#: Parts of `torch.cuda` that a compile may ask for and that need a GPU.
_REFUSED: Final = ("_lazy_init", "init", "current_stream", "synchronize", "memory_allocated", "mem_get_info", "Event")


class _Cuda:
    """The answers of one job."""

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._current = gpus.current
        self.refused: list[UnserializableError] = []

    def index(self, device: Any = None) -> int:
        """Of a device as `torch.cuda` takes it.

        Raises:
            UnserializableError: there is none of that number.
        """
        number = device if device is None or isinstance(device, int) else torch.device(device).index
        number = self._current if number is None else int(number)
        if not 0 <= number < len(self._gpus.devices):
            raise self.refusal(f"GPU {number}; the snapshot has {len(self._gpus.devices)}")
        return number

    def gpu(self, device: Any = None) -> Gpu:
        """What the snapshot says of a device; default: the current one."""
        return self._gpus.devices[self.index(device)]

    def properties(self, device: Any = None) -> Any:
        """As `torch.cuda.get_device_properties`."""
        gpu = self.gpu(device)
        return _Known(self, "GPU's", **gpu.model_dump(), gcnArchName=gpu.name, is_multi_gpu_board=0)

    def exchange(self, device: Any) -> int:
        """Make a device the current one, unless its number is negative. Returns the one before."""
        before = self._current
        if not isinstance(device, int) or device >= 0:
            self._current = self.index(device)
        return before

    def refusal(self, what: str) -> UnserializableError:
        """The error for a question that only a GPU can answer. It is kept: whoever asks may catch it."""
        error = UnserializableError("needs_gpu", f"the compile asks for {what}, which only a GPU can answer")
        self.refused.append(error)
        return error

    def refuse(self, what: str) -> Callable[..., Any]:
        """A function that does."""

        def ask(*_: Any, **__: Any) -> Any:
            raise self.refusal(what)

        return ask

    def answers(self) -> dict[str, Any]:
        """Functions of `torch.cuda` by name."""
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "device_count": lambda: len(self._gpus.devices),
            "current_device": self.index,
            "get_device_properties": self.properties,
            "get_device_capability": lambda device=None: self.gpu(device).capability,
            "get_device_name": lambda device=None: self.gpu(device).name,
            "can_device_access_peer": lambda one, other: (self.index(one), self.index(other)) in self._gpus.peers,
            # Inductor puts the state of the random numbers back after a compile, which draws none on a GPU.
            "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device="cuda": None,
            "set_device": self.exchange,
            "_exchange_device": self.exchange,
            "_maybe_exchange_device": self.exchange,
            **{name: self.refuse(f"torch.cuda.{name}") for name in _REFUSED},
        }


class _Known(SimpleNamespace):
    """Has some attributes, and refuses to be asked for others."""

    def __init__(self, cuda: _Cuda, whose: str, **known: Any) -> None:
        super().__init__(**known)
        self._cuda = cuda
        self._whose = whose

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._cuda.refusal(f"the {self._whose} {name}")


class _Driver:
    """Triton's driver: says what is compiled for, and loads nothing."""

    def __init__(self, cuda: _Cuda) -> None:
        self._cuda = cuda
        self.utils = _Known(cuda, "utility of Triton's driver", get_device_properties=self._properties)

    def _properties(self, device: int) -> dict[str, int]:
        gpu = self._cuda.gpu(device)
        return {
            "max_shared_mem": gpu.shared_memory_per_block_optin,
            "max_num_regs": gpu.regs_per_multiprocessor,
            "multiprocessor_count": gpu.multi_processor_count,
            "warpSize": gpu.warp_size,
            "sm_clock_rate": gpu.clock_rate,
            "mem_clock_rate": gpu.memory_clock_rate,
            "mem_bus_width": gpu.memory_bus_width,
        }

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        gpu = self._cuda.gpu()
        return GPUTarget("cuda", gpu.major * 10 + gpu.minor, gpu.warp_size)

    def get_current_device(self) -> int:
        return self._cuda.index()

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self._cuda.index())

    def get_device_interface(self) -> Any:
        return torch.cuda

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._cuda.refusal(f"{name} of Triton's driver")


def of(gpus: Gpus | None) -> contextlib.AbstractContextManager[None]:
    """:func:`answering`, or :func:`absent` if there are none."""
    return absent() if gpus is None else answering(gpus)


@contextlib.contextmanager
def answering(gpus: Gpus) -> Iterator[None]:
    """Inside the block CUDA seems to be there, as the snapshot says, and nothing asks a driver; kernels are compiled
    and not loaded.

    Raises:
        UnserializableError: `needs_gpu`: something was asked that only a GPU can answer, whatever came of it.
    """
    cuda = _Cuda(gpus)
    try:
        with _replaced(cuda, gpus):
            yield
    except Exception as error:
        if cuda.refused:
            raise cuda.refused[0] from error
        raise
    if cuda.refused:
        raise cuda.refused[0]


@contextlib.contextmanager
def absent() -> Iterator[None]:
    """Inside the block there is no GPU, and nothing asks a driver. (PyTorch finds none by itself where they are hidden,
    but by starting CUDA, whose threads and handles stay.)"""
    if not torch.backends.cuda.is_built():
        yield
        return

    def none() -> None:
        raise RuntimeError("No CUDA GPUs are available")  # as CUDA says it; callers look for a RuntimeError

    def count() -> int:
        return 0

    with contextlib.ExitStack() as stack:
        stack.callback(_forget_absence, count)
        for name, answer in (("is_available", lambda: False), ("device_count", count), ("_lazy_init", none)):
            stack.enter_context(compat.replaced(torch.cuda, name, answer))
        for module in _TOOK:
            stack.enter_context(compat.replaced(importlib.import_module(module), "_lazy_init", none))
        stack.enter_context(compat.lent_device_guard())
        yield


def _forget_absence(stub: Any) -> None:
    """What was imported inside the block may have taken a stub for good."""
    interface = sys.modules.get("torch._dynamo.device_interface")
    if interface is not None and interface.CudaInterface.device_count is stub:
        interface.CudaInterface.device_count = staticmethod(torch.cuda.device_count)
    devices.forget()


@contextlib.contextmanager
def _replaced(cuda: _Cuda, gpus: Gpus) -> Iterator[None]:
    answers = cuda.answers()
    with contextlib.ExitStack() as stack:

        def replaced(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(compat.replaced(owner, name, value))

        for name, answer in answers.items():
            replaced(torch.cuda, name, answer)
        for module in _TOOK:
            replaced(importlib.import_module(module), "_lazy_init", answers["_lazy_init"])
        replaced(torch.version, "cuda", gpus.cuda)
        stack.enter_context(compat.raw_stream())
        # It took its functions from torch.cuda when it was imported.
        interface = compat.CudaInterface
        for name in ("current_device", "device_count", "get_device_properties", "set_device"):
            replaced(interface, name, staticmethod(answers[name]))
        for name in ("exchange_device", "maybe_exchange_device"):
            replaced(interface, name, staticmethod(answers[f"_{name}"]))
        replaced(interface, "get_raw_stream", staticmethod(lambda device: 0))
        replaced(compat.fake_tensor, "init_gpu_context", lambda device: None)
        # Decided by `is_available`, which says yes here.
        replaced(compat.FakeTensorMode, "avoid_device_init", property(lambda self: True))
        again = stack.enter_context(compat.triton_driver(_Driver(cuda)))
        replaced(compat.triton_helpers, "set_driver_to_gpu", again)
        replaced(compat.CachingAutotuner, "precompile", _only_compiled(compat.CachingAutotuner.precompile))
        replaced(compat.TritonBenchmarkRequest, "precompile", cuda.refuse("the time that a kernel takes"))
        replaced(compat.GraphLowering, "constant_name", _named_apart(compat.GraphLowering.constant_name))
        stack.enter_context(compat.lent_device_guard())
        stack.enter_context(tensors.kept_here())
        stack.callback(devices.forget)  # what was learnt here is of this snapshot
        devices.forget()
        yield


def _only_compiled(precompile: Callable[..., Any]) -> Callable[..., Any]:
    def compile_only(self: Any, warm_cache_only: bool = True, **options: Any) -> Any:
        return precompile(self, warm_cache_only=True, **options)

    return compile_only


def _named_apart(constant_name: Callable[..., str]) -> Callable[..., str]:
    """Inductor copies a constant of the graph to the device that it is needed on. Here the copy stays, and what is sent
    says where it belongs."""

    def name_of(self: Any, name: str, device_override: torch.device | None) -> str:
        value = self.constants[name]
        if device_override is None or device_override.type != "cuda" or value.device.type != "cpu":
            return constant_name(self, name, device_override)
        with compat.disable_current_modes():
            copy = tensors.meant_for(value.clone(), device_override, of=value)
        index = device_override.index or 0
        found: str = self.allocate_non_dup_const_name(f"{name}_{device_override.type}{index}", copy)
        return found

    return name_of
