"""The user's own code on every worker: packed once, unpacked where a worker starts."""

import hashlib
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
    """Unpacks an archive beside the worker and puts it first on the import path."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive

    def setup(self, worker: Any) -> None:
        target = Path(worker.local_directory) / f"code-{hashlib.sha256(self.archive).hexdigest()[:12]}"
        with zipfile.ZipFile(io.BytesIO(self.archive)) as archive:
            archive.extractall(target)
        if str(target) not in sys.path:
            sys.path.insert(0, str(target))
