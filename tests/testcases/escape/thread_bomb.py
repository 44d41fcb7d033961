"""Start threads without end."""

import threading
import time

NEEDS = ()


def attempt(at):
    threading.stack_size(65536)
    for _ in range(1000):
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
    time.sleep(5)


def proof(at, seen):
    return seen.result.status.value == "ok"
