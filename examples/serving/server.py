"""An HTTP server whose model is compiled through the sandbox, while it serves.

    python examples/serving/server.py --port 8000
    curl -d '{"text": "hello"}' http://127.0.0.1:8000/predict

Each length of text is a shape of its own, and each new shape is a new compile. See README.md for the reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Sequence

import torch
import uvicorn
from model import MAX_LENGTH, as_tensor, build
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import sandbox

#: Shapes that wait to be compiled, a count at most; others ask again with their next request.
MAX_WAITING = 8
#: Bytes of a request's body, at most.
MAX_BODY = 64 << 10


class Engine:
    """The model, and a thread that compiles it for one shape after the other. Requests never wait for that thread."""

    def __init__(self) -> None:
        self.uncompiled = build()
        self._compiled = torch.compile(self.uncompiled, dynamic=False)
        # Uses what is compiled and never starts a compile itself: where no guard fits, the model runs uncompiled.
        self._ready_only = torch._dynamo.run(self._compiled)
        self._ready: set[int] = set()
        self._asked: set[int] = set()
        self._waiting: queue.Queue[int | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._compile, name="compile", daemon=True)
        self._closed = False
        self.errors = 0
        self._thread.start()

    def predict(self, text: bytes) -> tuple[list[float], bool]:
        """The probabilities, and whether the compile for this length was done when they were asked for."""
        tensor, ready = as_tensor(text), len(text) in self._ready
        if not ready:
            self._ask(len(text))
        with torch.inference_mode():
            if ready:
                try:
                    return self._ready_only(tensor)[0].tolist(), True
                except Exception:  # noqa: BLE001 - compiled code that fails must not fail the request; it is counted
                    self.errors += 1
            return self.uncompiled(tensor)[0].tolist(), False

    def state(self) -> dict[str, int]:
        """Counts, for `/health`."""
        return {"ready": len(self._ready), "waiting": len(self._asked) - len(self._ready), "errors": self.errors}

    def close(self) -> None:
        """Cancel what is being compiled and end the thread."""
        self._closed = True
        sandbox.uninstall()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(10)

    def _ask(self, length: int) -> None:
        with self._lock:
            if length not in self._asked:
                with contextlib.suppress(queue.Full):  # its next request asks again
                    self._waiting.put_nowait(length)
                    self._asked.add(length)

    def _compile(self) -> None:
        # One compile at a time is all that Dynamo can do in a process. Its settings belong to the thread that makes
        # them. The limit is on shapes of one function: here each length is one.
        with torch._dynamo.config.patch(recompile_limit=MAX_LENGTH, accumulated_recompile_limit=MAX_LENGTH):
            while (length := self._waiting.get()) is not None and not self._closed:
                try:
                    with torch.inference_mode():
                        self._compiled(as_tensor(bytes(length)))
                except Exception as error:  # noqa: BLE001 - the policy `production` never raises; other policies may
                    if self._closed:
                        return
                    print(f"length {length} stays uncompiled: {error}", flush=True)
                    self.errors += 1
                # Also of one that failed: it is not tried again, and runs uncompiled.
                self._ready.add(length)


engine: Engine


async def predict(request: Request) -> JSONResponse:
    """`{"text": "..."}` to `{"scores": [...], "compiled": ...}`."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            return JSONResponse({"error": f"a body of more than {MAX_BODY} bytes"}, 413)
    try:
        text = json.loads(body)["text"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return JSONResponse({"error": 'send {"text": "..."}'}, 400)
    if not 0 < len(text) <= MAX_LENGTH:
        return JSONResponse({"error": f"a text has 1 to {MAX_LENGTH} bytes, this one {len(text)}"}, 400)
    # In a thread: the event loop goes on answering while the model computes.
    scores, compiled = await run_in_threadpool(engine.predict, text)
    return JSONResponse({"scores": scores, "compiled": compiled})


async def health(_: Request) -> JSONResponse:
    """Whether requests are answered, and how far the compiles are. Never waits for one."""
    return JSONResponse({"status": "ok", **engine.state()})


async def metrics(_: Request) -> JSONResponse:
    """What `sandbox.stats()` says."""
    return JSONResponse(sandbox.stats().model_dump(mode="json"))


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """At the end, no child and no forkserver stays."""
    yield
    await run_in_threadpool(engine.close)


app = Starlette(
    routes=[
        Route("/predict", predict, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", metrics),
    ],
    lifespan=lifespan,
)


def main(words: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. ``words``: the command line, default that of the process."""
    global engine
    parser = argparse.ArgumentParser(description="serve a small model, compiled through the sandbox")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    parser.add_argument("--policy", default="production", help="a shipped policy or a TOML file")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)  # requests run side by side; their threads are the parallelism
    sandbox.install(arguments.policy)  # first: the forkserver warms up while the rest starts
    engine = Engine()
    listener = socket.create_server((arguments.host, arguments.port))
    print(f"listening on http://{arguments.host}:{listener.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
