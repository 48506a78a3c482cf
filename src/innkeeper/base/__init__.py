"""What every room may use: errors, ids, units, time, undo and the layout of the data folder.

Imports nothing of Innkeeper. Has no state.
"""
