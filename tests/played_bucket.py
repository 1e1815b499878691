"""A bucket, gs://bucket, played by a folder behind the path layer: objects appear whole and never grow."""

import pathlib

import pytest
from etils.epath import testing


@pytest.fixture(name="bucket")
def played(tmp_path):
    """Where the objects of gs://bucket lie; what a bucket cannot do fails. Beside a file `refused` it takes nothing."""

    def here(path):
        return str(path).replace("gs://", f"{tmp_path}/")

    def of(original, path, **options):
        return original(here(path), **options)

    def open_whole(original, path, mode):
        assert "a" not in mode, "objects cannot be extended"
        if "w" in mode:
            if (tmp_path / "refused").exists():
                raise OSError("Forbidden: no storage.objects.create access")
            if (tmp_path / str(path).split("/")[2]).exists():  # the bucket; objects lie in no folders that must be made
                pathlib.Path(here(path)).parent.mkdir(parents=True, exist_ok=True)
        return original(here(path), mode)

    def glob(original, path):
        return [str(found).replace(f"{tmp_path}/", "gs://") for found in original(here(path))]

    def never(original, path, dst):
        raise AssertionError("a rename in a bucket copies: a reader sees the parts")

    same = dict.fromkeys(("exists", "isdir", "listdir", "makedirs", "mkdir", "remove", "rmtree", "stat"), of)
    (tmp_path / "bucket").mkdir()
    with testing.mock_epath(**same, open=open_whole, glob=glob, rename=never, replace=never):
        yield tmp_path / "bucket"
