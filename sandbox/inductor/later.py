"""The better code of one graph: asked for by a thread that nobody waits for, checked, loaded, exchanged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sandbox.inductor import deferred, reply
from sandbox.inductor.workers import Task, Workers, exclusive
from sandbox.report import Recorder

log = logging.getLogger("sandbox")


class Kept(Exception):
    """There is no better code, so the graph keeps the code that it began with."""

    def __init__(self, reason: str, detail: str) -> None:
        """``reason``: a short word to count by."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Later:
    """Made by the thread that compiles, while the graph is as it was traced; :meth:`exchanged` starts the rest."""

    def __init__(
        self,
        name: str,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        inputs_to_check: Sequence[int],
        graph_kwargs: dict[str, Any],
        region: str | None,
    ) -> None:
        """``name``: for logs; the rest as of the compile."""
        self._name = name
        self._gm = gm
        self._sizes = reply.Sizes.here(example_inputs)
        self._inputs = len(example_inputs)
        self._symints = deferred.symints_of(example_inputs)
        self._rest = (inputs_to_check, graph_kwargs, region)
        self._traced = deferred.traced_strides(gm)
        self._more = deferred.keeps_more(gm)
        # A backward graph may be compiled to write into what it was given.
        self._again = not graph_kwargs.get("is_backward") and deferred.repeatable(gm)
        self._done = False

    def exchanged(self, first: Any, was: str, make: Callable[[], None], workers: Workers, recorder: Recorder) -> Any:
        """An OutputCode that runs ``first``, and the better code when ``make`` has made it.

        Args:
            first: an OutputCode.
            was: what reports say of it: `eager` or `in_child`.
            make: called in a thread of ``workers``, under the settings of the compile. It calls :meth:`load` with a
                child's reply, or raises why there is none.
        """
        self._was = was
        self._recorder = recorder
        self._workers = workers

        def begin(output: Any) -> None:
            self._output = output
            recorder.began()
            workers.add(Task(lambda: self._run(make), lambda: self._settle(Kept("cancelled", ""))))

        return deferred.deferred_class()(first, self._more, begin)

    def never(self, first: Any) -> Any:
        """An OutputCode that runs ``first``, and that no cache takes for the code that was wanted."""
        return deferred.deferred_class()(first, self._more)

    def keeps_strides(self, code: Any) -> bool:
        """Whether compiled code gives every output the strides that were traced."""
        return deferred.same_strides(self._traced, code.output_strides)

    def load(self, value: Any, loaded: Callable[[Any], None]) -> None:
        """Check a child's reply, load its graph, and exchange.

        Args:
            value: the reply.
            loaded: called with the OutputCode before it is saved and used.

        Raises:
            Kept: it is sound, but may not take the place of what runs.
            WireError, UnserializableError, OSError: it is not; another child may do better.
        """
        checked = reply.check_later(value, self._gm, self._sizes, self._inputs)  # a large one takes its time
        if not self.keeps_strides(checked.code):
            raise Kept("strides", f"{checked.code.output_strides} are those of the outputs, traced were {self._traced}")
        guards = [guard for guard, _ in checked.guards]
        text = deferred.guards_text(guards, [size for _, size in self._symints])
        if text is None:
            raise Kept("guards", f"{guards} are about sizes that are no inputs of the graph")
        with exclusive.held(lambda: not self._workers.closed) as held:
            if not held:
                raise Kept("cancelled", "")
            code = reply.load_later(checked, value, self._gm, *self._rest)
            loaded(code)
            self._output.exchange(code, text, [place for place, _ in self._symints], self._again, self._not_usable)
            self._done = True

    def _run(self, make: Callable[[], None]) -> None:
        problem: BaseException | None = None
        try:
            self._output.within(make)
        except BaseException as error:  # noqa: BLE001 - nobody waits for it; it is counted and logged
            problem = error
        self._settle(problem)

    def _settle(self, problem: BaseException | None) -> None:
        self._output.settle()
        if problem is not None and not isinstance(problem, Kept):
            self._recorder.swallowed(problem)
            log.warning("%s: %s: %s", self._name, type(problem).__name__, problem)
        if self._done:
            self._recorder.switched(self._was)
            log.info("%s runs better code from now on", self._name)
            return
        reason = problem.reason if isinstance(problem, Kept) else type(problem).__name__
        self._recorder.kept(reason, begun=True)
        if reason != "cancelled":
            log.warning("%s keeps the code that it began with (%s): %s", self._name, self._was, problem)

    def _not_usable(self, error: Exception) -> None:
        self._recorder.switched_back(self._was, "failed_when_run")
        log.warning(
            "%s: its better code raised %s: %s, where the code before does not; it is not used again",
            self._name,
            type(error).__name__,
            error,
        )
