"""Ask the kernel by netlink which sockets of the host listen."""

import socket
import struct

NEEDS = ("network_namespace", "seccomp")


def attempt(at):
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
    request = struct.pack("BBBBI48x", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 1 << 10)
    netlink.send(struct.pack("IHHII", 16 + len(request), 20, 0x301, 1, 0) + request)
    netlink.settimeout(2)
    ports, data = [], b"go on"
    while data:
        data = netlink.recv(1 << 16)
        while len(data) >= 16:
            length, kind = struct.unpack_from("IH", data)
            if kind == 2:
                raise OSError(-struct.unpack_from("i", data, 16)[0], "netlink")
            if kind == 3:
                return ports
            ports.append(struct.unpack_from("!H", data, 20)[0])
            data = data[(length + 3) & ~3 :]
        data = b"go on"


def proof(at, seen):
    return at.tcp_port in (seen.got or [])
