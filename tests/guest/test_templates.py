"""Templates of real disks: what a scan finds, what cleaning leaves, and that nobody edits one by hand."""

import os

import pytest
from inside import mounted, sh

from innkeeper.client.errors import ApiError

pytestmark = pytest.mark.guest

FILL = r"""
mkfs.ext4 -q /dev/vda; mkdir -p /data; mount /dev/vda /data; cd /data
mkdir -p etc/ssh etc/ssl root/.aws home/joe/.ssh var/lib/cloud/instances/i-1 var/log
for file in etc/ssh/ssh_host_ed25519_key etc/ssl/some.pem home/joe/.ssh/id_ed25519; do
  printf -- '-----BEGIN OPENSSH PRIVATE KEY-----\n' >$file
done
printf -- '-----BEGIN CERTIFICATE-----\n' >etc/ssl/public.pem
echo 0123456789abcdef0123456789abcdef >etc/machine-id
echo secret >root/.aws/credentials
echo ls >root/.bash_history; echo ls >home/joe/.python_history
echo x >var/lib/cloud/instances/i-1/user-data.txt
printf 'root:$y$j9T$salt$hash:1:\nlocked:!$y$j9T$salt$hash:1:\nnone:*:1:\nempty::1:\n' >etc/shadow
ln -s /etc/passwd home/joe/.netrc; mkfifo root/.netrc; touch home/joe/.npmrc
echo precious >srv; cd /; umount /data"""

MADE_ANEW = {
    ("host-key", "/etc/ssh/ssh_host_ed25519_key"),
    ("machine-id", "/etc/machine-id"),
    ("history", "/root/.bash_history"),
    ("history", "/home/joe/.python_history"),
    ("cloud-init", "/var/lib/cloud/instances/i-1"),
}
SECRETS = {
    ("private-key", "/etc/ssl/some.pem"),
    ("private-key", "/home/joe/.ssh/id_ed25519"),
    ("token", "/root/.aws/credentials"),
    ("password", "/etc/shadow: root"),
    ("password", "/etc/shadow: locked"),
}


@pytest.fixture(scope="module")
def source(daemon):
    made = daemon.inn.launch("tiny", name="to-be-sealed", memory="256M", disk="256M")
    sh(made, f"{FILL}; sync")
    with pytest.raises(ApiError, match="stopped"):
        daemon.inn.template_create("to-be-sealed", "golden")
    made.stop(force=True)
    yield made
    made.delete(force=True)


@pytest.fixture(scope="module")
def sealed(daemon, source):
    """Its name, and what was on the disk of the VM that it is of before it was sealed."""
    before = disk_of(daemon, source)
    daemon.inn.template_create("to-be-sealed", "golden", clean=True, accept=True, by="joe", note="a note").wait()
    yield "golden", before
    for image in daemon.inn.images():
        if image["kind"] == "template":
            daemon.inn.image_delete(image["name"]).wait()


@pytest.fixture
def template(sealed, tidy):
    """Its name; what was launched from it is gone afterwards."""
    return sealed[0]


def disk_of(daemon, vm) -> bytes:
    (path,) = daemon.home.vm(vm.info["id"]).glob("disk0-*.qcow2")
    return path.read_bytes()


def found(findings) -> set[tuple[str, str]]:
    return {(one["kind"], one["path"]) for one in findings}


def test_what_must_not_be_in_it_is_listed_and_refused(daemon, source):
    before = [image["name"] for image in daemon.inn.images()]
    for clean, wanted in ((False, SECRETS | MADE_ANEW), (True, SECRETS)):
        with pytest.raises(ApiError, match=r"/etc/ssl/some\.pem") as refused:
            daemon.inn.template_create("to-be-sealed", "golden", clean=clean).wait()
        assert refused.value.code == "not-sealed"
        assert found(refused.value.facts["findings"]) == wanted
    assert [image["name"] for image in daemon.inn.images()] == before


def test_a_template_is_launched_and_the_vm_it_is_of_keeps_what_was_cleaned(daemon, source, sealed, template):
    assert disk_of(daemon, source) == sealed[1]
    told = daemon.inn.image(template)["template"]
    assert found(told["accepted"]) == SECRETS and told["cleaned"] and told["scanned"]
    assert (told["vm"], told["by"], told["note"]) == ("to-be-sealed", "joe", "a note")
    vm = daemon.inn.launch(template, name="from-template", memory="256M")
    assert vm.info["spec"]["disks"][0]["size"] == 256 << 20  # as the sealed one had it
    mounted(vm)
    left = "cat /data/srv; wc -c </data/etc/machine-id; find /data/etc/ssh /data/root /data/var/lib/cloud -type f"
    assert sh(vm, left).split() == ["precious", "0", "/data/root/.aws/credentials"]


def test_a_manifest_takes_over_what_the_template_has(daemon, source, template):
    document = {"kind": "vm", "name": "from-manifest", "image": template, "memory": "256M", "state": "stopped"}
    (operation,) = daemon.inn.apply([document])["operations"]
    daemon.inn.operation(operation).wait()
    made = daemon.inn.vm("from-manifest").info["spec"]
    assert [disk["size"] for disk in made["disks"]] == [256 << 20] and made["firmware"] == "bios"
    assert [change["action"] for change in daemon.inn.apply([document])["changes"]] == ["none"]
    with pytest.raises(ApiError, match="disks cannot change"):
        daemon.inn.apply([document | {"disks": [{"size": "300M"}]}])


def test_versions_parents_and_who_stands_on_what(daemon, source, template):
    daemon.inn.launch("golden:1", name="from-first", memory="256M", start=False)
    daemon.inn.vm("from-first").clone("from-clone", linked=True).wait()
    daemon.inn.template_create("from-first", "golden", accept=True).wait()
    assert daemon.inn.image("golden")["name"] == "golden:2"
    history = daemon.inn.image_history("golden")
    assert [image["name"] for image in history["line"]] == ["golden:2", "golden:1", "tiny"]
    assert [image["name"] for image in history["versions"]] == ["golden:2", "golden:1"]
    with pytest.raises(ApiError) as refused:
        daemon.inn.image_delete("golden:1")
    assert refused.value.facts["users"] == ["from-clone", "from-first", "golden:2"]
    with pytest.raises(ApiError, match="already"):
        daemon.inn.template_create("from-first", "golden", version="2")
    with pytest.raises(ApiError, match="already"):
        daemon.inn.template_create("from-first", "tiny")
    daemon.inn.image_delete("golden:2").wait()
    assert daemon.inn.image("golden")["name"] == "golden:1"


def test_a_template_that_was_edited_by_hand_starts_nothing(daemon, source, template):
    daemon.inn.image_verify(template).wait()
    assert daemon.inn.image(template)["verified"]
    image = daemon.inn.image(template)
    path = daemon.home.image(image["id"]) / image["files"]["disk"]
    before, data = path.stat(), path.read_bytes()
    daemon.inn.launch(template, name="from-before", memory="256M", start=False)
    with path.open("r+b") as file:
        file.seek(200000)
        file.write(bytes([data[200000] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # whoever did it tries to hide it
    with pytest.raises(ApiError) as launch:
        daemon.inn.launch(template, name="from-after", memory="256M", start=False)
    with pytest.raises(ApiError) as clone:
        daemon.inn.vm("from-before").clone("from-clone").wait()
    with pytest.raises(ApiError) as proof:
        daemon.inn.image_verify(template).wait()
    assert {error.value.code for error in (launch, clone, proof)} == {"image-changed"}
    assert proof.value.facts["files"] == ["disk.qcow2"]
    assert {vm["name"] for vm in daemon.inn.vms()} & {"from-after", "from-clone"} == set()
    path.write_bytes(data)  # put back; and to make sure, proved
    with pytest.raises(ApiError):
        daemon.inn.launch(template, name="from-after", memory="256M", start=False)
    daemon.inn.image_verify(template).wait()
    daemon.inn.launch(template, name="from-after", memory="256M", start=False)
