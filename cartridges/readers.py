"""Reads text from the user's files: plain text, Markdown, source, HTML, PDF, notebooks.

`read_file` reads a file that the user named and raises a one-line `UserError` for any fault.
`walk` reads a folder, skips files without text and counts them, so that the caller can report them.
Long plain text is read block by block; HTML, PDF and notebooks are read as a whole.
"""

import codecs
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cartridges.documents import LONGEST_CHARACTERS, stretches
from cartridges.errors import UserError
from cartridges.records import Document

HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
TEXT_SUFFIXES = {".txt", ".md", ".markdown", ".rst", ".tex", ".csv", ".tsv", ".log", ".org"}
CODE_SUFFIXES = {".py", ".js", ".ts", ".tsx", ".jsx", ".java", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs",
                 ".go", ".rs", ".rb", ".php", ".swift", ".kt", ".scala", ".sh", ".sql", ".r", ".jl",
                 ".lua", ".pl", ".yaml", ".yml", ".toml", ".ini", ".json"}
PROBE_BYTES = 8192
ROW_SUFFIXES = {".jsonl", ".ndjson"}
BLOCK_BYTES = 2**20
FILES_NAMED = 8
PDF = b"%PDF-"
BOM = "\ufeff"


class NotUtf8(UserError):
    """A file that was meant to be read; in a folder all of them are named together."""


class NoText(UserError):
    """The file has no readable text (binary, damaged, or a scan); in a folder it is skipped."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_file(path: Path, source: str | None = None) -> Iterator[Document]:
    """One file as a document, or several if it is long. `document_id` is the SHA-256 (32 hex digits) of the file's
    bytes, or for a part of a long file of its number and text.

    Raises `UserError` (`NoText` if the file is binary, damaged or without a text layer).
    """
    source = source or str(path)
    try:
        if path.stat().st_size > LONGEST_CHARACTERS and _is_plain(path):
            yield from split(_blocks(path), source)
        else:
            data = path.read_bytes()
            text = _extract(data, path)
            check_unicode(text, str(path))
            if len(text) > LONGEST_CHARACTERS:
                yield from split([text], source)
            else:
                yield Document(hash_bytes(data), source, text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def split(blocks: Iterable[str], source: str) -> Iterator[Document]:
    """A long text as several documents of one source. Their ids include a number, as parts may be identical."""
    for number, text in enumerate(stretches(blocks)):
        if text.strip():
            yield Document(hash_bytes(f"{number}\n{text}".encode()), source, text)


def walk(root: Path, skipped: Counter) -> Iterator[Document]:
    """Every readable text below `root` in sorted order. Skipped files are counted in `skipped` by reason.

    Hidden files, files ignored by the .gitignore files in `root` and below, broken links and special files
    are omitted without a count; in a Git repository also what the .gitignore files above `root` and
    `.git/info/exclude` ignore. Files with a text or source suffix that are not UTF-8 raise one `UserError` at the
    end, since they were meant to be read.
    """
    seen: set[str] = set()
    unreadable: list[NotUtf8] = []
    for path in _files(root):
        without = "empty"
        try:
            for document in read_file(path, source=path.relative_to(root).as_posix()):
                if not document.text.strip():
                    continue
                if document.document_id in seen:
                    without = without and "duplicate"
                    continue
                without = ""
                seen.add(document.document_id)
                yield document
        except NoText as error:
            without = error.kind
        except NotUtf8 as error:
            unreadable.append(error)
            continue
        if without:
            skipped[without] += 1
    if unreadable:
        raise unreadable[0] if len(unreadable) == 1 else _several(unreadable, root)


def _several(unreadable: list[NotUtf8], root: Path) -> UserError:
    names = [str(error).partition(" is not UTF-8")[0].partition(" is UTF-16")[0] for error in unreadable]
    more = f" and {len(names) - FILES_NAMED} more" if len(names) > FILES_NAMED else ""
    return UserError(f"{len(names)} files in {root} are not UTF-8 text; convert them, or name them in a .gitignore "
                     f"there: {', '.join(names[:FILES_NAMED])}{more}. The first: {unreadable[0]}")


def decode(data: bytes, path: Path) -> str:
    """UTF-8 text with `\\n` line ends. A `UserError` names the file, the byte and the remedy."""
    try:
        text = data.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def not_utf8(path: Path, byte: int) -> NotUtf8:
    return NotUtf8(f"{path} is not UTF-8 text (byte {byte} cannot be decoded); convert it, "
                   f"for example: iconv -f LATIN1 -t UTF-8 '{path.name}'")


def check_unicode(text: str, place: str) -> None:
    """Raise `UserError` for half of a surrogate pair, which JSON can represent and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: half of a surrogate pair at character {error.start}; "
                        "write the file again as UTF-8") from None


def _is_plain(path: Path) -> bool:
    """Whether the file is plain text, by its suffix and its first bytes."""
    if path.suffix.lower() not in TEXT_SUFFIXES | CODE_SUFFIXES:
        return False
    with path.open("rb") as file:
        start = file.read(PROBE_BYTES)
    if start.startswith(PDF):
        return False
    _check_plain(start, path)
    return True


def _blocks(path: Path) -> Iterator[str]:
    """The file's text as by `decode`, one block at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    at, begun, data = 0, False, b"more"
    with path.open("rb") as file:
        while data:
            data, waiting = file.read(BLOCK_BYTES), len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(path, at - waiting + error.start) from None
            yield lines.decode(text if begun else text.removeprefix(BOM), final=not data)
            at, begun = at + len(data), begun or bool(text)


def hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _extract(data: bytes, path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".pdf" or data.startswith(PDF):
        return _pdf_text(data, path)
    _check_plain(data[:PROBE_BYTES], path)
    if suffix not in TEXT_SUFFIXES | CODE_SUFFIXES | HTML_SUFFIXES | {".ipynb"}:
        text = _decode_unknown(data, path)
        return _rows_text(text) if suffix in ROW_SUFFIXES else text
    text = decode(data, path)
    if suffix in HTML_SUFFIXES:
        return _html_text(text)
    return _notebook_text(text, path) if suffix == ".ipynb" else text


def _check_plain(start: bytes, path: Path) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise NotUtf8(f"{path} is UTF-16, not UTF-8 text; convert it: iconv -f UTF-16 -t UTF-8 "
                      f"'{path.name}'")
    if b"\0" in start:
        raise NoText("binary", f"{path} is a binary file; a corpus is text, Markdown, HTML, PDF, source "
                               "code, a notebook or a JSONL")


def _rows_text(text: str) -> str:
    """The `text` of the rows of a JSONL in a folder; as it stands where not all rows have one."""
    try:
        found = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text
    return "\n\n".join(found) if all(isinstance(one, str) for one in found) else text


def _decode_unknown(data: bytes, path: Path) -> str:
    try:
        return decode(data, path)
    except UserError as error:
        raise NoText("not UTF-8", str(error)) from None


def _pdf_text(data: bytes, path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        pages = [page.extract_text().strip() for page in reader.pages]
    except (PyPdfError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoText("damaged PDF", f"{path} is not a readable PDF ({reason})") from None
    text = "\n\n".join(page for page in pages if page)
    if not text:
        raise NoText("PDF without text", f"{path} has no text layer (a scan?); run OCR on it first")
    return text


def _html_text(html: str) -> str:
    """Visible text. Block elements become paragraphs, headings Markdown headings, and table rows lines."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for element in soup(["script", "style", "template", "noscript", "head"]):
        element.decompose()
    for heading in soup(["h1", "h2", "h3", "h4", "h5", "h6"]):
        heading.insert_before("\n\n" + "#" * int(heading.name[1]) + " ")
        heading.insert_after("\n\n")
    for cell in soup(["td", "th"]):
        cell.insert_before(" | ")
    for block in soup(["p", "div", "section", "article", "ul", "ol", "table", "pre", "blockquote"]):
        block.insert_before("\n\n")
        block.insert_after("\n\n")
    for line in soup(["br", "li", "tr"]):
        line.insert_before("\n")
    text = re.sub(r"[ \t]+", " ", soup.get_text())
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r" *\n *", "\n", text)).strip()


def _notebook_text(text: str, path: Path) -> str:
    """Markdown and source cells in order, without outputs, which are rarely prose."""
    try:
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]).strip() for cell in cells).strip()
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NoText("damaged notebook", f"{path} is not a Jupyter notebook of format 4; save it again "
                                         "with a current Jupyter") from None


def _files(root: Path) -> Iterator[Path]:
    """All files, sorted and depth first, so that the corpus has the same order on every machine."""
    real = root.resolve()
    top, rules = _rules_above(real)
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        known = real / here.relative_to(root)
        if ".gitignore" in names:
            rules[known] = _read_gitignore(here / ".gitignore") + rules.get(known, [])
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")
                               and not _ignored(known / name, top, rules, is_folder=True))
        for name in sorted(names):
            path = here / name
            if not name.startswith(".") and path.is_file() and not _ignored(known / name, top, rules):
                yield path


Rules = dict[Path, list[Any]]
"""By folder, what its .gitignore says; behind it at the top of a repository, what `.git/info/exclude` says."""


def _rules_above(root: Path) -> tuple[Path, Rules]:
    """The top of the Git repository that `root` is in, or `root`, and the rules from there down to it. None of them
    where they ignore `root` itself: it was asked for."""
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), root)
    rules: Rules = {}
    for folder in root.parents:
        if folder.is_relative_to(top) and (folder / ".gitignore").is_file():
            rules[folder] = _read_gitignore(folder / ".gitignore")
    if (top / ".git" / "info" / "exclude").is_file():
        rules[top] = rules.get(top, []) + _read_gitignore(top / ".git" / "info" / "exclude")
    between = [folder for folder in (root, *root.parents) if folder != top and folder.is_relative_to(top)]
    asked_for = any(_ignored(folder, top, rules, is_folder=True) for folder in between)
    return (root, {}) if asked_for else (top, rules)


def _read_gitignore(path: Path) -> list[Any]:
    from pathspec import GitIgnoreSpec

    return [GitIgnoreSpec.from_lines(decode(path.read_bytes(), path).splitlines())]


def _ignored(path: Path, top: Path, rules: Rules, is_folder: bool = False) -> bool:
    """git's rule: the deepest .gitignore with a matching pattern decides."""
    for parent in path.parents:
        for spec in rules.get(parent, ()):
            relative = path.relative_to(parent).as_posix() + ("/" if is_folder else "")
            verdict = spec.check_file(relative).include
            if verdict is not None:
                return verdict
        if parent == top:
            return False
    return False
