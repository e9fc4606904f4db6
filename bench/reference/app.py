"""The reference of ``bench.intake``: the same intake, written as most would, on FastAPI, uvicorn and asyncpg.

It does what the service does and no less: strict headers, Ed25519 by PyNaCl over the raw body, ±300 s, the account,
one parse of the JSON, one row whose constraint removes duplicates, and the commit before the 200. It stores what the
service stores, into the same table with the same indexes and the same trigger. It has no metrics, no log line a
delivery, no guards of the parser and no care for overload: what it leaves out makes it faster, never slower.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI, HTTPException, Request
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

KEY = VerifyKey(bytes.fromhex(os.environ["REFERENCE_PUBLIC_KEY"]))
ACCOUNT = os.environ["REFERENCE_ACCOUNT"]
LIMIT = 10 * 1024 * 1024
PATTERNS = {
    "x-fal-webhook-request-id": re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}"),
    "x-fal-webhook-user-id": re.compile(r"[A-Za-z0-9][A-Za-z0-9._:|@+-]{0,199}"),
    "x-fal-webhook-timestamp": re.compile(r"[1-9][0-9]{0,11}"),
    "x-fal-webhook-signature": re.compile(r"[0-9a-fA-F]{128}"),
}
STATUS = {"OK": "completed", "ERROR": "failed"}
INSERT = """
insert into webhook.deliveries as d (
    source, request_id, dedup_key, status, gateway_request_id, account_id, body, body_sha256, headers)
values ('fal', $1, $2, $3, $4, $5, $6, $7, $8::jsonb)
on conflict on constraint deliveries_identity do update
    set attempts = d.attempts + 1, last_seen_at = greatest(d.last_seen_at, now())
returning d.id, d.xmax = 0 as created
"""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool for as long as the process serves."""
    async with asyncpg.create_pool(os.environ["REFERENCE_DATABASE_URL"], min_size=16, max_size=16) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/api/v1/avatar/status_update")
async def status_update(request: Request) -> dict[str, Any]:
    """Take a delivery; 200 means that it is committed."""
    headers = {name: request.headers.get(name, "") for name in PATTERNS}
    if not all(pattern.fullmatch(headers[name]) for name, pattern in PATTERNS.items()):
        raise HTTPException(401, "headers")
    body = await request.body()
    if len(body) > LIMIT:
        raise HTTPException(413, "too large")
    request_id, account, timestamp, signature = headers.values()
    sha256 = hashlib.sha256(body).hexdigest()
    try:
        KEY.verify(f"{request_id}\n{account}\n{timestamp}\n{sha256}".encode(), bytes.fromhex(signature))
    except BadSignatureError:
        raise HTTPException(401, "signature") from None
    if abs(time.time() - int(timestamp)) > 300 or account != ACCOUNT:
        raise HTTPException(401, "stale or another account")
    document = json.loads(body)
    status = STATUS[document["status"]]
    row = await app.state.pool.fetchrow(
        INSERT,
        document["request_id"],
        f"{status}:{sha256[:32]}",
        status,
        document.get("gateway_request_id"),
        account,
        body,
        sha256,
        json.dumps(headers),
    )
    return {
        "status": "received",
        "request_id": document["request_id"],
        "message": "the delivery is stored",
        "delivery_id": row["id"],
        "duplicate": not row["created"],
    }
