"""What scripts/up and scripts/test do before there is anything but Debian's python3: standard library only.

`steps.py` shows and runs steps, `debian.py` brings Debian packages, `python_env.py` the private Python environment;
`up.py` and `test.py` are the two commands.
"""
