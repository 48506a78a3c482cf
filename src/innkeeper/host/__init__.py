"""Facts about this host as a value: CPU, memory, kernel features, tools, the accelerator verdict. Reads
the host, changes nothing. Imports spec and base."""
