"""The long suite: 200 kills, 1000 damages (python -m pytest -n 0 -m faults -s); docs/reliability.md has its counts."""

import json
import os
import pathlib
import random
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath
from fork_server import ForkServer
from test_checkpoint import restore, state

from convattn_jax import checkpoint

pytestmark = pytest.mark.faults

KILLS = {"pretraining": 150, "fine-tuning": 50}
DAMAGES = 1000
CHAIN = 10  # kills of one run, at most
STEPS = 60
ROOT = pathlib.Path(__file__).parent.parent
SEED = int.from_bytes(os.urandom(4))  # printed, so that a failure can be played again


@pytest.fixture(scope="module")
def server():
    """Shared by all runs."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory, server):
    """A text, a configuration file, a cache, and runs of both kinds that nobody touched."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt")
    rhythm = {"train__steps": STEPS, "train__log_every": 3, "train__eval_every": 6, "data__heldout_fraction": 0.3}
    tiny.write_config(home, model__layers=1, **rhythm)
    for kind in KILLS:
        assert finish(server, command(home, kind, home / kind), home / "log.txt") == 0, (home / "log.txt").read_text()
    return home


def command(home, kind, run):
    if kind == "pretraining":
        return [f"--config={home / 'config.py'}", f"--workdir={run}"]
    probe = ["--config.glue.tasks=word_order", "--config.glue.length=16", "--config.glue.save_seconds=0"]
    start = [f"--config={ROOT / 'configs' / 'glue.py'}", f"--config.init_from={home / 'pretraining'}"]
    return [*start, *probe, f"--workdir={run}"]


def finish(server, args, log):
    process = server.start(args, log)
    while (code := server.ended(process)) is None:
        time.sleep(0.01)
    return code


def progress(run):
    """Something that changes whenever a run gets on."""
    metrics = run / "metrics.jsonl"
    try:
        seen = sorted(str(path) for path in [*run.glob("**/manifest.json"), *run.glob("**/*tmp*")])
        return seen, metrics.stat().st_size if metrics.exists() else 0
    except OSError:  # what was there a moment ago is gone
        return [], 0


def killed(server, args, run, log, draw):
    """Starts a run and kills it at a random moment; None if it had ended, else whether a save was under way."""
    process = server.start(args, log)
    early = draw.random() < 0.2
    deadline = time.monotonic() + (draw.uniform(0, 2.5) if early else 600)
    before, changes = progress(run), draw.randint(1, 12)
    while time.monotonic() < deadline and changes:
        if (code := server.ended(process)) is not None:
            assert code == 0, log.read_text()[-3000:]
            return None
        if (now := progress(run)) != before:
            before, changes = now, changes - 1
        time.sleep(0.001)
    time.sleep(0 if early else draw.choice((0, draw.uniform(0, 0.05))))
    os.kill(process, signal.SIGKILL)
    while (code := server.ended(process)) is None:
        time.sleep(0.005)
    if code != -signal.SIGKILL:
        assert code == 0, log.read_text()[-3000:]
        return None
    return bool(list(run.glob("**/*orbax-checkpoint-tmp*")))


def arrays(run):
    """Every parameter and every number of the optimizer that a run has saved last."""
    found = {}
    for folder in sorted(path.parent for path in run.glob("checkpoints/**/manifest.json")):
        if folder.parent.name == "checkpoints" and folder.name != str(STEPS):
            continue
        with ocp.StandardCheckpointer() as orbax:
            items = {item.name: orbax.restore(epath.Path(item)) for item in sorted(folder.iterdir()) if item.is_dir()}
        found[str(folder.relative_to(run))] = items
    assert found
    return found


def assert_same_run(run, untouched):
    a, b = arrays(run), arrays(untouched)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    if (untouched / "metrics.jsonl").exists():
        assert tiny.metrics(run) == tiny.metrics(untouched)
    else:
        assert json.loads((run / "results.json").read_text()) == json.loads((untouched / "results.json").read_text())


@pytest.mark.parametrize("kind", KILLS)
def test_kills_at_random_moments_change_no_bit(server, home, tmp_path, kind):
    draw = random.Random(f"{SEED}{kind}")
    print(f"\nseed {SEED}")
    kills = in_saves = runs = 0
    began = time.monotonic()
    while kills < KILLS[kind]:
        run, log, chain = tmp_path / f"run{runs}", tmp_path / f"log{runs}.txt", 0
        args = command(home, kind, run)
        while chain < CHAIN and (found := killed(server, args, run, log, draw)) is not None:
            chain, kills, in_saves = chain + 1, kills + 1, in_saves + found
        assert finish(server, args, log) == 0, log.read_text()[-3000:]
        assert_same_run(run, home / kind)
        shutil.rmtree(run)
        runs += 1
        print(f"{kind}: {kills} kills, {in_saves} within a save; {runs} runs, all bit-identical", flush=True)
    print(f"{kind}: {time.monotonic() - began:.0f} s")


# --- damages ---


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def overwrite(path, draw):
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    part = content[start : start + draw.randint(1, 512)]
    new = draw.choice((bytes(len(part)), draw.randbytes(len(part))))
    content[start : start + len(part)] = new if new != part else bytes(byte ^ 255 for byte in part)
    path.write_bytes(content)


def link(path, draw):
    content = path.rename(path.with_name(f"{path.name}.moved"))
    path.symlink_to(content)


FILE_DAMAGES = {
    "bit flip": flip,
    "block": overwrite,
    "truncation": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "growth": lambda path, draw: path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 99))),
    "deletion": lambda path, draw: path.unlink(),
    "renamed file": lambda path, draw: path.rename(path.with_name(f"{path.name}x")),
    "link": link,
}
FOLDER_DAMAGES = {
    "missing marker": lambda folder, draw: (folder / "manifest.json").unlink(),
    "renamed folder": lambda folder, draw: folder.rename(folder.with_name(str(draw.randint(3, 99)))),
    "missing item": lambda folder, draw: shutil.rmtree(folder / draw.choice(("params", "rest"))),
    "items exchanged": lambda folder, draw: [
        (folder / a).rename(folder / b) for a, b in (("params", "x"), ("rest", "params"), ("x", "rest"))
    ],
    "older content": lambda folder, draw: [shutil.rmtree(folder), shutil.copytree(folder.with_name("1"), folder)],
}


def test_each_of_many_random_damages_is_found_and_training_goes_on(tmp_path):
    draw = random.Random(SEED)
    print(f"\nseed {SEED}")
    checkpoints = checkpoint.Checkpoints(tmp_path / "saved", 2)
    for step in (1, 2):
        checkpoints.save(state(step), {"eval_loss": 1 / step}, {"window": [{"loss": 0.1 * step}]})
    checkpoints.close()
    onward = jax.jit(lambda saved: jax.tree.map(lambda x: x * 2 + 1, saved))
    expected = onward(state(1))
    counts: dict[str, int] = {}
    for _ in range(DAMAGES):
        folder = pathlib.Path(shutil.copytree(tmp_path / "saved", tmp_path / "copy"))
        newest = folder / "2"
        kind = draw.choice([*FILE_DAMAGES] * 3 + [*FOLDER_DAMAGES])
        if kind in FILE_DAMAGES:
            files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
            FILE_DAMAGES[kind](draw.choice(files), draw)
        else:
            FOLDER_DAMAGES[kind](newest, draw)
        restored, lines = restore(folder)
        assert len(lines) == 1, (kind, lines)
        assert "is damaged" in lines[0], (kind, lines)
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, onward(restored), expected))), kind
        counts[kind] = counts.get(kind, 0) + 1
        shutil.rmtree(folder)
    print(f"{sum(counts.values())} damages found, all continued: {counts}")
