"""Every key there is, documented, with its default; the other files of this folder change a few of them.

Sizes, chosen as `--config=configs/composite.py:SIZE`:

- `tiny`: the embedded demonstration. Docstrings of installed packages, 3 layers of width 128, about 90 s on two
  CPU cores.
- `small`: 12 layers of width 256 (the small model of ELECTRA), the paper's schedule, text files of your own.
- `base`: BERT-base, the paper's schedule, text files of your own.
- `large`: BERT-large, likewise; not in the paper.
"""

from ml_collections import ConfigDict

SIZES = ("tiny", "small", "base", "large")


def get_config(size: str = "tiny") -> ConfigDict:
    """All defaults of one size; plain BERT with absolute positions."""
    if size not in SIZES:
        from convattn_jax.config import UserError

        raise UserError(f"size {size!r} is unknown; known: {', '.join(SIZES)} (as in configs/composite.py:small)")
    config = _paper()
    if size == "tiny":
        _tiny(config)
    elif size == "base":
        config.model.width = 768
        config.model.heads = 12
        config.model.hidden = 3072
        config.model.embedding = 768
    elif size == "large":
        config.model.layers = 24
        config.model.width = 1024
        config.model.heads = 16
        config.model.hidden = 4096
        config.model.embedding = 1024
    return config


def name(variant: str, size: str) -> str:
    """The run folder's name: `composite` for the demonstration, else `composite-small` and so on."""
    return variant if size == "tiny" else f"{variant}-{size}"


def _paper() -> ConfigDict:
    c = ConfigDict()
    c.task = "pretrain"
    c.name = "base"  # the run folder is runs/NAME unless --workdir says otherwise
    c.seed = 0  # initial weights, order of the rows, masks and dropout are functions of it

    c.data = data = ConfigDict()
    data.source = "text"  # docstrings (embedded) | text (files) | tfds
    data.files = ()  # source text: paths or globs; .txt .gz .xz .zst .jsonl; a blank line ends a document
    data.heldout_files = ()  # source text: held-out text of its own; empty: split off by document
    data.heldout_fraction = 0.02  # the share of documents held out when there are no heldout_files
    data.fraction = 1.0  # the share of the training documents that is used; the tokenizer is made of all of them
    data.tfds_name = ""  # source tfds: such as wikipedia/20230601.en or lm1b
    data.tfds_split = "train"
    data.tfds_feature = "text"
    data.tfds_data_dir = ""  # empty: TFDS's own default
    data.layout = "pairs"  # pairs: [CLS] a [SEP] b [SEP], one document | packed: full rows, documents isolated
    data.length = 128  # tokens per row, T
    data.cache_dir = "~/.cache/convattn_jax"  # prepared token rows, shared by all runs; may be gs://...
    data.workers = 0  # processes that tokenise; 0: one per core

    c.tokenizer = tokenizer = ConfigDict()
    tokenizer.model = ""  # a SentencePiece .model to use; empty: train one on the corpus
    tokenizer.vocab_size = 30_004  # pieces to train, the special ones included
    tokenizer.normalization = "reference"  # reference: lower-case, accents stripped, quotes unified | none

    c.model = model = ConfigDict()
    model.mixer = "attention"  # attention | lightweight | dynamic | convbert | convbert_reference
    model.scores = ("content",)  # terms of the attention score, summed; `python -m convattn_jax.variants` lists them
    model.rotation = "none"  # of queries and keys by position: none | rope
    model.branches = ()  # what adds to attention's output: depthwise, depthwise_scaled, relative_values
    for name in ("query_key", "value"):  # how queries and keys, and values, are made from the hidden states
        projection = model[name] = ConfigDict()
        projection.kind = "linear"  # linear | separable (depthwise, then linear) | grouped | none
        projection.radius = 8  # n of the convolution
        projection.groups = 1  # of a grouped convolution; 1 is a dense one
        projection.activation = True  # gelu between the two parts of a separable one
        projection.half = False  # convolve for the first half of the heads only
    model.positions = "absolute"  # position embeddings: absolute | none
    model.radius = 8  # n: taps reach n positions to each side, W = 2n + 1
    # how taps start, fixed and dynamic: reference 0, U(+-1/sqrt(W)) | wide_dynamic 0, N(0, 1) | wide N(0, 4), N(0, 1)
    model.taps_init = "reference"
    model.layers = 12
    model.width = 256  # D
    model.heads = 4  # H
    model.head_size = 0  # K; 0: width / heads
    model.hidden = 1024  # width of the feed-forward layer
    model.embedding = 128  # width of the token embedding; projected to `width` where they differ
    model.max_length = 512  # rows of a position table (absolute, tupe_absolute, tupe_relative); no limit without one
    model.dropout = 0.1  # on embeddings and on each sublayer's output
    model.attention_dropout = 0.1  # on attention probabilities
    model.vocab_multiple = 128  # the embedding has this multiple of rows; the surplus is never predicted
    model.output_bias = "zeros"  # start of the MLM output bias: zeros | unigram (log-frequencies of the corpus)
    model.dtype = "bfloat16"  # of activations and products: float32 | bfloat16; parameters stay float32
    model.kernel = "auto"  # of attention, convolutions, ends of sublayers: auto | pallas_gpu | pallas_tpu | plain
    model.loop = "unroll"  # over layers: unroll (faster steps) | scan (faster compilation); equal results
    model.remat = False  # recompute each layer in the backward pass: less memory, about a third more time

    c.masking = masking = ConfigDict()
    masking.rate = 0.15  # of each row's own tokens are predicted: 80 % [MASK], 10 % random, 10 % kept
    masking.whole_words = False  # mask all pieces of a word together

    c.train = train = ConfigDict()
    train.steps = 1_000_000  # updates; the schedule scales with it
    train.batch_size = 256  # rows per update, over all devices
    train.accumulate = 1  # split each batch into this many passes, for memory
    train.log_every = 100  # steps between two rows of metrics.jsonl
    train.eval_every = 10_000  # steps between two evaluations on held-out text; a multiple of log_every
    train.eval_rows = 2_048  # held-out rows evaluated, at most
    train.skip_nonfinite = 0  # updates left out in a run because their loss or gradient is not finite; then it stops
    train.deterministic = False  # on a GPU: the same bits again after a restart; slower, see docs/reliability.md

    c.optimizer = optimizer = ConfigDict()  # AdamW
    optimizer.learning_rate = 1e-4  # the peak
    optimizer.warmup = 0.01  # share of the steps with a linearly rising rate; then linear decay to zero
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-6
    optimizer.weight_decay = 0.01  # on all but biases and LayerNorm
    optimizer.clip = 1.0  # global norm of the gradient

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_seconds = 600.0  # save at least this often (and at every evaluation)
    checkpoint.keep = 2  # newest checkpoints kept, beside the best by held-out loss

    c.mesh = mesh = ConfigDict()  # devices along each axis; -1: the rest
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1
    mesh.dry_run = False  # only compile for such a mesh, there or not, and say what it would hold and send
    mesh.chips = ""  # of a dry run: these TPUs in place of CPUs, such as v5e:16x16; needs the extra tpu, but no TPU

    c.resume = resume = ConfigDict()
    resume.allow = ()  # keys changed on purpose in a run that has begun, such as optimizer.learning_rate,train.steps

    c.watchdog = watchdog = ConfigDict()  # of runs of several processes
    watchdog.killed_seconds = 100  # until the others miss a process that is gone, and end
    watchdog.frozen_seconds = 300  # without progress, until a process says where it stands and ends
    return c


def _tiny(c: ConfigDict) -> None:
    c.data.source = "docstrings"
    c.data.layout = "packed"
    c.data.length = 64
    c.data.heldout_fraction = 0.12  # enough sentences for the probes of configs/glue.py
    c.tokenizer.vocab_size = 4096

    c.model.dtype = "float32"
    c.model.layers = 3
    c.model.width = 128
    c.model.heads = 2
    c.model.hidden = 512
    c.model.embedding = 128
    c.model.dropout = 0.0  # a single pass over little text underfits: dropout only slows it down
    c.model.attention_dropout = 0.0
    c.model.taps_init = "wide_dynamic"  # near zero, a short run stays on the bag-of-words plateau
    c.model.output_bias = "unigram"

    c.train.steps = 800
    c.train.batch_size = 32
    c.train.log_every = 20
    c.train.eval_every = 200
    c.train.eval_rows = 512
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup = 0.1
    c.optimizer.b2 = 0.98
    c.optimizer.weight_decay = 0.01
    c.checkpoint.every_seconds = 10.0
