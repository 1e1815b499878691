"""From flags to dataclasses: every key, no other key, the right types, and errors that name the remedy."""

import dataclasses
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import base
from convattn_jax.config import UserError, check_choice, flatten, from_config, load_config_file, parse, to_plain
from convattn_jax.pretrain import PretrainConfig

CONFIGS = pathlib.Path(base.__file__).parent
OTHER_TASKS = ("glue",)
VARIANTS = sorted(path for path in CONFIGS.glob("*.py") if path.stem not in ("__init__", "base", *OTHER_TASKS))
COMPOSITE = str(CONFIGS / "composite.py")


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner


GOOD = {"count": 1, "inner": {"rate": 0.5, "names": ["a"]}}


def test_nested_values_become_dataclasses_and_plain_values_again():
    built = from_config(Outer, GOOD)
    assert built == Outer(1, Inner(0.5, ("a",)))
    assert to_plain(built) == GOOD
    assert from_config(Outer, ConfigDict(GOOD)) == built


def test_a_whole_number_serves_where_a_float_is_asked_for():
    rate = from_config(Outer, {**GOOD, "inner": {"rate": 1, "names": []}}).inner.rate
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "cuont": 2}, "cuont is unknown (did you mean 'count'?); known: count, inner"),
        ({**GOOD, "inner": {**GOOD["inner"], "rat": 1.0}}, "inner.rat is unknown (did you mean 'rate'?)"),
        ({"inner": GOOD["inner"]}, "count missing"),
        ({**GOOD, "count": 1.5}, "count=1.5 must be of type int"),
        ({**GOOD, "count": True}, "count=True must be of type int"),
        ({**GOOD, "inner": {"rate": True, "names": []}}, "inner.rate=True must be of type float"),
        ({**GOOD, "inner": {"rate": 0.5, "names": "a"}}, "inner.names='a' must be a tuple"),
        ({**GOOD, "inner": {"rate": 0.5, "names": (1,)}}, "inner.names=1 must be of type str"),
        ({**GOOD, "inner": 3}, "inner must be a group of keys"),
    ],
)
def test_a_wrong_key_or_type_is_named(values, message):
    with pytest.raises(UserError) as error:
        from_config(Outer, values)
    assert message in str(error.value)


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(UserError, match=r"a.b='fixd' is unknown \(did you mean 'fixed'\?\); known: content, fixed"):
        check_choice("a.b", "fixd", ("content", "fixed"))


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", base.SIZES)
def test_each_configuration_has_each_size(path, size):
    config = load_config_file(f"{path}:{size}")
    if config.data.source == "text":
        config.data.files = ("a.txt",)  # of one's own
    built = from_config(PretrainConfig, config)
    assert built.name == (path.stem if size == "tiny" else f"{path.stem}-{size}")


def test_the_sizes_are_those_of_the_paper():
    def shape(size):
        m = load_config_file(f"{COMPOSITE}:{size}").model
        return m.width, m.layers, m.heads, m.hidden, m.embedding

    assert shape("small") == (256, 12, 4, 1024, 128)
    assert shape("base") == (768, 12, 12, 3072, 768)
    assert shape("large") == (1024, 24, 16, 4096, 1024)


def test_composite_attention_differs_from_bert_by_its_terms_and_positions_only():
    def flat(name):
        return flatten(load_config_file(str(CONFIGS / f"{name}.py")))

    bert, composite = flat("bert"), flat("composite")
    assert {key for key in bert if bert[key] != composite[key]} == {"name", "model.scores", "model.positions"}
    assert composite["model.scores"] == ("content", "fixed", "dynamic_query")
    assert composite["model.radius"] == 8


# --- the command line ---


def command(*args):
    return parse(["main", *args])


def test_flags_override_values_of_every_type():
    parsed = command(
        f"--config={COMPOSITE}:small",
        "--config.model.scores=content,fixed",
        "--config.data.files=a.txt,b*.xz",
        "--config.model.remat=true",
        "--config.optimizer.learning_rate=1",
        "--config.mesh.data=-1",
        "--config.train.steps=7",
        "--config.tokenizer.model=x.model",
    )
    config = parsed.config
    assert config.model.scores == ("content", "fixed")
    assert config.data.files == ("a.txt", "b*.xz")
    assert config.model.remat is True
    assert config.optimizer.learning_rate == 1.0
    assert (config.mesh.data, config.train.steps, config.tokenizer.model) == (-1, 7, "x.model")
    assert from_config(PretrainConfig, config).model.scores == ("content", "fixed")


@pytest.mark.parametrize("value", ["fixed", "fixed,", "('fixed',)"])
def test_a_list_of_one_value(value):
    assert command(f"--config={COMPOSITE}", f"--config.model.scores={value}").config.model.scores == ("fixed",)


def test_values_may_stand_apart_from_their_flags():
    parsed = command(
        "--config", COMPOSITE, "--config.mesh.data", "-1", "--config.model.scores", "content,fixed", "--workdir", "w"
    )
    assert parsed.config.mesh.data == -1
    assert parsed.config.model.scores == ("content", "fixed")
    assert parsed.workdir == "w"


def test_the_run_folder_is_named_after_the_configuration():
    assert command(f"--config={COMPOSITE}").workdir == "runs/composite"
    assert command(f"--config={COMPOSITE}:base").workdir == "runs/composite-base"
    assert command(f"--config={COMPOSITE}", "--config.name=mine").workdir == "runs/mine"
    assert command(f"--config={COMPOSITE}", "--workdir=there").workdir == "there"


COMMAND_LINES = [
    ([], ["--config=FILE is missing; there are: ", "composite.py", "no_positions.py"]),
    (["--config"], ["--config=FILE is missing"]),
    (["--cofnig=composite.py"], ["--cofnig is no option (did you mean 'config'?)"]),
    ([f"--config={COMPOSITE}", "--config.train.steps=1e3"], ["a whole number: write --config.train.steps=1000"]),
    (
        [f"--config={COMPOSITE}", "--config.train.steps="],
        ["--config.train.steps has no value: write --config.train.steps="],
    ),
    ([f"--config={COMPOSITE}", "--config.optimizer.clip="], ["--config.optimizer.clip has no value: write"]),
    ([f"--config={COMPOSITE}", "--config.model.dropout=low"], ["--config.model.dropout=low must be a number: write"]),
    ([f"--config={COMPOSITE}", "--config.model.remat=maybe"], ["--config.model.remat=maybe must be True or False"]),
    (["--config=none.py"], ["--config=none.py: no such file; there are: ", "bert.py"]),
    (["--config=config/composit.py"], ["--config=config/composit.py: no such file (did you mean ", "composite.py'?)"]),
    (["--config=" + COMPOSITE + ":huge"], ["size 'huge' is unknown; known: tiny, small, base"]),
    ([f"--config={COMPOSITE}", f"--config={COMPOSITE}"], ["--config stands there twice"]),
    ([f"--config={COMPOSITE}", "--config.model.raduis=4"], ["did you mean --config.model.radius?"]),
    ([f"--config={COMPOSITE}", "--config.modle.radius=4"], ["did you mean --config.model.radius?"]),
    ([f"--config={COMPOSITE}", "--config.radius=4"], ["did you mean --config.model.radius?"]),
    ([f"--config={COMPOSITE}", "--config.sede=4"], ["did you mean --config.seed?"]),
    ([f"--config={COMPOSITE}", "--config.data.file=4"], ["did you mean --config.data.files?"]),
    ([f"--config={COMPOSITE}", "--config.mesh=4"], ["it is a group, with config.mesh.chips, config.mesh.data"]),
    ([f"--config={COMPOSITE}", "--radius=4"], ["--radius is no option; did you mean --config.model.radius?"]),
    ([f"--config={COMPOSITE}", "--workdri=4"], ["--workdri is no option (did you mean 'workdir'?)"]),
    ([f"--config={COMPOSITE}", "--config.seed=x"], ["--config.seed=x"]),
    ([f"--config={COMPOSITE}", "--config.train.steps=1.5"], ["--config.train.steps=1.5"]),
    ([f"--config={COMPOSITE}", "--config.train.steps"], ["config.train.steps"]),
    ([f"--config={COMPOSITE}", "train"], ["unexpected argument", "--name=value"]),
]


@pytest.mark.parametrize(("args", "messages"), COMMAND_LINES)
def test_what_is_wrong_with_a_command_line_is_said_in_one_line(args, messages):
    with pytest.raises(UserError) as error:
        command(*args)
    text = str(error.value)
    assert "\n" not in text
    for message in messages:
        assert message in text


CONFIGURATION_FILES = [
    ("1 +", "SyntaxError"),
    ("x = 1", "get_config"),
    ("import no_such_module", "no_such_module"),
    ("def get_config(size=''): return {}[size]", "KeyError"),
    ("def get_config(): return 3", "get_config must return a ConfigDict"),
]


@pytest.mark.parametrize(("source", "message"), CONFIGURATION_FILES)
def test_a_broken_configuration_file_is_named(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UserError, match=r"broken\.py") as error:
        command(f"--config={path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_sizes_says_so(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("from configs import base\ndef get_config(): return base.get_config()")
    assert command(f"--config={path}").config.model.layers == 3
    with pytest.raises(UserError, match="takes no size"):
        command(f"--config={path}:small")


def test_a_key_mistyped_in_a_configuration_file_is_named(tmp_path):
    path = tmp_path / "mistyped.py"
    path.write_text(
        "from configs import base\ndef get_config():\n  c = base.get_config()\n  c.model.raduis = 4\n  return c"
    )
    with pytest.raises(UserError, match=r"model\.raduis is unknown \(did you mean 'radius'\?\)"):
        from_config(PretrainConfig, command(f"--config={path}").config)
