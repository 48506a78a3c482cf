"""The `inn` command. Sees only the SDK; imports client and base."""
