"""Process groups of `torch.distributed`, as far as code generation asks for them: names, sizes, ranks.

A child talks to nobody. It gets groups of the same names and ranks that pretend, as PyTorch's own tests use them.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from sandbox.inductor import compat


def described() -> dict[str, Any] | None:
    """`{rank, size, groups: {name: [backend, [global rank, ...]]}}` of this process; None where it is in no group."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    world = compat.c10d._world
    groups = {
        str(name): [str(dist.get_backend(group)), sorted(world.pg_group_ranks[group])]
        for group, name in world.pg_names.items()
        if group in world.pg_group_ranks
    }
    return {"rank": dist.get_rank(), "size": dist.get_world_size(), "groups": groups}


def is_group(value: Any) -> bool:
    """Whether it is a process group, which travels by name."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def find(name: str) -> Any:
    """In a child: the group of that name, see :func:`pretend`."""
    return compat.c10d._resolve_process_group(name)


def pretend(data: dict[str, Any] | None) -> None:
    """In a child, for as long as it lives: be a member of the groups that :func:`described` told of."""
    if data is None or dist.is_initialized():
        return  # or the mode `serialize`: the real ones are here
    store = compat.FakeStore()
    dist.init_process_group("fake", store=store, rank=data["rank"], world_size=data["size"])
    world = compat.c10d._world
    for name, (backend, ranks) in data["groups"].items():
        everybody = len(ranks) == data["size"] and name in map(str, world.pg_names.values())
        group = dist.group.WORLD if everybody else dist.new_group(ranks, backend="fake")
        if str(world.pg_names[group]) != name:
            compat.c10d._register_process_group(name, group)
            world.pg_names[group] = name
        world.pg_map[group] = (dist.Backend(backend), store)
