"""`sandbox policy`: list, show and check policies."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from pydantic import BaseModel

from sandbox.cli.output import FAILED, OK, add_json, console, print_json, size, subcommand
from sandbox.errors import PolicyError
from sandbox.policy import Policy, load, schema, shipped

_HELP = """\
Lists, shows and checks policies: the TOML files that say what a compile may use and what happens when it fails.

commands:
  list                 the policies that are shipped
  show P               all effective values of a policy, as a TOML file with every key explained
  validate FILE...     check policy files
  schema               the JSON Schema of a policy file, for editors

example:
  sandbox policy show default > mine.toml     # then edit it
  sandbox policy validate mine.toml && sandbox run --policy mine.toml -- script.py

exit codes: 0 fine; 1 a file is not valid; 2 no such policy
"""
#: Columns of the comments that explain a key.
_COMMENT_COLUMNS = 110


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    group = subcommand(commands, "policy", "list, show and check policies", _HELP)
    actions = group.add_subparsers(dest="action", metavar="list|show|validate|schema", required=True)
    listing = subcommand(
        actions, "list", "the shipped policies", "Lists the shipped policies with a few facts of each."
    )
    add_json(listing)
    listing.set_defaults(handler=_list)
    show = subcommand(
        actions, "show", "all effective values",
        "Prints all effective values of a policy as a TOML file that can be edited, each key explained.\n\n"
        "example: sandbox policy show production",
    )  # fmt: skip
    show.add_argument("policy", metavar="P", help="a shipped policy or a TOML file")
    add_json(show)
    show.set_defaults(handler=_show)
    validate = subcommand(
        actions, "validate", "check policy files",
        "Checks policy files: `FILE: ok`, or each fault with key, value and what is allowed.\n\n"
        "example: sandbox policy validate policies/*.toml\n\nexit codes: 0 all valid; 1 a fault",
    )  # fmt: skip
    validate.add_argument("files", metavar="FILE", nargs="+", help="a TOML file")
    add_json(validate)
    validate.set_defaults(handler=_validate)
    structure = subcommand(actions, "schema", "the JSON Schema", "Prints the JSON Schema of a policy file.")
    structure.set_defaults(handler=_schema)


def _list(_arguments: argparse.Namespace) -> int:
    policies = [load(name) for name in shipped()]
    if _arguments.json:
        print_json([_facts(policy) for policy in policies])
        return OK
    from rich.table import Table

    table = Table("policy", "for each job", "in this process", "required", "description")
    for policy in policies:
        facts = _facts(policy)
        table.add_row(
            policy.name,
            f"{facts['wall_seconds']:.0f} s, {size(facts['memory_bytes'])}",
            "also after a crash" if facts["in_process_after_crash"] else "if safe" if facts["in_process"] else "never",
            ", ".join(facts["required"]) or "nothing",
            policy.description,
        )
    console().print(table)
    return OK


def _facts(policy: Policy) -> dict[str, Any]:
    return {
        "name": policy.name,
        "description": policy.description,
        "wall_seconds": policy.limits.wall_seconds,
        "memory_bytes": policy.limits.memory_bytes,
        "parallel_jobs": policy.parallel_jobs,
        "in_process": policy.allow_in_process,
        "in_process_after_crash": policy.allow_in_process_after_crash,
        "required": [name for name, demand in policy.confinement.demands().items() if demand == "require"],
    }


def _show(arguments: argparse.Namespace) -> int:
    policy = load(arguments.policy)
    if arguments.json:
        print_json(policy.model_dump(mode="json"))
    else:
        print(as_toml(policy))
    return OK


def _validate(arguments: argparse.Namespace) -> int:
    found = []
    for file in arguments.files:
        try:
            load(file)
            found.append({"file": file, "ok": True, "faults": []})
        except PolicyError as problem:
            found.append({"file": file, "ok": False, "faults": str(problem).splitlines()})
    if arguments.json:
        print_json(found)
    else:
        for entry in found:
            print("\n".join(entry["faults"]) if entry["faults"] else f"{entry['file']}: ok")
    return OK if all(entry["ok"] for entry in found) else FAILED


def _schema(_arguments: argparse.Namespace) -> int:
    print_json(schema())
    return OK


def as_toml(policy: Policy) -> str:
    """A policy as the text of a policy file: every key with its value and what it means. `parse` reads it back."""
    lines = [f"# All effective values of the policy {policy.name!r}."]
    tables = []
    for name, field in Policy.model_fields.items():
        value = getattr(policy, name)
        if name == "name":
            continue  # a file's name is its policy's name
        if isinstance(value, BaseModel | dict):
            tables.append((name, field.description or "", value))
        else:
            lines += ["", *_key(name, value, field.description or "")]
    for name, description, value in tables:
        lines += ["", "", *_comment(description), f"[{name}]"]
        if isinstance(value, BaseModel):
            for key, field in type(value).model_fields.items():
                lines += ["", *_key(key, getattr(value, key), field.description or "")]
        else:
            # TOML has no null, so no policy file can hold one.
            lines += [f"{json.dumps(key)} = {_value(item)}" for key, item in value.items() if item is not None]
    return "\n".join(lines)


def _key(name: str, value: Any, description: str) -> list[str]:
    hint = f"  # {size(value)}" if name.endswith("_bytes") else ""
    return [*_comment(description), f"{name} = {_value(value)}{hint}"]


def _comment(description: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(description.split()), _COMMENT_COLUMNS)]


def _value(value: Any) -> str:
    # A JSON scalar or array of strings is a TOML one, too.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
