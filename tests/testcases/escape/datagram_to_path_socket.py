"""Send to a socket in the file system, such as that of the system's log, by one half of a pair of sockets: a filter
that lets pairs be made because they are connected to each other forgets that a datagram may name another address.
"""

import socket
import time

NEEDS = ("seccomp",)


def attempt(at):
    near, _far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.sendto(at.mark.encode(), at.datagram_socket)
    time.sleep(0.1)


def proof(at, seen):
    return at.mark in at.connections
