"""The host's network as guests use it. Imports plan, host, spec, base.

So far guests have QEMU's user-mode network, so all that lies here is who holds which host port (`ports.py`). Bridges,
taps, NAT, DHCP, DNS and the firewall will be beside it.
"""
