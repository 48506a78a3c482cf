"""All commands of `inn`, as data. The order is the order of `inn help` and docs/cli.md."""

from __future__ import annotations

from innkeeper.cli.parser import duration, ports, size
from innkeeper.cli.table import Argument as A
from innkeeper.cli.table import Command as C

FORMATS = ("qcow2", "raw", "vmdk", "vdi", "vhdx", "vpc")

VM = A(("vm",), "name or id of the VM", {"metavar": "VM"}, "vm")
VMS = A(("vms",), "names or ids of VMs", {"metavar": "VM", "nargs": "+"}, "vm")
IMAGE = A(("image",), "name of the image", {"metavar": "IMAGE"}, "image")
NO_WAIT = A(("--no-wait",), "return at once and print the operation's id", {"action": "store_true"})
FOLLOW = A(("-f", "--follow"), "go on as more comes, until ctrl-C", {"action": "store_true"})
FORMAT = A(("--format",), "its format, told from the file's header by default", {"choices": FORMATS})
TIMEOUT = A(
    ("--timeout",), "how long the guest may take, like 90s; then it fails", {"metavar": "TIME", "type": duration}
)

MACHINES, IMAGES, INSIDE, AS_FILES, HOST = (
    "Virtual machines",
    "Images",
    "Inside a guest",
    "Declarative files",
    "Host and daemon",
)

COMMANDS: tuple[C, ...] = (
    C(
        "launch",
        MACHINES,
        "make a VM from an image and start it",
        "launch:launch",
        (
            A(
                ("image",),
                "image to start from; none with --iso: an empty disk",
                {"metavar": "IMAGE", "nargs": "?"},
                "image",
            ),
            A(("--name",), "its name, which is also its hostname; a friendly one by default", {"metavar": "N"}),
            A(("--cpus",), "vCPUs (default 2)", {"metavar": "N", "type": int}),
            A(("--memory",), "RAM, like 2G (default 2G)", {"metavar": "SIZE", "type": size}),
            A(
                ("--disk",),
                "size of the first disk, like 20G (default 20G); repeat for more disks",
                {"metavar": "SIZE", "action": "append", "type": size},
            ),
            A(("--firmware",), "bios (default) or uefi", {"choices": ("bios", "uefi")}),
            A(
                ("--ssh-key",),
                "public key, or private key beside its .pub; by default those in ~/.ssh, or one that is made",
                {"metavar": "FILE", "action": "append"},
                "file",
            ),
            A(("--user",), "login user; the image's own by default", {"metavar": "NAME"}),
            A(("--user-data",), "cloud-init user-data; - is stdin", {"metavar": "FILE"}, "file"),
            A(("--network-config",), "cloud-init network-config; - is stdin", {"metavar": "FILE"}, "file"),
            A(("--ignition",), "Ignition configuration, JSON; - is stdin", {"metavar": "FILE"}, "file"),
            A(("--iso",), "disc of the host to boot once, like an installer", {"metavar": "FILE"}, "file"),
            A(
                ("--publish", "-p"),
                "host port that leads into the guest: [ADDRESS:]HOST:GUEST[/udp]; may be repeated",
                {"metavar": "PORTS", "action": "append", "type": ports},
            ),
            A(("--nic",), "user: NAT (default); none: cable not plugged in", {"choices": ("user", "none")}),
            A(
                ("--env", "-e"),
                "environment variable in the guest, K=V, or K with its value here; may be repeated",
                {"metavar": "K[=V]", "action": "append"},
            ),
            A(("--note",), "free text for people", {"metavar": "TEXT", "default": ""}),
            A(("--no-start",), "make it, but leave it stopped", {"action": "store_true"}),
            A(("--force",), "even where the host has too little memory", {"action": "store_true"}),
            NO_WAIT,
        ),
        (
            "inn launch debian-12 --name web --publish 8080:80",
            "inn launch debian-12 --cpus 4 --memory 8G --disk 100G --firmware uefi",
            "inn launch --iso ./installer.iso --name setup --disk 40G",
        ),
        "document",
        "Ends once the guest is up. SSH keys are put in where the image reads a cloud-init seed.",
    ),
    C(
        "ls",
        MACHINES,
        "list VMs",
        "vms:ls",
        (),
        ("inn ls", "inn ls -o name"),
        "list",
    ),
    C(
        "info",
        MACHINES,
        "everything about one VM",
        "vms:info",
        (VM,),
        ("inn info web", "inn info web -o json"),
        "document",
    ),
    C(
        "start",
        MACHINES,
        "start VMs",
        "lifecycle:start",
        (VMS, A(("--force",), "even where the host has too little memory", {"action": "store_true"}), NO_WAIT),
        ("inn start web db",),
        "list",
    ),
    C(
        "stop",
        MACHINES,
        "shut VMs down",
        "lifecycle:stop",
        (
            VMS,
            A(("--force",), "cut the power instead of asking the guest", {"action": "store_true"}),
            TIMEOUT,
            NO_WAIT,
        ),
        ("inn stop web", "inn stop web --force"),
        "list",
    ),
    C(
        "restart",
        MACHINES,
        "stop and start VMs",
        "lifecycle:restart",
        (
            VMS,
            A(("--force",), "cut the power instead of asking the guest", {"action": "store_true"}),
            TIMEOUT,
            NO_WAIT,
        ),
        ("inn restart web",),
        "list",
    ),
    C(
        "pause",
        MACHINES,
        "stop the vCPUs, keep the memory",
        "lifecycle:pause",
        (VMS, NO_WAIT),
        ("inn pause web",),
        "list",
    ),
    C("resume", MACHINES, "let paused VMs run on", "lifecycle:resume", (VMS, NO_WAIT), ("inn resume web",), "list"),
    C(
        "rm",
        MACHINES,
        "remove VMs with their disks",
        "lifecycle:remove",
        (VMS, A(("--force",), "even while they run", {"action": "store_true"}), NO_WAIT),
        ("inn rm web", "inn rm --force web db"),
        "list",
    ),
    C(
        "ssh",
        INSIDE,
        "log in with SSH",
        "ssh:ssh",
        (
            VM,
            A(("-i", "--identity"), "private key to log in with", {"metavar": "FILE", "action": "append"}, "file"),
            A(("-l", "--login"), "user to log in as; the image's own by default", {"metavar": "NAME"}),
            A(("-t", "--tty"), "give the command a terminal", {"action": "store_true"}),
        ),
        ("inn ssh web", "inn ssh web -- systemctl status nginx", "inn ssh web -- 'ls /etc | wc -l'"),
        "",
        "The guest's host key is known from its first boot, so nothing is asked and nobody can be in the middle. "
        "One word after -- is a line for the guest's shell; several are one command, each word kept as it is. "
        "The exit status is the command's.",
        rest=True,
    ),
    C(
        "exec",
        INSIDE,
        "run a command through the guest agent",
        "execute:execute",
        (
            VM,
            A(
                ("-e", "--env"),
                "environment variable, K=V, or K with its value here; may be repeated",
                {"metavar": "K[=V]", "action": "append"},
            ),
            A(("--cwd",), "folder to run in", {"metavar": "FOLDER"}),
            A(("--timeout",), "kill it after this time, like 90s", {"metavar": "TIME", "type": duration}),
            A(("-n", "--no-stdin"), "do not read stdin", {"action": "store_true"}),
        ),
        (
            "inn exec web -- uname -a",
            "echo hi | inn exec web -- cat",
            "inn exec web -- sh -c 'exit 7'",
        ),
        "document",
        "Runs as root. stdin, where it is no terminal, is read to its end before the command starts. "
        "The exit status is the command's (128 + n when signal n ended it).",
        rest=True,
    ),
    C(
        "cp",
        INSIDE,
        "copy files and folders into and out of guests",
        "copy:copy",
        (
            A(("source",), "PATH, or VM:PATH in a guest", {"metavar": "SRC"}, "file"),
            A(("destination",), "PATH, or VM:PATH in a guest", {"metavar": "DST"}, "file"),
            A(("--via",), "ssh (default where the guest has it) or agent", {"choices": ("ssh", "agent")}),
            A(("-i", "--identity"), "private key for SSH", {"metavar": "FILE", "action": "append"}, "file"),
        ),
        ("inn cp site.tar.gz web:/srv/", "inn cp web:/var/log ./web-log", "inn cp a:/etc/hosts b:/tmp/"),
        "document",
        "Into an existing folder the source keeps its name, else DST is the new name, as with cp -r. Modes are kept. "
        "Over SSH, paths are relative to the home of the login user and written as that user; over the agent they "
        "are relative to / and written as root.",
    ),
    C(
        "console",
        INSIDE,
        "the serial console; ctrl-] leaves",
        "console:console",
        (VM,),
        ("inn console web",),
        "",
    ),
    C(
        "logs",
        INSIDE,
        "what the serial console printed, kept across restarts",
        "logs:logs",
        (VM, FOLLOW, A(("--tail", "-n"), "only the last N lines", {"metavar": "N", "type": int})),
        ("inn logs web --tail 20", "inn logs web -f"),
        "document",
        "On a terminal, colours are kept and other control sequences left out, so a guest cannot rearrange your "
        "screen; into a file or pipe goes every byte.",
    ),
    C(
        "screenshot",
        INSIDE,
        "a PNG of the guest's screen",
        "screenshot:screenshot",
        (VM, A(("file",), "where to write it; - is stdout", {"metavar": "FILE.png"}, "file")),
        ("inn screenshot web web.png",),
        "document",
    ),
    C(
        "image build",
        IMAGES,
        "build a golden image from a recipe",
        "images:build",
        (
            A(("recipe",), "debian-12, debian-13, tiny …", {"metavar": "RECIPE"}, "recipe"),
            A(("--name",), "name of the image; the recipe's by default", {"metavar": "N"}),
            A(("--replace",), "build anew where an image of this name exists", {"action": "store_true"}),
            NO_WAIT,
        ),
        ("inn image build debian-12", "inn image build tiny --replace"),
        "document",
    ),
    C(
        "image import",
        IMAGES,
        "take a copy of a disk image file",
        "images:import_",
        (
            A(("file",), "qcow2, raw, vmdk, vdi, vhdx or vpc", {"metavar": "FILE"}, "file"),
            A(("--name",), "name of the image; the file's by default", {"metavar": "N"}),
            FORMAT,
            NO_WAIT,
        ),
        ("inn image import ./appliance.vmdk --name appliance",),
        "document",
    ),
    C(
        "image pull",
        IMAGES,
        "download a disk image",
        "images:pull",
        (
            A(("url",), "http or https", {"metavar": "URL"}),
            A(("--sha256",), "digest that its bytes must have", {"metavar": "HEX", "required": True}),
            A(("--name",), "name of the image; the file's by default", {"metavar": "N"}),
            FORMAT,
            NO_WAIT,
        ),
        ("inn image pull https://example.org/disk.qcow2 --sha256 9f86d081884c7d65… --name other",),
        "document",
    ),
    C("image ls", IMAGES, "list images", "images:ls", (), ("inn image ls",), "list"),
    C(
        "image info",
        IMAGES,
        "everything about one image",
        "images:info",
        (IMAGE,),
        ("inn image info debian-12",),
        "document",
    ),
    C(
        "image rm",
        IMAGES,
        "remove images that no VM uses",
        "images:remove",
        (A(("images",), "names of images", {"metavar": "IMAGE", "nargs": "+"}, "image"), NO_WAIT),
        ("inn image rm debian-12",),
        "list",
    ),
    C(
        "apply",
        AS_FILES,
        "bring about what YAML files say",
        "manifests:apply",
        (
            A(
                ("-f", "--file"),
                "file, folder of *.yaml files, or - for stdin; may be repeated",
                {"metavar": "FILE|DIR", "action": "append", "required": True, "dest": "files"},
                "file",
            ),
            A(("--dry-run",), "only show what would change", {"action": "store_true"}),
            NO_WAIT,
        ),
        ("inn apply -f web.yaml --dry-run", "inn apply -f machines/"),
        "document",
        "Shows the difference and converges; applied twice, there is nothing to do the second time. In first_boot, "
        "user_data_file, network_config_file, ignition_file and ssh_key_files name files beside the YAML file.",
    ),
    C(
        "export",
        AS_FILES,
        "a VM as YAML for apply",
        "manifests:export",
        (VM,),
        ("inn export web > web.yaml",),
        "document",
    ),
    C("host", HOST, "this host, its accelerator and why, what is free", "host:host", (), ("inn host",), "document"),
    C(
        "op ls",
        HOST,
        "list operations, newest first",
        "operations:ls",
        (
            A(
                ("--state",),
                "only those in this state",
                {"choices": ("running", "undoing", "done", "failed", "cancelled")},
            ),
            A(("--target",), "only those on this VM or image", {"metavar": "NAME"}, "vm"),
        ),
        ("inn op ls --state running",),
        "list",
    ),
    C(
        "op show",
        HOST,
        "one operation",
        "operations:show",
        (
            A(("operation",), "id of the operation", {"metavar": "ID"}, "operation"),
            A(("-f", "--follow"), "show its progress until it ends", {"action": "store_true"}),
        ),
        ("inn op show 3f2a9c41d07b -f",),
        "document",
    ),
    C(
        "op cancel",
        HOST,
        "stop an operation and undo what it did",
        "operations:cancel",
        (A(("operation",), "id of the operation", {"metavar": "ID"}, "operation"), NO_WAIT),
        ("inn op cancel 3f2a9c41d07b",),
        "document",
    ),
    C(
        "events",
        HOST,
        "what happened",
        "events:events",
        (FOLLOW, A(("--tail", "-n"), "only the last N (default 50)", {"metavar": "N", "type": int, "default": 50})),
        ("inn events", "inn events -f"),
        "list",
    ),
    C(
        "daemon start",
        HOST,
        "start innkeeperd; other commands do it by themselves",
        "daemon:start",
        (),
        ("inn daemon start",),
        "document",
        "INNKEEPER_HOME puts all its files into one folder; INNKEEPER_NO_AUTOSTART=1 keeps other commands from "
        "starting it.",
    ),
    C("daemon stop", HOST, "stop innkeeperd; guests go on", "daemon:stop", (), ("inn daemon stop",), "document"),
    C(
        "daemon status",
        HOST,
        "does it run, where, since when",
        "daemon:status",
        (),
        ("inn daemon status",),
        "document",
        "The exit status is 1 when none runs.",
    ),
    C(
        "completion",
        HOST,
        "shell code that completes commands and names",
        "completion:completion",
        (A(("shell",), "which shell", {"choices": ("bash", "zsh", "fish")}),),
        (
            'eval "$(inn completion bash)"',
            "inn completion fish > ~/.config/fish/completions/inn.fish",
        ),
    ),
    C("version", HOST, "versions of inn and the daemon", "daemon:version", (), ("inn version",), "document"),
    C(
        "help",
        HOST,
        "all commands, or one in full",
        "helping:help_",
        (
            A(("words",), "a command", {"metavar": "COMMAND", "nargs": "*"}, "command"),
            A(("--markdown",), "everything as Markdown (docs/cli.md)", {"action": "store_true"}),
        ),
        ("inn help launch",),
    ),
)
