"""Dates of certificates as OpenSSL writes them, read without it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from ansible.module_utils.certificate_dates import CertificateUnreadable, first_certificate, validity
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "webhook")])


def certificate(begins, ends):
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder().subject_name(NAME).issuer_name(NAME).public_key(key.public_key())
    builder = (
        builder.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize("year", [1999, 2026, 2049, 2050, 2120])
def test_dates_of_both_notations_are_read(year):
    begins = datetime(year, 1, 2, 3, 4, 5, tzinfo=UTC)
    ends = begins + timedelta(days=365)
    assert validity(certificate(begins, ends)) == (begins, ends)


def test_of_a_chain_it_is_the_first():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    first, second = certificate(now, now + timedelta(days=1)), certificate(now, now + timedelta(days=9))
    assert validity(f"words\n{first}{second}")[1] == now + timedelta(days=1)
    assert first_certificate(first + second) == first_certificate(first) != first_certificate(second)


@pytest.mark.parametrize("inside", ["!!", "MIIB", "MAA=", ""])
def test_what_is_no_certificate_is_said(inside):
    for text in (inside, f"-----BEGIN CERTIFICATE-----\n{inside}\n-----END CERTIFICATE-----"):
        with pytest.raises(CertificateUnreadable):
            validity(text)
