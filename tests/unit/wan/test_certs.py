from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from geotrain.errors import BadCertificate, JobError
from geotrain.job import SecurityFiles
from geotrain.wan import certs


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    certs.make_ca(tmp_path)
    return tmp_path


def files(ca: Path, name: str) -> SecurityFiles:
    return SecurityFiles(ca=str(ca / "ca.pem"), cert=str(ca / f"{name}.pem"), key=str(ca / f"{name}.key"))


def test_a_region_gets_a_certificate_of_its_own(ca: Path) -> None:
    certs.make_region(ca, "tokyo", ["dask.tokyo.example"], days=100)
    own = certs.load("tokyo", files(ca, "tokyo"))
    assert timedelta(days=99) < own.expires - datetime.now(UTC) <= timedelta(days=100)
    assert not own.expires_soon()
    assert own.expires_soon(datetime.now(UTC) + timedelta(days=90))
    assert (ca / "tokyo.key").stat().st_mode & 0o077 == 0, "nobody else reads the key"


def test_a_signature_is_of_one_region_and_one_message(ca: Path) -> None:
    for name in ("tokyo", "paris"):
        certs.make_region(ca, name)
    tokyo, paris = (certs.load(name, files(ca, name)) for name in ("tokyo", "paris"))
    signature = certs.sign(tokyo, b"message")
    signers = certs.Signers(paris)
    signers.check("tokyo", tokyo.cert, signature, b"message")
    for region, cert, message, why in (
        ("tokyo", tokyo.cert, b"massage", "not signed by tokyo"),
        ("tokyo", paris.cert, b"message", "it is for paris, not for tokyo"),
        ("paris", paris.cert, b"message", "not signed by paris"),
        ("tokyo", b"rubbish", b"message", "certificate"),
    ):
        with pytest.raises(ValueError, match=why):
            signers.check(region, cert, signature, message)


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda ca: (ca / "tokyo.pem").unlink(), "No such file"),
        (lambda ca: (ca / "tokyo.pem").write_text("hello"), "no PEM certificate"),
        (lambda ca: (ca / "tokyo.key").write_text("hello"), "no PEM private key"),
        (lambda ca: (ca / "tokyo.key").write_bytes((ca / "paris.key").read_bytes()), "not the key of"),
        (lambda ca: [(ca / f"tokyo.{end}").write_bytes((ca / f"paris.{end}").read_bytes()) for end in ("pem", "key")], "it is for paris"),
        (lambda ca: (ca / "ca.pem").write_bytes((ca / "elsewhere" / "ca.pem").read_bytes()), "the CA did not issue it"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_said_in_plain_words(ca: Path, break_it: object, why: str) -> None:
    for name in ("tokyo", "paris"):
        certs.make_region(ca, name)
    certs.make_ca(ca / "elsewhere")
    break_it(ca)  # type: ignore[operator]
    with pytest.raises(BadCertificate, match=why) as caught:
        certs.load("tokyo", files(ca, "tokyo"))
    assert "geotrain certs region tokyo" in caught.value.advice


def test_a_certificate_that_is_over_is_refused(ca: Path) -> None:
    cert = certs.make_region(ca, "tokyo", days=10).read_bytes()
    authority = (ca / "ca.pem").read_bytes()
    assert certs.refusal(authority, cert, "tokyo") is None
    late = datetime.now(UTC) + timedelta(days=11)
    assert f"and it is {late:%F} here" in (certs.refusal(authority, cert, "tokyo", late) or "")


def test_a_ca_is_not_written_over_and_a_region_needs_one(ca: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="has a CA already"):
        certs.make_ca(ca)
    with pytest.raises(JobError, match="geotrain certs init"):
        certs.make_region(tmp_path / "nowhere", "tokyo")


def test_keys_of_other_kinds_sign_too(ca: Path) -> None:
    """Users bring certificates of their own."""
    certs.make_region(ca, "tokyo")
    own = certs.load("tokyo", files(ca, "tokyo"))
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signature = certs.sign(certs.Credentials("tokyo", own.ca, own.cert, pem, own.expires), b"message")
    certs.verify(key.public_key(), signature, b"message")
    with pytest.raises(InvalidSignature):
        certs.verify(key.public_key(), signature, b"massage")
