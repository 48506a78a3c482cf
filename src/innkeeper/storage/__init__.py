"""Images, volumes, overlays, seeds: everything that lies on a disk. Imports plan, host, spec, base."""
