"""Data inside an HTML page: gzip in base64 in a script element that the page's own script reads by its id."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any


def data_element(name: str, raw: bytes) -> bytes:
    """The element that holds `raw`; safe whatever the bytes are, as base64 has no `<`."""
    packed = base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0))
    return b'<script type="text/plain" id="%s">%s</script>\n' % (name.encode("ascii"), packed)


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8. Half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
