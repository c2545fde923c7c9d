"""Sealed objects: what lies in a bucket, and can only have been made by one region of one run.

A line of proofs, a line of header, then bytes. The MAC is by the run's token, over the header, which has the digest of the bytes; the
signature, where regions have certificates, is by the region that made it.
"""

import hashlib
import hmac
import json
from typing import Any

from geotrain.wan.certs import Credentials, Signers, sign
from geotrain.wan.transport import LARGEST_HEADER, Identity


class Forged(ValueError):
    """An object that its writer cannot have written."""


class Seal:
    """Makes objects that only a region of this run can have made, and opens those of the others."""

    def __init__(self, identity: Identity, credentials: Credentials | None) -> None:
        self.identity, self.credentials = identity, credentials
        self._signers = Signers(credentials) if credentials is not None else None

    def close(self, header: dict[str, Any], data: Any = b"") -> bytes:
        """Proofs, header, data: two lines of JSON, then bytes."""
        facts = {**header, "run": self.identity.run, "origin": self.identity.region, "model": self.identity.model}
        line = json.dumps({**facts, "sha256": hashlib.sha256(data).hexdigest()}).encode()
        proof: dict[str, str] = {"mac": self._mac(line)}
        if self.credentials is not None:
            proof |= {"signature": sign(self.credentials, line).hex(), "cert": self.credentials.cert.decode()}
        return b"\n".join([json.dumps(proof).encode(), line, data if isinstance(data, bytes) else bytes(data)])

    def open(self, content: bytes, origin: str) -> tuple[dict[str, Any], memoryview]:
        """(header, data) of an object that `origin` made in this run. Raises Forged."""
        view = memoryview(content)
        try:
            first = content.find(b"\n", 0, LARGEST_HEADER)
            if (second := content.find(b"\n", first + 1, first + 1 + LARGEST_HEADER)) <= first or first < 0:
                raise ValueError("it is no sealed object")
            proof, line, data = json.loads(content[:first]), content[first + 1 : second], view[second + 1 :]
            if not hmac.compare_digest(str(proof["mac"]), self._mac(line)):
                raise ValueError("its seal is not of this run")
            if self._signers is not None:
                self._signers.check(origin, str(proof["cert"]).encode(), bytes.fromhex(proof["signature"]), line)
            header = json.loads(line)
            for name, expected in (("run", self.identity.run), ("origin", origin), ("model", self.identity.model)):
                if header[name] != expected:
                    raise ValueError(f"its {name} is {str(header[name])[:100]!r}, expected {expected!r}")
            if hashlib.sha256(data).hexdigest() != header["sha256"]:
                raise ValueError("its content is damaged")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Forged(str(error) if isinstance(error, ValueError) else f"it is no sealed object: {error!r}") from error
        return header, data

    def _mac(self, line: bytes) -> str:
        return hmac.new(self.identity.token.encode(), line, hashlib.sha256).hexdigest()
