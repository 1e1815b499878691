"""docs/reliability.md: every promise names tests that exist, and the list of bad input is that of the tests."""

import pathlib
import re

import test_arguments
import test_checkpoint
import test_config
import test_finetune
import test_main

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- bad input: begin -->\n", "<!-- bad input: end -->\n"


def bad_input() -> str:
    """The table of the document: python tests/test_reliability.py writes it there."""
    lines = ["| what is wrong | what is said, in one line |", "|---|---|"]

    def add(where, name, said):
        lines.append("| " + f"{where}: {name} | {said}".replace("\n", " ") + " |")

    for args, said in test_config.COMMAND_LINES:
        shown = " ".join(args).replace(test_config.COMPOSITE, "FILE")
        add("command line", f"`{shown}`" if shown else "nothing", "; ".join(f"`{part}`" for part in said))
    for name, args, said in test_arguments.ERRORS:
        add(name, f"`{' '.join(args)}`" if args else "nothing", f"`{said}`")
    for source, said in test_config.CONFIGURATION_FILES:
        add("configuration file", f"`{source}`", f"`{said}`")
    for where, table in (("pre-training", test_main.ERRORS), ("fine-tuning", test_finetune.ERRORS)):
        for name, case in table.items():
            add(where, name, f"`{case[-1]}`")
    for name, (_, said) in test_checkpoint.DAMAGES.items():
        add("checkpoint", name, f"`{said}`")
    return "\n".join(lines) + "\n"


def test_the_list_of_bad_input_is_that_of_the_tests():
    text = DOCUMENT.read_text()
    listed = text.partition(BEGIN)[2].partition(END)[0]
    assert listed == bad_input()
    assert listed.count("\n") - 2 >= 60


def test_each_promise_names_tests_that_exist():
    text = DOCUMENT.read_text()
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", text))
    here = pathlib.Path(__file__).parent
    files = {path.stem: path.read_text() for path in here.glob("test_*.py")}
    tests = {name for source in files.values() for name in re.findall(r"def (test_\w+)", source)}
    assert len(named) > 20
    assert named <= files.keys() | tests, named - files.keys() - tests


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + bad_input() + END + rest.partition(END)[2])
