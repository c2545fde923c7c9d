"""Certificates: a trial CA, a region's own, and what is wrong with one. The region's name is the certificate's DNS name.

TLS (flight) and signatures (mailbox) both rest on them: whoever holds the key of a certificate for `tokyo` from the job's CA is tokyo.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from geotrain.errors import BadCertificate, JobError
from geotrain.job import SecurityFiles

WARN_BEFORE = timedelta(days=14)
CA_DAYS, REGION_DAYS = 3650, 365
CA = "ca"
"""Base name of the CA's own files."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """One region's certificate and key, and the CA that it trusts; PEM."""

    region: str
    ca: bytes
    cert: bytes
    key: bytes
    expires: datetime

    def expires_soon(self, now: datetime | None = None) -> bool:
        return self.expires - (now or datetime.now(UTC)) < WARN_BEFORE


def load(region: str, files: SecurityFiles) -> Credentials:
    """Read and check a region's files. Raises BadCertificate, which names the file."""
    content = {}
    for what, path in files.model_dump().items():
        try:
            content[what] = Path(path).read_bytes()
        except OSError as error:
            raise BadCertificate(region, path, error.strerror or str(error)) from error
    try:
        cert = x509.load_pem_x509_certificate(content["cert"])
        x509.load_pem_x509_certificate(content["ca"])
    except ValueError as error:
        raise BadCertificate(region, files.cert, f"this, or {files.ca}, is no PEM certificate") from error
    try:
        key = serialization.load_pem_private_key(content["key"], password=None)
    except (ValueError, TypeError) as error:
        raise BadCertificate(region, files.key, "it is no PEM private key, or it needs a password") from error
    if key.public_key() != cert.public_key():
        raise BadCertificate(region, files.key, f"it is not the key of {files.cert}")
    if (why := refusal(content["ca"], content["cert"], region)) is not None:
        raise BadCertificate(region, files.cert, why)
    if (first := _dns_names(cert)[0]) != region:
        raise BadCertificate(region, files.cert, f"its first DNS name is {first}, by which others would know it: it must be {region}")
    return Credentials(region, content["ca"], content["cert"], content["key"], cert.not_valid_after_utc)


def refusal(ca: bytes, cert: bytes, region: str, now: datetime | None = None) -> str | None:
    """Why a certificate is not one of that region; None when it is."""
    try:
        authority, leaf = x509.load_pem_x509_certificate(ca), x509.load_pem_x509_certificate(cert)
        policy = PolicyBuilder().store(Store([authority])).time(now or datetime.now(UTC))
        policy.build_server_verifier(x509.DNSName(region)).verify(leaf, [])
    except VerificationError as error:
        return _reason(leaf, authority, region, now or datetime.now(UTC)) or str(error)
    except ValueError as error:
        return str(error)
    return None


def _dns_names(cert: x509.Certificate) -> list[str]:
    try:
        return cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        return []


def _reason(leaf: x509.Certificate, authority: x509.Certificate, region: str, now: datetime) -> str | None:
    """The plain words for the usual faults."""
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        return f"it is valid from {leaf.not_valid_before_utc:%F} to {leaf.not_valid_after_utc:%F}, and it is {now:%F} here"
    if region not in (names := _dns_names(leaf)):
        return f"it is for {', '.join(names) or 'nobody'}, not for {region}"
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return "the CA did not issue it"
    return None


PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


def sign(own: Credentials, message: bytes) -> bytes:
    """With the region's own key: ECDSA or RSA-PSS over SHA-256, or Ed25519."""
    key = serialization.load_pem_private_key(own.key, password=None)
    match key:
        case ec.EllipticCurvePrivateKey():
            return key.sign(message, ec.ECDSA(hashes.SHA256()))
        case rsa.RSAPrivateKey():
            return key.sign(message, PSS, hashes.SHA256())
        case ed25519.Ed25519PrivateKey():
            return key.sign(message)
        case _:
            raise BadCertificate(own.region, "the private key", f"{type(key).__name__} signs nothing: use ECDSA, RSA or Ed25519")


def verify(key: object, signature: bytes, message: bytes) -> None:
    """Raises InvalidSignature."""
    match key:
        case ec.EllipticCurvePublicKey():
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        case rsa.RSAPublicKey():
            key.verify(signature, message, PSS, hashes.SHA256())
        case ed25519.Ed25519PublicKey():
            key.verify(signature, message)
        case _:
            raise InvalidSignature


class Signers:
    """Checks signatures of other regions; a certificate is looked at once."""

    def __init__(self, own: Credentials) -> None:
        self.own = own
        self._trusted: dict[tuple[str, bytes], x509.Certificate] = {}

    def check(self, region: str, cert: bytes, signature: bytes, message: bytes) -> None:
        """Raises ValueError, saying why it is not that region's."""
        found = self._trusted.get((region, cert))
        if found is None or found.not_valid_after_utc < datetime.now(UTC):
            if (why := refusal(self.own.ca, cert, region)) is not None:
                raise ValueError(f"the certificate that it names: {why}")
            found = self._trusted[region, cert] = x509.load_pem_x509_certificate(cert)
        try:
            verify(found.public_key(), signature, message)
        except InvalidSignature as error:
            raise ValueError(f"not signed by {region}") from error


def make_ca(folder: Path) -> Path:
    """A new CA: ca.pem, which every region gets, and ca.key, which stays here. Raises JobError when there is one."""
    if (folder / f"{CA}.key").exists():
        raise JobError(f"{folder} has a CA already; take another folder, or remove it: all its certificates are void then")
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "geotrain trial CA")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    built = (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _write(folder, CA, built, key)


def make_region(folder: Path, region: str, names: Sequence[str] = (), days: int = REGION_DAYS) -> Path:
    """NAME.pem and NAME.key of a region, in the CA's folder; over the ones that are there. Returns the certificate's path.

    `names`: further DNS names, as a Dask scheduler's host. Raises JobError where there is no CA.
    """
    try:
        authority = x509.load_pem_x509_certificate((folder / f"{CA}.pem").read_bytes())
        ca_key = serialization.load_pem_private_key((folder / f"{CA}.key").read_bytes(), password=None)
    except OSError as error:
        raise JobError(f"no CA in {folder}: make one with `geotrain certs init {folder}`") from error
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, region)])
    # The region's name comes first: gRPC calls its peer by the first name.
    known_as = x509.SubjectAlternativeName([x509.DNSName(name) for name in (region, *names)])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    built = (
        _builder(subject, authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(known_as, critical=False)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return _write(folder, region, built, key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))


def _write(folder: Path, name: str, cert: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Path:
    """Key first, and readable for its owner alone; each by rename, so that a reader finds the old or the new one."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for suffix, content, mode in (("key", pem, 0o600), ("pem", cert.public_bytes(serialization.Encoding.PEM), 0o644)):
        temporary = folder / f".{name}.{suffix}"
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        temporary.replace(folder / f"{name}.{suffix}")
    return folder / f"{name}.pem"
