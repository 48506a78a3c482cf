"""Everything that takes time, one file per verb, over a journal. Imports machine and below.

`engine.py` runs a verb's table of steps and journals each before it runs; `world.py` is what steps may touch;
`verbs.py` lists all verbs. An operation's states:

    running ──all steps done──────────────▶ done
       │ a step fails, or a cancel
       ▼
    undoing ──steps undone, newest first──▶ failed | cancelled

A step that is `idle` this time is run without a line in the journal: whoever comes next begins at the one before it.
A step marked `keep` is past the point of undoing: when it fails the operation has failed and what was made stays.
A daemon that finds an operation `running` or `undoing` at its start goes on with it from the journalled step, so
every `do` and `undo` can run twice.
"""
