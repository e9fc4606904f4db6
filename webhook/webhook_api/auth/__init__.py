"""Who sent a delivery: one verifier a scheme, all fail closed, one exception type."""

from __future__ import annotations

from webhook_api.auth.accounts import Accounts, LearnedFile
from webhook_api.auth.errors import AuthError
from webhook_api.auth.fal import FalVerifier
from webhook_api.auth.keys import KeyStore
from webhook_api.auth.model import Claims, Headers, Verified, Verifier
from webhook_api.auth.scheme import Authenticator
from webhook_api.auth.secret import SecretVerifier
from webhook_api.auth.standard import StandardVerifier

__all__ = [
    "Accounts",
    "AuthError",
    "Authenticator",
    "Claims",
    "FalVerifier",
    "Headers",
    "KeyStore",
    "LearnedFile",
    "SecretVerifier",
    "StandardVerifier",
    "Verified",
    "Verifier",
]
