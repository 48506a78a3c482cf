"""The Python SDK: `from innkeeper.client import Innkeeper`. Sees only the REST API; imports base."""
