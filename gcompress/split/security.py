"""Who may connect: certificates for mutual TLS, tokens over TLS, and plaintext on the loopback only."""

from __future__ import annotations

import contextlib
import datetime
import hmac
import ipaddress
import os
import pathlib
import re
import socket
import ssl
from collections.abc import Sequence

import grpc

from ..errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
PROBE_SECONDS = 2.0


def split_address(address):
    """("host", port) of "host:port" or "[v6]:port"; ConfigError if it is neither."""
    host, colon, port = str(address).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"address: got {address!r}, expected host:port")
    return host, int(port)


def is_loopback(address):
    """Whether an address is one that only this machine can reach."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def check_name(name):
    """ConfigError unless a client's name is 1 to 64 of letters, digits, ".", "_" and "-"."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"name: got {str(name)[:80]!r}, expected 1 to 64 letters, digits, dots, dashes, underscores")
    return name


def _read(argument, path):
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{argument}: cannot read {path}: {error.strerror}") from None


def client_credentials(address, ca, certificate, key, insecure):
    """gRPC's channel credentials; None for plaintext, which is refused beyond loopback unless `insecure`."""
    if (certificate is None) != (key is None) or (certificate and not ca):
        raise ConfigError("certificate: a certificate, its key and the authority's ca go together")
    if ca:
        own = (_read("key", key), _read("certificate", certificate)) if certificate else (None, None)
        return grpc.ssl_channel_credentials(_read("ca", ca), *own)
    if not insecure and not is_loopback(address):
        raise ConfigError(
            f"address: {address} is another machine and no ca was given: expected TLS, or insecure=True (--insecure)"
        )
    return None


def server_credentials(address, ca, certificate, key, tokens, insecure):
    """gRPC's server credentials, or None for plaintext. Beyond loopback, strangers are refused unless `insecure`."""
    if (certificate is None) != (key is None) or (ca and not certificate):
        raise ConfigError("certificate: a server's certificate and key go together, and with them the clients' ca")
    if not certificate:
        if not insecure and not is_loopback(address):
            raise ConfigError(
                f"address: {address} is reachable by others and no certificate was given: expected TLS, or "
                "insecure=True (--insecure)"
            )
        return None
    if not ca and not tokens and not insecure and not is_loopback(address):
        raise ConfigError("ca: anyone could connect; expected the clients' ca, tokens, or insecure=True (--insecure)")
    pair = [(_read("key", key), _read("certificate", certificate))]
    authority = _read("ca", ca) if ca else None
    return grpc.ssl_server_credentials(pair, authority, require_client_auth=bool(ca))


def check_token(token, whose="token"):
    """ConfigError unless a token is printable ASCII text and not empty."""
    right = isinstance(token, str) and token.isascii() and token.isprintable() and token.strip() == token != ""
    if not right:
        got = "an empty one" if isinstance(token, str) and not token.strip() else "another"
        raise ConfigError(f"{whose}: got {got}, expected printable ASCII characters, no blanks around them")
    return token


def check_tokens(tokens):
    """{client's name: token} of a server; ConfigError for empty tokens, and for one that two clients share."""
    tokens = {check_name(name): check_token(token, f"tokens: of {name}") for name, token in tokens.items()}
    if not tokens or len(set(tokens.values())) != len(tokens):
        raise ConfigError("tokens: got none, or one for two clients, expected a different one for each client")
    return tokens


def token_owner(tokens, token):
    """The client that has this token, or None; takes equally long for each of them."""
    owner = None
    for name, known in tokens.items():
        if hmac.compare_digest(known.encode(), token.encode()):
            owner = name
    return owner


def why_unreachable(address, **files):
    """What is wrong with the certificates, in words; None if they are not why gRPC cannot connect.

    gRPC only says that it cannot. This asks the server itself, and asks twice, since a server
    that is about to stop looks like one that refuses.
    """
    return _probe(address, **files) and _probe(address, **files)


def _probe(address, ca=None, certificate=None, key=None, server_name=None):
    host, port = split_address(address)
    try:
        with socket.create_connection((host, port), PROBE_SECONDS) as connection:
            if not ca:
                return _why_plaintext_fails(connection)
            return _why_tls_fails(connection, server_name or host, ca, certificate, key)
    except OSError:
        return None  # nobody listens, or the server is slow: worth another try


def _why_plaintext_fails(connection):
    """A TLS server answers a TLS greeting; a plaintext one does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection):
            return "the server speaks TLS; give its ca (and a certificate or token)"
    except ssl.SSLError as error:
        return "the server speaks TLS and wants a certificate" if "ALERT" in str(error).upper() else None


def _why_tls_fails(connection, host, ca, certificate, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(ca)
        if certificate:
            context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        return f"ca, certificate or key cannot be used: {error.reason or error}"
    who = f"the client's certificate {certificate}" if certificate else "a client without a certificate"
    try:
        with context.wrap_socket(connection, server_hostname=host) as channel:
            # With TLS 1.3 the server checks our certificate after we are connected. If it accepts it, it sends
            # something first. If not, gRPC's server ends the connection and does not say why.
            channel.settimeout(PROBE_SECONDS)
            try:
                return None if channel.recv(1) else f"the server refuses {who}"
            except (ConnectionError, ssl.SSLEOFError):
                return f"the server refuses {who}"
    except ssl.SSLCertVerificationError as error:
        return f"the server's certificate is not accepted under {ca}: {error.verify_message}"
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        reason = str(error.reason or error).replace("_", " ").lower()
        if "alert" in reason or "certificate" in reason:
            return f"the server refuses {who}: {reason}"
        return f"the server does not speak TLS: {reason}"


def make_certificates(
    folder: str | os.PathLike,
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
    clients: Sequence[str] = ("client",),
    days: int = 365,
) -> pathlib.Path:
    """Make a development authority, a server's certificate and one for each client: for trials, not production.

    Writes ca.pem, server.pem, server.key, and NAME.pem and NAME.key for each client. Only their
    owner can read the keys. The authority's own key is not kept: to add a client, make all again.

    Args:
        folder: created if it does not exist; files in it are replaced.
        hosts: names and addresses at which clients reach the server.
        clients: their names; the server reads them in the certificates.
        days: how long the certificates are valid.
    """
    from cryptography import x509

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    authority = _Authority("gcompress development authority", days)
    _write(folder / "ca.pem", authority.certificate)
    purposes = {"server": x509.ExtendedKeyUsageOID.SERVER_AUTH}
    purposes |= {check_name(name): x509.ExtendedKeyUsageOID.CLIENT_AUTH for name in clients}
    for name, purpose in purposes.items():
        certificate, key = authority.issue(name, purpose, _names(hosts if name == "server" else [name]))
        _write(folder / f"{name}.pem", certificate)
        _write(folder / f"{name}.key", key, private=True)
    return folder


class _Authority:
    """Signs certificates with a key that is never written to a file. All are in PEM form."""

    def __init__(self, name, days):
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self._key, self._name, self._days = ec.generate_private_key(ec.SECP256R1()), _name(name), days
        self._identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        allowed = dict.fromkeys(("digital_signature", "key_cert_sign", "crl_sign"), True)
        forbidden = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        forbidden = dict.fromkeys((*forbidden, "encipher_only", "decipher_only"), False)
        extensions = [
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (x509.KeyUsage(**allowed, **forbidden), True),
            (self._identifier, False),
        ]
        self.certificate = self._sign(self._name, self._key.public_key(), extensions)

    def issue(self, name, purpose, alternatives):
        """(certificate, key) of a server or client."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        extensions = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.ExtendedKeyUsage([purpose]), False),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._identifier), False),
            (x509.SubjectAlternativeName(alternatives), False),
        ]
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return self._sign(_name(name), key.public_key(), extensions), key.private_bytes(*form)

    def _sign(self, subject, public_key, extensions):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number())
        # Clocks differ a little.
        builder = builder.not_valid_before(now - datetime.timedelta(minutes=5))
        builder = builder.not_valid_after(now + datetime.timedelta(days=self._days))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(common_name):
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _names(hosts):
    from cryptography import x509

    names = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _write(path, content, private=False):
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
        file.write(content)
