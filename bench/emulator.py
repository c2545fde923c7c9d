"""The WAN emulator that measurements and tests borrow: WAN=path/to/wan, a Python file with the class Wan(regions, rate=, rtt=, host=).

Default: ../shared/wan. It needs root, gcc, iproute2 and /dev/net/tun.
"""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def path() -> Path:
    return Path(os.environ.get("WAN", ROOT.parent / "shared" / "wan"))


def missing() -> str | None:
    """Why there can be no emulated WAN here; None when there can."""
    if not path().exists():
        return f"no WAN emulator at {path()}: set WAN"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not Path("/dev/net/tun").exists() or not shutil.which("gcc") or not shutil.which("ip"):
        return "the WAN emulator needs /dev/net/tun, gcc and iproute2"
    return None


def emulator() -> Any:
    """The class Wan."""
    loader = importlib.machinery.SourceFileLoader("wan", str(path()))
    spec = importlib.util.spec_from_loader("wan", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module.Wan


def settled(seconds: float = 20.0) -> None:
    """Wait until the interface of the emulator before is gone."""
    until = time.monotonic() + seconds
    while "10.77.0." in subprocess.run(["ip", "route"], check=True, capture_output=True, text=True).stdout and time.monotonic() < until:
        time.sleep(0.2)
