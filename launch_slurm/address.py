"""Prints the IPv4 address under which other nodes reach this one: that of NFT_IFNAME, else the host name's.

Where the host name is on loopback, the node's name is printed instead: other nodes may resolve it better.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # linux/sockios.h; struct ifreq holds the address at byte 20


def interface_address(interface: str) -> str:
    """OSError where the interface has no IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        answer = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
    return socket.inet_ntoa(answer[20:24])


def main() -> int:
    interface, name = os.environ.get("NFT_IFNAME"), os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        found = interface_address(interface) if interface else socket.gethostbyname(socket.gethostname())
    except OSError as e:
        what = f"NFT_IFNAME={interface}: no IPv4 address" if interface else "no address of its own name"
        print(f"nft: node {name}: {what} ({e.strerror or e})", file=sys.stderr)
        return 2
    print(found if interface or not found.startswith("127.") else name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
