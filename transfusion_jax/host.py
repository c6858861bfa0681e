"""Settings of the host process, to be made before its first computation."""

import contextlib
import ctypes
import hashlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# From malloc.h of the GNU C library.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), core_quota())
    return os.cpu_count() or 1


def core_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores whose time a container may take, rounded up; infinity where that is not limited."""
    try:
        quota, period = map(float, file.read_text().split())
    except (OSError, ValueError):  # there is none, or it says "max"
        return math.inf
    return max(math.ceil(quota / period), 1)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that what is half written is cleared away."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory instead of returning it to the kernel; False if it cannot.

    XLA's CPU backend allocates the temporaries of every step anew. By default glibc maps and unmaps
    them each time; the page faults took 13 % of the digits' training step and 45 % of the gradient
    of one feed-forward layer.
    """
    return _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20})


def return_freed_memory() -> bool:
    """Makes malloc return large blocks to the kernel as soon as they are freed; False if it cannot.

    For work that goes through a model array by array and computes nothing: freed arrays of many
    sizes that are kept add up to the whole model.
    """
    return _mallopt(
        {M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 1 << 20, M_TRIM_THRESHOLD: 1 << 20, M_TOP_PAD: 0}
    )


def _mallopt(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library than glibc
        return False
    return all([mallopt(option, value) for option, value in options.items()])


def use_every_core(rows: int) -> None:
    """Makes JAX's CPU backend a device for every core, as far as that many devices divide `rows`.

    XLA runs what is not a large product on one core of a device. Two devices on two cores made the
    training step of the scenes a quarter faster, that of the digits a twentieth. Nothing
    is changed where JAX was told how many CPU devices to make, or has made them.
    """
    import jax

    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.config.jax_num_cpu_devices > 0:
        return
    devices = max(n for n in range(1, cores() + 1) if rows % n == 0)
    with contextlib.suppress(RuntimeError):  # they have been made
        jax.config.update("jax_num_cpu_devices", devices)


def bar_intervals() -> dict[str, float]:
    """Seconds between two states of a progress bar, as tqdm's options. In a log file all of them
    are kept, and are one line."""
    seconds = 0.5 if sys.stderr.isatty() else 60.0
    return {"mininterval": seconds, "maxinterval": 20 * seconds}


def process_start() -> float:
    """When this process was started, as `time.time()` counts; now, where the system does not say
    it."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.time()
    # After the name of the program, which may hold spaces, come fields 3, 4, ...; number 22 is the
    # start, in ticks of a clock that began with the machine.
    ticks = int(stat.read_text().rpartition(")")[2].split()[22 - 3])
    running = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - running


def cache_directory(name: str) -> Path | None:
    """`transfusion_jax/NAME` under `$XDG_CACHE_HOME`, or else `~/.cache`; None for a user without a
    home."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(cache, "transfusion_jax", name)


def cache_compiled(report: Callable[[str], None]) -> Path | None:
    """Makes JAX keep what it compiles from now on in a directory of the user.

    That is `cache_directory("xla")`. JAX's own variables come first: `JAX_COMPILATION_CACHE_DIR`
    names another directory, and `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.

    On CPUs, each kind of processor has a directory of its own: JAX files a program under a key
    without the features of the processor that it was compiled for, so machines with one home
    directory would run each other's instructions. Several processes on CPUs keep nothing.

    Returns:
      The directory; None where nothing is kept.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    directory = cache_directory("xla")
    if directory is None:
        report("compiled programs are not kept: this user has no home directory")
        return None
    if jax.default_backend() == "cpu":
        kind = _kind_of_processor()
        if kind is None or jax.process_count() > 1:
            return None
        directory /= f"cpu-{kind}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        report(f"compiled programs are not kept: {directory}: {error.strerror}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return directory


def _kind_of_processor() -> str | None:
    """A hash of the model and the features of this machine's processor; None if it says none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return None
    said = [line for line in lines if re.match(r"(model name|flags|Features|CPU part)\b", line)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:12] if said else None
