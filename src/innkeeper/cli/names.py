"""A friendly name for a VM that was given none."""

from __future__ import annotations

import secrets

ADJECTIVES = """
amber bold brave brisk calm clear clever cosy crisp eager early fair fleet fond fresh gentle glad
golden happy hardy keen kind lively lucky merry mild neat noble plucky polite proud quick quiet
ready rosy silver snug spry steady still sunny swift tidy trusty vivid warm wise witty young zesty
""".split()  # noqa: SIM905 - easier to read and to add to
NOUNS = """
acorn badger beech birch bison brook clover comet cove crane daisy dune falcon fern finch fjord fox
glade grove harbor heron ibex iris lark lynx maple marten meadow moss otter owl pebble pine plover
puffin quail raven reed robin sable spruce swan thistle tulip vale walrus willow wren yak zephyr
""".split()  # noqa: SIM905 - easier to read and to add to


def friendly_name() -> str:
    """`calm-otter`: one of 2,500; who meets a taken one asks for another."""
    return f"{secrets.choice(ADJECTIVES)}-{secrets.choice(NOUNS)}"
