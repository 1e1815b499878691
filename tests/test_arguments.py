"""What is wrong with the options of the commands beside `convattn_jax.main`: one line each."""

import importlib

import pytest

ERRORS = [
    ("evaluate", [], "--run: missing; see --help"),
    ("evaluate", ["--run=run", "--lenghts=16"], "--lenghts is no option (did you mean '--lengths'?); see --help"),
    ("evaluate", ["--run=run", "--sentence"], "--sentence: expected one argument; see --help"),
    ("evaluate", ["--run=run", "16"], "unexpected argument '16'; see --help"),
    ("report", [], "FOLDER: missing; see --help"),
    ("report", ["runs", "--base=bert"], "--base is no option (did you mean '--baseline'?); see --help"),
    ("sweep", [], "--sweep: missing; see --help"),
    ("variants", ["--size=tini"], "--size: invalid choice: 'tini' (choose from "),
    ("variants", ["--sise=tiny"], "--sise is no option (did you mean '--size'?); see --help"),
]


@pytest.mark.parametrize(("name", "args", "said"), ERRORS)
def test_a_wrong_option_is_one_line(name, args, said, capsys):
    module = importlib.import_module(f"convattn_jax.{name}{'.__main__' if name in ('report', 'sweep') else ''}")
    with pytest.raises(SystemExit) as ended:
        module.main(args)
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith(f"error: {said}")
    assert written.count("\n") == 1
