"""The web page at `/`: files of this package, nothing from elsewhere."""

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

FOLDER = Path(str(files("workflows") / "serving" / "web"))


def add_page(app: FastAPI) -> None:
    """Serve the page and its files. The browser may run and load only what comes from here."""
    page = (FOLDER / "index.html").read_text()
    headers = {"Content-Security-Policy": content_policy(page), "Referrer-Policy": "no-referrer",
               "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def index():
        return HTMLResponse(page, headers=headers)

    app.mount("/web", StaticFiles(directory=FOLDER), name="web")


def content_policy(page: str) -> str:
    """No scripts but our files and the import map that is written into `page`."""
    inline = re.search(r'<script type="importmap">(.*?)</script>', page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
