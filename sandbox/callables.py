"""The job kind `callable`: any function, by dill, for tests and custom compilers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import dill

from sandbox.errors import JobError
from sandbox.jobs import CallableSpec, Job, digest, given, new_job_id
from sandbox.limits import Confinement, Limits

#: To find what a function refers to, dill has `dis` print it and takes sys.stdout away meanwhile: one at a time.
_pickling = threading.Lock()


def job(
    function: Callable[..., Any],
    *args: Any,
    limits: Limits | None = None,
    confinement: Confinement | None = None,
    environment: dict[str, str] | None = None,
    result_globals: tuple[str, ...] = (),
    **kwargs: Any,
) -> Job:
    """A job that calls ``function(*args, **kwargs)`` in a child.

    Functions of `__main__` travel by value, so the child never imports the caller's script. The result must be
    plain data (numbers, strings, bytes, containers), or of a class named in ``result_globals`` as `module:name`.

    Raises:
        JobError: the function or its arguments cannot be pickled.
    """
    try:
        with _pickling:
            payload = dill.dumps((function, args, kwargs), recurse=True)
    except Exception as error:
        raise JobError(f"{function!r} cannot be sent to a child: {type(error).__name__}: {error}") from error
    spec = CallableSpec(
        job_id=new_job_id(),
        payload_sha256=digest(payload),
        payload_bytes=len(payload),
        **given(limits=limits, confinement=confinement, environment=environment),
        result_globals=result_globals,
    )
    return Job(spec, payload)


def prepare(spec: CallableSpec, payload: bytes) -> Callable[[], Any]:
    """In the child: the unpickled call."""
    function, args, kwargs = dill.loads(payload)
    return lambda: function(*args, **kwargs)
