"""Innkeeper: virtual machines that are quick to make, cheap to keep and hard to lose.

The rooms, in the order a VM passes through them, are described in ARCHITECTURE.md.
"""

__version__ = "0.1.0"
