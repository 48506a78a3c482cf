"""The accelerator verdict, by real code in a real QEMU."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from innkeeper.base.home import Home
from innkeeper.host import kvm
from innkeeper.host.accelerator import Verdict
from innkeeper.host.facts import QemuFacts
from innkeeper.host.gather import boot_id
from innkeeper.host.users import errand_uid
from innkeeper.qemu import probe as module
from innkeeper.qemu.capabilities import capabilities, find_qemu
from innkeeper.qemu.probe import RIGHT_STATUS, WRONG_STATUS, Outcome, probe, run_guest

SOURCE = Path(module.__file__).with_name("probe.S")
BINARY = SOURCE.with_suffix(".bin")
HANG = b"\xeb\xfe".ljust(16, b"\xf4")
"""`jmp .` at the reset vector."""

needs_qemu = pytest.mark.skipif(find_qemu() is None, reason="QEMU is not installed")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path, tmp_path / "run", tmp_path)


@pytest.fixture
async def qemu(home: Home) -> QemuFacts:
    facts = await capabilities(find_qemu(), home)
    assert facts
    return facts


def _children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "qemu" in each.name()]


@pytest.mark.parametrize(("name", "address"), [("probe", "0xffe00"), ("flags", "0xfffc0")])
def test_the_binary_is_what_the_source_assembles_to(tmp_path: Path, name: str, address: str) -> None:
    if not all(map(shutil.which, ("as", "ld", "objcopy"))):
        pytest.skip("binutils is not installed")
    for command in (
        ["as", "--64", "-o", "rom.o", str(SOURCE.with_name(f"{name}.S"))],
        ["ld", "-m", "elf_x86_64", f"-Ttext={address}", "-e", address, "-o", "rom.elf", "rom.o"],
        ["objcopy", "-O", "binary", "-j", ".text", "rom.elf", "rom.bin"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "rom.bin").read_bytes() == SOURCE.with_name(f"{name}.bin").read_bytes()


@needs_qemu
async def test_an_emulator_that_spoils_flags_does_not_offer_the_instruction(qemu: QemuFacts) -> None:
    outcome = await module.run_guest(qemu, "tcg", qemu.tcg_cpu, code=BINARY.with_name("flags.bin").read_bytes())
    assert outcome.status in (RIGHT_STATUS, WRONG_STATUS), outcome
    wanted = f"{qemu.tcg_cpu},{module.NO_LEAKS}" + (",cx16=off" if outcome.status == WRONG_STATUS else "")
    assert await module._tcg_model(qemu) == wanted
    assert (await run_guest(qemu, "tcg", wanted, deadline=20)).works


def test_what_the_guest_must_find() -> None:
    """20 million rounds of x = x * a + c, by squaring the affine map."""
    step = (6364136223846793005, 1442695040888963407)
    power, rounds = (1, 0), 20_000_000
    while rounds:
        if rounds & 1:
            power = (power[0] * step[0], power[1] * step[0] + step[1])
        step = (step[0] * step[0] % 2**64, (step[1] * step[0] + step[1]) % 2**64)
        power = (power[0] % 2**64, power[1] % 2**64)
        rounds >>= 1
    expected = sum(power) % 2**64
    assert f"movabs  ${expected:#x}, %rax" in SOURCE.read_text()
    assert expected.to_bytes(8, "little") in BINARY.read_bytes()


@needs_qemu
async def test_the_probe_guest_passes_where_64_bit_code_runs(qemu: QemuFacts) -> None:
    outcome = await run_guest(qemu, "tcg", qemu.tcg_cpu, deadline=60)
    assert (outcome.works, outcome.stages, outcome.stderr) == (True, "RPL", "")


@needs_qemu
async def test_a_wrong_result_is_told(qemu: QemuFacts) -> None:
    code = BINARY.read_bytes()
    at = code.index((20_000_000).to_bytes(4, "little"))
    fewer = code[:at] + (1000).to_bytes(4, "little") + code[at + 4 :]
    outcome = await run_guest(qemu, "tcg", qemu.tcg_cpu, deadline=60, code=fewer)
    assert (outcome.status, outcome.stages) == (WRONG_STATUS, "RPL")
    assert "wrong results" in outcome.why_not()


@needs_qemu
async def test_a_guest_that_hangs_is_killed_at_the_deadline(qemu: QemuFacts) -> None:
    outcome = await run_guest(qemu, "tcg", qemu.tcg_cpu, deadline=0.3, code=HANG)
    assert (outcome.status, outcome.works) == (None, False)
    assert _children() == []


@needs_qemu
async def test_cancelling_leaves_no_process_behind(qemu: QemuFacts) -> None:
    account = (uid, ()) if (uid := errand_uid()) else None
    task = asyncio.create_task(run_guest(qemu, "tcg", qemu.tcg_cpu, deadline=60, code=HANG, account=account))
    while not (running := _children()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert running[0].uids().real == (uid or os.getuid())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running[0].is_running()
    assert _children() == []


@needs_qemu
async def test_qemu_that_refuses_is_told_in_its_words(qemu: QemuFacts) -> None:
    outcome = await run_guest(qemu, "tcg", "no-such-cpu", deadline=60)
    assert outcome.status == 1
    assert "no-such-cpu" in outcome.why_not()


def test_each_failure_has_its_own_reason() -> None:
    failures = [Outcome(None, stages, "") for stages in ("", "R", "RP", "RPL")]
    failures += [Outcome(0, stages, "") for stages in ("", "R", "RP", "RPL")]
    failures += [Outcome(WRONG_STATUS, "RPL", ""), Outcome(-6, "", "Assertion"), Outcome(1, "", "no memory")]
    reasons = [failure.why_not() for failure in failures]
    assert len(set(reasons)) == len(failures)
    assert "64-bit guest gets nowhere" in failures[3].why_not()
    assert Outcome(RIGHT_STATUS, "RPL", "").works


# --- the verdict ------------------------------------------------------------------------------------------------


async def test_without_qemu_there_is_a_verdict_too(home: Home) -> None:
    verdict = await probe(None, home)
    assert (verdict.name, verdict.reason) == ("tcg", "QEMU is not installed")
    assert not (home.data / "accelerator.json").exists()


@needs_qemu
async def test_the_verdict_of_this_host(home: Home, qemu: QemuFacts) -> None:
    verdict = await probe(qemu, home)
    assert verdict.boot_id == boot_id()
    assert verdict.kvm_device == kvm.device().identity
    if verdict.name == "kvm":
        assert (await run_guest(qemu, "kvm", verdict.cpu_model)).works
    else:
        assert verdict.cpu_model.split(",")[0] == qemu.tcg_cpu
        assert verdict.hint
        assert "software emulation" in verdict.reason
    assert (await run_guest(qemu, "tcg", qemu.tcg_cpu, deadline=60)).works


@needs_qemu
@pytest.mark.skipif(bool(kvm.device().problem), reason=f"nothing is kept: {kvm.device().problem}")
async def test_the_verdict_is_kept_per_boot_and_qemu(
    home: Home, qemu: QemuFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home.data / "accelerator.json"
    monkeypatch.setattr(module, "DEADLINE", 0.3)  # which verdict it is does not matter here
    first = await probe(qemu, home)
    mark = first.model_copy(update={"reason": "kept"})
    file.write_text(mark.model_dump_json())
    assert (await probe(qemu, home)).reason == "kept"
    assert (await probe(qemu.model_copy(update={"version": "99.0.0"}), home)).reason != "kept"
    file.write_text(mark.model_copy(update={"boot_id": "another"}).model_dump_json())
    again = await probe(qemu, home)
    assert again.reason != "kept"
    assert again.boot_id == boot_id()
    assert Verdict.model_validate_json(file.read_text()) == again


@needs_qemu
async def test_no_kvm_device_is_told_at_once(
    home: Home, qemu: QemuFacts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = kvm.device(str(tmp_path / "kvm"))
    monkeypatch.setattr(module.kvm, "device", lambda: found)
    verdict = await probe(qemu, home)
    assert (verdict.name, verdict.cpu_model.split(",")[0]) == ("tcg", qemu.tcg_cpu)
    assert "is missing" in verdict.reason
    assert not (home.data / "accelerator.json").exists()
