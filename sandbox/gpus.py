"""What a compile has to know of GPUs: taken once where they are, sent with the job, answered from there in its child.

A machine without a GPU compiles for one with a recorded snapshot, see :func:`recorded`.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=1 << 48)]
Told = Annotated[int, Field(ge=0, le=1 << 40)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class Gpu(_Model):
    """One GPU, as `torch.cuda.get_device_properties` tells it. Sizes in bytes."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    """As the driver calls it."""
    major: Annotated[int, Field(ge=5, le=99)]
    """Compute capability, before the point."""
    minor: Annotated[int, Field(ge=0, le=9)]
    """Compute capability, behind the point."""
    total_memory: Count
    multi_processor_count: Count
    regs_per_multiprocessor: Count
    max_threads_per_multi_processor: Count
    max_threads_per_block: Count = 1024
    warp_size: Count = 32
    shared_memory_per_block: Count
    shared_memory_per_block_optin: Count
    shared_memory_per_multiprocessor: Count
    L2_cache_size: Count
    clock_rate: Told = 0
    """In kHz; 0 if the driver does not tell."""
    memory_clock_rate: Told = 0
    """In kHz."""
    memory_bus_width: Told = 0
    """In bits."""
    is_integrated: Told = 0

    @property
    def capability(self) -> tuple[int, int]:
        """As `torch.cuda.get_device_capability` tells it."""
        return self.major, self.minor


class Gpus(_Model):
    """The GPUs that a process sees, by index."""

    devices: Annotated[tuple[Gpu, ...], Field(min_length=1, max_length=64)]
    current: Annotated[int, Field(ge=0)] = 0
    """Index of the device that is current where the graph is compiled."""
    cuda: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]{1,2}$")]
    """Version of CUDA that PyTorch was built for."""
    peers: Annotated[tuple[tuple[int, int], ...], Field(max_length=4096)] = ()
    """Pairs of devices of which the first can read the memory of the second."""

    @property
    def target(self) -> str:
        """What is compiled for where the current device is."""
        gpu = self.devices[self.current]
        return f"cuda:{gpu.major}{gpu.minor}"

    @model_validator(mode="after")
    def _known_devices(self) -> Gpus:
        if self.current >= len(self.devices):
            raise ValueError(f"current is {self.current}, and there are {len(self.devices)} devices")
        if any(not 0 <= number < len(self.devices) for pair in self.peers for number in pair):
            raise ValueError(f"peers names a device that is none of the {len(self.devices)}")
        return self


#: NVIDIA's figures for the cards that these are, as their drivers tell them.
_RECORDED: Final = {
    "cuda:90": Gpu(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=85_028_765_696,
        multi_processor_count=132,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=232_448,
        shared_memory_per_multiprocessor=233_472,
        L2_cache_size=52_428_800,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5_120,
    ),
}


def recorded(target: str) -> Gpus | None:
    """The snapshot of a card of that target (`cuda:90`: an H100), None if none was recorded."""
    found = _RECORDED.get(target)
    return Gpus(devices=(found,), cuda="13.0") if found is not None else None
