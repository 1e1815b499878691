"""Settings of all tests: toy programs are compiled fast, not to be fast, and once for all test processes."""

import gc
import importlib.metadata
import os
import tempfile

import pytest

COMPILER = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # newer ones end the process at a flag they have no more
    COMPILER += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), COMPILER]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  the flags come first

gc.freeze()  # programs are many objects that stay: looking through them for garbage took a twentieth of all tests' time
gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """A folder of compiled programs; processes that tests start inherit it by environment variables."""
    with tempfile.TemporaryDirectory(prefix="convattn-compiled-", ignore_cleanup_errors=True) as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        yield


@pytest.fixture
def float64():
    """Double precision within one test."""
    with jax.enable_x64(True):
        yield
