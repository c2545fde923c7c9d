"""The user's own code on every worker: packed once, unpacked where a worker starts."""

import hashlib
import importlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin

from geotrain.errors import JobError

SKIP = {"__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
LARGEST_BYTES = 50 * 2**20


def pack(paths: tuple[str, ...]) -> bytes:
    """Files and folders as a zip archive. A folder's content lands on the import path, a package folder itself does.

    Raises JobError for a path that is absent, or for more than LARGEST_BYTES: that is data, not code.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in map(Path, paths):
            if not path.exists():
                raise JobError(f"code: {path} does not exist")
            base = path.parent if path.is_file() or (path / "__init__.py").exists() else path
            for file in sorted([path] if path.is_file() else path.rglob("*.py")):
                if not SKIP & set(file.parts):
                    archive.writestr(zipfile.ZipInfo(str(file.relative_to(base))), file.read_bytes())
    if buffer.tell() > LARGEST_BYTES:
        raise JobError(f"code: {', '.join(paths)} is {buffer.tell() / 2**20:.0f} MiB packed; name the Python files alone")
    return buffer.getvalue()


class CodePlugin(WorkerPlugin):
    """Unpacks an archive beside the worker and puts it first on the import path, in the place of any that came before.

    A worker that outlives a run would otherwise go on with the modules of the run before.
    """

    def __init__(self, archive: bytes) -> None:
        self.archive = archive

    def setup(self, worker: Any) -> None:
        home = Path(worker.local_directory) / "geotrain-code"
        target = home / hashlib.sha256(self.archive).hexdigest()[:12]
        with zipfile.ZipFile(io.BytesIO(self.archive)) as archive:
            archive.extractall(target)
        sys.path[:] = [str(target), *(path for path in sys.path if home not in Path(path).parents)]
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and home in Path(file).parents:
                del sys.modules[name]
        importlib.invalidate_caches()
