"""Where the tests of launch/ play: a folder with stand-ins for all that the scripts call."""

import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
TPU = {"ZONE": "us-west4-a", "TYPE": "v5litepod-16"}
# Arguments that quoting may spoil.
ARGUMENTS = [
    "--config=configs/composite.py",
    "--workdir=gs://bucket/run",
    '--a=it\'s "x" & $HOME `id` \\ * @NAME@',
    "--b=",
]
COMMANDS = ("gcloud", "kubectl", "docker", "sbatch", "srun", "squeue", "scontrol", "python", "python3", "sleep", "tail")


class Stage:
    """A folder in which scripts see stand-ins only; see stand_in.sh."""

    def __init__(self, folder):
        self.folder = folder
        uv = folder / "image" / ".local" / "bin" / "uv"
        for path in (folder / "bin", folder / "plan", uv.parent):
            path.mkdir(parents=True)
        for path in [uv, *(folder / "bin" / name for name in COMMANDS)]:
            path.symlink_to(ROOT / "tests" / "stand_in.sh")

    def plan(self, **events):
        """What happens to those that ask: {event: outcomes in their order}; a `_` in a name stands for a space."""
        for event, outcomes in events.items():
            (self.folder / "plan" / event.replace("_", " ")).write_text("".join(f"{line}\n" for line in outcomes))

    def environment(self, settings):
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return {"PATH": path, "STAGE": str(self.folder), "TMPDIR": str(self.folder), "HOME": "/nowhere", **settings}

    def run(self, script, *words, cwd=None, **settings):
        command = [LAUNCH / script] if isinstance(script, str) else script
        environment = self.environment(settings)
        return subprocess.run(
            [*command, *words], env=environment, cwd=cwd or self.folder, capture_output=True, text=True, timeout=60
        )

    def calls(self, *names):
        """(name, word, ...) of each call so far."""
        file = self.folder / "calls"
        rows = [tuple(line.split("\x1f")) for line in file.read_text().splitlines()] if file.exists() else []
        return [row for row in rows if not names or row[0] in names]

    def forget(self):
        (self.folder / "calls").unlink(missing_ok=True)

    def verbs(self):
        """What was asked of gcloud, in order."""
        return [" ".join(call[3:5]) for call in self.calls("gcloud")]


def wait_for(path):
    for _ in range(1000):
        if path.exists() and (text := path.read_text().strip()):
            return text
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")
