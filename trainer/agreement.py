"""Whether all ranks run the same thing: code, settings, data; and if not, which differ, and how."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch

from trainer.config import Config
from trainer.fingerprint import Fingerprint
from utils import shipped
from utils.config import ConfigError, leaves
from utils.distributed import Session
from utils.version import VERSION

PACKAGES = ("model", "pipeline", "trainer", "utils")
ABSENT = "absent"
SHOWN = 12  # digits of a hash
MOST = 8  # differences that are named


def check_same_run(config: Config, options: Mapping[str, object], session: Session) -> None:
    """Raise ConfigError on all ranks unless they have the same code and settings. Collective.

    options: what the command line says beside the settings, by flag.
    """
    if session.world_size == 1:
        return
    settings = {key: str(value) for key, value in leaves(config).items()}
    flags = {flag: str(value) for flag, value in options.items()}
    check_same({**_code(), **flags, **settings}, session)


def check_same_inputs(print_of: Fingerprint, session: Session) -> None:
    """Raise ConfigError on all ranks unless they read the same data and weights. Collective."""
    facts = asdict(print_of)
    named = {
        "data.path, number of records": str(facts["records"]),
        "data.path, captions": facts["captions"][:SHOWN],
        "data.path, latents, images or trajectories": facts["tensors"][:SHOWN],
    }
    named |= {f"{role}, first weights": digest[:SHOWN] for role, digest in facts["weights"].items()}
    check_same(named, session)


def check_same(own: Mapping[str, str], session: Session) -> None:
    """Raise ConfigError on all ranks unless each has the same facts, by name. Collective.

    One short message per rank; only where they differ all facts are sent.
    """
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(session.gather(digest))) == 1:
        return
    told = session.gather((socket.gethostname(), dict(own)))
    hosts, facts = [host for host, _ in told], [fact for _, fact in told]
    differing = list(differences(facts, hosts))
    more = [f"and {len(differing) - MOST} more"] if len(differing) > MOST else []
    raise ConfigError(
        f"ranks disagree; start all with the same code, command line and data: "
        f"{'; '.join(differing[:MOST] + more)}"
    )


def differences(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> Iterator[str]:
    """A phrase for each fact in which some ranks differ from most, or of equal halves rank 0's.

    facts, hosts: of each rank.
    """
    for name in sorted(set().union(*facts)):
        values = [fact.get(name, ABSENT) for fact in facts]
        groups = Counter(values)
        if len(groups) == 1:
            continue
        usual = max(groups, key=lambda value: (groups[value], value == values[0]))
        others = [
            f"{value} on {named_ranks([r for r, v in enumerate(values) if v == value], hosts)}"
            for value in groups
            if value != usual
        ]
        yield f"{name}: {usual}, but {', '.join(others)}"


def named_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks and where they are, in words. ranks: rising. hosts: of every rank."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    numbers = ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
    where = sorted({hosts[rank] for rank in ranks})
    shown = ", ".join(where[:MOST]) + (", ..." if len(where) > MOST else "")
    plural, hosts_word = ("s" if len(ranks) > 1 else ""), ("hosts" if len(where) > 1 else "host")
    return f"rank{plural} {numbers} ({hosts_word} {shown})"


def _code() -> dict[str, str]:
    """What a rank runs: versions, and a hash of each source file."""
    root = shipped.ROOT
    files = [root / "train.py"]
    files += [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    sources = {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()[:SHOWN]
        for file in files
        if file.is_file()
    }
    versions = {"Fewstep": VERSION, "torch": torch.__version__, "Python": platform.python_version()}
    return {**{f"version of {name}": version for name, version in versions.items()}, **sources}
