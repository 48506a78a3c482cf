"""Host ports and (later) bridges, taps, NAT and the firewall. Imports plan, host, spec, base."""
