"""The one place where things are wired: routes, websockets, errors → HTTP, and the daemon. Imports everything.

`daemon.py` brings a host's engine up and down; `app.py` assembles the routes; `problems.py` is the only place where an
error becomes HTTP; `views.py` how documents look from outside.
"""
