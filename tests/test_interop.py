"""Weights of the reference code give the reference's numbers, and what does not fit is named."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from safetensors.numpy import save_file

from convattn_jax import interop, reference_names
from convattn_jax.config import UserError
from convattn_jax.data import tokenizer
from convattn_jax.inference import load_run
from convattn_jax.interop import from_reference, to_reference
from convattn_jax.model.attention import separate
from convattn_jax.model.classifier import SequenceClassifier
from convattn_jax.model.convolution import convolve
from convattn_jax.model.inputs import from_mask
from convattn_jax.model.projections import project, projection

DATA = pathlib.Path(__file__).parent / "data"
FIXTURES = sorted(path.stem for path in DATA.glob("*.npz"))
SMALL = {
    "vocab_size": 19,
    "embedding_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 7,
}
PROJECTIONS = (
    "linear",
    "convolution 1 1",
    "convolution 9 4",
    "convolution_no_act 2 2",
    "convolution_mixed 2 2",
    "convolution_mixed 1 1",
    "convolution_depth 2 1",
    "convolution_depth_no_act 1 1",
    "convolution_depth_mixed 8 1",
    "convolution_depth_mixed_no_act 2 1",
)
KERNELS = ["dot_product", "qk", "convbert"] + [
    "_".join(word for word in words if word) + " 3"
    for qk in ("", "qk")
    for fixed in ("", "convfixed")
    for query in ("", "convq")
    for key in ("", "convk")
    for branch in ("", "convolution", "convolution_scaled")
    if any((words := (qk, fixed, query, key, branch))[1:])
]


class Fixture:
    """The reference's numbers for one configuration, floats in a type."""

    def __init__(self, name, dtype="float64"):
        with np.load(DATA / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        meta = json.loads(bytes(arrays["meta"]))
        self.config, self.regression = meta["config"], meta["regression"]
        self.arrays = {key: a.astype(dtype) if a.dtype.kind == "f" else a for key, a in arrays.items()}
        self.params, self.grads = self.group("param/"), self.group("grad/")
        self.call = [arrays[key] for key in ("input_ids", "attention_mask", "token_type_ids")]

    def group(self, prefix):
        return {key[len(prefix) :]: a for key, a in self.arrays.items() if key.startswith(prefix)}

    def numbered(self, prefix):
        return np.stack([self.arrays[f"{prefix}.{i}"] for i in range(len(self.group(f"{prefix}.")))])

    def loss(self, logits):
        """Mean cross-entropy over what is scored."""
        labels = self.arrays["labels"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -(picked * (labels >= 0)).sum() / (labels >= 0).sum()


def example(config, classes=None, seed=0):
    """Random tensors of a configuration, as the reference names them."""
    draw = np.random.default_rng(seed)
    c = reference_names.model_config(config, "float32")
    expected = reference_names.tensors(c, config["vocab_size"], classes)
    tensors = {tensor.name: draw.normal(size=tensor.shape).astype(np.float32) for tensor in expected}
    return tensors | {name: value.astype(np.float32) for name, value in reference_names.constants(c).items()}


# --- the reference's numbers ---


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", FIXTURES)
def test_logits_states_attention_loss_and_every_gradient_are_the_references(name, dtype):
    tolerance = {"rtol": 0, "atol": 1e-9 if dtype == "float64" else 1e-4}
    with jax.enable_x64(dtype == "float64"):
        fixture = Fixture(name, dtype)
        model, variables = from_reference(fixture.params, fixture.config)

        def loss(variables):
            logits, outputs = model.apply(variables, *fixture.call, outputs=("hidden", "attention"))
            return fixture.loss(logits), (logits, outputs)

        (value, (logits, outputs)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        valid = fixture.call[1] == 1
        assert logits.dtype == outputs["hidden"].dtype == outputs["attention"].dtype == dtype
        np.testing.assert_allclose(logits, fixture.arrays["logits"], **tolerance)
        np.testing.assert_allclose(outputs["hidden"][:, valid], fixture.numbered("hidden")[:, valid], **tolerance)
        by_query = np.moveaxis(np.asarray(outputs["attention"]), 2, 3)
        np.testing.assert_allclose(
            by_query[:, valid], np.moveaxis(fixture.numbered("attention"), 2, 3)[:, valid], **tolerance
        )
        np.testing.assert_allclose(value, fixture.arrays["loss"], **tolerance)
        found = to_reference(gradient, fixture.config)
        assert fixture.grads.keys() <= found.keys()
        for key, expected in fixture.grads.items():
            np.testing.assert_allclose(found[key], expected, **tolerance, err_msg=key)


@pytest.mark.parametrize("name", ["convbert", "classifier"])
def test_a_call_without_outputs_gives_the_same_logits_alone(name):
    fixture = Fixture(name, "float32")
    model, variables = from_reference(fixture.params, fixture.config)
    alone, with_states = jax.jit(
        lambda v: (model.apply(v, *fixture.call), model.apply(v, *fixture.call, outputs=("hidden",)))
    )(variables)
    np.testing.assert_array_equal(alone, with_states[0])
    assert set(with_states[1]) == {"hidden"}


def test_without_mask_and_types_there_is_no_padding_and_one_type():
    fixture = Fixture("composite", "float32")
    model, variables = from_reference(fixture.params, fixture.config)
    ids = fixture.call[0]
    apply = jax.jit(model.apply)
    expected = apply(variables, ids, np.ones_like(ids), np.zeros_like(ids))
    np.testing.assert_array_equal(apply(variables, ids), expected)


# --- there and back ---


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixtures_tensors_come_back_under_their_names(name):
    fixture = Fixture(name, "float32")
    back = to_reference(from_reference(fixture.params, fixture.config)[1], fixture.config)
    assert back.keys() == fixture.params.keys()
    for key, array in fixture.params.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def round_trip(config, classes=None):
    tensors = example(config, classes)
    back = to_reference(from_reference(tensors, config)[1], config)
    second_names = reference_names.tied(classes)
    assert back.keys() == tensors.keys() | second_names.keys()
    assert all(np.array_equal(back[name], array) and back[name].shape == array.shape for name, array in tensors.items())


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_attention_kernel_goes_there_and_back(kernel):
    round_trip({**SMALL, "attention_kernel": kernel})


@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize("place", range(len(PROJECTIONS)), ids=PROJECTIONS)
def test_every_projection_of_queries_keys_and_values_goes_there_and_back(place, shift):
    qk, value = PROJECTIONS[place], PROJECTIONS[(place + shift) % len(PROJECTIONS)]
    round_trip({**SMALL, "qk": qk, "value_forward": value, "attention_kernel": "qk_convq_convolution 2"})


@pytest.mark.parametrize("classes", [None, 1, 5])
@pytest.mark.parametrize(
    "change",
    [
        {"remove_qk": True},
        {"remove_position_embeddings": True},
        {"attention_head_size": 3},
        {"embedding_size": 8},
        {"num_attention_heads": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_other_flag_goes_there_and_back(change, classes):
    round_trip({**SMALL, **change}, classes)


def test_scanned_layers_are_the_references_layers_too():
    config = {**SMALL, "num_hidden_layers": 3}
    tensors = example(config)
    params = from_reference(tensors, config)[1]["params"]
    layers = [params["encoder"].pop(f"layer_{i}") for i in range(3)]
    params["encoder"]["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    back = to_reference(params, config)
    assert all(np.array_equal(back[name], array) for name, array in tensors.items())


def test_a_tree_of_another_configuration_is_refused():
    variables = from_reference(example(SMALL), SMALL)[1]
    with pytest.raises(
        UserError, match=r"missing: .*fixed/taps; unknown: encoder/embeddings/position; misshapen: .*word"
    ):
        to_reference(
            variables,
            {**SMALL, "vocab_size": 20, "attention_kernel": "qk_convfixed 2", "remove_position_embeddings": True},
        )


# --- what PyTorch's layouts mean ---


def conv1d(x, weight, bias, groups):
    """out[t, o] = bias[o] + sum_c sum_w weight[o, c, w] x[t + w - n, c-th channel of o's group], x (T, D)."""
    outputs, channels, taps = weight.shape
    out = np.tile(bias, (len(x), 1))
    for t in range(len(x)):
        for o in range(outputs):
            first = o // (outputs // groups) * channels
            for w in range(taps):
                place = t + w - taps // 2
                if 0 <= place < len(x):
                    out[t, o] += weight[o, :, w] @ x[place, first : first + channels]
    return out


def projected(text, x, tensors, name):
    """The reference's value or query projection (T, H K) of hidden states with padding zeroed."""
    words, *numbers = text.split()

    def dense(x, part):
        return x @ tensors[f"{part}.weight"].T + tensors[f"{part}.bias"]

    if words == "linear":
        return dense(x, name)
    depth = "depth" in words
    out = conv1d(
        x, tensors[f"{name}_conv.weight"], tensors[f"{name}_conv.bias"], x.shape[1] if depth else int(numbers[1])
    )
    if depth and "no_act" not in words:
        out = out * 0.5 * (1 + np.vectorize(math.erf)(out / math.sqrt(2)))
    if depth:
        out = dense(out, f"{name}_pointwise")
    return np.concatenate([out, dense(x, f"{name}_linear")], axis=1) if "mixed" in words else out


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("text", PROJECTIONS)
@pytest.mark.parametrize(("flag", "name"), [("value_forward", "value"), ("qk", "key")])
def test_projections_mean_what_pytorch_means(text, flag, name):
    config = {**SMALL, flag: text}
    tensors = {key: array.astype(np.float64) for key, array in example(config).items()}
    model, variables = from_reference(tensors, config)
    c = model.network.config
    length, padded = 7, 2
    x = np.random.default_rng(1).normal(size=(1, length, c.width))
    x[:, length - padded :] = 0
    inputs = from_mask(jnp.zeros((1, length), jnp.int32), jnp.asarray([[1] * (length - padded) + [0] * padded]))
    module = projection(c.value if name == "value" else c.query_key, c.width, (c.heads, c.head_size), name)
    params = variables["params"]["encoder"]["layer_0"]["attention"][name]
    alone = nn.apply(lambda module, *args: separate(project([module] * 3, *args, convolve)[1])[0], module)
    found = jax.jit(alone)({"params": params}, x, inputs)
    own = {key.rpartition("self.")[2]: array for key, array in tensors.items() if "self." in key}
    np.testing.assert_allclose(np.reshape(found, (length, -1)), projected(text, x[0], own, name), rtol=0, atol=1e-12)


# --- flags ---


def test_missing_flags_are_the_references_defaults():
    c = reference_names.model_config({}, "float32")
    assert (c.embedding, c.width, c.layers, c.heads, c.head_size, c.hidden, c.max_length) == (
        *(128, 768, 12, 12, 64, 3072, 512),
    )
    assert (c.scores, c.branches, c.positions, c.dropout) == (("content",), (), "absolute", 0.1)
    assert c.query_key.kind == c.value.kind == "linear"


@pytest.mark.parametrize(
    ("kernel", "scores", "branches"),
    [
        ("convolution 3", ("content",), ("depthwise",)),
        ("qk_convolution_scaled 3", ("content",), ("depthwise_scaled",)),
        ("convfixed 3", ("fixed",), ()),
        ("convfixed_convolution 3", ("fixed",), ("depthwise",)),
        ("convk_convq_convfixed_qk 3", ("content", "fixed", "dynamic_query", "dynamic_key"), ()),
    ],
)
def test_products_stand_in_unless_a_convolution_makes_the_score(kernel, scores, branches):
    assert reference_names.parse_kernel(kernel) == ("attention", scores, branches, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_kernel": "qk_convz 3"}, "'convz' is unknown .*convfixed, convq, convk"),
        ({"attention_kernel": "qk_convq"}, "must end in a space and n"),
        ({"attention_kernel": "qk_convq 0"}, "at least 1"),
        ({"attention_kernel": ""}, "'' is unknown"),
        ({"qk": "convolution_deep 2 1"}, "config.qk=.*'deep' is unknown.*depth, mixed, no_act"),
        ({"value_forward": "convolution 2"}, "config.value_forward=.* must end in a space and n g"),
        ({"value_forward": "conv 2 1"}, "'conv' is unknown.*feedforward, convolution"),
        ({"value_forward": "convolution_mixed 2 3"}, "groups=3 must divide"),
        ({"qk": "convolution_mixed 2 1", "num_attention_heads": 1}, "even number of heads"),
        ({"remove_qk": True, "attention_head_size": 3}, "kind=none"),
        ({"hidden_act": "relu"}, "config.hidden_act='relu'"),
        ({"type_vocab_size": 3}, "config.type_vocab_size=3"),
        ({"hidden_size": "8"}, "config.hidden_size='8' must be of type int"),
        ({"num_attention_heads": 0}, "config.num_attention_heads=0"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_a_flag_that_means_nothing_is_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        from_reference({}, {**SMALL, **change})
    assert "\n" not in str(caught.value)


# --- tensors that don't fit ---


def test_all_missing_unknown_and_misshapen_tensors_are_named_at_once():
    tensors = example(SMALL)
    del tensors["cls.predictions.bias"], tensors["bert.encoder.layer.0.attention.self.key.weight"]
    tensors["bert.extra"] = np.zeros(3, np.float32)
    tensors["bert.embeddings.LayerNorm.bias"] = np.zeros((2, 2), np.float32)
    with pytest.raises(UserError) as caught:
        from_reference(tensors, SMALL)
    for part in (
        "missing: bert.encoder.layer.0.attention.self.key.weight, cls.predictions.bias;",
        "unknown: bert.extra;",
        "misshapen: bert.embeddings.LayerNorm.bias (2, 2) instead of (4,)",
    ):
        assert part in str(caught.value)


def test_buffers_and_tied_tensors_are_taken_when_right():
    config = {**SMALL, "attention_kernel": "qk_convfixed 2"}
    tensors = example(config)
    places = np.arange(7)
    extra = {
        "bert.embeddings.position_ids": places[None],
        "bert.encoder.layer.0.attention.self.relative_positions_mat": np.clip(places - places[:, None], -2, 2)[
            None, None
        ]
        + 2,
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }
    variables = from_reference({**tensors, **extra}, config)[1]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, from_reference(tensors, config)[1]))
    for name, right in extra.items():
        with pytest.raises(UserError, match=f"not .*: {name}"):
            from_reference({**tensors, **extra, name: right + 1}, config)
        with pytest.raises(UserError, match=f"misshapen: {name}"):
            from_reference({**tensors, **extra, name: right[..., 1:]}, config)


def test_the_scale_of_an_unscaled_branch_is_one():
    config = {**SMALL, "attention_kernel": "qk_convolution 2"}
    name = "bert.encoder.layer.0.attention.self.convolution_scalar"
    tensors = example(config)
    with pytest.raises(UserError, match=f"not what the configuration makes it: {name}"):
        from_reference({**tensors, name: 2 * tensors[name]}, config)


def test_query_and_key_may_be_absent_where_no_term_reads_them():
    config = {**SMALL, "attention_kernel": "convfixed 2"}
    tensors = example(config)
    unused = [name for name in tensors if "self.query" in name or "self.key" in name]
    model, variables = from_reference(tensors, config)
    without = from_reference({name: array for name, array in tensors.items() if name not in unused}, config)[1]
    ids = np.arange(7)[None]
    assert len(unused) == 4
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(variables, ids), apply(without, ids))


def test_num_labels_and_the_head_must_agree():
    with pytest.raises(UserError, match=r"classifier.weight \(3, 8\) instead of \(2, 8\)"):
        from_reference(example(SMALL, 3), {**SMALL, "num_labels": 2})


def test_types_that_cannot_be_kept_are_refused():
    tensors = example(SMALL)
    doubles = {name: array.astype(np.float64) for name, array in tensors.items()}
    with pytest.raises(UserError, match="float64, which JAX has only with jax_enable_x64"):
        from_reference(doubles, SMALL)
    with pytest.raises(UserError, match=r"several types \(float32, float64\)"):
        from_reference({**doubles, "cls.predictions.bias": tensors["cls.predictions.bias"]}, SMALL)
    with pytest.raises(UserError, match="tensors are float16: convert"):
        from_reference({name: array.astype(np.float16) for name, array in tensors.items()}, SMALL)


# --- the classifier ---


@pytest.mark.parametrize("classes", [1, 3], ids=["regression", "classes"])
def test_a_classifier_drops_out_only_with_an_rng(classes):
    config = {**SMALL, "hidden_dropout_prob": 0.5, "num_labels": classes}
    model, variables = from_reference(example(config, classes), config)
    assert isinstance(model.network, SequenceClassifier)
    ids = np.arange(14).reshape(2, 7)

    @jax.jit
    def logits(seed):
        return model.network.apply(variables, from_mask(jnp.asarray(ids)), rngs={"dropout": jax.random.key(seed)})

    plain = jax.jit(model.apply)(variables, ids)
    assert plain.shape == (2, classes)
    np.testing.assert_array_equal(plain, jax.jit(model.network.apply)(variables, from_mask(jnp.asarray(ids))))
    one, same, other = logits(0), logits(0), logits(1)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one != plain).any()


def test_only_the_first_tokens_state_is_pooled_then_dropped_out():
    c = reference_names.model_config({**SMALL, "hidden_dropout_prob": 0.5}, "float32")
    model = SequenceClassifier(c, 19, classes=2)
    params = jax.jit(model.initial_params)(jax.random.key(0))
    assert params["pooler"]["kernel"].shape == (8, 8)
    assert params["classifier"]["kernel"].shape == (8, 2)
    hidden = jax.random.normal(jax.random.key(1), (3, 7, 8))
    pooled = np.tanh(hidden[:, 0] @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    expected = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    found = model.apply({"params": params}, hidden, method="logits")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    dropped = model.apply({"params": params}, hidden, method="logits", rngs={"dropout": jax.random.key(2)})
    assert (np.abs(dropped - found) > 1e-6).any(axis=1).all()  # the head's own dropout, in each row


# --- the command ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with what the reference leaves behind: weights, configuration, SentencePiece model."""
    folder = tmp_path_factory.mktemp("reference")
    fixture = Fixture("composite")
    save_file(fixture.params, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fixture.config))
    text = tiny.write_corpus(folder / "text.txt").read_text().splitlines()
    tokenizer.train(text, fixture.config["vocab_size"], "reference").save(folder)
    return folder


def command(checkpoint, **changes):
    options = {
        "weights": checkpoint / "model.safetensors",
        "config": checkpoint / "config.json",
        "tokenizer": checkpoint / "tokenizer.model",
        **changes,
    }
    interop.main(["interop", *(f"--{name}={value}" for name, value in options.items())])


def test_the_command_makes_a_run_folder_that_loads(checkpoint, tmp_path, capsys):
    command(checkpoint, workdir=tmp_path / "run")
    assert str(tmp_path / "run") in capsys.readouterr().out
    run, fixture = load_run(tmp_path / "run"), Fixture("composite", "float32")
    found = to_reference(run.params, fixture.config)
    assert all(np.array_equal(found[name], array) for name, array in fixture.params.items())
    assert run.config["name"] == "reference"
    assert run.config["tokenizer"]["vocab_size"] == run.tokenizer.size == 41
    with pytest.raises(SystemExit):
        command(checkpoint, workdir=tmp_path / "run")
    assert "holds a run already" in capsys.readouterr().err


def test_a_pytorch_file_gives_the_same_tensors(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = Fixture("composite").params
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, tmp_path / "pytorch_model.bin")
    command(checkpoint, weights=tmp_path / "pytorch_model.bin", workdir=tmp_path / "run")
    found = to_reference(load_run(tmp_path / "run").params, Fixture("composite").config)
    assert all(np.array_equal(found[name], array.astype(np.float32)) for name, array in tensors.items())


@pytest.mark.parametrize(
    ("option", "name", "content", "message"),
    [
        ("weights", "gone.safetensors", None, "no such file"),
        ("weights", "junk.safetensors", b"junk", "is no safetensors file"),
        ("weights", "junk.bin", b"junk", "needs PyTorch|is no PyTorch checkpoint"),
        ("config", "gone.json", None, "cannot be read"),
        ("config", "junk.json", b"{", "is no JSON"),
        ("config", "list.json", b"[]", "is no JSON object"),
        ("config", "sizes.json", b"{}", "has 41 ids .* vocab_size=30522"),
        ("config", "shape.json", b'{"vocab_size": 41}', "tensors do not fit the configuration: missing"),
        ("tokenizer", "gone.model", None, "cannot be read"),
        ("tokenizer", "junk.model", b"junk", "is no SentencePiece model"),
        ("wieghts", "x", None, "wieghts"),
    ],
)
def test_what_the_command_cannot_use_is_one_line_and_leaves_nothing(
    checkpoint, tmp_path, capsys, option, name, content, message
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        command(checkpoint, workdir=tmp_path / "run", **{option: tmp_path / name})
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1
    assert not (tmp_path / "run").exists()
    assert re.search(message, lines[0])


def test_a_classifier_makes_no_run_folder(checkpoint, tmp_path, capsys):
    fixture = Fixture("classifier")
    save_file(fixture.params, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fixture.config))
    with pytest.raises(SystemExit):
        command(
            checkpoint,
            weights=tmp_path / "model.safetensors",
            config=tmp_path / "config.json",
            workdir=tmp_path / "run",
        )
    assert "is a classifier" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_forgotten_options_are_named(capsys):
    with pytest.raises(SystemExit):
        interop.main(["interop", "--config=x"])
    assert "--weights=FILE, --tokenizer=FILE missing" in capsys.readouterr().err
