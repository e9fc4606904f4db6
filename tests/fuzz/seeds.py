"""The corpus' first inputs: every shape of body, each way of sending it. `python -m tests.fuzz.seeds` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).parent / "corpus"
BODIES: Final[dict[str, bytes]] = {
    "portrait": json.dumps(
        {
            "request_id": "r", "gateway_request_id": "g", "status": "OK",
            "payload": {"diffusers_lora_file": {"url": "https://v3.fal.media/a"}, "seed": 2**63},
        }
    ).encode(),
    "null_payload": b'{"request_id":"r","status":"OK","payload":null,"payload_error":"x"}',
    "error": b'{"request_id":"r","status":"ERROR","error":"e","payload":{"detail":[{"loc":["body"],"msg":"m"}]}}',
    "old": b'{"status":"IN_PROGRESS","finetune_id":"f","progress":7,"comment":"user_id=1;avatar_id=a"}',
    "nan": b'{"request_id":"r","status":"OK","payload":NaN}',
    "nul": b'{"request_id":"r\\u0000","status":"OK"}',
    "surrogate": b'{"request_id":"r","status":"OK","error":"\\ud800"}',
    "doubled": b'{"request_id":"r","request_id":"s","status":"OK"}',
    "deep": b"[" * 3000,
    "digits": b'{"request_id":"r","status":"OK","payload":' + b"9" * 5000 + b"}",
    "bom": b'\xef\xbb\xbf{"request_id":"r","status":"OK"}',
    "not_utf8": b'{"request_id":"\xff","status":"OK"}',
    "kelvin": '{"request_id":"r","status":"O\u212a"}'.encode(),
    "empty": b"",
    "number": b"1e400",
}  # fmt: skip
HEADERS: Final[dict[str, bytes]] = {
    "plain": b"Content-Type: application/json\n\n",
    "gzip": b"Content-Encoding: gzip\n\n",
    "loose": b"X-Fal-Webhook-Timestamp:  17\nX-Fal-Webhook-Signature: zz\n\n",
    "length": b"Content-Length: 1_0\n\n",
}


def main() -> None:
    """Write the seeds."""
    CORPUS.mkdir(exist_ok=True)
    for name, body in BODIES.items():
        for mode in range(5):
            (CORPUS / f"{name}-{mode}").write_bytes(bytes([mode, 0]) + HEADERS["plain"] + body)
            (CORPUS / f"{name}-served-{mode}").write_bytes(bytes([mode, 8]) + HEADERS["plain"] + body)
    for name, lines in HEADERS.items():
        for how in (0, 1, 2, 3, 8, 12, 10, 16, 24, 28, 6 << 5, 7 << 5, 8 | 6 << 5, 8 | 7 << 5):
            (CORPUS / f"{name}-how{how}").write_bytes(bytes([1, how]) + lines + BODIES["portrait"])


if __name__ == "__main__":
    main()
