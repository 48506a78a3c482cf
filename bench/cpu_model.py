"""The CPU model of emulated guests: system calls and programs in a guest as Innkeeper makes it, and in one whose CPU
says to be Intel's, so that Linux guards against leaks that emulation has not. In turn, in one run; not for KVM.

    .venv/bin/python bench/cpu_model.py [RUNS]
"""

from __future__ import annotations

import json
import sys
from functools import partial

from common import median, running_daemon, say, timed

from innkeeper.qemu.probe import NO_LEAKS

RUNS = next((int(word) for word in sys.argv[1:] if word.isdigit()), 10)
WORK = {
    "system calls": "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); read x </proc/sys/kernel/hostname; done",
    "20 programs": "for i in 1 2 3 4 5 6 7 8 9 10; do /bin/true; /bin/ls / >/dev/null; done",
}


def main() -> None:
    with running_daemon("tiny") as daemon:
        verdict = daemon.inn.host()["accelerator"]
        print(f"accelerator: {verdict['name']}, CPU {verdict['cpu_model']}")
        if NO_LEAKS not in verdict["cpu_model"]:
            return
        ours = daemon.inn.launch("tiny", name="ours", memory="256M", disk="1G")
        daemon.stop()
        kept = daemon.home.data / "accelerator.json"
        document = json.loads(kept.read_text())
        document["cpu_model"] = document["cpu_model"].replace(f",{NO_LEAKS}", "")
        kept.write_text(json.dumps(document))
        daemon.start()
        peer = daemon.inn.launch("tiny", name="peer", memory="256M", disk="1G")
        assert peer.info["machine"]["cpu"] == document["cpu_model"]
        for what, script in WORK.items():
            taken: dict[str, list[float]] = {"ours": [], "peer": []}
            for _ in range(RUNS):
                for name, vm in (("ours", ours), ("peer", peer)):
                    taken[name].append(timed(partial(vm.exec, ["sh", "-c", script])))
            a, b = (median(taken[name]) for name in ("ours", "peer"))
            say(f"{what} in an emulated guest", f"{a * 1000:.0f} ms", f"{b * 1000:.0f} ms", a / b, "less than 1")


main()
