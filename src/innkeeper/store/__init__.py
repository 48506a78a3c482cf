"""Versioned documents: get, list by prefix, compare-and-set transactions, watch. Imports base.

`contract.py` is what every store does; `memory.py` keeps documents in memory; `sqlite.py` adds durability on one
host. A cluster's store (etcd) will be a third implementation of the same contract. `tests/unit/test_store.py` runs
one suite on all of them.

Keys, by prefix:

    vm/<id>  live/<id>  secret/vm/<id>    a VM, its running QEMU, what must not be shown
    image/<id>                            a golden image
    operation/<id>                        the journal
    event/<seq>                           what happened, oldest first
    name/vm/<name>  name/image/<name>     → id; being a key makes a name unique
    port/<protocol>/<port>  slot/<n>      claims of a VM: host ports, its number
"""
