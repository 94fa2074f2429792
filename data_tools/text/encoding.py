"""Encoding: the bytes of a text in any common encoding -> text."""

from __future__ import annotations

import re


def decode_text(data: bytes) -> str:
    """Decode UTF-8, UTF-16 with a byte order mark, the declared character set, or the Windows code page. Never raises."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        declared = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", data[:4096], re.I)
    name = declared[1].decode("ascii", "replace").lower() if declared else ""
    if name in ("", "us-ascii", "ascii", "iso-8859-1", "latin1", "latin-1"):
        name = "cp1252"  # as browsers do
    try:
        return data.decode(name, "replace")
    except (LookupError, UnicodeError):  # an unknown name; a codec without "replace"
        return data.decode("cp1252", "replace")
