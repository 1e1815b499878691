"""What a run was made by: the commit and digest of this code, its libraries, its machine; a line of starts.jsonl."""

import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax

from convattn_jax import distributed

PACKAGE = pathlib.Path(__file__).parent
CHANGED = "+changes"  # behind a commit: files of the package are not as it has them


def facts() -> dict[str, Any]:
    """What is known of this start, as JSON takes it; `commit` is None where there is none to be known.

    `code` is a digest of the package's files: the same code has the same, wherever it was installed from.
    """
    found = dict(distributed.code())
    libraries = {name: found.pop(name) for name in distributed.LIBRARIES}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(PACKAGE),
        "code": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12],
        "libraries": {"python": platform.python_version(), **libraries},
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def commit(package: pathlib.Path) -> str | None:
    """The commit of the checkout that the package's files belong to, or else the one that pip installed it from."""
    # an environment may lie inside of somebody else's repository, which does not track its files
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        head = _git(package, "rev-parse", "--short=12", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", ".")
        return None if head is None or changed is None else head + (CHANGED if changed else "")
    try:
        told = importlib.metadata.distribution("convattn_jax").read_text("direct_url.json")
        found = json.loads(told or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return str(found)[:12] if found else None


def _git(folder: pathlib.Path, *arguments: str) -> str | None:
    """What git prints; None where it is missing, refuses or doesn't come back."""
    try:
        done = subprocess.run(
            ("git", "-C", str(folder), *arguments), capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
