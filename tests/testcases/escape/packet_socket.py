"""Open a packet socket, which sees all traffic of an interface."""

import os
import socket

NEEDS = ("network_namespace", "seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    return os.readlink("/proc/self/ns/net")


def proof(at, seen):
    return seen.got == os.readlink("/proc/self/ns/net")  # in a network of its own it sees only itself
