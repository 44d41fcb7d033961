"""Open a raw IP socket, which can forge the packets of others."""

import os
import socket

NEEDS = ("network_namespace", "seccomp", "capabilities")
PRIVILEGED = True


def attempt(at):
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    return os.readlink("/proc/self/ns/net")


def proof(at, seen):
    return seen.got == os.readlink("/proc/self/ns/net")  # in a network of its own it sees only itself
