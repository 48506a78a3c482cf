"""`inn apply` and `inn export`: VMs and images as YAML files."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from innkeeper.base.errors import InvalidInput
from innkeeper.base.units import GIB, MIB, TIB, format_size
from innkeeper.cli import terminal
from innkeeper.cli.keys import read_public_key
from innkeeper.cli.progress import follow, left_running
from innkeeper.client import ApiError, Innkeeper
from innkeeper.client.errors import InnkeeperError

FILE_FIELDS = {"user_data_file": "user_data", "network_config_file": "network_config", "ignition_file": "ignition"}
"""Fields of first_boot that name a file → the field that gets its text."""

SIGNS = {
    "create": ("+", "green"),
    "build": ("+", "green"),
    "update": ("~", "yellow"),
    "start": ("▸", "green"),
    "stop": ("▪", "yellow"),
}
SIZES = ("memory", "size")
LONGEST = 100
"""Characters of a value that a difference shows."""


class Document(NamedTuple):
    """One YAML document, and where each part of it stands."""

    content: dict[str, Any]
    node: Any
    file: str

    def line(self, field: str) -> int:
        """The line of a field like `nics.0.mac`, or of the nearest thing around it."""
        node, found = self.node, self.node
        for part in field.split("."):
            if isinstance(node, yaml.MappingNode):
                entry = next(((key, value) for key, value in node.value if key.value == part), None)
                if entry is None:
                    break
                found, node = entry[0], entry[1]
            elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
                found = node = node.value[int(part)]
            else:
                break
        return int(found.start_mark.line) + 1


def apply(inn: Innkeeper, args: Namespace) -> int:
    """Show the difference, then follow what was begun."""
    documents = [document for name in args.files for document in read(name)]
    if not documents:
        raise InvalidInput(f"nothing in {', '.join(args.files)} to apply")
    try:
        answer = inn.apply([document.content for document in documents], dry_run=args.dry_run)
    except ApiError as error:
        raise _located(error, documents) from None
    operations = [inn.operation(id) for id in answer.get("operations") or ()]
    if args.output == "text":
        _show(answer.get("changes") or [], args.dry_run)
    failed = 0
    for index, operation in enumerate(operations if not args.no_wait else ()):
        try:
            follow(operation)
        except InnkeeperError as error:
            from innkeeper.cli.main import report

            failed += 1
            report(error)
        except SystemExit:
            left_running(*operations[index + 1 :])
            raise
    if args.output == "json":
        terminal.emit_json(answer | {"operations": [operation.document for operation in operations]})
    elif args.no_wait:
        for operation in operations:
            terminal.say(operation.id)
    elif operations and not failed:
        terminal.say("done")
    return 1 if failed else 0


def read(name: str) -> list[Document]:
    """The documents of a file, of the *.yaml and *.yml files of a folder, or of stdin (`-`). Raises `InvalidInput` with
    file and line."""
    if name == "-":
        return parse(sys.stdin.read(), "<stdin>", Path.cwd())
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())
        if not files:
            raise InvalidInput(f"there is no *.yaml file in {name}")
    elif path.exists():
        files = [path]
    else:
        raise InvalidInput(f"there is no file {name}")
    documents: list[Document] = []
    for file in files:
        try:
            documents += parse(file.read_text(encoding="utf-8"), str(file), file.absolute().parent)
        except UnicodeDecodeError:
            raise InvalidInput(f"{file} is not UTF-8 text") from None
    return documents


def parse(text: str, file: str, folder: Path) -> list[Document]:
    """YAML text → documents whose file references are resolved from `folder`."""
    loader = yaml.SafeLoader(text)
    documents: list[Document] = []
    try:
        while loader.check_node():
            node: Any = loader.get_node()
            content = loader.construct_document(node)
            if content is None:
                continue
            if not isinstance(content, dict):
                raise InvalidInput(f"{file}:{node.start_mark.line + 1}: a document is a mapping like `kind: vm`")
            document = Document(content, node, file)
            documents.append(document._replace(content=_resolved(document, folder)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        raise InvalidInput(f"{where}: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    return documents


def _resolved(document: Document, folder: Path) -> dict[str, Any]:
    """The document with the files it refers to read in."""
    content = dict(document.content)
    if isinstance(content.get("iso"), str):
        content["iso"] = str(folder / Path(content["iso"]).expanduser())
    first = content.get("first_boot")
    if not isinstance(first, dict):
        return content
    first = dict(first)
    for field, target in FILE_FIELDS.items():
        if (name := first.pop(field, None)) is None:
            continue
        if target in first:
            raise _at(document, f"first_boot.{field}", f"there are both {field} and {target}")
        try:
            first[target] = (folder / Path(str(name)).expanduser()).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8 text"
            raise _at(document, f"first_boot.{field}", f"{name}: {reason}") from None
    names = first.pop("ssh_key_files", None) or []
    if not isinstance(names, list):
        raise _at(document, "first_boot.ssh_key_files", "is a list of files")
    try:
        keys = [read_public_key(folder / Path(str(name)).expanduser())[0] for name in names]
    except InvalidInput as error:
        raise _at(document, "first_boot.ssh_key_files", error.detail) from None
    if keys:
        first["ssh_keys"] = [*(first.get("ssh_keys") or ()), *keys]
    return content | {"first_boot": first}


def _at(document: Document, field: str, problem: str) -> InvalidInput:
    return InvalidInput(f"{document.file}:{document.line(field)}: {field} {problem}")


def _located(error: ApiError, documents: list[Document]) -> InnkeeperError:
    """The daemon's «document 1, field nics.0.mac» as file and line."""
    index = error.facts.get("document")
    if not isinstance(index, int) or not 0 <= index < len(documents) or not error.fields:
        return error
    document = documents[index]
    lines: list[str] = []
    for field, problem in error.fields:
        kind, _, rest = field.partition(".")
        inner = rest if kind in ("vm", "image") else field  # the tag of the union is not in the file
        lines.append(f"{document.file}:{document.line(inner)}: {inner + ': ' if inner else ''}{problem}")
    return InvalidInput("\n".join(lines), hint=error.hint)


def _show(changes: list[dict[str, Any]], dry_run: bool) -> None:
    """The changes as a diff."""
    real = [change for change in changes if change["action"] != "none" or change.get("differences")]
    if not real:
        terminal.say("nothing to do")
    for change in real:
        sign, style = SIGNS.get(change["action"], ("!", "yellow"))
        head = f"{sign} {change['kind']} {change['name']}"
        terminal.say(f"{terminal.paint(head, style + ' bold')}  {terminal.paint(change['action'], style)}")
        for difference in change.get("differences") or ():
            field = str(difference["field"])
            for mark, side, colour in (("-", "old", "red"), ("+", "new", "green")):
                if difference.get(side) is not None:
                    text = f"    {mark} {field}: {_value(field, difference[side])}"
                    terminal.say(terminal.paint(terminal.clean(text), colour))
    for change in changes:
        if change.get("note"):
            terminal.say(terminal.paint(f"  {change['name']}: {terminal.clean(change['note'])}", "dim"))
    if real and dry_run:
        terminal.say(terminal.paint("nothing was changed: this was a dry run", "dim"))


def _value(field: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and field.rpartition(".")[2] in SIZES:
        return format_size(value)
    text = str(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    text = text.removesuffix("\n...")
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def export(inn: Innkeeper, args: Namespace) -> int:
    """A VM as YAML that `apply` takes."""
    document = inn.vm(args.vm).export()
    if args.output == "json":
        terminal.emit_json(document)
    else:
        terminal.say(yaml.safe_dump(_written(document), sort_keys=False, allow_unicode=True).rstrip("\n"))
    return 0


def _written(value: Any, field: str = "") -> Any:
    """A document as a person would write it: sizes like `2G`, nothing that says nothing."""
    if isinstance(value, dict):
        return {k: _written(v, k) for k, v in value.items() if v not in (None, "", [], {})}
    if isinstance(value, list):
        return [_written(one, field) for one in value]
    if field in SIZES and isinstance(value, int):
        for suffix, unit in (("T", TIB), ("G", GIB), ("M", MIB)):
            if value and value % unit == 0:
                return f"{value // unit}{suffix}"
    return value
