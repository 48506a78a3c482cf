"""The `inn` command. Sees only the SDK; imports client and base.

`table` (with `commands`) is the one list of what there is: parsing, help, completion and docs/cli.md all come from it.
A command's code is imported when it runs, so that `inn ls` starts fast; keep imports at the top of a file to what the
command needs on its quickest path.
"""
