"""A client of the registry HTTP API, version 2 (Docker Registry and the OCI Distribution Specification).

Only what proves that an image is in a registry, and what keeps a registry tidy: ping, the catalogue and tags
with their pagination, manifests and their digests, and deletion. It needs nothing but `requests`, so that it
also works on a target that has Debian's python3-requests. No call prints; every fault is a `RegistryError`.

Contract: https://distribution.github.io/distribution/spec/api/ and the OCI Distribution Specification 1.1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urljoin, urlsplit

if TYPE_CHECKING:
    import requests

# Imported where a registry is asked: a tenth of a second that the modules which need none are spared.
REQUESTS_IMPORT_ERROR: str | None = None
if importlib.util.find_spec("requests") is None:  # reported by the module, with the package to install
    REQUESTS_IMPORT_ERROR = "No module named 'requests'"

#: Sent with every manifest request. For a type that is not listed a registry answers another digest, or 404.
MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
PAGE_SIZE = 100
MAX_PAGES = 10_000

_REPOSITORY = re.compile(
    r"^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$"
)
_TAG = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")
_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")
_NEXT_LINK = re.compile(r"<([^>]*)>\s*;[^,]*\brel=\"?next\"?", re.IGNORECASE)


class RegistryError(Exception):
    """A registry did not do what was asked.

    `reason` is machine-readable: invalid_url, invalid_name, plain_http_refused, unreachable, timeout, tls,
    unauthorized, forbidden, not_found, deletion_disabled, rate_limited, server_error, unexpected_answer.
    `remedy` says what to do next; `str()` gives fault and remedy in one line.
    """

    def __init__(self, reason: str, message: str, remedy: str = "", status: int | None = None) -> None:
        super().__init__(f"{message}. {remedy}".strip() if remedy else message)
        self.reason = reason
        self.message = message
        self.remedy = remedy
        self.status = status


def check_base_url(base_url: str, *, plain_http: bool) -> str:
    """Return `base_url` without its trailing slash, or raise for anything but an allowed http(s) origin."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RegistryError(
            "invalid_url",
            f"{base_url!r} is not the address of a registry",
            "Give scheme and host, for example https://registry.example:5000",
        )
    if parts.username or parts.password:
        raise RegistryError(
            "invalid_url",
            f"the registry address of {parts.hostname} carries a login",
            "Give username and password as parameters of their own: an address is logged",
        )
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise RegistryError(
            "invalid_url",
            f"{base_url!r} has a path behind the host",
            "Give only scheme, host and port: /v2/ is added here",
        )
    if parts.scheme == "http" and not plain_http:
        raise RegistryError(
            "plain_http_refused",
            f"{base_url} is plain http, and that was not allowed",
            "Use https, or set plain_http to true for a registry on loopback or in a trusted network",
        )
    return base_url.rstrip("/")


def next_page(link_header: str, current_url: str) -> str | None:
    """The address that a `Link: <…>; rel="next"` header names, absolute; None on the last page.

    The next page must lie at the same origin: a login must not follow a link to somewhere else.
    """
    match = _NEXT_LINK.search(link_header)
    if not match:
        return None
    return same_origin(current_url, urljoin(current_url, match.group(1)))


def same_origin(current_url: str, target: str) -> str:
    """The address that the registry sent us on to, if it is its own: a login goes nowhere else."""
    # Only the host and port count: registries behind a TLS proxy write http:// in their links.
    here, there = urlsplit(current_url), urlsplit(target)
    if there.netloc != here.netloc:
        raise RegistryError(
            "unexpected_answer",
            f"the registry at {here.netloc} sends on to another host, {there.netloc}",
            "Set the registry's http.host to the address by which it is reached",
        )
    return str(there._replace(scheme=here.scheme).geturl())


def is_loopback(host: str) -> bool:
    """Whether a host name can only mean this machine (a proxy must not be asked for it)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_session(base_url: str) -> requests.Session:
    """A session that asks no proxy (and no ~/.netrc) for a registry on loopback."""
    import requests

    session = requests.Session()
    if is_loopback(urlsplit(base_url).hostname or ""):
        session.trust_env = False
    return session


class RegistryClient:
    """One registry, reached with one login.

    :param base_url: scheme, host and port, e.g. ``https://registry.example:5000``.
    :param auth: (username, password) for basic authentication, or None.
    :param ca: path of a file with the certificate authorities to trust in place of the system's, or None.
    :param session: the `requests` session to use; None makes one.
    :param connect_timeout: seconds until a connection must stand.
    :param read_timeout: seconds between two bytes of an answer.
    :param plain_http: whether an ``http://`` address is allowed.
    """

    def __init__(
        self,
        base_url: str,
        auth: tuple[str, str] | None = None,
        ca: str | None = None,
        session: requests.Session | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 30.0,
        *,
        plain_http: bool = False,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.base_url = check_base_url(base_url, plain_http=plain_http)
        self._auth = auth
        # Given with each request: requests prefers REQUESTS_CA_BUNDLE to what the session says.
        self._verify: str | bool = ca or True
        self._session = session if session is not None else make_session(self.base_url)
        self._timeout = (connect_timeout, read_timeout)
        self._page_size = page_size

    def ping(self) -> None:
        """Raise unless a registry answers here and lets this login in."""
        answer = self._call("GET", f"{self.base_url}/v2/", "ask for the API version")
        # A web page at /v2/ with status 200 is not a registry.
        if "registry/2.0" not in answer.headers.get("Docker-Distribution-Api-Version", ""):
            body = answer.text.strip()
            if body not in ("", "{}"):
                raise RegistryError(
                    "unexpected_answer",
                    f"{self.base_url} answers, but not as a registry does",
                    "Check address and port",
                    answer.status_code,
                )

    def catalog(self) -> list[str]:
        """All repository names, of all pages, in the registry's order. One without tags may be among them."""
        return self._pages(f"{self.base_url}/v2/_catalog", "repositories", "list the repositories")

    def tags(self, repository: str) -> list[str]:
        """All tags of a repository; empty when it has none or does not exist."""
        url = f"{self.base_url}/v2/{self._repository(repository)}/tags/list"
        try:
            return self._pages(url, "tags", f"list the tags of {repository}")
        except RegistryError as error:
            if error.reason == "not_found":
                return []
            raise

    def manifest_digest(self, repository: str, reference: str) -> str:
        """The digest (``sha256:…``) of what a tag or digest names; `not_found` when it names nothing."""
        answer = self._manifest("HEAD", repository, reference)
        digest = answer.headers.get("Docker-Content-Digest", "")
        if not digest:  # a registry need not send it; then the digest is that of the bytes
            content = self._manifest("GET", repository, reference).content
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if not _DIGEST.match(digest):
            raise RegistryError(
                "unexpected_answer",
                f"{self.base_url} names {digest!r} as the digest of {repository}:{reference}",
            )
        return digest

    def find_digest(self, repository: str, reference: str) -> str | None:
        """Like `manifest_digest`, but None when the registry does not have it."""
        try:
            return self.manifest_digest(repository, reference)
        except RegistryError as error:
            if error.reason == "not_found":
                return None
            raise

    def manifest(self, repository: str, reference: str) -> dict[str, Any]:
        """The manifest (or index) itself, parsed."""
        return self._json(self._manifest("GET", repository, reference), f"read {repository}:{reference}")

    def labels(self, repository: str, reference: str) -> dict[str, str]:
        """The labels of an image, from its configuration in the registry. An index has none of its own."""
        action = f"read the configuration of {repository}:{reference}"
        digest = (self.manifest(repository, reference).get("config") or {}).get("digest", "")
        if not _DIGEST.match(digest):
            return {}
        answer = self._call(
            "GET", f"{self.base_url}/v2/{self._repository(repository)}/blobs/{digest}", action
        )
        return dict((self._json(answer, action).get("config") or {}).get("Labels") or {})

    def add_tag(self, repository: str, digest: str, tag: str) -> None:
        """Let `tag` name the manifest `digest` that the registry already has, and check that it does."""
        manifest = self._manifest("GET", repository, digest)
        content_type = manifest.headers.get("Content-Type", "").partition(";")[0]
        self._manifest("PUT", repository, tag, body=manifest.content, content_type=content_type)
        found = self.manifest_digest(repository, tag)
        if found != digest:
            raise RegistryError(
                "unexpected_answer", f"{repository}:{tag} is {found} after it was set to {digest}"
            )

    def stored_manifest(self, repository: str, reference: str) -> tuple[bytes, str]:
        """A manifest as the registry keeps it: its bytes, which its digest is made of, and its media type."""
        answer = self._manifest("GET", repository, reference)
        return answer.content, answer.headers.get("Content-Type", "").partition(";")[0]

    def put_manifest(self, repository: str, reference: str, content: bytes, media_type: str) -> str:
        """Put a manifest under a tag or under its own digest; return its digest."""
        self._manifest("PUT", repository, reference, body=content, content_type=media_type)
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    def blob(self, repository: str, digest: str) -> bytes:
        """A blob, whole, proven by its digest. Meant for documents, not for layers."""
        if not _DIGEST.match(digest):
            raise RegistryError("invalid_name", f"{digest!r} is not a digest")
        url = f"{self.base_url}/v2/{self._repository(repository)}/blobs/{digest}"
        content: bytes = self._call("GET", url, f"read a blob of {repository}").content
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            raise RegistryError("unexpected_answer", f"{self.base_url} gave other bytes than {digest}")
        return content

    def put_blob(self, repository: str, content: bytes) -> str:
        """Put a blob, unless it is there; return its digest."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        place = f"{self.base_url}/v2/{self._repository(repository)}/blobs"
        action = f"put a blob into {repository}"
        try:
            self._call("HEAD", f"{place}/{digest}", action)
        except RegistryError as error:
            if error.reason != "not_found":
                raise
            started = self._call("POST", f"{place}/uploads/", action)
            target = same_origin(
                self.base_url, urljoin(f"{place}/uploads/", started.headers.get("Location", ""))
            )
            separator = "&" if "?" in target else "?"
            headers = {"Content-Type": "application/octet-stream"}
            self._call("PUT", f"{target}{separator}{urlencode({'digest': digest})}", action, headers, content)
        return digest

    def delete_manifest(self, repository: str, digest: str) -> bool:
        """Remove a manifest and all tags on it. True when it was there, False when it was gone already."""
        if not _DIGEST.match(digest):
            raise RegistryError(
                "invalid_name", f"{digest!r} is not a digest", "Deletion takes sha256:<64 hex>"
            )
        try:
            self._manifest("DELETE", repository, digest)
        except RegistryError as error:
            if error.reason == "not_found":
                return False
            raise
        return True

    def _manifest(
        self, method: str, repository: str, reference: str, body: bytes | None = None, content_type: str = ""
    ) -> requests.Response:
        if not (_TAG.match(reference) or _DIGEST.match(reference)):
            raise RegistryError("invalid_name", f"{reference!r} is neither a tag nor a digest")
        url = f"{self.base_url}/v2/{self._repository(repository)}/manifests/{reference}"
        what = {"HEAD": "look for", "GET": "read", "DELETE": "delete", "PUT": "set"}[method]
        separator = "@" if reference.startswith("sha256:") else ":"
        return self._call(
            method,
            url,
            f"{what} {repository}{separator}{reference}",
            headers={"Content-Type": content_type}
            if body is not None
            else {"Accept": ", ".join(MANIFEST_TYPES)},
            body=body,
        )

    @staticmethod
    def _repository(name: str) -> str:
        if not _REPOSITORY.match(name):
            raise RegistryError(
                "invalid_name",
                f"{name!r} is not a repository name",
                "Give it in lower case and without the registry's host, for example aisha/bot",
            )
        return name

    def _pages(self, url: str, key: str, action: str) -> list[str]:
        found: dict[str, None] = {}
        page: str | None = f"{url}?n={self._page_size}"
        seen: set[str] = set()
        while page is not None:
            if page in seen or len(seen) >= MAX_PAGES:
                raise RegistryError("unexpected_answer", f"{self.base_url} never ends its list of {key}")
            seen.add(page)
            answer = self._call("GET", page, action)
            names = self._json(answer, action).get(key) or []  # "tags": null is an empty repository
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise RegistryError("unexpected_answer", f"{self.base_url} gave no list of {key}")
            found.update(dict.fromkeys(names))
            page = next_page(answer.headers.get("Link", ""), page)
        return list(found)

    def _json(self, answer: requests.Response, action: str) -> dict[str, Any]:
        try:
            body = answer.json()
        except ValueError as error:
            raise RegistryError(
                "unexpected_answer",
                f"{self.base_url} answered no JSON to '{action}'",
                "Check that a registry, and not a web server or a proxy, listens there",
            ) from error
        if not isinstance(body, dict):
            raise RegistryError("unexpected_answer", f"{self.base_url} answered no JSON object to '{action}'")
        return body

    def _call(
        self,
        method: str,
        url: str,
        action: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> requests.Response:
        try:
            answer = self._session.request(
                method,
                url,
                headers=dict(headers or {}),
                data=body,
                auth=self._auth,
                verify=self._verify,
                timeout=self._timeout,
                # A redirect could lead to plain http or another host; nothing asked for here needs one.
                allow_redirects=False,
            )
        except OSError as error:  # every fault of requests is one; so is a CA file that is not there
            raise transport_error(self.base_url, action, error) from error
        if 200 <= answer.status_code < 300:
            return answer
        raise answer_error(self.base_url, action, method, answer)


def transport_error(base_url: str, action: str, error: Exception) -> RegistryError:
    """The `RegistryError` for a call that got no answer."""
    import requests

    text = _innermost(error)
    if isinstance(error, requests.exceptions.SSLError):
        speaks_http = "WRONG_VERSION_NUMBER" in text or "wrong version number" in text
        remedy = (
            "It speaks plain http on this port: use http:// together with plain_http where that is wanted"
            if speaks_http
            else "Give the authority that signed its certificate as 'ca'; use a name that its certificate has"
        )
        return RegistryError("tls", f"cannot {action}: TLS with {base_url} failed ({text})", remedy)
    if isinstance(error, requests.exceptions.Timeout):
        return RegistryError(
            "timeout",
            f"cannot {action}: {base_url} did not answer in time",
            "Check the registry's load and log, and that no firewall drops the packets",
        )
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return RegistryError(
            "tls",
            f"cannot {action}: the certificate authorities for {base_url} cannot be read ({text})",
            "Give in 'ca' the path of a readable PEM file on the host where the module runs",
        )
    return RegistryError(
        "unreachable",
        f"cannot {action}: no registry answers at {base_url} ({text})",
        "Check that it runs, and that address and port are right and open from this host",
    )


def answer_error(base_url: str, action: str, method: str, answer: requests.Response) -> RegistryError:
    """The `RegistryError` for an answer that is not 2xx. One place maps statuses to reasons and remedies."""
    status = answer.status_code
    detail = _detail(answer)
    if status == 400 and "HTTP request to an HTTPS server" in answer.text:
        return RegistryError("tls", f"cannot {action}: {base_url} wants TLS", "Use https:// for it", status)
    if status == 404 and answer.url.rstrip("/").endswith("/v2"):
        return RegistryError(
            "unexpected_answer",
            f"cannot {action}: what answers at {base_url} is no registry (HTTP 404 to /v2/)",
            "Check address and port, and whether a proxy answers in its place (no_proxy)",
            status,
        )
    reason, remedy = {
        401: ("unauthorized", _login_remedy(answer)),
        403: ("forbidden", "Give this user the right to do so in the registry"),
        404: (
            "not_found",
            "Push it first, and give its name exactly as it was pushed, without the registry's host",
        ),
        429: ("rate_limited", "Wait, or sign in with an account that has a higher limit"),
    }.get(status, ("", ""))
    if status in (405, 400) and method == "DELETE" and "UNSUPPORTED" in (detail or "UNSUPPORTED"):
        reason, remedy = (
            "deletion_disabled",
            "Set storage.delete.enabled to true in the registry's configuration",
        )
    elif status >= 500:
        reason, remedy = "server_error", "Look at the registry's log and the free space of its disk"
    elif not reason:
        reason, remedy = "unexpected_answer", "Check that a registry listens at this address"
    suffix = f": {detail}" if detail else ""
    return RegistryError(
        reason, f"cannot {action}: {base_url} answered HTTP {status}{suffix}", remedy, status
    )


def _login_remedy(answer: requests.Response) -> str:
    if answer.headers.get("WWW-Authenticate", "").lower().startswith("bearer"):
        return "This registry wants token authentication; give it basic authentication (htpasswd)"
    return "Give the right username and password (htpasswd needs bcrypt)"


def _detail(answer: requests.Response) -> str:
    """What the registry itself says about the fault (``CODE message``, bounded), or nothing."""
    try:
        errors = answer.json()["errors"]
        return "; ".join(f"{item.get('code', '')} {item.get('message', '')}".strip() for item in errors)[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _innermost(error: BaseException) -> str:
    """The cause at the bottom, without the names of the layers around it."""
    for attribute in ("reason", "__cause__", "__context__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _innermost(inner)
    for argument in getattr(error, "args", ()):
        if isinstance(argument, BaseException):
            return _innermost(argument)
    text = str(error) or type(error).__name__
    return re.sub(r"<[^>]*object at 0x[0-9a-f]+>:?\s*", "", text)[:300]
