"""A pytest plug-in: the fixture `sandbox_faults`, which injects faults in your own tests.

Not loaded unless asked for, in the top `conftest.py` or on the command line:

    pytest_plugins = ["sandbox.faults.pytest"]          # or: pytest -p sandbox.faults.pytest

    def test_my_service_survives_a_crash(sandbox_faults):
        injection = sandbox_faults("sigsegv", times=1)  # until the test ends
        assert my_service.answers()
        assert injection.given                          # a child really had it

There is no entry point for it: pytest would import it in every project of an environment, and a test run of somebody
else has no use for faults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from sandbox.executor import Sandbox
from sandbox.faults.injection import Injection, Plan, inject
from sandbox.faults.kinds import Shot


@pytest.fixture
def sandbox_faults() -> Iterator[Callable[..., Injection]]:
    """A function with the arguments of :func:`sandbox.faults.inject`; what it arms is disarmed when the test ends.

    Without `into` the sandbox is that of :func:`sandbox.install`; its policy must say `allow_faults`.
    """
    with contextlib.ExitStack() as stack:

        def arm(
            what: str | Shot | Plan, at: str | None = None, *, into: Sandbox | None = None, times: int | None = None
        ) -> Injection:
            return stack.enter_context(inject(what, at, into=into, times=times))

        yield arm
