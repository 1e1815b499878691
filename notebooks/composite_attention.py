# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convolutions inside attention
#
# A language model that reads a text as a bag of words needs to be told where each word stands. BERT adds a vector for
# each position to its input. **Composite attention**
# ([Chang et al., ACL 2021](https://arxiv.org/abs/2106.05505)) adds a *convolution* to the attention score instead:
#
# $$\mathrm{score}_{ij} = \frac{q_i \cdot k_j + q_i \cdot w^Q_{c(j-i)}}{\sqrt K} + \beta_{h,c(j-i)}$$
#
# $\beta$ is a small kernel of each head, the same everywhere: "look one word back". $w^Q$ makes a kernel out of each
# query: an *of* may look elsewhere than a *returns*. Both reach 8 tokens to each side.
#
# In about five minutes this notebook trains a small BERT with composite attention, shows what its convolutions have
# learned, and compares it with an ordinary BERT. The text is what every machine with Python has: the docstrings of the
# installed packages. Two CPU cores are enough; a GPU or TPU is used if there is one.

# %%
import importlib.metadata
import os
import pathlib
import subprocess
import sys

REPOSITORY = ""  # outside a checkout: the address from which to `git clone` this project

here = pathlib.Path(os.environ.get("CONVATTN_CHECKOUT", ".")).absolute()
folders = [here, *here.parents, here / "convattn"]
checkout = next((folder for folder in folders if (folder / "configs" / "composite.py").exists()), folders[-1])
if not checkout.exists():
    if not REPOSITORY:
        raise SystemExit("Set REPOSITORY, above, to the address of this project, and run this cell again.")
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, checkout], check=True)
sys.path.insert(0, str(checkout))
try:
    importlib.metadata.version("convattn_jax")
except importlib.metadata.PackageNotFoundError:
    # should pip ask for it: restart the session, and run this cell again
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", checkout], check=True)

STEPS = int(os.environ.get("CONVATTN_NOTEBOOK_STEPS", "400"))  # twice as many sharpen the pictures

# %% [markdown]
# ## Train
#
# The same command as in a terminal, `python -m convattn_jax.main --config=configs/composite.py`, with fewer steps. The
# first time it gathers the text and trains a tokenizer. Run the cell again after an interruption: it goes on.

# %%
from convattn_jax.main import main


def train(variant: str) -> str:
    """Trains a variant, one of the files in configs/, and returns its run folder."""
    folder, log = f"runs/{variant}-{STEPS}-steps", max(1, STEPS // 40)
    length = [
        f"--config.train.steps={STEPS}",
        f"--config.train.log_every={log}",
        f"--config.train.eval_every={5 * log}",
    ]
    main(["notebook", f"--config={checkout}/configs/{variant}.py", f"--workdir={folder}", *length])
    return folder


composite = train("composite")

# %% [markdown]
# ## Look at the kernels
#
# One chart for each head: how much it adds to the score of a word that stands so far before (−) or after (+) the one
# that looks. Blue draws attention, orange repels it. Heads that learned "the word before" and "the word after" are
# convolutions that nobody asked for. (Which head learns what depends on your packages.)

# %%
from IPython.display import Image, display

display(Image(f"{composite}/kernels.png", width=900))

# %% [markdown]
# ## See them in the attention of a sentence
#
# Each square is one head: rows look, columns are looked at. Dark places beside the orange diagonal are the kernels
# above at work; a column that many rows look at is content.

# %%
import matplotlib.pyplot as plt

from convattn_jax import attention_maps

SENTENCE = "Return the index of the first element."


def draw_attention(folder: str) -> None:
    """A square for each layer and head; the orange line is where a token looks at itself."""
    tokens, weights = attention_maps(folder, SENTENCE)
    layers, heads, size, _ = weights.shape
    _, grid = plt.subplots(heads, layers, figsize=(3.1 * layers, 3.1 * heads), layout="constrained", squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[head][layer]
            axes.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
            axes.plot([-0.5, size - 0.5], [-0.5, size - 0.5], color="#d9601a", linewidth=0.7)
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=9, loc="left")
            axes.set_xticks(range(size), tokens if head == heads - 1 else [""] * size, rotation=90, fontsize=7)
            axes.set_yticks(range(size), tokens if layer == 0 else [""] * size, fontsize=7)
            axes.tick_params(length=0)
            axes.spines[:].set_color("#dfe3e8")
    plt.show()


draw_attention(composite)

# %% [markdown]
# ## Ask it

# %%
from convattn_jax import fill_mask

for question in ("Returns the [MASK] of an array.", "Raises an error if the [MASK] does not exist."):
    print(question, " ".join(f"{guess.word} {guess.probability:.0%}" for guess in fill_mask(composite, question)))

# %% [markdown]
# ## Compare it with another variant
#
# The same text, tokenizer, batches and number of steps; only the model differs. `bert` has position embeddings and no
# convolution. `python -m convattn_jax.variants` lists the others: `shaw`, `t5`, `alibi`, `rope`, `convbert`, ... The
# curves say how fast each learns in a few hundred steps, not which one is better in the end.

# %%
OTHER = "bert"
other = train(OTHER)

# %%
import json


def curve(folder: str) -> tuple[list[int], list[float]]:
    """Steps and held-out losses of a run."""
    rows = [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_loss" in row]
    return [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations]


figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
for name, folder, colour in (("composite", composite, "#1f6fb4"), (OTHER, other, "#d9601a")):
    steps, losses = curve(folder)
    axes.plot(steps, losses, "o-", color=colour, ms=4, label=f"{name}: {losses[-1]:.2f} in the end")
unigram = json.loads(pathlib.Path(composite, "summary.json").read_text())["unigram_loss"]
axes.axhline(unigram, color="#6a7280", dashes=(4, 3), linewidth=1, label=f"word frequencies only: {unigram:.2f}")
axes.set_xlabel("step")
axes.set_title("held-out loss of the masked tokens, nats per token", fontsize=10, loc="left")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## What do positions give a model?
#
# A probe: both models are fine-tuned to tell sentences from sentences in which three pairs of neighbouring words are
# swapped. All there is to go by is the order of the words; a coin gets 50 %.

# %%
for folder in (composite, other):
    main(["notebook", f"--config={checkout}/configs/glue.py", f"--config.init_from={folder}",
          "--config.glue.tasks=word_order", "--config.glue.seeds=1"])  # fmt: skip

# %%
from convattn_jax import load_classifier

for name, folder in (("composite", composite), (OTHER, other)):
    accuracy = json.loads(pathlib.Path(f"{folder}-glue", "results.json").read_text())["word_order"]["accuracy"][0]
    print(f"{name:>9}: {accuracy:.1%} of new sentences told apart")

judge = load_classifier(f"{composite}-glue", "word_order")
for text in ("Returns the shape of an array.", "Returns shape the of an array."):
    print(f"{text:>33}  {judge([text])[0].label}")

# %% [markdown]
# ## Go on
#
# - `train("t5")`, `train("rope")`, `train("convbert")`: any file of `configs/`.
# - Add keys to the command: `--config.model.radius=4`, `--config.model.scores=content,fixed`; `configs/base.py`
#   documents all of them.
# - Your own text: `--config.data.source=text --config.data.files='my_text/*.txt'`.
# - `runs/` holds every run: pictures, metrics, checkpoints, tokenizer.
