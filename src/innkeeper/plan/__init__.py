"""Spec + host facts → exactly what will exist: paths, ids, PCI slots, the complete QEMU command. Pure:
no choice is left after it. Imports host, spec, base."""
