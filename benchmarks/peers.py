"""PyTorch's BERT as a contender of `benchmarks.step`: a process of its own that runs steps on demand.

The peer gets what its users give it: bf16 autocast, fused AdamW, gradients clipped at 1.0, scaled_dot_product_attention
by the fastest of PyTorch's kernels, torch.compile; the vocabulary padded as ours; token rows that are masked already
(ours masks within the step). A process of its own because the authors' package is called transformers too.
"""

import dataclasses
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.served import Served, requests

# torch and transformers are imported where they are used: this module also serves the side that has neither
# pyright: reportMissingImports=false

SDPA = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
MASK = 4
UNMASKED = "sdpa_unmasked"


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    """All that a peer's process is told."""

    kind: str  # transformers | authors
    width: int
    layers: int
    heads: int
    hidden: int
    embedding: int
    vocabulary: int
    length: int
    dropout: float
    attention_dropout: float
    radius: int
    rate: float  # of masked tokens
    dtype: str  # of products: bfloat16 (autocast) | float32
    rows: str  # an .npy file, (batches, B, T)
    path: str = ""  # of the authors' code
    head: str = "all"
    compile: str = "True"
    sdpa: str = "auto"


class Peer(Served):
    """The near side: starts the process, asks it for steps."""

    def __init__(self, config: PeerConfig):
        super().__init__("benchmarks.peers", dataclasses.asdict(config))

    def run(self, steps: int) -> float:
        """Seconds for some steps."""
        self.ask(steps)
        return self.answer()["seconds"]


def save_rows(rows: np.ndarray) -> str:
    """A temporary .npy file, for peers to read; the caller removes it."""
    file, name = tempfile.mkstemp(suffix=".npy")
    os.close(file)
    np.save(name, rows)
    return name


# --- the process -----------------------------------------------------------------------------------------------------


def masked_batches(rows: np.ndarray, rate: float, head: str) -> list[dict[str, np.ndarray]]:
    """Ids with a share of each row's ordinary tokens hidden; labels for every position, or positions and labels."""
    random = np.random.default_rng(1)
    batches = []
    for ids in rows.astype(np.int64):
        valid = ids != 0
        ordinary = ids > MASK
        slots = math.ceil(rate * ids.shape[1])
        wanted = np.clip(np.round(rate * ordinary.sum(1)).astype(int), 1, slots)
        positions = np.argsort(np.where(ordinary, random.random(ids.shape), 2.0), axis=1)[:, :slots]
        chosen = np.arange(slots) < wanted[:, None]
        picked = np.where(chosen, np.take_along_axis(ids, positions, 1), -100)
        labels = np.full_like(ids, -100)
        np.put_along_axis(labels, positions, picked, 1)
        types = np.where(valid, (np.cumsum(ids == 3, axis=1) - (ids == 3) > 0), 0)
        batch = {"input_ids": np.where(labels != -100, MASK, ids), "token_type_ids": types.astype(np.int64)}
        if not valid.all():
            batch["attention_mask"] = valid.astype(np.int64)
        batch |= {"labels": picked, "positions": positions} if head == "masked" else {"labels": labels}
        batches.append(batch)
    return batches


def transformers_model(c: PeerConfig, padding: bool) -> Any:
    """BertForMaskedLM with fresh weights; its attention knows of padding if there is any."""
    from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertForMaskedLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # compiled, some releases hand attention a mask that hides nothing, and the fastest kernels take none
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=c.vocabulary, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            intermediate_size=c.hidden, hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.attention_dropout, max_position_embeddings=max(512, c.length),
            attn_implementation="sdpa" if padding else UNMASKED,
        )
    )  # fmt: skip


def authors_model(c: PeerConfig, padding: bool) -> Any:
    """Composite attention, fixed and query-dynamic, without position embeddings, by the paper's own code."""
    import importlib
    import types

    package = types.ModuleType("authors")  # their package without its __init__, which imports what nobody needs here
    package.__path__ = [str(pathlib.Path(c.path) / "src" / "transformers")]
    vars(package)["__version__"] = ""
    sys.modules["authors"] = package
    configuration = importlib.import_module("authors.configuration_bert")
    modeling = importlib.import_module("authors.modeling_bert")
    return modeling.BertForMaskedLM(
        configuration.BertConfig(
            vocab_size=c.vocabulary, embedding_size=c.embedding, hidden_size=c.width, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, intermediate_size=c.hidden, hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.attention_dropout, max_position_embeddings=c.length,
            attention_kernel=f"qk_convfixed_convq {c.radius}", remove_position_embeddings=True,
        )
    )  # fmt: skip


MODELS = {"transformers": transformers_model, "authors": authors_model}


def sdpa_by_speed(c: PeerConfig, batch: int, masked: bool) -> list[str]:
    """The kernels, fastest first, for attention alone at this shape, forward and backward, dropout included."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape = (batch, c.length, c.heads, c.width // c.heads)
    q, k, v, g = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    mask = torch.ones((batch, 1, c.length, c.length), device="cuda", dtype=torch.bool) if masked else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    times = {}
    for name in ("default", *SDPA):

        def once(name=name):
            with forced_sdpa(name):
                out = scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=c.attention_dropout)
                torch.autograd.grad(out, inputs, g)

        try:
            rounds = []
            for _ in range(6):  # the fastest counts: another peer may be starting beside this one
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(10):
                    once()
                torch.cuda.synchronize()
                rounds.append(time.perf_counter() - began)
            times[name] = min(rounds)
        except RuntimeError:  # this kernel doesn't take the shape
            continue
    print(f"SDPA: {times}", file=sys.stderr)
    return sorted(times, key=lambda name: times[name])


def forced_sdpa(name: str) -> Any:
    """A context in which one kernel alone may serve."""
    import contextlib

    from torch.nn.attention import SDPBackend, sdpa_kernel

    return contextlib.nullcontext() if name == "default" else sdpa_kernel(getattr(SDPBackend, SDPA[name]))


def serve(c: PeerConfig, asked: Iterator[str], out: Any) -> None:
    """Builds the model, says so, then runs as many steps as each line asks for."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = np.load(c.rows)
    batches = [
        {name: torch.from_numpy(values).to(device) for name, values in batch.items()}
        for batch in masked_batches(rows, c.rate, c.head)
    ]
    padding = "attention_mask" in batches[0]
    model = MODELS[c.kind](c, padding).to(device).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, eps=1e-6, weight_decay=0.01, fused=True
    )
    kernels = ["default"]
    if c.kind == "transformers" and device == "cuda":
        kernels = sdpa_by_speed(c, rows.shape[1], padding) if c.sdpa == "auto" else [c.sdpa]

    def loss_of(batch):
        if c.head == "all":
            return model(**batch)[0]
        rest = {name: values for name, values in batch.items() if name not in ("labels", "positions")}
        hidden = model.bert(**rest)[0]
        index = batch["positions"][..., None].expand(-1, -1, hidden.shape[-1])
        logits = model.cls(hidden.gather(1, index))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    loss_of = torch.compile(loss_of, dynamic=False) if c.compile == "True" else loss_of

    def run(steps, sdpa):
        loss = None
        for i in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=c.dtype == "bfloat16"), forced_sdpa(sdpa):
                loss = loss_of(batches[i % len(batches)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    def release():
        """Gives back what the next contender may need."""
        if device == "cuda":
            torch.cuda.empty_cache()

    def first_that_runs():
        """With padding the model may hand attention a mask that the fastest kernel doesn't take."""
        for sdpa in kernels:
            try:
                run(3, sdpa)
                return sdpa
            except RuntimeError as error:
                print(f"SDPA {sdpa}: {str(error)[:200]}", file=sys.stderr)
                torch.compiler.reset()
                if sdpa == kernels[-1]:
                    raise
        raise AssertionError

    began = time.perf_counter()
    sdpa = first_that_runs()
    release()
    facts = {"sdpa": sdpa, "torch": torch.__version__, "first_steps_s": time.perf_counter() - began}
    if c.kind == "transformers":
        import transformers

        facts["transformers"] = transformers.__version__
    print(json.dumps(facts), file=out, flush=True)
    for line in asked:
        run(1, sdpa)  # memory is allocated afresh
        began = time.perf_counter()
        run(int(line), sdpa)
        seconds = time.perf_counter() - began
        release()
        print(json.dumps({"seconds": seconds}), file=out, flush=True)


def main() -> None:
    """The far side."""
    asked, out, sys.stdout = requests(), sys.stdout, sys.stderr  # what libraries print is no answer
    try:
        serve(PeerConfig(**json.loads(sys.argv[1])), asked, out)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"error": reason[:300]}), file=out, flush=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
