"""The accelerator verdict: does KVM run 64-bit guests here? (DESIGN.md 2.3)

A probe guest, `probe.S`, runs real long-mode code under a deadline, with the CPU model that guests would get and as
the kind of user that they would run as. That `/dev/kvm` opens proves nothing: under some hypervisors its KVM
interprets 64-bit kernel code so slowly that no guest ever boots.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from innkeeper.base import clock
from innkeeper.base.home import Home
from innkeeper.host import kvm
from innkeeper.host.accelerator import Verdict
from innkeeper.host.cpu import cpu_flags
from innkeeper.host.facts import QemuFacts
from innkeeper.host.gather import boot_id
from innkeeper.host.users import errand_uid
from innkeeper.plan.options import SANDBOX
from innkeeper.qemu.capabilities import keep
from innkeeper.qemu.errand import Account, errand

DEADLINE = 2.0
"""Seconds that all tries have together; where the CPU runs the guest, one takes 0.2."""
ROM_SIZE = 64 << 10
RIGHT_STATUS = 85
"""QEMU's exit status when the guest has found its computation right: `RIGHT` of probe.S * 2 + 1."""
WRONG_STATUS = 43
_REACHED = {
    "": "the guest never ran its first instruction",
    "R": "the guest stopped in 16-bit mode",
    "RP": "the guest stopped in 32-bit mode",
    "RPL": "the guest stopped in 64-bit mode",
}


NO_LEAKS = "vendor=AuthenticAMD,family=20"
"""Properties of a CPU model: it says to be of a kind (AMD's family 14h) without Meltdown, as an emulated one is:
nothing runs ahead in it. On one of Intel's, Linux keeps its page tables from programs (PTI), and each system call
empties the TLB twice, since TCG of 7.2 has no PCID: it takes four times as long (bench/cpu_model.py)."""


@dataclass(frozen=True)
class Outcome:
    """What became of one probe guest."""

    status: int | None
    """QEMU's exit status; None when it was killed at the deadline."""
    stages: str
    """The modes it reached: `R`eal, `P`rotected, `L`ong."""
    stderr: str

    @property
    def works(self) -> bool:
        return self.status == RIGHT_STATUS

    def why_not(self) -> str:
        """The failure as a clause: `the guest stopped in 32-bit mode`."""
        if self.status is None and self.stages == "RPL":
            return (
                "a 64-bit guest gets nowhere: it enters 64-bit mode, then does not finish in "
                f"{DEADLINE:.0f} s what a CPU does in 0.1 s (this KVM interprets 64-bit code, or hangs)"
            )
        if self.status is None:
            return f"{_REACHED.get(self.stages, 'the guest ran wild')} and hung"
        if self.status == WRONG_STATUS:
            return "the guest computes wrong results in 64-bit mode"
        if self.status < 0:
            said = f": {self.stderr}" if self.stderr else ""
            return f"QEMU died of signal {-self.status}{said}"
        if self.stderr and not self.stages:
            return f"QEMU did not start the guest: {self.stderr}"
        return _REACHED.get(self.stages, "the guest ran wild")


async def probe(qemu: QemuFacts | None, home: Home, *, fresh: bool = False) -> Verdict:
    """The verdict of this boot: from the data folder, or reached now (at most 3 s). Never raises for a host
    without KVM: that is a verdict. `fresh` probes again whatever is kept."""
    device = kvm.device()
    version = f"{qemu.version} {qemu.package}".strip() if qemu else ""
    cache = home.data / "accelerator.json"
    with suppress(OSError, ValueError, ValidationError):
        kept = Verdict.model_validate(json.loads(cache.read_bytes()))
        current = (boot_id(), version, device.identity)
        if not fresh and (kept.boot_id, kept.qemu_version, kept.kvm_device) == current and not device.problem:
            return kept
    began = time.monotonic()
    name, reason, hint, cpu_model = await _judge(qemu, device)
    verdict = Verdict(
        name=name,
        reason=reason,
        hint=hint,
        cpu_model=cpu_model,
        seconds=round(time.monotonic() - began, 3),
        boot_id=boot_id(),
        qemu_version=version,
        kvm_device=device.identity,
        checked=clock.now(),
    )
    if qemu and not device.problem:  # what costs nothing to find out is not kept: it may change any time
        keep(cache, verdict.model_dump(mode="json"))
    return verdict


async def _judge(qemu: QemuFacts | None, device: kvm.KvmDevice) -> tuple[Literal["kvm", "tcg"], str, str, str]:
    """(accelerator, reason, hint, CPU model)."""
    if qemu is None:
        return "tcg", "QEMU is not installed", "`apt install qemu-system-x86`", "qemu64"
    software = "guests run in software emulation"
    if device.problem:
        return "tcg", f"{device.problem}; {software}", device.hint, await _tcg_model(qemu)
    uid = errand_uid()
    account: Account | None = (uid, (device.group,) if device.group else ()) if uid else None
    reasons: list[str] = []
    give_up = time.monotonic() + DEADLINE
    for cpu_model in ("host", qemu.tcg_cpu):
        outcome = await run_guest(
            qemu,
            "kvm",
            cpu_model,
            deadline=give_up - time.monotonic(),
            account=account,
            open_as_root=device.root_only,
        )
        if outcome.works and device.root_only and uid:
            return (
                "tcg",
                f"KVM works, but {kvm.DEVICE} is for root only, and guests do not run as root; {software}",
                f"`chgrp kvm {kvm.DEVICE} && chmod 660 {kvm.DEVICE}` (udev does so where it runs)",
                await _tcg_model(qemu),
            )
        if outcome.works:
            but = f" with CPU model {cpu_model} (with `host`, {reasons[0]})" if reasons else ""
            return "kvm", f"a 64-bit guest ran under KVM{but}", "", cpu_model
        reasons.append(outcome.why_not())
        if outcome.status is None:
            break  # it ran, and too slowly: another CPU model changes nothing
    hint = (
        "this host is itself a virtual machine: its hypervisor must offer nested virtualization"
        if "hypervisor" in cpu_flags()
        else "`dmesg | grep -i kvm` may say why; a newer kernel or firmware may help"
    )
    return "tcg", f"{kvm.DEVICE} opens, but {reasons[-1]}; {software}", hint, await _tcg_model(qemu)


async def _tcg_model(qemu: QemuFacts) -> str:
    """The CPU model for guests in software emulation: without CMPXCHG16B where this QEMU would have guests die of it
    (flags.S). It then lacks one instruction of x86-64-v2."""
    outcome = await run_guest(qemu, "tcg", qemu.tcg_cpu, code=_rom("flags.bin"))
    return ",".join([qemu.tcg_cpu, NO_LEAKS, *([] if outcome.works else ["cx16=off"])])


def _rom(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


async def run_guest(
    qemu: QemuFacts,
    accelerator: Literal["kvm", "tcg"],
    cpu_model: str,
    *,
    deadline: float = DEADLINE,
    account: Account | None = None,
    open_as_root: bool = False,
    code: bytes | None = None,
) -> Outcome:
    """Run the probe guest once, for `deadline` seconds at most.

    `account` is whom QEMU runs as. With `open_as_root` it starts as root and becomes that account once it has
    opened /dev/kvm, before the guest runs. `code` is the end of the 64 KiB ROM, probe.bin by
    default. The ROM is in memory: no file is left behind, whatever happens.
    """
    code = _rom("probe.bin") if code is None else code
    rom = os.memfd_create("probe-rom")
    try:
        os.write(rom, bytes(ROM_SIZE - len(code)) + code)
        arguments = _command(qemu, accelerator, cpu_model, rom)
        if account and open_as_root:
            who = f"{account[0]}:{account[0]}"
            with_user = "run-with-user" in qemu.features  # replaces -runas, which newer ones have no more
            arguments += ["-run-with", f"user={who}"] if with_user else ["-runas", who]
            account = None
        elif "sandbox" in qemu.features:
            arguments += SANDBOX.words()
        async with errand(arguments, pass_fds=[rom], account=account) as process:
            assert process.stdout and process.stderr
            try:
                async with asyncio.timeout(max(0.0, deadline)):
                    status: int | None = await process.wait()
            except TimeoutError:
                status = None
                process.kill()
            stages, stderr = await asyncio.gather(process.stdout.read(), process.stderr.read())
    finally:
        os.close(rom)
    lines = [line for line in stderr.decode(errors="replace").splitlines() if "warning:" not in line]
    return Outcome(status, stages.decode(errors="replace"), " / ".join(lines)[:400])


def _command(qemu: QemuFacts, accelerator: str, cpu_model: str, rom: int) -> list[str]:
    return [
        qemu.path,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", qemu.machine, "-accel", accelerator, "-cpu", cpu_model, "-m", "2M"),
        *("-bios", f"/proc/self/fd/{rom}"),
        *("-chardev", "stdio,id=stages,signal=off"),
        *("-device", json.dumps({"driver": "isa-debugcon", "iobase": 0xE9, "chardev": "stages"})),
        *("-device", json.dumps({"driver": "isa-debug-exit", "iobase": 0xF4, "iosize": 4})),
    ]
