"""Send to an abstract socket by one half of a pair of sockets."""

import socket
import time

NEEDS = ("network_namespace", "landlock", "seccomp")


def attempt(at):
    near, _far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.sendto(at.mark.encode(), f"\0{at.abstract}-datagram")
    time.sleep(0.1)


def proof(at, seen):
    return at.mark in at.connections
