"""The commit that a run notes is the one whose files it runs, and is not made up where there is none."""

import importlib.metadata
import json
import subprocess
import types

import pytest

from convattn_jax import origin


def git(folder, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(("git", "-C", folder, *who, *arguments), capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package's folder in a repository of one commit."""
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("a = 1\n")
    git(folder.parent, "init", "--quiet")
    (tmp_path / "checkout" / ".gitignore").write_text("*.pyc\nenvironment/\n")
    git(folder.parent, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


@pytest.fixture
def installed(monkeypatch):
    """Has pip say where it got the package from."""

    def say(text: str | None) -> None:
        told = types.SimpleNamespace(read_text=lambda name: text if name == "direct_url.json" else None)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: told)

    say(None)
    return say


def test_a_checkout_has_its_commit_and_says_when_files_of_the_package_are_others(package):
    head = git(package, "rev-parse", "HEAD")[:12]
    (package / "left.pyc").write_text("")
    (package.parent / "notes.md").write_text("of no concern to the code")
    assert origin.commit(package) == head
    (package / "more.py").write_text("")
    assert origin.commit(package) == head + origin.CHANGED
    (package / "more.py").unlink()
    (package / "__init__.py").write_text("a = 2\n")
    assert origin.commit(package) == head + origin.CHANGED


def test_a_package_installed_inside_of_another_repository_has_not_its_commit(package, installed):
    inside = package.parent / "environment" / "package"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("")
    assert origin.commit(inside) is None
    installed(json.dumps({"url": "u", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}))
    assert origin.commit(inside) == "0123456789ab"


@pytest.mark.parametrize("told", [None, "", "{", "[]", '{"vcs_info": 1}', '{"dir_info": {"editable": true}}'])
def test_without_git_or_repository_there_is_no_commit(package, installed, told, monkeypatch):
    monkeypatch.setenv("PATH", "")
    installed(told)
    assert origin.commit(package) is None


def test_the_facts_name_code_libraries_and_machine():
    found = json.loads(json.dumps(origin.facts()))
    assert found["code"] == origin.facts()["code"]
    assert {"python", "jax", "flax"} <= found["libraries"].keys()
    assert found["hardware"].endswith("cpu")
    assert found["processes"] == 1
    assert found["time"].endswith("+00:00")
